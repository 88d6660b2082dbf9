"""Position and time encodings on a CPU in one pass: compiled in float32, PyTorch in place otherwise.

Shape suffixes: T tokens, D width, R rows of a table.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.native import load_native


def add_encodings_cpu(x_TD: Tensor, rows: list[Tensor], tables: list[Tensor], *, scale: float) -> Tensor:
    """As `add_encodings_reference`; float16 and bfloat16 are computed in float32."""
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    out: Tensor = _AddEncodings.apply(scale, rows, x_TD.to(wide), *(table.to(wide) for table in tables))
    return out.to(x_TD.dtype)


class _AddEncodings(torch.autograd.Function):
    """Keeps nothing but the rows; a table's gradient is the sum of the tokens' that read a row, in their order."""

    @staticmethod
    @override
    def forward(ctx: Any, scale: float, rows: list[Tensor], x_TD: Tensor, *tables: Tensor) -> Tensor:
        ctx.scale, ctx.rows, ctx.num_rows = scale, rows, [len(table) for table in tables]
        native = _native(x_TD)
        if native is None:
            out = x_TD * scale
            for rows_T, table_RD in zip(rows, tables, strict=True):
                out.add_(table_RD.index_select(0, rows_T))
            return out
        x_TD, out = x_TD.contiguous(), torch.empty(x_TD.shape)
        alive = [(rows_T.contiguous(), table.contiguous()) for rows_T, table in zip(rows, tables, strict=True)]
        pointers = [tensor.data_ptr() for pair in alive for tensor in pair] + [None] * (4 - 2 * len(alive))
        native.add_encodings(
            *(ctypes.c_int64(n) for n in (*x_TD.shape, torch.get_num_threads())),
            ctypes.c_float(scale),
            *(ctypes.c_void_p(p) for p in (x_TD.data_ptr(), out.data_ptr(), *pointers)),
        )
        return out

    @staticmethod
    @override
    def backward(ctx: Any, d_out: Tensor) -> Any:
        refuse_second_derivative("add_encodings", "cpu")
        native = _native(d_out)
        d_out = d_out.contiguous()
        d_x = d_out * ctx.scale if ctx.needs_input_grad[2] else None
        d_tables: list[Tensor | None] = []
        for rows_T, num_rows, need in zip(ctx.rows, ctx.num_rows, ctx.needs_input_grad[3:], strict=True):
            if not need:
                d_tables.append(None)
                continue
            d_tables.append(d_out.new_zeros(num_rows, d_out.shape[1]))
            if native is None:
                d_tables[-1].index_add_(0, rows_T, d_out)  # type: ignore[union-attr]
            else:
                rows_T = rows_T.contiguous()
                native.sum_by_row(
                    *(ctypes.c_int64(n) for n in (*d_out.shape, torch.get_num_threads())),
                    *(ctypes.c_void_p(x.data_ptr()) for x in (d_out, rows_T, d_tables[-1])),  # type: ignore[union-attr]
                )
        return None, None, d_x, *d_tables


def _native(x: Tensor) -> Any:
    return load_native(Path(__file__).with_name("cpu.cpp")) if x.dtype == torch.float32 else None
