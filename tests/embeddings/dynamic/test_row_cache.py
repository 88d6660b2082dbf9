"""A cache of rows against the plain array, under random reads and writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.embeddings.dynamic.chunked_rows import ChunkedRows
from lightning_gr.embeddings.dynamic.row_cache import RowCache

CPU = torch.device("cpu")


def rows_of(num: int, width: int = 3) -> ChunkedRows:
    rows = ChunkedRows(width=width, dtype=torch.float32, chunk_rows=8, device=CPU)
    rows.set_chunks([rows.new_chunk().zero_() for _ in range(num // 8)])
    return rows


@settings(max_examples=60, deadline=None)
@given(
    cache_rows=st.integers(1, 30),
    steps=st.lists(
        st.tuples(st.sampled_from("rrwwzg"), st.lists(st.integers(-1, 31), max_size=20), st.integers(0, 2**31)),
        max_size=30,
    ),
)
def test_reads_give_what_was_written_last(cache_rows: int, steps: list[tuple[str, list[int], int]]) -> None:
    behind, plain = rows_of(32), rows_of(32)
    cache = RowCache(behind, cache_rows=cache_rows, device=CPU)
    for action, chosen, seed in steps:
        if action == "r":
            rows = torch.tensor(chosen, dtype=torch.int64)
            assert torch.equal(cache.gather(rows), plain.gather(rows))
            out = torch.full((len(rows), 3), 5.0)
            assert torch.equal(cache.gather(rows, out.clone()), plain.gather(rows, out))
        elif action == "g":
            for array in (behind, plain):
                array.set_chunks([*array.chunks, array.new_chunk().zero_()])
        else:
            rows = torch.tensor(sorted(set(chosen)), dtype=torch.int64)
            values = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(seed))
            for array in (cache, plain):
                array.scatter(rows, None if action == "z" else values)
    assert torch.equal(cache.gather(torch.arange(32)), plain.gather(torch.arange(32)))


def test_the_least_recently_used_row_is_written_back() -> None:
    behind = rows_of(16)
    cache = RowCache(behind, cache_rows=3, device=CPU)
    for row in (0, 1, 2):
        cache.scatter(torch.tensor([row]), torch.full((1, 3), row + 1.0))
    assert not behind.gather(torch.arange(3)).any()
    cache.gather(torch.tensor([0]))
    cache.gather(torch.tensor([9]))  # 1 goes
    assert behind.gather(torch.arange(3))[:, 0].tolist() == [0, 2, 0]
    assert cache.gather(torch.tensor([1, 0, 2]))[:, 0].tolist() == [2, 1, 3]


def test_forgotten_rows_are_not_written_back() -> None:
    behind = rows_of(16)
    cache = RowCache(behind, cache_rows=2, device=CPU)
    cache.scatter(torch.tensor([3, 4]), torch.ones(2, 3))
    cache.forget(torch.tensor([3, 7]))
    cache.gather(torch.tensor([10, 11]))
    assert behind.gather(torch.tensor([3, 4]))[:, 0].tolist() == [0, 1]
    assert cache.nbytes == 2 * (3 * 4 + 8 + 8 + 1) + 16 * 4


@pytest.mark.parametrize("width", [0, 1])
def test_narrow_rows(width: int) -> None:
    cache = RowCache(rows_of(8, width), cache_rows=2, device=CPU)
    cache.scatter(torch.tensor([5]), torch.ones(1, width))
    assert torch.equal(cache.gather(torch.tensor([5, 6])).sum(1), torch.tensor([float(width), 0]))
