"""Gathered dot products on a CPU: compiled loops in float32, chunks of tokens in PyTorch otherwise.

Shape suffixes: T tokens, K rows that a token names, U rows of the table, D width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_gr.ops.native import load_native

_NUMBERS_AT_ONCE = 1 << 20
"""Numbers of gathered rows that the PyTorch path holds."""


def dots(queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``out[t, k] = queries[t] . rows[indices[t, k]]``."""
    queries_TD, rows_UD = _widened(queries_TD, rows_UD)
    dots_TK = queries_TD.new_empty(indices_TK.shape)
    if not _compiled("dots", queries_TD, rows_UD, indices_TK, dots_TK):
        for chunk in _chunks(indices_TK, rows_UD):
            torch.bmm(rows_UD[indices_TK[chunk]], queries_TD[chunk, :, None], out=dots_TK[chunk, :, None])
    return dots_TK


def queries_gradient(weights_TK: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``out[t] = sum_k weights[t, k] rows[indices[t, k]]``."""
    weights_TK, rows_UD = _widened(weights_TK, rows_UD)
    d_queries_TD = rows_UD.new_zeros(len(indices_TK), rows_UD.shape[1])
    if not _compiled("queries_gradient", weights_TK, rows_UD, indices_TK, d_queries_TD):
        for chunk in _chunks(indices_TK, rows_UD):
            torch.bmm(weights_TK[chunk, None], rows_UD[indices_TK[chunk]], out=d_queries_TD[chunk, None])
    return d_queries_TD


def rows_gradient(weights_TK: Tensor, queries_TD: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
    """``out[u] = sum over (t, k) with indices[t, k] = u of weights[t, k] queries[t]``."""
    weights_TK, queries_TD = _widened(weights_TK, queries_TD)
    d_rows_UD = queries_TD.new_zeros(num_rows, queries_TD.shape[1])
    if not _compiled("rows_gradient", weights_TK, queries_TD, indices_TK, d_rows_UD):
        for chunk in _chunks(indices_TK, queries_TD):
            parts_TKD = weights_TK[chunk, :, None] * queries_TD[chunk, None]
            d_rows_UD.index_add_(0, indices_TK[chunk].flatten(), parts_TKD.flatten(0, 1))
    return d_rows_UD


def _widened(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return one.to(wide), other.to(wide)


def _compiled(name: str, one: Tensor, other: Tensor, indices_TK: Tensor, out: Tensor) -> bool:
    """Runs a function of the C++ file; False where there is none for the dtype or the machine."""
    native = load_native(Path(__file__).with_name("cpu.cpp")) if out.dtype == torch.float32 else None
    if native is None:
        return False
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (one, other, indices_TK, out)]
    getattr(native, name)(*pointers, *(ctypes.c_int64(n) for n in (*indices_TK.shape, other.shape[1])))
    return True


def _chunks(indices_TK: Tensor, matrix: Tensor) -> Iterator[slice]:
    tokens = max(1, _NUMBERS_AT_ONCE // max(1, indices_TK.shape[1] * matrix.shape[1]))
    return (slice(first, first + tokens) for first in range(0, len(indices_TK), tokens))
