"""Rows in chunks against a Python dict, compiled and not, in every precision, with a cache and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.embeddings.dynamic import chunked_rows
from lightning_gr.embeddings.dynamic.row_storage import Precision, RowStorage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.float16}


@pytest.fixture(params=["compiled", "pytorch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pytorch":
        monkeypatch.setattr(chunked_rows, "load_native", lambda source: None)


def storage(**settings: Any) -> RowStorage:
    return RowStorage(**{"dim": 5, "state_width": 3, "chunk_rows": 8} | settings)


def numbers(rows: Tensor, width: int) -> Tensor:
    return rows[:, None] + torch.arange(width) / 8


@pytest.mark.usefixtures("_path")
def test_growth_moves_nothing() -> None:
    of = storage()
    assert (of.num_rows, of.capacity, of.num_chunks) == (0, 0, 0)
    pointers: list[int] = []
    for n in (1, 6, 9, 0, 40):
        rows = of.allocate(n)
        assert of.chunk_pointers[: len(pointers)] == pointers
        pointers = of.chunk_pointers
        of.write(rows, numbers(rows, 5))
        of.write_state(rows, numbers(rows, 3) + 1000)
    assert of.num_rows == 56
    assert of.num_chunks == 8  # 7 and the one in advance
    everything = torch.arange(56)
    assert torch.equal(of.read(everything), numbers(everything, 5))
    assert torch.equal(of.read_state(everything), numbers(everything, 3) + 1000)
    assert of.row_bytes == 5 * 4 + 3 * 4 + 24
    assert of.nbytes == 64 * of.row_bytes


@pytest.mark.usefixtures("_path")
def test_absent_rows_are_zeros_and_not_written() -> None:
    of = storage()
    rows = of.allocate(3)
    of.write(torch.tensor([2, -1, 0]), torch.arange(15.0).view(3, 5))
    assert torch.equal(of.read(torch.tensor([-1, 0, 2, 0]))[:, 0], torch.tensor([0.0, 10, 0, 10]))
    of.write_state(rows[:0], torch.zeros(0, 3))
    assert of.read(rows[:0]).shape == (0, 5)
    for row in (-2, 16):
        with pytest.raises(AssertionError):
            of.read(torch.tensor([row]))


@pytest.mark.usefixtures("_path")
def test_freed_rows_come_back_clean_and_first() -> None:
    of = storage(scores=True)
    rows = of.allocate(20)
    of.write_state(rows, torch.ones(20, 3))
    of.write_metadata(rows, counts=rows + 1, last_steps=rows + 2, last_times=rows + 3, scores=rows + 0.5)
    of.free(torch.tensor([4, 11, 7]))
    of.free(torch.tensor([0]))
    assert of.num_rows == 16
    again = of.allocate(6)
    assert again.tolist() == [0, 7, 11, 4, 20, 21]
    assert not of.read_state(again).any()
    counts, last_steps, last_times, scores = of.read_metadata(again)
    assert scores is not None
    assert not any(x.any() for x in (counts, last_steps, last_times, scores))
    assert of.read_metadata(torch.tensor([5]))[:3] == (6, 7, 8)
    assert of.read_state(torch.tensor([5])).eq(1).all()


@pytest.mark.usefixtures("_path")
def test_without_rows_two_chunks_stay() -> None:
    of = storage(precision="mixed", hot_count=1)
    rows = of.allocate(50)
    of.touch(rows, torch.ones_like(rows), step=1, time=1)
    first = of.chunk_pointers[:2]
    of.free(rows[:20])
    assert of.num_chunks == 8
    of.free(rows[20:])
    assert (of.num_rows, of.num_chunks, of.chunk_pointers) == (0, 2, first)
    assert of.nbytes == 16 * of.row_bytes + 16 * 5 * 4
    assert of.allocate(3).tolist() == [0, 1, 2]
    assert not of.read_metadata(torch.arange(3)).counts.any()


def test_reserved_room_stays_until_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    of = storage()
    rows = of.allocate(30)
    of.reserve(10)
    of.free(rows)
    monkeypatch.setattr(chunked_rows.ChunkedRows, "new_chunk", _fails)
    assert len(of.allocate(40)) == 40
    of.free(torch.arange(40))
    assert of.num_chunks == 2


def _fails(*_: Any) -> Tensor:
    raise RuntimeError("out of memory")


def test_growth_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of = storage(precision="mixed", hot_count=2)
    rows = of.allocate(7)
    of.write(rows, numbers(rows, 5))
    of.free(rows[2:4])
    pointers, nbytes = of.chunk_pointers, of.nbytes
    calls = []
    real = chunked_rows.ChunkedRows.new_chunk

    def fails_later(self: chunked_rows.ChunkedRows) -> Tensor:
        calls.append(self)
        return real(self) if len(calls) < 6 else _fails()

    monkeypatch.setattr(chunked_rows.ChunkedRows, "new_chunk", fails_later)
    with pytest.raises(MemoryError, match=r"100 more rows beside 5: \d+,\d+ bytes"):
        of.allocate(100)
    assert len(calls) == 6
    assert (of.num_rows, of.chunk_pointers, of.nbytes) == (5, pointers, nbytes)
    with pytest.raises(MemoryError):  # of the hot rows
        of.touch(rows[:2], torch.tensor([1, 2]), step=3, time=3)
    assert not of.read_metadata(rows[:2]).counts.any()
    assert of.is_hot(rows[:2]).tolist() == [False, False]  # type: ignore[union-attr]
    assert of.allocate(11).tolist() == [3, 2, *range(7, 16)]  # what fits needs no chunk in advance
    assert of.num_chunks == 2


@pytest.mark.usefixtures("_path")
def test_touch_adds_up_repeated_rows() -> None:
    of = storage()
    of.allocate(20)
    of.touch(torch.tensor([3, 17, 3]), torch.tensor([2, 1, 5]), step=4, time=100)
    of.touch(torch.tensor([3]), torch.tensor([1]), step=5, time=90)
    metadata = of.read_metadata(torch.tensor([3, 17, 0]))
    assert metadata.counts.tolist() == [8, 1, 0]
    assert metadata.last_steps.tolist() == [5, 4, 0]
    assert metadata.last_times.tolist() == [100, 100, 0]
    assert metadata.scores is None
    of.write_metadata(torch.tensor([17]), last_times=torch.tensor([7]))
    assert [int(x) for x in of.read_metadata(torch.tensor([17]))[:3]] == [1, 4, 7]  # type: ignore[arg-type]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "mixed"])
def test_narrow_rows_are_rounded(precision: Precision) -> None:
    of = storage(dim=64, precision=precision, hot_count=2)
    rows = of.allocate(30)
    values = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    of.write(rows, values)
    assert torch.equal(of.read(rows), values.to(DTYPES[precision]).float())
    seeds = rows * 7919
    of.write(rows, values, seeds_N=seeds, step=3)
    drawn = of.read(rows)
    assert not torch.equal(drawn, values.to(DTYPES[precision]).float())
    assert (drawn - values).abs().max() <= values.abs().max() * (2**-7 if precision == "bf16" else 2**-10)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    of.write(rows[order], values[order], seeds_N=seeds[order], step=3)
    assert torch.equal(of.read(rows), drawn)


@pytest.mark.usefixtures("_path")
def test_hot_rows_are_in_fp32() -> None:
    of = storage(precision="mixed", hot_count=3)
    rows = of.allocate(20)
    values = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    of.write(rows, values)
    before = of.read(rows)
    of.touch(torch.tensor([2, 9, 2, 12]), torch.tensor([1, 2, 2, 3]), step=1, time=1)
    hot = of.is_hot(rows)
    assert hot is not None
    assert hot.nonzero()[:, 0].tolist() == [2, 12]
    assert torch.equal(of.read(rows), before)
    of.write(rows, values)
    assert torch.equal(of.read(rows)[hot], values[hot])
    assert torch.equal(of.read(rows)[~hot], before[~hot])
    of.free(torch.tensor([2]))
    assert of.allocate(1).tolist() == [2]
    of.write(torch.tensor([2]), values[2:3])
    assert torch.equal(of.read(torch.tensor([2])), before[2:3])
    of.promote_hot(torch.tensor([9, 12, 9]))
    assert torch.equal(of.read(rows)[12], values[12])
    assert storage().is_hot(torch.arange(3)) is None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"dim": 0}, "dim=0"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"precision": "mixed"}, "hot_count=0"),
        ({"chunk_rows": 12}, "chunk_rows=12"),
        ({"placement": "disk"}, "placement='disk'"),
        ({"placement": "host"}, "cache_rows=0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        storage(**settings)


def test_scores_of_a_storage_without_are_refused() -> None:
    of = storage()
    with pytest.raises(ValueError, match="scores=True"):
        of.write_metadata(of.allocate(1), scores=torch.ones(1))


@settings(max_examples=40, deadline=None)
@given(
    compiled=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16", "fp16", "mixed"]),
    placement=st.sampled_from([{}, {"placement": "host", "cache_rows": 3}, {"placement": "host", "cache_rows": 40}]),
    state_width=st.sampled_from([0, 2]),
    steps=st.lists(st.tuples(st.sampled_from("aaffwwwtt"), st.integers(0, 2**31)), max_size=25),
)
def test_it_is_a_dict(
    compiled: bool,
    precision: Precision,
    placement: dict[str, Any],
    state_width: int,
    steps: list[tuple[str, int]],
) -> None:
    """Random allocation, freeing, writing and use; `truth` holds what each row was last given."""
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(chunked_rows, "load_native", lambda source: None)
        of = storage(precision=precision, hot_count=4, state_width=state_width, **placement)
        truth: dict[int, dict[str, Any]] = {}
        for number, (action, seed) in enumerate(steps):
            random = torch.Generator().manual_seed(seed)
            some = _some(list(truth), random)
            if action == "a":
                rows = of.allocate(int(torch.randint(13, (), generator=random)))
                assert not set(rows.tolist()) & set(truth)
                values = torch.randn(len(rows), 5, generator=random)
                of.write(rows, values)
                for row, value in zip(rows.tolist(), values, strict=True):
                    truth[row] = _fresh(value.to(DTYPES[precision]).float(), state_width)
            elif action == "f":
                of.free(torch.tensor(some, dtype=torch.int64))
                for row in some:
                    del truth[row]
            elif action == "w":
                values, state = torch.randn(len(some), 5, generator=random), torch.rand(len(some), state_width)
                of.write(torch.tensor(some, dtype=torch.int64), values)
                of.write_state(torch.tensor(some, dtype=torch.int64), state)
                for row, value, numbers in zip(some, values, state, strict=True):
                    is_hot = precision == "mixed" and truth[row]["count"] >= 4
                    value = value if is_hot else value.to(DTYPES[precision]).float()
                    truth[row] |= {"value": value, "state": numbers}
            else:
                again = some + some[::2]
                counts = torch.randint(3, (len(again),), generator=random)
                of.touch(torch.tensor(again, dtype=torch.int64), counts, step=number, time=number % 7)
                for row, count in zip(again, counts.tolist(), strict=True):
                    truth[row]["count"] += count
                    truth[row] |= {"step": number, "time": max(truth[row]["time"], number % 7)}
            _compare(of, truth)


def _fresh(value: Tensor, state_width: int) -> dict[str, Any]:
    return {"value": value, "state": torch.zeros(state_width), "count": 0, "step": 0, "time": 0}


def _some(rows: list[int], random: torch.Generator) -> list[int]:
    share = float(torch.rand((), generator=random)) * 1.5
    return [row for row in rows if float(torch.rand((), generator=random)) < share]


def _compare(of: RowStorage, truth: dict[int, dict[str, Any]]) -> None:
    assert of.num_rows == len(truth)
    if not truth:
        return
    rows = torch.tensor(list(truth))
    get: Callable[[str], list[Any]] = lambda name: [entry[name] for entry in truth.values()]  # noqa: E731
    assert torch.equal(of.read(rows), torch.stack(get("value")))
    assert torch.equal(of.read_state(rows), torch.stack(get("state")))
    metadata = of.read_metadata(rows)
    assert metadata.counts.tolist() == get("count")
    assert metadata.last_steps.tolist() == get("step")
    assert metadata.last_times.tolist() == get("time")
