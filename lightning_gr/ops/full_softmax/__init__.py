"""Softmax over all items without a large matrix of tokens and items: checks and dispatch.

Shape suffixes: T tokens, C items, D width.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.full_softmax import cpu
from lightning_gr.ops.full_softmax.fused import FullSoftmax
from lightning_gr.ops.full_softmax.logits import Logits
from lightning_gr.ops.full_softmax.reference import full_softmax_reference

__all__ = [
    "full_softmax_bytes",
    "full_softmax_flops",
    "full_softmax_loss",
    "full_softmax_recomputed_flops",
    "log_sum_exp",
]


def full_softmax_loss(
    queries_TD: Tensor,
    items_CD: Tensor,
    *,
    targets_T: Tensor,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """``log(sum_c exp(logit of c)) - target's logit``, logits being ``q . item / temperature``.

    Differentiable in `queries_TD` and `items_CD`. For cosine similarity normalise both first.

    Args:
        queries_TD: a query a token, float.
        items_CD: all items, float.
        targets_T: int64 row of each token's target.
        temperature: divides the dot products.
        backend: which implementation; `auto` takes the fused one of the device.

    Returns:
        (T,), float64 if an input is, else float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a target is outside the items; the latter is looked at on
            the CPU, and elsewhere only under ``LIGHTNING_GR_DEBUG=1``.
    """
    of = _checked(queries_TD, items_CD, temperature)
    if targets_T.dtype != torch.int64 or targets_T.shape != queries_TD.shape[:1]:
        raise ValueError(
            f"targets_T: expected int64 of shape {tuple(queries_TD.shape[:1])}, got {targets_T.dtype} of shape "
            f"{tuple(targets_T.shape)}"
        )
    if targets_T.device != queries_TD.device:
        raise ValueError(f"targets_T: expected the device of queries_TD, {queries_TD.device}, got {targets_T.device}")
    if targets_T.numel() and (targets_T.device.type == "cpu" or os.environ.get("LIGHTNING_GR_DEBUG") == "1"):
        low, high = (int(x) for x in targets_T.aminmax())
        if low < 0 or high >= len(items_CD):
            raise ValueError(f"targets_T: expected items 0 ... {len(items_CD) - 1}, got {low} ... {high}")
    return _by_backend(of, targets_T, backend, uniform_gradient=True)


def log_sum_exp(
    queries_TD: Tensor,
    items_CD: Tensor,
    *,
    temperature: float = 1.0,
    log_weights_C: Tensor | None = None,
    ids_C: Tensor | None = None,
    excluded_T: Tensor | None = None,
    uniform_gradient: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``log(sum_c w_c exp(q . item_c / temperature))`` over the items whose id is not the token's excluded one.

    Where items are spread over processes, each computes that of its own items; ``torch.logsumexp`` over the
    processes' results gives the whole, and its gradient is right for each part.

    Args:
        queries_TD: a query a token, float.
        items_CD: the items, float.
        temperature: divides the dot products.
        log_weights_C: ``log w_c``, float; None means 0. Not differentiated.
        ids_C: int64 what each item stands for; may repeat.
        excluded_T: int64 id that does not count for a token; given with `ids_C`, or not at all.
        uniform_gradient: whether the gradient of the result will probably be equal for all tokens, as in a mean. On
            a CPU forward then takes the gradients too, which saves a matrix product; if that of a token turns out to
            differ, those of the items are computed again.
        backend: which implementation; `auto` takes the fused one of the device.

    Returns:
        (T,), float64 if an input is, else float32; minus infinity, with gradient 0, where no item counts.
        Differentiable in `queries_TD` and `items_CD`.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    of = _checked(queries_TD, items_CD, temperature, log_weights_C, ids_C, excluded_T)
    return _by_backend(of, None, backend, uniform_gradient=uniform_gradient)


def _by_backend(of: Logits, targets_T: Tensor | None, backend: Backend, *, uniform_gradient: bool) -> Tensor:
    backend = choose_backend(backend, of.queries_TD.device)
    if backend == "reference":
        return full_softmax_reference(of, targets_T)
    early = uniform_gradient and torch.is_grad_enabled()
    losses_T: Tensor = FullSoftmax.apply(backend, early, targets_T, *of)
    return losses_T


def _checked(
    queries_TD: Tensor,
    items_CD: Tensor,
    temperature: float,
    log_weights_C: Tensor | None = None,
    ids_C: Tensor | None = None,
    excluded_T: Tensor | None = None,
) -> Logits:
    for argument, tensor in (("queries_TD", queries_TD), ("items_CD", items_CD)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{argument}: expected a float matrix, got {tensor.dtype} {tuple(tensor.shape)}")
    if items_CD.shape[1] != queries_TD.shape[1]:
        raise ValueError(f"items_CD: expected width {queries_TD.shape[1]} like queries_TD, got {items_CD.shape[1]}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a number above 0")
    if (ids_C is None) != (excluded_T is None):
        missing = "ids_C" if ids_C is None else "excluded_T"
        raise ValueError(f"{missing}=None: expected both ids_C and excluded_T, or neither")
    num_tokens, num_items = queries_TD.shape[0], items_CD.shape[0]
    wanted: list[tuple[str, Any, int, bool]] = [
        ("log_weights_C", log_weights_C, num_items, True),
        ("ids_C", ids_C, num_items, False),
        ("excluded_T", excluded_T, num_tokens, False),
    ]
    for argument, tensor, size, is_float in wanted:
        if tensor is None:
            continue
        if tensor.shape != (size,) or (not tensor.is_floating_point() if is_float else tensor.dtype != torch.int64):
            raise ValueError(
                f"{argument}: expected {'floats' if is_float else 'int64'} of shape {(size,)}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}"
            )
    for argument, tensor in (("items_CD", items_CD), *((name, tensor) for name, tensor, *_ in wanted)):
        if tensor is not None and tensor.device != queries_TD.device:
            raise ValueError(f"{argument}: expected the device of queries_TD, {queries_TD.device}, got {tensor.device}")
    dtype = torch.promote_types(queries_TD.dtype, items_CD.dtype)
    if log_weights_C is not None:
        log_weights_C = log_weights_C.detach().to(torch.promote_types(dtype, torch.float32))
    return Logits(queries_TD.to(dtype), items_CD.to(dtype), 1 / temperature, log_weights_C, ids_C, excluded_T)


def full_softmax_flops(num_tokens: int, num_items: int, dim: int) -> int:
    """Forward floating-point operations: the dot products.

    A backward pass has twice as many; `full_softmax_recomputed_flops` says what it computes anew beside.

    Args:
        num_tokens: tokens with a target.
        num_items: all items.
        dim: width of the embeddings.
    """
    return 2 * num_tokens * num_items * dim


def full_softmax_recomputed_flops(
    num_tokens: int,
    num_items: int,
    dim: int,
    *,
    device: torch.device,
    uniform_gradient: bool = True,
    backend: Backend = "auto",
) -> int:
    """What is computed twice of the forward's operations, in float32; arguments as of `full_softmax_flops`.

    Args:
        num_tokens: tokens with a target.
        num_items: all items.
        dim: width of the embeddings.
        device: of the tensors.
        uniform_gradient: as of `log_sum_exp`, and come true; `full_softmax_loss` expects it.
        backend: which implementation.
    """
    chosen = choose_backend(backend, device)
    if chosen == "reference":
        return 0
    if chosen == "cpu" and not cpu.recomputes(num_tokens, num_items, uniform_gradient=uniform_gradient):
        return 0
    # On a GPU the gradients of queries and of items have a kernel each, and each kernel makes the logits.
    return (2 if chosen == "triton" else 1) * full_softmax_flops(num_tokens, num_items, dim)


def full_softmax_bytes(num_tokens: int, num_items: int, dim: int, *, element_size: int = 4) -> int:
    """Bytes that the forward pass must read and write: queries and items once, and a number a token.

    Args:
        num_tokens: tokens with a target.
        num_items: all items.
        dim: width of the embeddings.
        element_size: bytes of one of their numbers.
    """
    return (num_tokens + num_items) * dim * element_size + num_tokens * 4
