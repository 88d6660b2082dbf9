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
    # A layer that runs with other parameters than its own (`torch.func.functional_call`) has its own in backward.
    others: dict[str, Tensor] = {name: x for name, x in layer.named_parameters() if not isinstance(x, nn.Parameter)}

    def run(x_TD: Tensor) -> Tensor:
        with use_backend(backend):
            if not others:
                out: Tensor = layer(x_TD, **inputs)
            else:
                out = torch.func.functional_call(layer, others, (x_TD,), inputs)
        return out

    again: Tensor = checkpoint(run, x_TD, use_reentrant=False)
    return again
