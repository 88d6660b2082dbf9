"""Ranks and ranking metrics against NumPy's sorting, and their sums over uneven shards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from lightning_gr.metrics import NDCG, HitRate, MeanReciprocalRank, WeightedMean, ranking, ranks_of_targets

METRICS: dict[str, Callable[[], Metric]] = {
    "HR@1": lambda: HitRate(1),
    "HR@3": lambda: HitRate(k=3),
    "NDCG@3": lambda: NDCG(k=3),
    "NDCG@10": lambda: NDCG(k=10),
    "MRR": lambda: MeanReciprocalRank(),
}


def gain(name: str, rank: int) -> float:
    if name == "MRR":
        return 1 / rank
    kind, k = name.split("@")
    if rank > int(k):
        return 0.0
    return 1.0 if kind == "HR" else 1 / math.log2(1 + rank)


def brute_force_rank(scores: list[float], target: int) -> int:
    """The target's place in an order of all items where NaN is worst and the target comes last among equals."""
    keys = np.nan_to_num(np.array(scores, dtype=np.float64), nan=-np.inf)
    is_nan = np.isnan(scores)
    order = np.lexsort((np.arange(len(scores)) == target, -keys, is_nan))
    if is_nan[target]:
        return len(scores)
    return int(np.flatnonzero(order == target)[0]) + 1


SCORE = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf, math.nan])


@given(
    st.integers(1, 7).flatmap(
        lambda i: st.lists(st.tuples(st.lists(SCORE, min_size=i, max_size=i), st.integers(0, i - 1)), max_size=6)
    )
)
def test_ranks_are_those_of_a_sort_with_ties_against_the_target(rows: list[tuple[list[float], int]]) -> None:
    scores = torch.tensor([row for row, _ in rows]) if rows else torch.zeros(0, 4)
    ranks = ranks_of_targets(scores, torch.tensor([target for _, target in rows], dtype=torch.int64))
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [brute_force_rank(row, target) for row, target in rows]


def test_equal_scores_give_the_last_rank_and_so_does_nan() -> None:
    assert ranks_of_targets(torch.zeros(3, 9), torch.tensor([0, 4, 8])).tolist() == [9, 9, 9]
    scores = torch.tensor([[math.nan, 1.0, 2.0], [math.nan, 1.0, math.nan]])
    assert ranks_of_targets(scores, torch.tensor([0, 1])).tolist() == [3, 1]


def test_ranks_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, targets = torch.randn(11, 13).round(decimals=1), torch.randint(13, (11,))
    whole = ranks_of_targets(scores, targets)
    for elements in (1, 30, 13 * 11):
        monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", elements)
        assert torch.equal(ranks_of_targets(scores, targets), whole)
    assert torch.equal(
        whole, torch.tensor([brute_force_rank(s, t) for s, t in zip(scores.tolist(), targets, strict=True)])
    )


@pytest.mark.parametrize(("scores", "targets"), [((3,), (3,)), ((3, 2), (2,)), ((3, 2), (3, 1))])
def test_shapes_that_do_not_fit_are_an_error(scores: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ranks_of_targets") as error:
        ranks_of_targets(torch.zeros(scores), torch.zeros(targets, dtype=torch.int64))
    assert str(scores) in str(error.value)


WEIGHTED_RANKS = st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.0, 0.5, 1.0, 3.0])), max_size=8)


@pytest.mark.parametrize("name", METRICS)
@given(st.lists(WEIGHTED_RANKS, max_size=4), st.booleans())
def test_a_metric_is_the_mean_gain_over_all_batches(
    name: str, batches: list[list[tuple[int, float]]], weighted: bool
) -> None:
    metric = METRICS[name]()
    for batch in batches:
        ranks = torch.tensor([rank for rank, _ in batch], dtype=torch.int64)
        metric.update(ranks, torch.tensor([weight for _, weight in batch]) if weighted else None)
    everything = [(rank, weight if weighted else 1.0) for batch in batches for rank, weight in batch]
    total = sum(weight for _, weight in everything)
    expected = sum(weight * gain(name, rank) for rank, weight in everything) / total if total else 0.0
    assert computed(metric) == pytest.approx(expected, abs=1e-12)
    metric.reset()
    assert computed(metric) == 0


def computed(metric: Metric) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of compute before update
        return float(metric.compute())


def merged(shards: list[Metric]) -> Metric:
    """What a sync over processes makes of the shards: every state reduced by its own reduction."""
    whole = shards[0].clone()
    whole.reset()
    whole.update(*([torch.zeros(0, dtype=torch.int64)] * 2))
    for state, reduce in whole._reductions.items():
        assert callable(reduce)
        setattr(whole, state, reduce(torch.stack([getattr(shard, state) for shard in shards])))
    return whole


@pytest.mark.parametrize("name", METRICS)
@given(st.lists(st.integers(1, 15), max_size=12), st.lists(st.integers(0, 12), min_size=2, max_size=2))
def test_uneven_shards_merge_to_the_single_process(name: str, ranks: list[int], cuts: list[int]) -> None:
    single = METRICS[name]()
    single.update(torch.tensor(ranks, dtype=torch.int64))
    shards = []
    first, second = sorted(cuts)
    for part in (ranks[:first], ranks[first:second], ranks[second:]):
        shard = METRICS[name]()
        shard.update(torch.tensor(part, dtype=torch.int64))
        shards.append(shard)
    assert computed(merged(shards)) == pytest.approx(computed(single), abs=1e-12)


def test_counting_does_not_stop_where_float32_would() -> None:
    metric = HitRate(k=1)
    metric.update(torch.ones(1, dtype=torch.int64), torch.tensor([2.0**25]))
    for _ in range(3):
        metric.update(torch.tensor([2]))
    assert computed(metric) == 2.0**25 / (2.0**25 + 3)


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 5)), max_size=10), st.integers(0, 10))
def test_a_weighted_mean_is_right_over_uneven_batches_and_shards(parts: list[tuple[float, int]], cut: int) -> None:
    single, shards = WeightedMean(), [WeightedMean(), WeightedMean()]
    for index, (value, weight) in enumerate(parts):
        # Batches without labels often have a NaN mean.
        number = torch.tensor(value, dtype=torch.float64) if weight else torch.tensor(math.nan)
        single.update(number, weight)
        shards[index >= cut].update(number, torch.tensor(weight))
    total = sum(weight for _, weight in parts)
    expected = sum(value * weight for value, weight in parts) / total if total else 0.0
    assert computed(single) == pytest.approx(expected, abs=1e-12)
    assert computed(merged(list(shards))) == pytest.approx(expected, abs=1e-12)


def test_a_weighted_mean_takes_numbers_and_tensors() -> None:
    mean = WeightedMean()
    mean.update(2.0)
    mean.update(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]))
    mean.update(torch.tensor([4.0, 6.0], requires_grad=True), 0.5)
    assert computed(mean) == pytest.approx((2 + 3 + 5 + 2 + 3) / 6)


def test_a_nan_that_counts_is_not_hidden() -> None:
    mean = WeightedMean()
    mean.update(math.nan, 2)
    assert math.isnan(computed(mean))


def test_states_made_in_inference_mode_can_be_updated_outside_it() -> None:
    metric = HitRate(k=1)
    with torch.inference_mode():
        metric.update(torch.tensor([1]))
        metric.reset()
        metric.update(torch.tensor([1]))
    metric.update(torch.tensor([2]))
    assert computed(metric) == 0.5


@pytest.mark.parametrize("kind", [HitRate, NDCG])
def test_a_cut_off_below_one_is_an_error(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"k=0: expected at least 1"):
        kind(k=0)


def _evaluate_on_rank(rank_lists: list[list[int]]) -> tuple[float, float, float]:
    ranks = torch.tensor(rank_lists[torch.distributed.get_rank()], dtype=torch.int64)
    metrics: list[Metric] = [HitRate(k=2), NDCG(k=2), WeightedMean()]
    for metric in metrics[:2]:
        metric.update(ranks)
    metrics[2].update(ranks.double().mean(), ranks.numel())
    hit, ndcg, mean = (float(metric.compute()) for metric in metrics)
    return hit, ndcg, mean


@pytest.mark.dist
def test_two_processes_with_uneven_shards_agree_with_one(gloo: Any) -> None:
    shards: list[list[int]] = [[1, 2, 5, 2, 1], []]
    ranks = sum(shards, [])
    expected = [
        np.mean([gain("HR@2", rank) for rank in ranks]),
        np.mean([gain("NDCG@2", rank) for rank in ranks]),
        np.mean(ranks),
    ]
    for result in gloo(2).run(_evaluate_on_rank, shards):
        assert result == pytest.approx(expected)
