"""FLOPs of layers: what torch's own counter sees of dense work, and the figures of MTGR's paper."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_gr.layers import HSTUEncoder, MultiTaskHeads, SASRecEncoder
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout


@pytest.mark.parametrize(
    ("num_layers", "dim", "num_heads", "gflops"), [(3, 512, 2, 5.468), (5, 768, 3, 18.586), (15, 768, 3, 55.757)]
)
def test_hstu_has_the_papers_figures(num_layers: int, dim: int, num_heads: int, gflops: float) -> None:
    """MTGR (arXiv 2505.18654), table 2, at 500 tokens that all see each other."""
    with torch.device("meta"):
        encoder = HSTUEncoder(dim=dim, num_layers=num_layers, num_heads=num_heads)
    flops = encoder.flops(500, 500 * 500)
    assert flops == num_layers * (10 * dim**2 * 500 + 4 * dim * 500**2)
    assert round(flops / 1e9, 3) == gflops


@pytest.mark.parametrize("hidden_dim", [None, 20])
def test_sasrec_is_counted_as_torch_counts_dense_work(hidden_dim: int | None) -> None:
    encoder = SASRecEncoder(dim=8, num_layers=3, num_heads=2, hidden_dim=hidden_dim, max_length=11, dropout=0.0)
    layout = JaggedLayout.from_lengths(torch.tensor([11]))
    everything = IntervalMask.contextual_prefix(layout, torch.tensor([11]))
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        encoder(torch.randn(11, 8), layout=layout, mask=everything)
    assert encoder.flops(11, 121) == counter.get_total_flops() > 0
    assert encoder.flops(0, 7) == 3 * 7 * 2 * 2 * 8


@pytest.mark.parametrize("num_experts", [0, 3])
def test_heads_are_counted_as_torch_counts_them(num_experts: int) -> None:
    heads = MultiTaskHeads(dim=6, tasks=["click", "buy"], num_experts=num_experts, hidden_dim=5)
    with FlopCounterMode(display=False) as counter:
        heads(torch.randn(7, 6))
    assert heads.flops(7) == counter.get_total_flops() > 0
