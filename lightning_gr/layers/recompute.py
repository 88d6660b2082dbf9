"""Activation recompute: a layer whose activations backward computes again instead of keeping them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gr.ops.backend import choose_backend, use_backend


def recomputed(layer: nn.Module, x_TD: Tensor, **inputs: Any) -> Tensor:
    """``layer(x_TD, **inputs)``, of which only the inputs are kept for backward.

    The second computation is the first one to the bit: it has the same random numbers, so the same dropout masks, the
    same autocast and the same implementation of operators.

    Args:
        layer: a function of its inputs, its parameters and torch's random numbers alone.
        x_TD: what it transforms.
        inputs: its further arguments.
    """
    if not torch.is_grad_enabled():
        plain: Tensor = layer(x_TD, **inputs)
        return plain
    # Backward runs outside of the caller's `use_backend`, on CUDA even in a thread of its own.
    backend = choose_backend("auto", x_TD.device)

    def run(x_TD: Tensor) -> Tensor:
        with use_backend(backend):
            out: Tensor = layer(x_TD, **inputs)
        return out

    again: Tensor = checkpoint(run, x_TD, use_reentrant=False)
    return again
