"""Rows expanded to the positions that want them, or pooled in bags at once, with gradients summed in order of position.

On a CPU in float32 the sums are compiled: equal places are brought together by a counting sort, and each row is summed
by one thread, so no result depends on the number of threads. Elsewhere, and for `backend="reference"`, it is PyTorch.

Shape suffixes: U distinct rows, N positions, B bags (B1: B + 1), D width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import Backend, choose_backend, refuse_second_derivative
from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.native import load_native

_SOURCE = Path(__file__).with_name("gather_rows.cpp")

PoolingMode = Literal["sum", "mean"]


def gather_rows(rows_UD: Tensor, inverse_N: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``rows_UD[inverse_N]``, differentiable.

    Args:
        rows_UD: floating point.
        inverse_N: int64 places in `rows_UD`.
        backend: `reference` is differentiable twice.

    Returns:
        (N, D) of the rows' dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a place out of range.
    """
    _check(rows_UD, inverse_N, "rows_UD")
    if _is_compiled(rows_UD, backend):
        (out_ND,) = _GatherPieces.apply(rows_UD, inverse_N, len(inverse_N))
        return out_ND
    # In 16 bits, sums of many gradients would lose the last ones.
    return _widened(rows_UD).index_select(0, inverse_N).to(rows_UD.dtype)


def gather_pieces(
    rows_UD: Tensor, inverse_N: Tensor, sizes: Sequence[int], *, backend: Backend = "auto"
) -> list[Tensor]:
    """``rows_UD[inverse_N].split(sizes)``, differentiable; gradients of the pieces are never put together.

    Args:
        rows_UD: floating point.
        inverse_N: int64 places in `rows_UD`.
        sizes: of the pieces, together N.
        backend: `reference` is differentiable twice.

    Returns:
        For each size (n, D) of the rows' dtype.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit, or a place out of range.
    """
    _check(rows_UD, inverse_N, "rows_UD")
    if any(size < 0 for size in sizes) or sum(sizes) != len(inverse_N):
        raise ValueError(f"sizes={[*sizes]}: expected numbers of positions that are {len(inverse_N)} together")
    if not sizes:
        return []
    if _is_compiled(rows_UD, backend):
        return [*_GatherPieces.apply(rows_UD, inverse_N, *sizes)]
    return [*gather_rows(rows_UD, inverse_N, backend=backend).split([*sizes])]


def sum_rows(grads_ND: Tensor, inverse_N: Tensor, num_rows: int) -> Tensor:
    """The sum of the gradients of each place, in order of position; not differentiable itself.

    Args:
        grads_ND: floating point.
        inverse_N: int64 places, 0 ... `num_rows` - 1.
        num_rows: U.

    Returns:
        (U, D) of the gradients' dtype; zeros for a place that does not occur.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a place out of range.
    """
    _check(grads_ND, inverse_N, "grads_ND")
    if len(grads_ND) != len(inverse_N):
        raise ValueError(f"inverse_N: {len(inverse_N)} places for {len(grads_ND)} gradients; give one each")
    grads_ND = grads_ND.detach()
    if _is_compiled(grads_ND, "auto"):
        return _sum(grads_ND, inverse_N, num_rows)
    wide_ND = _widened(grads_ND)
    sums_UD = wide_ND.new_zeros(num_rows, grads_ND.shape[1])
    return sums_UD.index_add_(0, inverse_N, wide_ND).to(grads_ND.dtype)


def segment_pool(
    rows_UD: Tensor,
    inverse_N: Tensor,
    offsets_B1: Tensor,
    mode: PoolingMode = "sum",
    weights_N: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Sums or means of ``weights_N * rows_UD[inverse_N]`` over bags, differentiable in rows and weights.

    The expanded rows are never made where it is compiled.

    Args:
        rows_UD: floating point.
        inverse_N: int64 places in `rows_UD`.
        offsets_B1: int64, where each bag's positions begin, from 0 to N.
        mode: `mean` divides by the bag's number of positions, whatever their weights, as TorchRec does.
        weights_N: of the rows' dtype; None is all ones.
        backend: `reference` is differentiable twice.

    Returns:
        (B, D) of the rows' dtype; zeros for an empty bag.

    Raises:
        ValueError: shapes, dtypes or a mode that do not fit, offsets out of order, or a place out of range.
    """
    _check(rows_UD, inverse_N, "rows_UD")
    if mode not in get_args(PoolingMode):
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(get_args(PoolingMode))}")
    if weights_N is not None and weights_N.shape != inverse_N.shape:
        raise ValueError(f"weights_N: shape {tuple(weights_N.shape)}; expected one for each of {len(inverse_N)} places")
    if offsets_B1.dtype != torch.int64 or offsets_B1.ndim != 1 or not len(offsets_B1):
        raise ValueError(f"offsets_B1: {offsets_B1.dtype} {tuple(offsets_B1.shape)}; expected int64 (B + 1,)")
    sizes_B = offsets_B1.diff()
    if offsets_B1.device.type == "cpu":
        ends = int(offsets_B1[0]), int(offsets_B1[-1])
        if ends != (0, len(inverse_N)) or bool((sizes_B < 0).any()):
            raise ValueError(f"offsets_B1: expected ascending numbers from 0 to {len(inverse_N)}")
    N = len(inverse_N)
    wide = torch.promote_types(rows_UD.dtype, torch.float32)
    scale_N = None if weights_N is None else weights_N.to(wide)
    if mode == "mean":
        share_N = sizes_B.clamp(min=1).to(wide).reciprocal().repeat_interleave(sizes_B, output_size=N)
        scale_N = share_N if scale_N is None else scale_N * share_N
    if _is_compiled(rows_UD, backend):
        return _Pool.apply(rows_UD, inverse_N, offsets_B1, scale_N)
    expanded_ND = _widened(rows_UD).index_select(0, inverse_N)
    if scale_N is not None:
        expanded_ND = expanded_ND * scale_N[:, None]
    pooled_BD = expanded_ND.new_zeros(len(sizes_B), rows_UD.shape[1])
    pooled_BD = pooled_BD.index_add(0, _bag_of_each(offsets_B1, N), expanded_ND)
    return pooled_BD.to(rows_UD.dtype)


def _check(rows: Tensor, inverse_N: Tensor, name: str) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"{name}: {rows.dtype} {tuple(rows.shape)}; expected floating point of two dimensions")
    if inverse_N.ndim != 1 or inverse_N.dtype != torch.int64:
        raise ValueError(f"inverse_N: {inverse_N.dtype} {tuple(inverse_N.shape)}; expected int64 of one dimension")


def _bag_of_each(offsets_B1: Tensor, N: int) -> Tensor:
    sizes_B = offsets_B1.diff()
    return torch.arange(len(sizes_B), device=sizes_B.device).repeat_interleave(sizes_B, output_size=N)


def _widened(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _is_compiled(rows: Tensor, backend: Backend) -> bool:
    if choose_backend(backend, rows.device) != "cpu":
        return False
    return rows.dtype == torch.float32 and _native() is not None


def _native() -> ctypes.CDLL | None:
    return load_native(_SOURCE)


def _run(name: str, *arguments: Tensor | int | None) -> None:
    function = getattr(_native(), name)
    function.restype = ctypes.c_int64
    wrong = function(
        *(
            ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(None if x is None else x.data_ptr())
            for x in arguments
        )
    )
    if wrong:
        raise ValueError(f"inverse_N: {wrong} places are not those of a row")


def _sum(
    grads: Tensor, inverse_N: Tensor, num_rows: int, source_N: Tensor | None = None, scale_N: Tensor | None = None
) -> Tensor:
    """For each row the sum of ``scale_N * grads[source_N]`` over its positions."""
    grads, inverse_N = grads.contiguous(), inverse_N.contiguous()
    D = grads.shape[1]
    sums_UD = empty_in_huge_pages(num_rows, D, dtype=torch.float32)
    _run("sum", grads, source_N, scale_N, inverse_N, len(inverse_N), num_rows, D, sums_UD)
    return sums_UD


class _GatherPieces(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, rows_UD: Tensor, inverse_N: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        rows_UD, inverse_N = rows_UD.contiguous(), inverse_N.contiguous()
        U, D = rows_UD.shape
        pieces = tuple(empty_in_huge_pages(size, D, dtype=torch.float32) for size in sizes)
        for piece_ND, places_N in zip(pieces, inverse_N.split([*sizes]), strict=True):
            _run("gather", rows_UD, places_N, len(places_N), U, D, piece_ND)
        ctx.save_for_backward(inverse_N)
        ctx.num_rows = U
        return pieces

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gather_rows", "cpu")
        (inverse_N,) = ctx.saved_tensors
        pieces = [gradient_ND.contiguous() for gradient_ND in gradients]
        N, U, D = len(inverse_N), ctx.num_rows, pieces[0].shape[1]
        addresses = torch.tensor([piece_ND.data_ptr() for piece_ND in pieces], dtype=torch.int64)
        sizes = torch.tensor([len(piece_ND) for piece_ND in pieces])
        sums_UD = empty_in_huge_pages(U, D, dtype=torch.float32)
        _run("sum_pieces", addresses, sizes, len(pieces), inverse_N, N, U, D, sums_UD)
        return sums_UD, None, *(None for _ in pieces)


class _Pool(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, rows_UD: Tensor, inverse_N: Tensor, offsets_B1: Tensor, scale_N: Tensor | None) -> Tensor:
        rows_UD, inverse_N, offsets_B1 = rows_UD.contiguous(), inverse_N.contiguous(), offsets_B1.contiguous()
        scale_N = None if scale_N is None else scale_N.contiguous()
        (U, D), N, B = rows_UD.shape, len(inverse_N), len(offsets_B1) - 1
        out_BD = empty_in_huge_pages(B, D, dtype=torch.float32)
        _run("pool", rows_UD, inverse_N, scale_N, offsets_B1, B, N, U, D, out_BD)
        ctx.save_for_backward(rows_UD, inverse_N, offsets_B1, scale_N)
        return out_BD

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("segment_pool", "cpu")
        rows_UD, inverse_N, offsets_B1, scale_N = ctx.saved_tensors
        gradient_BD = gradients[0].contiguous()
        (U, D), N = rows_UD.shape, len(inverse_N)
        bag_N = _bag_of_each(offsets_B1, N)
        d_rows_UD = _sum(gradient_BD, inverse_N, U, bag_N, scale_N) if ctx.needs_input_grad[0] else None
        d_scale_N = None
        if ctx.needs_input_grad[3]:
            d_scale_N = torch.empty(N)
            _run("dot", rows_UD, gradient_BD, inverse_N, bag_N, N, U, D, d_scale_N)
        return d_rows_UD, None, None, d_scale_N
