"""Layer norm by group of the token, times a gate, on a GPU: one kernel forward, one backward.

The kernels are plain functions here, which `_kernels` makes Triton's: triton is imported where it is needed only.

Shape suffixes: T tokens, D width, G groups, N programs of the backward.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.group_layer_norm.reference import NormInputs, drop_below

if TYPE_CHECKING:
    import triton.language as tl

# Sums over rows are kept by program and then added, so their number is part of the result: it is fixed.
_BACKWARD_PROGRAMS = 512
_TILE = 4096  # elements that a program holds at once


def group_layer_norm_triton(inputs: NormInputs) -> Tensor:
    """As `group_layer_norm_reference`, in float32 whatever the inputs are."""
    check_dtype(inputs.x_TD, "group_layer_norm")
    out_TD: Tensor = _GroupLayerNorm.apply(*inputs)
    return out_TD


def check_dtype(x_TD: Tensor, op: str) -> None:
    """Raises a ValueError for float64, which the kernels would compute in float32."""
    if x_TD.dtype == torch.float64:
        raise ValueError(
            f"{op}: backend='triton' takes float32, float16 and bfloat16, got torch.float64; use 'reference'"
        )


class _GroupLayerNorm(torch.autograd.Function):
    """Keeps its inputs alone; the backward kernel computes the statistics again."""

    @staticmethod
    @override
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = NormInputs(*args)
        ctx.save_for_backward(*inputs[:5])
        ctx.settings = inputs[5:]
        return norm_forward(inputs, dtype=inputs.x_TD.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, out_grad_TD: Tensor) -> Any:
        refuse_second_derivative("group_layer_norm", "triton")
        x_grad_TD, weight_grad_GD, bias_grad_GD, gate_grad_TD = norm_backward(
            NormInputs(*ctx.saved_tensors, *ctx.settings), out_grad_TD
        )
        return x_grad_TD, weight_grad_GD, bias_grad_GD, None, gate_grad_TD, None, None, None


def norm_forward(inputs: NormInputs, *, dtype: torch.dtype) -> Tensor:
    """The result in `dtype`."""
    x_TD, weight_GD, bias_GD, groups_T, gate_TD, eps, dropout, seed = inputs
    x_TD, gate_TD = _rows(x_TD), None if gate_TD is None else _rows(gate_TD)
    num_tokens, dim = x_TD.shape
    out_TD = torch.empty(num_tokens, dim, dtype=dtype, device=x_TD.device)
    block_t, block_d, warps = _tile(dim)
    if num_tokens:
        with torch.cuda.device_of(x_TD):
            _kernels()["forward"][(-(-num_tokens // block_t),)](
                x_TD,
                x_TD.stride(0),
                weight_GD.contiguous(),
                bias_GD.contiguous(),
                groups_T,
                gate_TD,
                gate_TD.stride(0) if gate_TD is not None else 0,
                out_TD,
                num_tokens,
                eps,
                seed,
                DIM=dim,
                DROP_BELOW=drop_below(dropout),
                KEPT_SCALE=1 / (1 - dropout),
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    return out_TD


def norm_backward(inputs: NormInputs, out_grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight, bias and gate."""
    x_TD, weight_GD, bias_GD, groups_T, gate_TD, eps, dropout, seed = inputs
    x_TD, gate_TD = _rows(x_TD), None if gate_TD is None else _rows(gate_TD)
    num_tokens, dim = x_TD.shape
    x_grad_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    gate_grad_TD = None if gate_TD is None else torch.empty_like(gate_TD, memory_format=torch.contiguous_format)
    block_t, block_d, warps = _tile(dim)
    blocks_per_program = -(-num_tokens // (block_t * _BACKWARD_PROGRAMS))
    programs = -(-num_tokens // (block_t * max(blocks_per_program, 1)))
    sums_2NGD = torch.zeros(2, programs, *weight_GD.shape, dtype=torch.float32, device=x_TD.device)
    if num_tokens:
        with torch.cuda.device_of(x_TD):
            _kernels()["backward"][(programs,)](
                x_TD,
                x_TD.stride(0),
                weight_GD.contiguous(),
                bias_GD.contiguous(),
                groups_T,
                gate_TD,
                gate_TD.stride(0) if gate_TD is not None else 0,
                out_grad_TD.contiguous(),
                x_grad_TD,
                gate_grad_TD,
                sums_2NGD[0],
                sums_2NGD[1],
                num_tokens,
                blocks_per_program,
                eps,
                seed,
                DIM=dim,
                NUM_GROUPS=weight_GD.shape[0],
                DROP_BELOW=drop_below(dropout),
                KEPT_SCALE=1 / (1 - dropout),
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    weight_grad_GD, bias_grad_GD = sums_2NGD.sum(1)
    return x_grad_TD, weight_grad_GD.to(weight_GD.dtype), bias_grad_GD.to(bias_GD.dtype), gate_grad_TD


def _tile(dim: int) -> tuple[int, int, int]:
    """Rows and columns that a program holds at once, and its warps."""
    columns = 1 << (dim - 1).bit_length()
    return max(1, min(32, _TILE // columns)), columns, 8 if columns >= 256 else 4


def _rows(x_TD: Tensor) -> Tensor:
    """The tensor itself where each row lies in one piece, as in a split of wider rows; else a copy."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


@cache
def _kernels() -> dict[str, Any]:
    """The kernels of this file, made by Triton at the first call."""
    global tl, _dropout  # Triton looks up names of a kernel in its module
    import triton
    import triton.language as tl

    _dropout = triton.jit(_dropout)
    often_new = ["num_tokens", "seed", "blocks_per_program"]  # no kernel of its own for numbers with a large power of 2
    return {
        "forward": triton.jit(_forward, do_not_specialize=often_new[:2]),
        "backward": triton.jit(_backward, do_not_specialize=often_new),
    }


def _dropout(seed, rows, columns, DROP_BELOW: tl.constexpr, KEPT_SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    key = seed.to(tl.uint32) + rows.to(tl.uint32) * 0x9E3779B9
    key = (key ^ (key >> 16)) * 0x7FEB352D
    key = (key ^ (key >> 15)) * 0x846CA68B
    key = key ^ (key >> 16)
    bits = key[:, None] ^ columns.to(tl.uint32)[None, :]
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    return tl.where(bits.to(tl.int64) >= DROP_BELOW, KEPT_SCALE, 0.0)


def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    groups_ptr,
    gate_ptr,
    gate_stride,
    out_ptr,
    num_tokens,
    eps,
    seed,
    DIM: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_tokens)[:, None] & (columns < DIM)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / DIM, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 1) / DIM + eps)[:, None]
    if groups_ptr is None:
        affine = columns[None, :] + tl.zeros_like(wide)
    else:
        groups = tl.load(groups_ptr + rows, mask=rows < num_tokens, other=0).to(tl.int64)
        affine = groups[:, None] * DIM + columns[None, :]
    weight = tl.load(weight_ptr + affine, mask=inside, other=0.0).to(tl.float32)
    out = normed * weight + tl.load(bias_ptr + affine, mask=inside, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        out *= tl.load(gate_ptr + wide * gate_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROP_BELOW > 0:
        out *= _dropout(seed, rows, columns, DROP_BELOW, KEPT_SCALE)
    tl.store(out_ptr + wide * DIM + columns[None, :], out, mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    groups_ptr,
    gate_ptr,
    gate_stride,
    out_grad_ptr,
    x_grad_ptr,
    gate_grad_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    num_tokens,
    blocks_per_program,
    eps,
    seed,
    DIM: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    sums_at = program.to(tl.int64) * NUM_GROUPS * DIM + columns
    weight_sum = tl.zeros([BLOCK_D], tl.float32)
    bias_sum = tl.zeros([BLOCK_D], tl.float32)
    for block in range(program * blocks_per_program, (program + 1) * blocks_per_program):
        rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (rows < num_tokens)[:, None] & (columns < DIM)[None, :]
        wide = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + wide * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / DIM, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / DIM + eps)[:, None]
        normed = centred * rstd
        if groups_ptr is None:
            affine = columns[None, :] + tl.zeros_like(wide)
        else:
            groups = tl.load(groups_ptr + rows, mask=rows < num_tokens, other=0).to(tl.int64)
            affine = groups[:, None] * DIM + columns[None, :]
        weight = tl.load(weight_ptr + affine, mask=inside, other=0.0).to(tl.float32)
        at = wide * DIM + columns[None, :]
        grad = tl.load(out_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DROP_BELOW > 0:
            grad *= _dropout(seed, rows, columns, DROP_BELOW, KEPT_SCALE)
        if gate_ptr is not None:
            bias = tl.load(bias_ptr + affine, mask=inside, other=0.0).to(tl.float32)
            tl.store(gate_grad_ptr + at, grad * (normed * weight + bias), mask=inside)
            gate_at = wide * gate_stride + columns[None, :]
            grad *= tl.load(gate_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
        if groups_ptr is None:
            weight_sum += tl.sum(grad * normed, 0)
            bias_sum += tl.sum(grad, 0)
        else:
            for group in range(NUM_GROUPS):
                mine = (groups == group) & (rows < num_tokens)
                if tl.max(mine.to(tl.int32), 0) > 0:
                    # Nobody else writes here. The barrier is for the loop's next turn, which reads it again.
                    here = sums_at + group * DIM
                    own = tl.where(mine[:, None], grad, 0.0)
                    weight_part = tl.load(weight_sums_ptr + here, mask=columns < DIM, other=0.0)
                    weight_part += tl.sum(own * normed, 0)
                    tl.store(weight_sums_ptr + here, weight_part, mask=columns < DIM)
                    bias_part = tl.load(bias_sums_ptr + here, mask=columns < DIM, other=0.0) + tl.sum(own, 0)
                    tl.store(bias_sums_ptr + here, bias_part, mask=columns < DIM)
            tl.debug_barrier()
        grad *= weight
        mean = tl.sum(grad, 1)[:, None] / DIM
        slope = tl.sum(grad * normed, 1)[:, None] / DIM
        tl.store(x_grad_ptr + at, rstd * (grad - mean - normed * slope), mask=inside)
    if groups_ptr is None:
        tl.store(weight_sums_ptr + sums_at, weight_sum, mask=columns < DIM)
        tl.store(bias_sums_ptr + sums_at, bias_sum, mask=columns < DIM)
