"""What sequences cost by their length: against counted pairs, torch's own counter, and samples one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec import KeyedJaggedTensor

from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of
from lightning_gr.batch import SequenceBatch
from lightning_gr.layers import HSTUEncoder, SASRecEncoder
from lightning_gr.models import DLRM, MTGR, RankingModule, RetrievalModule
from lightning_gr.models.sequence_cost import causal
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ranking_features import RankingFeatures

FEATURES = RankingFeatures(
    contextual={"user_id": 9, "city": 3},
    contextual_width=2,
    tokens={"item_id": 12, "kind": 4},
    width=3,
    history_width=4,
    candidate_width=5,
    tasks=("click", "buy"),
)
EMBEDDING = 6


class ToyEncoder(nn.Module):
    """An encoder that says nothing of its cost."""

    dim = 4


def encoder(kind: str) -> Any:
    if kind == "hstu":
        return HSTUEncoder(dim=8, num_layers=2, num_heads=2, qk_dim=3, v_dim=5, max_length=64)
    return SASRecEncoder(dim=8, num_layers=2, num_heads=2, hidden_dim=12, max_length=64)


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
@given(lengths=st.lists(st.integers(0, 64), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_a_history_costs_its_counted_pairs(kind: str, lengths: list[int]) -> None:
    layout = JaggedLayout.from_lengths(torch.tensor(lengths))
    seen = IntervalMask.causal(layout).visible(layout, layout)
    own = encoder(kind)
    module = RetrievalModule(encoder=own, num_items=50, loss="full_softmax")
    counted = own.flops(sum(lengths), int(seen.sum()))
    assert module.sequence_cost()(np.array(lengths)).sum() == pytest.approx(counted, rel=1e-12)


def test_drawn_negatives_are_scored_on_the_queries_rank() -> None:
    own = encoder("hstu")
    drawn = RetrievalModule(encoder=own, num_items=50, loss="sampled_softmax", num_negatives=7).sequence_cost()
    shared = RetrievalModule(encoder=own, num_items=50, loss="sampled_softmax", negatives="in_batch").sequence_cost()
    assert shared == causal(own.flops)
    assert drawn == SequenceCost(shared.linear + 2 * 8 * 8, shared.quadratic)


def test_without_figures_tokens_count() -> None:
    assert RetrievalModule(encoder=ToyEncoder(), num_items=50, loss="bce").sequence_cost() == TOKENS
    assert RankingModule(network=ToyEncoder()).sequence_cost() == TOKENS
    own = ToyEncoder()
    own.sequence_cost = lambda: SequenceCost(3.0, 2.0)  # type: ignore[assignment]
    assert cost_of(RetrievalModule(encoder=own, num_items=50)) == SequenceCost(3.0, 2.0)
    assert cost_of(RankingModule(network=own)) == SequenceCost(3.0, 2.0)


def batch_of(static: int, realtime: int, candidates: int) -> tuple[dict[str, torch.Tensor], SequenceBatch]:
    """One user: events at times 1, 2, ..., and all candidates after them, so that they see the whole history."""
    events = static + realtime + candidates
    total = FEATURES.num_contextual + events
    sizes = {"user_id": 1, "city": 1, "item_id": events, "kind": events}
    lengths = torch.tensor(list(sizes.values()))
    batch = SequenceBatch(
        features=KeyedJaggedTensor(
            keys=list(sizes), values=torch.zeros(int(lengths.sum()), dtype=torch.int64), lengths=lengths
        ),
        token_counts_B4=torch.tensor([[FEATURES.num_contextual, static, realtime, candidates]]),
        sample_ids_B=torch.zeros(1, dtype=torch.int64),
        timestamps_T=torch.arange(total).clamp(max=total - candidates),
        dense={
            "numbers": torch.randn(total, FEATURES.width),
            "actions": torch.randn(total, FEATURES.history_width),
            "cross": torch.randn(total, FEATURES.candidate_width),
            "contextual": torch.randn(1, FEATURES.contextual_width),
        },
    )
    return {name: torch.randn(size, EMBEDDING) for name, size in sizes.items()}, batch


def network(kind: str) -> Any:
    made: Any
    if kind == "mtgr":
        made = MTGR(dim=8, num_layers=2, num_heads=2, max_length=64, time_bias=False, position_bias=False)
    else:
        made = DLRM(dim=8, hidden_dims=(12, 10), pooling=kind)  # type: ignore[arg-type]
    made.build(FEATURES, EMBEDDING)
    return made.eval()


@pytest.mark.parametrize("kind", ["mtgr", "none", "sum", "target_attention"])
def test_networks_are_counted_as_torch_counts_dense_work(kind: str) -> None:
    """One sample is no padding; the reference multiplies all pairs, seen or not."""
    own = network(kind)
    embedded, batch = batch_of(4, 3, 5)
    counts = batch.token_counts_B4[0].tolist()
    pairs = sum(counts) ** 2 if kind == "mtgr" else 5 * 7
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        own(embedded, batch)
    assert own.flops(counts, pairs) == counter.get_total_flops() > 0


@pytest.mark.parametrize("kind", ["mtgr", "target_attention"])
def test_a_ranking_sample_costs_about_what_is_counted(kind: str) -> None:
    """Half history, half candidates: the linear part is exact but for the context; MTGR has half of the pairs."""
    own = network(kind)
    cost = own.sequence_cost()
    for half in (1, 10, 40):
        linear = own.flops([0, 0, half, half], 0)
        assert cost.linear * 2 * half >= linear
        assert cost.linear == pytest.approx(linear / (2 * half), rel=0.1)
    long = own.flops([0, 0, 10**4, 10**4], 0)
    # Real-time history and candidates, in turns: every other token has happened before.
    own_pairs = half_seen = 10**4 * (10**4 + 1) // 2
    pairs = own_pairs + half_seen if kind == "mtgr" else half_seen
    share = {"mtgr": 2, "target_attention": 1}[kind]
    counted = own.flops([0, 0, 10**4, 10**4], pairs)
    assert cost(np.array([2 * 10**4]))[0] - long == pytest.approx(share * (counted - long), rel=1e-2)


def test_heads_count_for_candidates() -> None:
    module = RankingModule(network=network("mtgr"), features=FEATURES, embedding_dim=EMBEDDING)
    before = module.sequence_cost()
    module.configure_model()
    assert module.heads is not None
    after = module.sequence_cost()
    assert after.quadratic == before.quadratic
    assert after.linear == before.linear + module.heads.flops(2) / 4
