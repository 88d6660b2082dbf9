"""Partitioners: whole, balanced, within bounds of the optimum, and the same compiled or not."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.balancing import partition as module
from lightning_gr.balancing.partition import Method, imbalance, micro_batches, micro_step_count, partition
from lightning_gr.balancing.partition_reference import deal

METHODS = get_args(Method)
COSTS = st.one_of(
    st.lists(st.integers(0, 50), max_size=30).map(lambda x: np.array(x, dtype=np.int64)),
    st.lists(st.floats(0, 1e15, allow_subnormal=False), max_size=30).map(lambda x: np.array(x, dtype=np.float64)),
)


def sums(costs: Any, parts: list[Any]) -> list[float]:
    return [sum(costs[i] for i in part.tolist()) for part in parts]


def optimum(costs: list[int], num_parts: int) -> int:
    """The least that the costliest part can cost, by trying all deals."""
    return min(
        max(sum(c for c, p in zip(costs, deal_, strict=True) if p == part) for part in range(num_parts))
        for deal_ in itertools.product(range(num_parts), repeat=len(costs))
    )


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(COSTS, st.integers(1, 9))
def test_each_sample_once(method: Method, costs: Any, num_parts: int) -> None:
    parts = partition(costs, num_parts, method=method)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    for part in parts:
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize("method", ["lpt", "karmarkar_karp"])
@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_parts_differ_by_the_costliest_sample_at_most(method: Method, costs: list[int], num_parts: int) -> None:
    loads = sums(costs, partition(np.array(costs, dtype=np.int64), num_parts, method=method))
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize("method", ["lpt", "karmarkar_karp"])
@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_within_grahams_bound_of_the_optimum(method: Method, costs: list[int], num_parts: int) -> None:
    parts = partition(np.array(costs), num_parts, method=method)
    assert max(sums(costs, parts)) <= optimum(costs, num_parts) * (4 / 3 - 1 / (3 * num_parts)) + 1e-9


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_ties_go_to_the_earlier_sample_and_the_lower_part(dtype: type) -> None:
    parts = partition(np.array([2, 3, 2, 3, 2, 2, 2], dtype=dtype), 3)
    assert [part.tolist() for part in parts] == [[1, 4], [3, 5], [0, 2, 6]]


def test_known_cases() -> None:
    # Longest processing time alone gives 7 and 5, and so does differencing; a swap makes 6 and 6 of it.
    costs = np.array([3, 3, 2, 2, 2])
    for method in ("lpt", "karmarkar_karp"):
        assert sorted(sums(costs, partition(costs, 2, method=method))) == [6, 6]
    # With equal counts one of the two parts has three samples.
    assert sorted(len(part) for part in partition(np.array([9, 1, 1, 1, 1]), 2, method="zigzag")) == [2, 3]
    assert [part.tolist() for part in partition(np.ones(5), 3, method="contiguous")] == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize("method", ["lpt", "karmarkar_karp", "zigzag"])
def test_samples_without_cost_are_spread_too(method: Method) -> None:
    assert [len(part) for part in partition(np.zeros(12), 4, method=method)] == [3, 3, 3, 3]


@pytest.mark.parametrize("method", ["zigzag", "contiguous"])
@settings(deadline=None)
@given(COSTS, st.integers(1, 9))
def test_equal_counts(method: Method, costs: Any, num_parts: int) -> None:
    counts = [len(part) for part in partition(costs, num_parts, method=method)]
    assert max(counts) - min(counts) <= 1


def test_contiguous_parts_are_consecutive() -> None:
    parts = partition(np.random.default_rng(0).random(50), 7, method="contiguous")
    assert np.concatenate(parts).tolist() == list(range(50))


@pytest.mark.parametrize("method", METHODS)
def test_balance_of_heavy_tailed_lengths(method: Method) -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.9, 1, 512), 2048)
    found = imbalance(lengths, partition(lengths, 64, method=method))
    assert found > 0.3 if method == "contiguous" else found < 0.01


@pytest.mark.parametrize("method", ["lpt", "karmarkar_karp", "zigzag"])
@settings(deadline=None, max_examples=300)
@given(COSTS, st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 60))
def test_compiled_is_the_reference(method: Method, costs: Any, num_parts: int, seed: int, capacity: int) -> None:
    if module._library() is None:
        pytest.skip("no C++ compiler")
    limited = method == "lpt" and seed % 2
    sizes = np.random.default_rng(seed).integers(0, 20, len(costs)) if limited else None
    settings_: dict[str, Any] = {
        "method": method,
        "sizes_N": sizes,
        "capacity": capacity if limited else module._NO_LIMIT,
    }
    ours = [part.tolist() for part in module._deal(costs, num_parts, **settings_)]
    assert ours == [part.tolist() for part in deal(costs, num_parts, **settings_)]


@pytest.mark.parametrize("method", ["lpt", "karmarkar_karp", "zigzag"])
@pytest.mark.parametrize(("num_samples", "num_parts"), [(300, 12), (300, 200), (100, 300)])
def test_compiled_is_the_reference_at_larger_sizes(method: Method, num_samples: int, num_parts: int) -> None:
    if module._library() is None:
        pytest.skip("no C++ compiler")
    for seed in range(3):
        costs = np.random.default_rng(seed).lognormal(6, 1, num_samples)
        settings_: dict[str, Any] = {"method": method, "sizes_N": None, "capacity": module._NO_LIMIT}
        ours = [part.tolist() for part in module._deal(costs, num_parts, **settings_)]
        assert ours == [part.tolist() for part in deal(costs, num_parts, **settings_)]


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = np.random.default_rng(0).random(40)
    expected = [part.tolist() for part in partition(costs, 5)]
    monkeypatch.setattr(module, "_library", lambda: None)
    assert [part.tolist() for part in partition(costs, 5)] == expected
    with pytest.raises(ValueError, match=r"costs: expected finite"):
        partition(np.array([-1.0]), 2)


SIZED = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 12)), max_size=30)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(SIZED, st.integers(1, 6), st.integers(1, 80))
def test_no_part_exceeds_the_capacity_while_another_has_room(
    method: Method, sized: list[tuple[int, int]], num_parts: int, capacity: int
) -> None:
    costs = np.array([cost for cost, _ in sized], dtype=np.float64)
    sizes = np.array([size for _, size in sized], dtype=np.int64)
    parts = partition(costs, num_parts, method=method, sizes=sizes, capacity=capacity)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sized)))
    filled = sums(sizes, parts)
    if max(filled) > capacity:
        # Some sample found no room anywhere: even now none would fit into the emptiest part.
        assert min(filled) + int(sizes.max()) > capacity


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(SIZED.filter(bool), st.integers(1, 9), st.integers(0, 40))
def test_as_many_micro_steps_as_counted_keep_within_the_capacity(
    method: Method, sized: list[tuple[int, int]], world_size: int, above: int
) -> None:
    costs = np.array([cost for cost, _ in sized], dtype=np.float64)
    sizes = np.array([size for _, size in sized], dtype=np.int64)
    longest, total = int(sizes.max()), int(sizes.sum())
    limit = longest + above
    steps = micro_step_count(total, longest, world_size=world_size, tokens_per_rank=limit)
    dealt = micro_batches(costs, world_size=world_size, steps=steps, method=method, sizes=sizes, capacity=limit)
    assert max(max(sums(sizes, step)) for step in dealt) <= limit
    assert (steps - 1) * world_size * limit < 2 * total  # no more than twice as many as if samples could be cut


def test_capacity_yields_to_nothing_but_lack_of_room() -> None:
    # By cost the six cheap samples would share a part.
    costs, sizes = np.array([100.0, 1, 1, 1, 1, 1, 1]), np.array([1, 2, 2, 2, 2, 2, 2])
    assert max(sums(sizes, partition(costs, 2))) > 8
    for method in METHODS:
        assert max(sums(sizes, partition(costs, 2, method=method, sizes=sizes, capacity=8))) <= 8
    # By cost the last, largest sample would find the others in both parts.
    costs, sizes = np.array([100.0, 10, 10, 1]), np.array([1, 4, 4, 10])
    for method in METHODS:
        parts = partition(costs, 2, method=method, sizes=sizes, capacity=10)
        assert sorted(part.tolist() for part in parts) == [[0, 1, 2], [3]]


@settings(deadline=None)
@given(COSTS, st.integers(1, 9), st.integers(1, 5), st.sampled_from(METHODS))
def test_micro_batches_hold_each_sample_once(costs: Any, world_size: int, steps: int, method: Method) -> None:
    dealt = micro_batches(costs, world_size=world_size, steps=steps, method=method)
    assert [len(step) for step in dealt] == [world_size] * steps
    parts = [part for step in dealt for part in step]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    loads = [sums(costs, step) for step in dealt]
    for step, following in itertools.pairwise(loads):
        assert min(step) >= max(following) * (1 - 1e-9)  # parts of like cost share a step


def test_each_micro_step_is_balanced_and_so_are_the_ranks() -> None:
    # One sample of ten times the mean: its step waits for it, the others do not.
    lengths = np.concatenate([[6000.0], np.random.default_rng(0).integers(300, 900, 191)])
    dealt = micro_batches(lengths, world_size=8, steps=4, method="karmarkar_karp")
    assert all(imbalance(lengths, step) < 0.01 for step in dealt[1:])
    # Ranks turn round, so that none has the costlier part of every step.
    assert [
        [part.tolist() for part in step] for step in micro_batches(np.array([4, 3, 2, 1]), world_size=2, steps=2)
    ] == [
        [[0], [1]],
        [[3], [2]],
    ]


def test_imbalance_is_the_wait_of_the_mean_rank() -> None:
    parts = [np.array([0, 1]), np.array([2]), np.array([], dtype=np.int64)]
    assert imbalance(np.array([3, 5, 4]), parts) == (8 - 4) / 8
    assert imbalance(np.zeros(3), parts) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, r"^method='best': expected one of lpt, karmarkar_karp, zigzag, contiguous"),
        ({"num_parts": 0}, r"^num_parts=0"),
        ({"costs": np.array([1.0, -2.0])}, r"^costs: expected finite numbers >= 0, got -2.0 \.\.\. 1.0"),
        ({"costs": np.array([1.0, np.nan])}, r"^costs: "),
        ({"costs": np.array([1.0, np.inf])}, r"^costs: "),
        ({"capacity": 4}, r"^sizes and capacity: "),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    given_ = {"costs": np.ones(4), "num_parts": 2} | changes
    with pytest.raises(ValueError, match=message):
        partition(given_.pop("costs"), given_.pop("num_parts"), **given_)


def test_bad_numbers_of_micro_batches_are_named() -> None:
    with pytest.raises(ValueError, match="world_size=2 and steps=0"):
        micro_batches(np.ones(4), world_size=2, steps=0)


def test_partitions_need_no_torch_until_they_are_made() -> None:
    code = "import sys, lightning_gr.balancing.partition; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
