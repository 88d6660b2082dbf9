"""Position and time encodings on a GPU: one kernel forward; backward, sums of sorted tokens, the same every time.

Shape suffixes: T tokens, D width, R rows of a table, K pieces of rows' tokens. In kernels t and d are the numbers of a
tile's tokens and columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative

tl: Any  # triton.language, a global since kernels look it up there
_TOKENS, _COLUMNS, _PIECE = 16, 128, 64


def add_encodings_triton(x_TD: Tensor, rows: list[Tensor], tables: list[Tensor], *, scale: float) -> Tensor:
    """As `add_encodings_reference`, summed in float32.

    Raises:
        ValueError: float64, which the kernel does not compute in.
    """
    for dtype in (x_TD.dtype, *(table.dtype for table in tables)):
        if dtype == torch.float64:
            raise ValueError(
                "add_encodings: backend='triton' takes float32, float16 and bfloat16, got torch.float64; use "
                "'reference'"
            )
    out: Tensor = _AddEncodings.apply(scale, rows, x_TD, *tables)
    return out


class _AddEncodings(torch.autograd.Function):
    """Keeps nothing but the rows."""

    @staticmethod
    @override
    def forward(ctx: Any, scale: float, rows: list[Tensor], x_TD: Tensor, *tables: Tensor) -> Tensor:
        ctx.scale, ctx.rows, ctx.x_dtype = scale, rows, x_TD.dtype
        ctx.tables = [(len(table), table.dtype) for table in tables]
        x_TD = x_TD.contiguous()
        tables = tuple(table.contiguous() for table in tables)
        out = torch.empty_like(x_TD)
        # A pointer that is never followed stands for a table that is not there.
        rows, given = [*rows, x_TD, x_TD], [*tables, x_TD, x_TD]
        arguments = (x_TD, rows[0], given[0], rows[1], given[1], out, scale, *x_TD.shape)
        _launch("add", -(-len(x_TD) // _TOKENS), x_TD, arguments, TABLES=len(tables), BLOCK=_TOKENS)
        return out

    @staticmethod
    @override
    def backward(ctx: Any, d_out: Tensor) -> Any:
        refuse_second_derivative("add_encodings", "triton")
        d_x = d_out * ctx.scale if ctx.needs_input_grad[2] else None
        d_out = d_out.contiguous()
        d_tables = [
            _sum_by_row(d_out, rows_T, num_rows).to(dtype) if need else None
            for rows_T, (num_rows, dtype), need in zip(ctx.rows, ctx.tables, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, d_x, *d_tables


def _sum_by_row(d_out: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
    """(R, D) float32: for each row the sum of the tokens that read it.

    Sorted by row, each row's tokens are cut into pieces of at most 64, so that a row that most tokens read is the work
    of many programs. How many pieces there are stays on the device; the grid is the most there can be.
    """
    (num_tokens, dim), device = d_out.shape, d_out.device
    sorted_T, order_T = rows_T.sort(stable=True)
    starts_R1 = torch.searchsorted(sorted_T, torch.arange(num_rows + 1, device=device))
    pieces_R = (starts_R1.diff() + _PIECE - 1) // _PIECE
    ends_R = pieces_R.cumsum(0)
    most = num_tokens // _PIECE + min(num_rows, num_tokens)
    piece_K = torch.arange(most, device=device)
    row_K = torch.searchsorted(ends_R, piece_K, right=True).clamp(max=num_rows - 1)
    begin_K = starts_R1[row_K] + (piece_K - (ends_R - pieces_R)[row_K]) * _PIECE
    end_K = torch.minimum(begin_K + _PIECE, starts_R1[row_K + 1])  # before the beginning where there is no such piece
    part_KD = torch.empty(most, dim, dtype=torch.float32, device=device)
    _launch("sum_runs", most, d_out, (d_out, order_T, begin_K, end_K, part_KD, dim), INDIRECT=True, BLOCK=_TOKENS)
    sum_RD = torch.empty(num_rows, dim, dtype=torch.float32, device=device)
    runs = (part_KD, order_T, ends_R - pieces_R, ends_R, sum_RD, dim)
    _launch("sum_runs", num_rows, d_out, runs, INDIRECT=False, BLOCK=_TOKENS)
    return sum_RD


def _launch(name: str, programs: int, like_TD: Tensor, arguments: tuple[Any, ...], **constants: Any) -> None:
    dim = like_TD.shape[1]
    if programs and dim:
        block_d = min(_COLUMNS, max(16, 1 << (dim - 1).bit_length()))
        with torch.cuda.device_of(like_TD):
            _kernels()[name][(programs, -(-dim // block_d))](*arguments, BLOCK_D=block_d, **constants)


@cache
def _kernels() -> dict[str, Any]:
    global tl
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def add(  # type: ignore[no-untyped-def]
        X,
        ROWS_1,
        TABLE_1,
        ROWS_2,
        TABLE_2,
        OUT,
        scale,
        T,
        D,
        TABLES: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (t < T)[:, None] & (d < D)[None, :]
        total = tl.load(X + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32) * scale
        if TABLES > 0:
            row = tl.load(ROWS_1 + t, mask=t < T, other=0)
            total += tl.load(TABLE_1 + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if TABLES > 1:
            row = tl.load(ROWS_2 + t, mask=t < T, other=0)
            total += tl.load(TABLE_2 + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + t[:, None] * D + d[None, :], total.to(OUT.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def sum_runs(  # type: ignore[no-untyped-def]
        X,
        ORDER,
        BEGIN,
        END,
        SUM,
        D,
        INDIRECT: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """SUM[program] = the sum of X[BEGIN ... END - 1], or of X[ORDER[...]]; 0 where there is nothing."""
        program = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        begin = tl.load(BEGIN + program)
        end = tl.load(END + program)
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(begin, end, BLOCK):
            t = first + tl.arange(0, BLOCK)
            token = tl.load(ORDER + t, mask=t < end, other=0) if INDIRECT else t
            inside = (t < end)[:, None] & (d < D)[None, :]
            values = tl.load(X + token[:, None] * D + d[None, :], mask=inside, other=0.0)
            total += tl.sum(values.to(tl.float32), 0)
        tl.store(SUM + program * D + d, total, mask=d < D)

    return {"add": add, "sum_runs": sum_runs}
