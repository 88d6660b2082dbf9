"""Which implementation of an operator runs: by device, by an argument of the call, or for everything inside a block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Backend = Literal["auto", "reference", "cpu", "triton"]

_override: ContextVar[Backend] = ContextVar("lightning_gr_backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Operators called inside without a `backend` of their own take this one.

    The backward pass of an operator is always by the implementation that ran its forward.

    Args:
        backend: `reference` is dense PyTorch, differentiable twice and in float64; `cpu` and `triton` are the fused
            ones; `auto` changes nothing.

    Raises:
        ValueError: no such backend.
    """
    token = _override.set(_override.get() if _known(backend) == "auto" else backend)
    try:
        yield
    finally:
        _override.reset(token)


def choose_backend(backend: Backend, device: torch.device) -> Backend:
    """The implementation to run: that of the call, else that of the enclosing `use_backend`, else the device's.

    Args:
        backend: what the call asks for; `auto` leaves it open.
        device: where its tensors are.

    Returns:
        `reference`, `cpu` or `triton`.

    Raises:
        ValueError: no such backend, or one that does not run on the device.
    """
    if _known(backend) == "auto":
        backend = _override.get()
    if backend == "auto":
        return {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")  # type: ignore[return-value]
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu': the tensors are on {device}; use 'auto', 'triton' or 'reference'")
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton': the tensors are on {device}; use 'auto', or TRITON_INTERPRET=1 to interpret the kernel"
        )
    return backend


def refuse_second_derivative(operator: str, backend: Backend) -> None:
    """Called first in the backward pass of a fused implementation, whose gradient cannot be differentiated.

    Raises:
        RuntimeError: the gradient's own graph is wanted (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: backend={backend!r} is differentiable once; take backend='reference', or run the forward "
            "pass under lightning_gr.ops.backend.use_backend('reference'), to differentiate its gradient"
        )


def _known(backend: Backend) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    return backend
