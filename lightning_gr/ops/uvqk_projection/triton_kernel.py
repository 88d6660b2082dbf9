"""Norm, projection and SiLU on a GPU: kernels for norm and SiLU around the products of cuBLAS.

Shape suffixes: T tokens, D width, E projected width, G groups, N programs over rows of the backward.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.group_layer_norm.reference import NormInputs
from lightning_gr.ops.group_layer_norm.triton_kernel import check_dtype, norm_backward, norm_forward

if TYPE_CHECKING:
    import triton.language as tl

# Sums over rows are kept by program and then added, so their number is part of the result: it is fixed.
_BACKWARD_PROGRAMS = 128
_BLOCK_T, _BLOCK_E = 16, 256


def uvqk_projection_triton(norm: NormInputs, weight_ED: Tensor, bias_E: Tensor, dtype: torch.dtype) -> Tensor:
    """As `uvqk_projection_reference`; norm and SiLU are computed in float32, the products in `dtype`."""
    check_dtype(norm.x_TD, "uvqk_projection")
    out_TE: Tensor = _UVQKProjection.apply(weight_ED.to(dtype), bias_E, *norm)
    return out_TE


class _UVQKProjection(torch.autograd.Function):
    """Keeps the product without its bias; norm(x) is computed again."""

    @staticmethod
    @override
    def forward(ctx: Any, weight_ED: Tensor, bias_E: Tensor, *args: Any) -> Tensor:
        norm = NormInputs(*args)
        product_TE = torch.mm(norm_forward(norm, dtype=weight_ED.dtype), weight_ED.T)
        ctx.save_for_backward(weight_ED, bias_E, product_TE, *norm[:4])
        ctx.eps = norm.eps
        return _silu_forward(product_TE, bias_E)

    @staticmethod
    @override
    def backward(ctx: Any, out_grad_TE: Tensor) -> Any:
        refuse_second_derivative("uvqk_projection", "triton")
        weight_ED, bias_E, product_TE, x_TD, norm_weight_GD, norm_bias_GD, groups_T = ctx.saved_tensors
        norm = NormInputs(x_TD, norm_weight_GD, norm_bias_GD, groups_T, None, ctx.eps)
        product_grad_TE, bias_grad_E = _silu_backward(product_TE, bias_E, out_grad_TE)
        weight_grad_ED = torch.mm(product_grad_TE.T, norm_forward(norm, dtype=weight_ED.dtype))
        normed_grad_TD = torch.mm(product_grad_TE, weight_ED)
        *norm_grads, _ = norm_backward(norm, normed_grad_TD)
        return weight_grad_ED, bias_grad_E, *norm_grads, *[None] * 5


def _silu_forward(product_TE: Tensor, bias_E: Tensor) -> Tensor:
    num_tokens, width = product_TE.shape
    out_TE = torch.empty_like(product_TE)
    if num_tokens:
        with torch.cuda.device_of(product_TE):
            grid = (-(-num_tokens // _BLOCK_T), -(-width // _BLOCK_E))
            _kernels()["forward"][grid](
                product_TE, bias_E.contiguous(), out_TE, num_tokens, WIDTH=width, BLOCK_T=_BLOCK_T, BLOCK_E=_BLOCK_E
            )
    return out_TE


def _silu_backward(product_TE: Tensor, bias_E: Tensor, out_grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of product and bias."""
    num_tokens, width = product_TE.shape
    product_grad_TE = torch.empty_like(product_TE)
    blocks_per_program = -(-num_tokens // (_BLOCK_T * _BACKWARD_PROGRAMS))
    programs = -(-num_tokens // (_BLOCK_T * max(blocks_per_program, 1)))
    bias_sums_NE = torch.empty(programs, width, dtype=torch.float32, device=product_TE.device)
    if num_tokens:
        with torch.cuda.device_of(product_TE):
            _kernels()["backward"][(programs, -(-width // _BLOCK_E))](
                product_TE,
                bias_E.contiguous(),
                out_grad_TE.contiguous(),
                product_grad_TE,
                bias_sums_NE,
                num_tokens,
                blocks_per_program,
                WIDTH=width,
                BLOCK_T=_BLOCK_T,
                BLOCK_E=_BLOCK_E,
            )
    return product_grad_TE, bias_sums_NE.sum(0).to(bias_E.dtype)


@cache
def _kernels() -> dict[str, Any]:
    """The kernels of this file, made by Triton at the first call."""
    global tl  # Triton looks up names of a kernel in its module
    import triton
    import triton.language as tl

    return {
        "forward": triton.jit(_forward, do_not_specialize=["num_tokens"]),
        "backward": triton.jit(_backward, do_not_specialize=["num_tokens", "blocks_per_program"]),
    }


def _forward(  # type: ignore[no-untyped-def]
    product_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (rows < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    z = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + at, z * tl.sigmoid(z), mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    product_ptr,
    bias_ptr,
    out_grad_ptr,
    product_grad_ptr,
    bias_sums_ptr,
    num_tokens,
    blocks_per_program,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias_sum = tl.zeros([BLOCK_E], tl.float32)
    for block in range(program * blocks_per_program, (program + 1) * blocks_per_program):
        rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (rows < num_tokens)[:, None] & (columns < WIDTH)[None, :]
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        z = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        s = tl.sigmoid(z)
        grad = tl.load(out_grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * s * (1.0 + z * (1.0 - s))
        tl.store(product_grad_ptr + at, grad, mask=inside)
        bias_sum += tl.sum(grad, 0)
    tl.store(bias_sums_ptr + program.to(tl.int64) * WIDTH + columns, bias_sum, mask=columns < WIDTH)
