"""Softmax over a target and its negatives, of rows of one table: checks and dispatch.

Shape suffixes: T tokens, R negatives a token, U rows of the table, D width, K = 1 + R.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.sampled_softmax.fused import GatheredDots, Kernels, kernels_of
from lightning_gr.ops.sampled_softmax.reference import sampled_logits_reference

__all__ = [
    "Kernels",
    "check_places",
    "kernels_of",
    "sampled_logits",
    "sampled_softmax_bytes",
    "sampled_softmax_flops",
    "sampled_softmax_loss",
]


def sampled_softmax_loss(
    queries_TD: Tensor,
    rows_UD: Tensor,
    *,
    targets_T: Tensor,
    negatives_TR: Tensor,
    temperature: float = 1.0,
    log_weights_U: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``log(sum exp(logits of target and negatives)) - target's logit``; a logit is ``q . row / temperature``.

    A negative that is its token's target does not count; one drawn twice counts twice. Differentiable in
    `queries_TD` and `rows_UD`. For cosine similarity normalise both first.

    Args:
        queries_TD: a query a token, float.
        rows_UD: embeddings of the distinct candidates, float.
        targets_T: int64 row of each token's target.
        negatives_TR: int64 rows of its negatives; none, R = 0, gives a loss of 0.
        temperature: divides the dot products.
        log_weights_U: added to the logit of a row where it is a negative, for example ``-log`` of how often it is
            drawn (logQ correction); not differentiated.
        backend: which implementation; `auto` takes the fused one of the device.

    Returns:
        (T,), float64 if an input is, else float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an index is outside the table; the latter is looked at on
            the CPU, and elsewhere only under ``LIGHTNING_GR_DEBUG=1``.
    """
    if targets_T.dim() != 1:
        raise ValueError(f"targets_T: expected one row a token, shape (T,), got {tuple(targets_T.shape)}")
    if negatives_TR.dim() != 2 or negatives_TR.shape[0] != targets_T.shape[0]:
        raise ValueError(
            f"negatives_TR: expected rows for each of {targets_T.shape[0]} targets, shape (T, R), got "
            f"{tuple(negatives_TR.shape)}"
        )
    for name, tensor in (("targets_T", targets_T), ("negatives_TR", negatives_TR)):
        _check_indices(name, tensor, queries_TD, rows_UD)
    if log_weights_U is not None and (
        log_weights_U.shape != rows_UD.shape[:1] or log_weights_U.device != rows_UD.device
    ):
        raise ValueError(
            f"log_weights_U: expected one for each row of rows_UD, shape {tuple(rows_UD.shape[:1])} on "
            f"{rows_UD.device}, got {tuple(log_weights_U.shape)} on {log_weights_U.device}"
        )
    # The target is column 0, so that one pass over the table serves both.
    logits_TK = _logits(
        queries_TD, rows_UD, torch.cat([targets_T[:, None], negatives_TR], 1), temperature=temperature, backend=backend
    )
    if log_weights_U is not None:
        logits_TK += F.pad(log_weights_U.detach().to(logits_TK.dtype)[negatives_TR], (1, 0))
    logits_TK.masked_fill_(F.pad(negatives_TR == targets_T[:, None], (1, 0)), -torch.inf)
    return F.cross_entropy(logits_TK, torch.zeros_like(targets_T), reduction="none")


def sampled_logits(
    queries_TD: Tensor,
    rows_UD: Tensor,
    indices_TK: Tensor,
    *,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """``queries_TD[t] . rows_UD[indices_TK[t, k]] / temperature``, for losses other than the softmax.

    Args:
        queries_TD: a query a token, float.
        rows_UD: embeddings of the distinct candidates, float.
        indices_TK: int64 rows that each token's query is multiplied with; may repeat.
        temperature: divides the dot products.
        backend: which implementation; `auto` takes the fused one of the device.

    Returns:
        (T, K), float64 if an input is, else float32; differentiable in `queries_TD` and `rows_UD`.

    Raises:
        ValueError: as `sampled_softmax_loss`.
    """
    if indices_TK.dim() != 2:
        raise ValueError(f"indices_TK: expected shape (T, K), got {tuple(indices_TK.shape)}")
    _check_indices("indices_TK", indices_TK, queries_TD, rows_UD)
    return _logits(queries_TD, rows_UD, indices_TK, temperature=temperature, backend=backend)


def _logits(queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor, *, temperature: float, backend: Backend) -> Tensor:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a number above 0")
    backend = choose_backend(backend, queries_TD.device)
    if backend == "reference":
        dots_TK = sampled_logits_reference(queries_TD, rows_UD, indices_TK)
    else:
        dots_TK = GatheredDots.apply(queries_TD, rows_UD, indices_TK, backend)
    return dots_TK.div_(temperature)


def _check_indices(name: str, indices: Tensor, queries_TD: Tensor, rows_UD: Tensor) -> None:
    for argument, tensor in (("queries_TD", queries_TD), ("rows_UD", rows_UD)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{argument}: expected a float matrix, got {tensor.dtype} {tuple(tensor.shape)}")
    if rows_UD.shape[1] != queries_TD.shape[1]:
        raise ValueError(f"rows_UD: expected width {queries_TD.shape[1]} like queries_TD, got {rows_UD.shape[1]}")
    if rows_UD.device != queries_TD.device:
        raise ValueError(f"rows_UD: expected the device of queries_TD, {queries_TD.device}, got {rows_UD.device}")
    check_places(name, indices, queries_TD, rows_UD.shape[0])


def check_places(name: str, indices: Tensor, queries_TD: Tensor, num_rows: int) -> None:
    """Refuses indices that do not name rows for each query.

    Args:
        name: of the argument, for the message.
        indices: int64, one or more rows a token.
        queries_TD: a query a token.
        num_rows: rows of the table.

    Raises:
        ValueError: another dtype, device or number of tokens, or an index outside the table; the latter is looked at
            on the CPU, and elsewhere only under ``LIGHTNING_GR_DEBUG=1``.
    """
    if indices.dtype != torch.int64 or indices.device != queries_TD.device:
        raise ValueError(
            f"{name}: expected int64 on the device of queries_TD, {queries_TD.device}, got {indices.dtype} on "
            f"{indices.device}"
        )
    if indices.shape[0] != queries_TD.shape[0]:
        raise ValueError(f"{name}: expected {queries_TD.shape[0]} tokens like queries_TD, got {indices.shape[0]}")
    if indices.numel() and (indices.device.type == "cpu" or os.environ.get("LIGHTNING_GR_DEBUG") == "1"):
        low, high = (int(x) for x in indices.aminmax())
        if low < 0 or high >= num_rows:
            raise ValueError(
                f"{name}: expected rows of rows_UD, 0 ... {num_rows - 1}, got {low} ... {high}; index the "
                "looked-up rows, not the whole table"
            )


def sampled_softmax_flops(num_tokens: int, num_negatives: int, dim: int) -> int:
    """Forward floating-point operations: the dot products; a backward pass has twice as many.

    Args:
        num_tokens: tokens with a target.
        num_negatives: negatives of each.
        dim: width of the embeddings.
    """
    return 2 * num_tokens * (1 + num_negatives) * dim


def sampled_softmax_bytes(num_tokens: int, num_negatives: int, dim: int, *, element_size: int = 4) -> int:
    """Bytes that the forward pass reads and writes when no row stays in a cache: rows, indices, queries, logits.

    Args:
        num_tokens: tokens with a target.
        num_negatives: negatives of each.
        dim: width of the embeddings.
        element_size: bytes of one of their numbers.
    """
    pairs = num_tokens * (1 + num_negatives)
    return pairs * (dim * element_size + 8 + 4) + num_tokens * dim * element_size
