"""ProductCounter: what torch's own counter counts, and results to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_gr.layers import HSTUEncoder, SASRecEncoder
from lightning_gr.observability.product_counter import ProductCounter
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout


class Attention(nn.Module):
    """Layers of torch, with its own attention, a convolution, and what it computes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.filter = nn.Sequential(nn.Conv1d(8, 8, 3), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.layer(x[None]).transpose(1, 2)
        return torch.utils.checkpoint.checkpoint(self.filter, mixed, use_reentrant=False) @ mixed.new_ones(
            x.shape[0] - 2
        )


def encoded(module: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, Attention):
        return module(x)
    layout = JaggedLayout.from_lengths(torch.tensor([5, 0, 1, 6]))
    return module(x, layout=layout, mask=IntervalMask.causal(layout))


def train(module: Any, context: Any, backend: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module.zero_grad()
    x = torch.randn(12, 8)
    with use_backend(backend), context:
        loss = encoded(module, x).square().sum()
        loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["hstu", "sasrec", "torch"])
def test_counts_are_torchs_and_no_bit_changes(kind: str, backend: str) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"dim": 8, "num_layers": 2, "num_heads": 2, "max_length": 12, "dropout": 0.2}
    makers: dict[str, Any] = {"hstu": HSTUEncoder, "sasrec": SASRecEncoder}
    module = Attention() if kind == "torch" else makers[kind](**sizes)
    plain = train(module, nullcontext(), backend)
    counter, torchs = ProductCounter(), FlopCounterMode(display=False)
    watched = train(module, counter, backend)
    assert watched.keys() == plain.keys()
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    train(module, torchs, backend)
    assert counter.flops == torchs.get_total_flops() > 0
