"""Softmax over items on a GPU: one pass over tiles of items forward; backward, one kernel for each gradient.

Shape suffixes: T tokens, C items, D width. In kernels t, c and d are the numbers of a tile's tokens, items and columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_gr.ops.full_softmax.logits import Logits

tl: Any  # triton.language and helpers, globals since kernels look them up there
_tile: Any
_slope: Any


def forward(of: Logits, early: tuple[bool, bool]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The log-sum-exp of each token; nothing else is kept, and no gradient taken."""
    total_T = torch.empty(len(of.queries_TD), dtype=torch.float32, device=of.queries_TD.device)
    _launch("forward", len(of.queries_TD), of, total_T)
    return total_T, ()


def backward(
    of: Logits,
    kept: tuple[Tensor | None, ...],
    targets_T: Tensor | None,
    total_T: Tensor,
    gradient_T: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and items, both in any case."""
    d_queries_TD, d_items_CD = (torch.zeros_like(x, dtype=torch.float32) for x in (of.queries_TD, of.items_CD))
    if len(of.queries_TD) and len(of.items_CD):
        # A part of the largest gradient, so that no slope leaves the range of float16.
        peak = gradient_T.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        if targets_T is None:
            targets_T = torch.full_like(gradient_T, -1, dtype=torch.int64)
        tensors = (targets_T, total_T, gradient_T / peak, peak)
        _launch("queries_gradient", len(of.queries_TD), of, *tensors, d_queries_TD)
        _launch("items_gradient", len(of.items_CD), of, *tensors, d_items_CD)
    return d_queries_TD, d_items_CD


def _launch(name: str, size: int, of: Logits, *tensors: Tensor) -> None:
    if of.queries_TD.dtype == torch.float64:
        raise ValueError(
            "full_softmax: backend='triton' takes float32, float16 and bfloat16, got torch.float64; use 'reference'"
        )
    if size == 0:
        return
    (num_tokens, dim), num_items = of.queries_TD.shape, len(of.items_CD)
    block_d = max(16, 1 << (dim - 1).bit_length())
    block = 64 if block_d * of.queries_TD.element_size() <= 512 else 32  # two tiles must fit into shared memory
    with torch.cuda.device_of(of.queries_TD):
        _kernels()[name][(-(-size // block),)](
            of.queries_TD,
            of.items_CD,
            # A pointer that is never followed stands for what is not there.
            *(of.queries_TD if x is None else x for x in (of.log_weights_C, of.ids_C, of.excluded_T)),
            *tensors,
            of.scale,
            num_tokens,
            num_items,
            dim,
            WEIGHTED=of.log_weights_C is not None,
            EXCLUDES=of.ids_C is not None,
            BLOCK=block,
            BLOCK_D=block_d,
            num_stages=2,
        )


@cache
def _kernels() -> dict[str, Any]:
    global tl, _tile, _slope
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _tile(  # type: ignore[no-untyped-def]
        queries, items, t, c, LOG_WEIGHTS, IDS, EXCLUDED, scale, T, C, WEIGHTED: tl.constexpr, EXCLUDES: tl.constexpr
    ):
        """Logits of a tile of tokens and items; what does not count is -inf."""
        logits = tl.dot(queries, tl.trans(items), input_precision="ieee") * scale
        if WEIGHTED:
            logits += tl.load(LOG_WEIGHTS + c, mask=c < C, other=0.0)[None, :]
        counts = (c < C)[None, :] & (t < T)[:, None]
        if EXCLUDES:
            ids = tl.load(IDS + c, mask=c < C, other=0)
            counts = counts & (ids[None, :] != tl.load(EXCLUDED + t, mask=t < T, other=0)[:, None])
        return tl.where(counts, logits, float("-inf"))

    @triton.jit
    def _slope(logits, c, target, total, gradient):  # type: ignore[no-untyped-def]
        """Gradient of the loss in the logits, times 2^14: a small probability would be subnormal in float16."""
        hit = (c[None, :] == target[:, None]).to(tl.float32)
        return (tl.exp(logits - total[:, None]) - hit) * gradient[:, None] * 16384.0

    @triton.jit  # type: ignore[untyped-decorator]
    def forward(  # type: ignore[no-untyped-def]
        QUERIES,
        ITEMS,
        LOG_WEIGHTS,
        IDS,
        EXCLUDED,
        TOTAL,
        scale,
        T,
        C,
        D,
        WEIGHTED: tl.constexpr,
        EXCLUDES: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        queries = tl.load(QUERIES + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        lowest = -3.0e38  # not -inf: where nothing counts, -inf - -inf would be NaN
        maximum = tl.full([BLOCK], lowest, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK).to(tl.int64)
            items = tl.load(ITEMS + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
            logits = _tile(queries, items, t, c, LOG_WEIGHTS, IDS, EXCLUDED, scale, T, C, WEIGHTED, EXCLUDES)
            higher = tl.maximum(maximum, tl.max(logits, 1))
            total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
            maximum = higher
        tl.store(TOTAL + t, maximum + tl.log(total), mask=t < T)

    @triton.jit  # type: ignore[untyped-decorator]
    def queries_gradient(  # type: ignore[no-untyped-def]
        QUERIES,
        ITEMS,
        LOG_WEIGHTS,
        IDS,
        EXCLUDED,
        TARGETS,
        TOTAL,
        GRADIENT,
        PEAK,
        OUT,
        scale,
        T,
        C,
        D,
        WEIGHTED: tl.constexpr,
        EXCLUDES: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        queries = tl.load(QUERIES + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        target = tl.load(TARGETS + t, mask=t < T, other=-1)
        total = tl.load(TOTAL + t, mask=t < T, other=0.0)
        gradient = tl.load(GRADIENT + t, mask=t < T, other=0.0)
        out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK).to(tl.int64)
            items = tl.load(ITEMS + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
            logits = _tile(queries, items, t, c, LOG_WEIGHTS, IDS, EXCLUDED, scale, T, C, WEIGHTED, EXCLUDES)
            slope = _slope(logits, c, target, total, gradient)
            out += tl.dot(slope.to(items.dtype), items, input_precision="ieee")
        out *= tl.load(PEAK) * scale / 16384.0
        tl.store(OUT + t[:, None] * D + d[None, :], out, mask=(t < T)[:, None] & (d < D)[None, :])

    @triton.jit  # type: ignore[untyped-decorator]
    def items_gradient(  # type: ignore[no-untyped-def]
        QUERIES,
        ITEMS,
        LOG_WEIGHTS,
        IDS,
        EXCLUDED,
        TARGETS,
        TOTAL,
        GRADIENT,
        PEAK,
        OUT,
        scale,
        T,
        C,
        D,
        WEIGHTED: tl.constexpr,
        EXCLUDES: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        items = tl.load(ITEMS + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for first in range(0, T, BLOCK):
            t = first + tl.arange(0, BLOCK).to(tl.int64)
            queries = tl.load(
                QUERIES + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
            )
            target = tl.load(TARGETS + t, mask=t < T, other=-1)
            total = tl.load(TOTAL + t, mask=t < T, other=0.0)
            gradient = tl.load(GRADIENT + t, mask=t < T, other=0.0)
            logits = _tile(queries, items, t, c, LOG_WEIGHTS, IDS, EXCLUDED, scale, T, C, WEIGHTED, EXCLUDES)
            slope = _slope(logits, c, target, total, gradient)
            out += tl.dot(tl.trans(slope).to(queries.dtype), queries, input_precision="ieee")
        out *= tl.load(PEAK) * scale / 16384.0
        tl.store(OUT + c[:, None] * D + d[None, :], out, mask=(c < C)[:, None] & (d < D)[None, :])

    return {"forward": forward, "queries_gradient": queries_gradient, "items_gradient": items_gradient}
