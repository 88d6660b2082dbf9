"""Gathered dot products on a GPU: a program a token, and a program a row of the table for the rows' gradient.

Shape suffixes: T tokens, K rows that a token names, U rows of the table, D width, P = T K pairs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

tl: Any  # triton.language, a global since kernels look it up there


def dots(queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``out[t, k] = queries[t] . rows[indices[t, k]]``."""
    (num_tokens, num_named), dim = indices_TK.shape, queries_TD.shape[1]
    dots_TK = torch.empty(indices_TK.shape, dtype=torch.float32, device=queries_TD.device)
    _launch("dots", num_tokens, queries_TD, rows_UD, indices_TK, dots_TK, num_named, dim)
    return dots_TK


def queries_gradient(weights_TK: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``out[t] = sum_k weights[t, k] rows[indices[t, k]]``."""
    (num_tokens, num_named), dim = indices_TK.shape, rows_UD.shape[1]
    out_TD = torch.empty(num_tokens, dim, dtype=torch.float32, device=rows_UD.device)
    _launch("queries_gradient", num_tokens, weights_TK, rows_UD, indices_TK, out_TD, num_named, dim)
    return out_TD


def rows_gradient(weights_TK: Tensor, queries_TD: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
    """``out[u] = sum over (t, k) with indices[t, k] = u of weights[t, k] queries[t]``.

    Pairs are sorted by row: sums of atomics would change from run to run.
    """
    num_named, dim = indices_TK.shape[1], queries_TD.shape[1]
    out_UD = torch.empty(num_rows, dim, dtype=torch.float32, device=queries_TD.device)
    sorted_P, pairs_P = indices_TK.flatten().sort(stable=True)
    bounds = torch.searchsorted(sorted_P, torch.arange(num_rows + 1, device=sorted_P.device))
    _launch("rows_gradient", num_rows, weights_TK, queries_TD, pairs_P, bounds, out_UD, num_named, dim)
    return out_UD


def _launch(name: str, programs: int, *arguments: Any) -> None:
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in arguments):
        raise ValueError(
            "sampled_softmax: backend='triton' takes float32, float16 and bfloat16, got torch.float64; use 'reference'"
        )
    *_, dim = arguments
    if programs == 0 or dim == 0:
        return
    block_d = 1 << (dim - 1).bit_length()
    with torch.cuda.device_of(arguments[0]):
        _kernels()[name][(programs,)](*arguments, BLOCK_D=block_d, BLOCK=max(8, min(64, 4096 // block_d)))


@cache
def _kernels() -> dict[str, Any]:
    global tl
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def dots(QUERIES, ROWS, INDICES, OUT, K, D, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        t = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        query = tl.load(QUERIES + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        for first in range(0, K, BLOCK):
            k = first + tl.arange(0, BLOCK)
            row = tl.load(INDICES + t * K + k, mask=k < K, other=0)
            inside = (k < K)[:, None] & (d < D)[None, :]
            rows = tl.load(ROWS + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(OUT + t * K + k, tl.sum(rows * query[None, :], 1), mask=k < K)

    @triton.jit  # type: ignore[untyped-decorator]
    def queries_gradient(WEIGHTS, ROWS, INDICES, OUT, K, D, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        t = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, K, BLOCK):
            k = first + tl.arange(0, BLOCK)
            row = tl.load(INDICES + t * K + k, mask=k < K, other=0)
            weight = tl.load(WEIGHTS + t * K + k, mask=k < K, other=0.0)
            inside = (k < K)[:, None] & (d < D)[None, :]
            rows = tl.load(ROWS + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(weight[:, None] * rows, 0)
        tl.store(OUT + t * D + d, total, mask=d < D)

    @triton.jit  # type: ignore[untyped-decorator]
    def rows_gradient(WEIGHTS, QUERIES, PAIRS, BOUNDS, OUT, K, D, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        u = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        last = tl.load(BOUNDS + u + 1)
        for first in range(tl.load(BOUNDS + u), last, BLOCK):
            p = first + tl.arange(0, BLOCK)
            pair = tl.load(PAIRS + p, mask=p < last, other=0)
            weight = tl.load(WEIGHTS + pair, mask=p < last, other=0.0)
            inside = (p < last)[:, None] & (d < D)[None, :]
            token = pair // K
            queries = tl.load(QUERIES + token[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(weight[:, None] * queries, 0)
        tl.store(OUT + u * D + d, total, mask=d < D)

    return {"dots": dots, "queries_gradient": queries_gradient, "rows_gradient": rows_gradient}
