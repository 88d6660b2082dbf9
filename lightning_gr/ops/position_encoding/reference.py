"""Position and time encodings in plain PyTorch: the executable specification.

Shape suffixes: T tokens, D width, R rows of a table.
"""

from __future__ import annotations

from torch import Tensor


def add_encodings_reference(x_TD: Tensor, rows: list[Tensor], tables: list[Tensor], *, scale: float) -> Tensor:
    """``scale * x`` plus one row of each table (R, D); `rows` says which, int64 (T,), in range."""
    out = scale * x_TD
    for rows_T, table_RD in zip(rows, tables, strict=True):
        out = out + table_RD[rows_T].to(x_TD.dtype)
    return out
