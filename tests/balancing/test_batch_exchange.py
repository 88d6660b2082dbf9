"""Reallocation of sequences between real gloo processes, against plain lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from lightning_gr.balancing.batch_exchange import destinations, exchange
from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.batch import Labels, SequenceBatch, TokenKind
from tests.more import more

pytestmark = pytest.mark.dist
COST = SequenceCost(linear=3.0, quadratic=0.5)
Row = tuple[int, list[int], list[int]]


def make(samples: list[tuple[int, int]], **changes: Any) -> SequenceBatch:
    """Samples (id, tokens); token i of sample s is the item 100 s + i, and every other one has a label."""
    lengths = torch.tensor([length for _, length in samples], dtype=torch.int64)
    items = torch.tensor([100 * s + i for s, length in samples for i in range(length)], dtype=torch.int64)
    counts = torch.zeros(len(samples), 4, dtype=torch.int64)
    counts[:, TokenKind.REALTIME] = lengths
    labelled = (items % 2 == 0).nonzero()[:, 0]
    fields: dict[str, Any] = {
        "features": KeyedJaggedTensor(["item_id"], items, lengths=lengths, stride=len(samples)),
        "token_counts_B4": counts,
        "sample_ids_B": torch.tensor([s for s, _ in samples], dtype=torch.int64),
        "labels": {"next_item": Labels(items[labelled] + 1, labelled)},
        "denominators": {"next_item": 1.0},
    }
    return SequenceBatch(**(fields | changes))


def rows(batch: SequenceBatch | None) -> list[Row]:
    """Id, items and labels of each sequence."""
    if batch is None:
        return []
    items = batch.features.values().split(batch.features.lengths().tolist())
    labels = batch.labels["next_item"]
    of = batch.layout.sequence_T[labels.tokens_N]
    return [
        (sample, own.tolist(), labels.values_N[of == i].tolist())
        for i, (sample, own) in enumerate(zip(batch.sample_ids_B.tolist(), items, strict=True))
    ]


def exchange_here(
    ranks: list[list[tuple[int, int]]], rank_S: list[int], step_S: list[int], steps: int
) -> list[list[Row]]:
    group = dist.new_group(backend="gloo")
    own = ranks[dist.get_rank()]
    received = exchange(
        make(own) if own else None,
        np.cumsum([0, *(len(x) for x in ranks)]).tolist(),
        rank_S=np.array(rank_S, dtype=np.int64),
        step_S=np.array(step_S, dtype=np.int64),
        steps=steps,
        group=group,
    )
    dist.destroy_process_group(group)
    return [rows(batch) for batch in received]


@pytest.mark.parametrize("world_size", [*more(2), 3])
def test_every_sequence_arrives_whole_where_it_was_sent(gloo: Any, world_size: int) -> None:
    pool = gloo(world_size)

    @settings(deadline=None, max_examples=20)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        counts = data.draw(st.lists(st.integers(0, 4), min_size=world_size, max_size=world_size))
        lengths = iter(data.draw(st.lists(st.integers(0, 5), min_size=sum(counts), max_size=sum(counts))))
        ranks = [[(10 * rank + i, next(lengths)) for i in range(count)] for rank, count in enumerate(counts)]
        steps = data.draw(st.integers(1, 3))
        total = sum(counts)
        rank_S = data.draw(st.lists(st.integers(0, world_size - 1), min_size=total, max_size=total))
        step_S = data.draw(st.lists(st.integers(0, steps - 1), min_size=total, max_size=total))
        everything = [sample for own in ranks for sample in own]
        wanted = [
            [
                [
                    (s, [100 * s + i for i in range(n)], [100 * s + i + 1 for i in range(n) if i % 2 == 0])
                    for (s, n), to, at in zip(everything, rank_S, step_S, strict=True)
                    if (to, at) == (rank, step)
                ]
                for step in range(steps)
            ]
            for rank in range(world_size)
        ]
        assert pool.run(exchange_here, ranks, rank_S, step_S, steps) == wanted

    check()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4), st.integers(1, 3))
def test_destinations_balance_ranks_within_the_costliest_sequence(lengths: list[list[int]], steps: int) -> None:
    tokens = [np.array(own, dtype=np.int64) for own in lengths]
    rank_S, step_S = destinations(tokens, steps=steps, cost=COST, method="lpt", capacity=None)
    flat = [length for own in lengths for length in own]
    assert len(rank_S) == len(step_S) == len(flat)
    costs = [3.0 * n + 0.5 * n * n for n in flat]
    parts = [[0.0] * steps for _ in lengths]
    for rank, step, cost in zip(rank_S.tolist(), step_S.tolist(), costs, strict=True):
        parts[rank][step] += cost
    sums = [x for rank in parts for x in rank]
    assert max(sums) - min(sums) <= max(costs, default=0.0) + 1e-6


def test_a_rank_takes_no_more_tokens_than_it_may() -> None:
    # By cost alone the long sequence would be a part of its own, the eight short ones the other.
    tokens = [np.array([10]), np.array([2] * 8)]
    rank_S, _ = destinations(tokens, steps=1, cost=SequenceCost(0.0, 1.0), method="lpt", capacity=14)
    sums = np.bincount(rank_S, weights=np.concatenate(tokens))
    assert sums.max() <= 14
    rank_S, _ = destinations(tokens, steps=1, cost=SequenceCost(0.0, 1.0), method="lpt", capacity=None)
    assert np.bincount(rank_S, weights=np.concatenate(tokens)).max() > 14


def test_one_process_deals_out_over_its_micro_steps() -> None:
    own = make([(1, 3), (2, 1), (3, 2)])
    first, second, third = exchange(
        own, [0, 3], rank_S=np.zeros(3, dtype=np.int64), step_S=np.array([1, 0, 1]), steps=3, group=None
    )
    assert [[sample for sample, _, _ in rows(batch)] for batch in (first, second, third)] == [[2], [1, 3], []]


def send_what_cannot_be_taken(failing: int) -> str:
    group = dist.new_group(backend="gloo")
    # As many tokens as sequences, one of which has none: rows of `price` may be of the ones or the others.
    dense = {"price": torch.zeros(2)} if dist.get_rank() == failing else {}
    try:
        exchange(
            make([(1, 0), (2, 2)], dense=dense),
            [0, 2, 4],
            rank_S=np.array([0, 1, 0, 1]),
            step_S=np.zeros(4, dtype=np.int64),
            steps=1,
            group=group,
        )
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group(group)
    return "nothing"


def test_a_rank_that_cannot_send_stops_all(gloo: Any) -> None:
    one, other = gloo(2).run(send_what_cannot_be_taken, 1)
    assert one.startswith("RuntimeError: rank 1: could not send")
    assert other.startswith("ValueError: SequenceBatch.dense['price']")
