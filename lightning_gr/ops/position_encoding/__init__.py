"""Position and time encodings added to token embeddings: checks and dispatch.

Shape suffixes: B sequences, T tokens of all sequences together, D width, P rows of the position table, N time buckets.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.position_encoding.buckets import gap_buckets
from lightning_gr.ops.position_encoding.cpu import add_encodings_cpu
from lightning_gr.ops.position_encoding.reference import add_encodings_reference

__all__ = ["add_encodings", "encoding_bytes", "encoding_flops", "gap_buckets", "gaps_to_last"]


def add_encodings(
    x_TD: Tensor,
    *,
    positions_T: Tensor | None = None,
    position_table_PD: Tensor | None = None,
    gaps_T: Tensor | None = None,
    time_table_ND: Tensor | None = None,
    bucket_by: Literal["sqrt", "log"] = "sqrt",
    time_unit: float = 60.0,
    bucket_width: float = 1.0,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """``scale * x + position_table[position] + time_table[bucket(gap)]`` in one pass.

    The encoding that Meta's HSTU adds to its input; `sqrt` and a unit of a minute are its choice too.

    Args:
        x_TD: token embeddings, float.
        positions_T: int64 row of the position table for each token, clipped to the table.
        position_table_PD: learned rows, float.
        gaps_T: int64 seconds from each token to the request, or to the last token (`gaps_to_last`); what is below 0
            counts as 0.
        time_table_ND: learned rows, float, by `gap_buckets`.
        bucket_by: whether buckets grow with the square root or the logarithm of the gap.
        time_unit: seconds of one unit of the gap.
        bucket_width: width of a bucket in units of the square root or logarithm.
        scale: factor of `x_TD`; ``sqrt(D)`` makes up for embeddings with a small initial deviation.
        backend: which implementation; `auto` takes that of an enclosing `use_backend`, else the device's.

    Returns:
        (T, D), the dtype of `x_TD`.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument and its value. Under
            ``LIGHTNING_GR_DEBUG=1`` also a position that is not in the table.
    """
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD: expected floats (tokens, width), got {x_TD.dtype} of shape {tuple(x_TD.shape)}")
    _check("positions_T", positions_T, "position_table_PD", position_table_PD, x_TD)
    _check("gaps_T", gaps_T, "time_table_ND", time_table_ND, x_TD)
    if bucket_by not in ("sqrt", "log"):
        raise ValueError(f"bucket_by: expected 'sqrt' or 'log', got {bucket_by!r}")
    for name, number in (("time_unit", time_unit), ("bucket_width", bucket_width)):
        if not number > 0:
            raise ValueError(f"{name}: expected a number above 0, got {number}")
    rows: list[Tensor] = []
    tables: list[Tensor] = []
    if positions_T is not None and position_table_PD is not None:
        num_rows = position_table_PD.shape[0]
        if os.environ.get("LIGHTNING_GR_DEBUG") == "1":
            for i, position in enumerate(positions_T.tolist()):
                if not 0 <= position < num_rows:
                    raise ValueError(f"positions_T[{i}]={position}: expected 0 ... {num_rows - 1}, rows of the table")
        rows.append(positions_T.clamp(0, num_rows - 1))
        tables.append(position_table_PD)
    if gaps_T is not None and time_table_ND is not None:
        rows.append(
            gap_buckets(gaps_T, num_buckets=time_table_ND.shape[0], by=bucket_by, unit=time_unit, width=bucket_width)
        )
        tables.append(time_table_ND)
    implementation: Any = add_encodings_reference
    if (chosen := choose_backend(backend, x_TD.device)) == "cpu":
        implementation = add_encodings_cpu
    elif chosen == "triton":
        from lightning_gr.ops.position_encoding.triton_kernel import add_encodings_triton

        implementation = add_encodings_triton
    out: Tensor = implementation(x_TD, rows, tables, scale=float(scale))
    return out


def _check(rows_name: str, rows_T: Tensor | None, table_name: str, table_RD: Tensor | None, x_TD: Tensor) -> None:
    if (rows_T is None) != (table_RD is None):
        missing, given = (rows_name, table_name) if rows_T is None else (table_name, rows_name)
        raise ValueError(f"{missing}=None: {given} is given; give both, or neither for no such encoding")
    if rows_T is None or table_RD is None:
        return
    if rows_T.shape != x_TD.shape[:1] or rows_T.dtype != torch.int64:
        raise ValueError(
            f"{rows_name}: expected {x_TD.shape[0]} int64 numbers, one a token, got {rows_T.dtype} of shape "
            f"{tuple(rows_T.shape)}"
        )
    if table_RD.dim() != 2 or table_RD.shape[1] != x_TD.shape[1] or table_RD.shape[0] < 1:
        raise ValueError(
            f"{table_name}: expected (rows, {x_TD.shape[1]}), as wide as x_TD, got shape {tuple(table_RD.shape)}"
        )
    if not table_RD.is_floating_point():
        raise ValueError(f"{table_name}: expected a floating dtype, got {table_RD.dtype}")
    for name, tensor in ((rows_name, rows_T), (table_name, table_RD)):
        if tensor.device != x_TD.device:
            raise ValueError(f"{name}: expected the device of x_TD, {x_TD.device}, got {tensor.device}")


def gaps_to_last(times_T: Tensor, layout: JaggedLayout) -> Tensor:
    """Seconds from each token to the last of its sequence, int64 (T,), on the device, without waiting.

    Args:
        times_T: int64 time of each token.
        layout: the sequences.
    """
    if times_T.shape != (layout.num_tokens,) or times_T.dtype != torch.int64:
        raise ValueError(
            f"times_T: expected {layout.num_tokens} int64 seconds, got {times_T.dtype} of shape {tuple(times_T.shape)}"
        )
    return times_T[(layout.offsets_B1[1:] - 1)[layout.sequence_T]] - times_T


def encoding_flops(num_tokens: int, *, width: int, num_tables: int) -> int:
    """Forward floating-point operations: one multiplication, and one addition a table, for each element."""
    return num_tokens * width * (1 + num_tables)


def encoding_bytes(num_tokens: int, *, width: int, num_tables: int, itemsize: int) -> int:
    """Bytes of the forward pass: tokens in and out, a row of each table (from a cache, if it fits), numbers of rows."""
    return num_tokens * ((2 + num_tables) * width * itemsize + 8 * num_tables)
