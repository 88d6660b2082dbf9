"""Token-budget batches against MTGenRec's algorithm 1 written as a plain loop."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from lightning_gr.balancing.token_budget import closest_prefix, token_budget_batches
from lightning_gr.batch import Labels, SequenceBatch, TokenKind


def make(lengths: list[int], first_id: int = 0) -> SequenceBatch:
    total = sum(lengths)
    counts = torch.zeros(len(lengths), 4, dtype=torch.int64)
    counts[:, TokenKind.REALTIME] = torch.tensor(lengths, dtype=torch.int64)
    ids = torch.arange(len(lengths)) + first_id
    return SequenceBatch(
        features=KeyedJaggedTensor(
            ["item_id"],
            torch.repeat_interleave(ids, torch.tensor(lengths, dtype=torch.int64)),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            stride=len(lengths),
        ),
        token_counts_B4=counts,
        sample_ids_B=ids,
        labels={"next_item": Labels(torch.arange(total), torch.arange(total))},
        denominators={"next_item": 1.0},
    )


def by_the_paper(chunks: list[list[int]], budget: int) -> list[list[int]]:
    """Algorithm 1 with k a count: by brute force over all prefixes."""
    out, queue, todo = [], [], [list(chunk) for chunk in chunks]
    while True:
        sums = [sum(queue[: k + 1]) for k in range(len(queue))]
        best = min((abs(s - budget) for s in sums), default=0)
        # Of equally close prefixes one within the budget, and sequences without tokens go along.
        close = [k + 1 for k, s in enumerate(sums) if abs(s - budget) == best]
        within = [k for k in close if sums[k - 1] <= budget]
        count = max(within) if within else min(close, default=0)
        if count < len(queue):
            out.append(queue[:count])
            queue = queue[count:]
        elif todo:
            queue += todo.pop(0)
        else:
            return [*out, queue] if queue else out


LENGTHS = st.lists(st.lists(st.integers(0, 12), max_size=7), max_size=7)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 25))
def test_batches_are_those_of_the_algorithm(chunks: list[list[int]], budget: int) -> None:
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)]).tolist()
    batches = list(token_budget_batches((make(c, s) for c, s in zip(chunks, starts, strict=False)), budget))
    assert [batch.layout.lengths_B.tolist() for batch in batches] == by_the_paper(chunks, budget)
    ids = [sample for batch in batches for sample in batch.sample_ids_B.tolist()]
    assert ids == list(range(starts[-1]))
    for batch in batches:
        owners = torch.repeat_interleave(batch.sample_ids_B, batch.layout.lengths_B)
        assert torch.equal(batch.features.values(), owners)


def test_the_figures_of_the_paper() -> None:
    assert closest_prefix(np.array([100] * 500 + [230]), 50_000) == 500
    assert closest_prefix(np.array([250] * 200 + [12_800]), 50_000) == 200


@pytest.mark.parametrize(
    ("lengths", "count"),
    [([30, 1], 1), ([4, 12], 1), ([4, 7], 2), ([4, 8, 5], 2), ([4, 8], 2), ([6, 8], 1), ([3, 3], 2), ([], 0)],
    ids=str,
)
def test_the_closest_prefix_of_10(lengths: list[int], count: int) -> None:
    assert closest_prefix(np.array(lengths, dtype=np.int64), 10) == count


def test_a_sequence_longer_than_the_budget_is_alone() -> None:
    batches = list(token_budget_batches([make([30, 2, 2, 30, 30])], 5))
    assert [batch.layout.lengths_B.tolist() for batch in batches] == [[30], [2, 2], [30], [30]]


def test_a_batch_comes_before_the_rest_of_the_stream_is_read() -> None:
    read = []

    def chunks() -> Iterator[SequenceBatch]:
        for i in range(100):
            read.append(i)
            yield make([5], i)

    batches = token_budget_batches(chunks(), 10)
    assert next(batches).layout.lengths_B.tolist() == [5, 5]
    assert len(read) == 3


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="budget=0"):
        list(token_budget_batches([make([1])], 0))
