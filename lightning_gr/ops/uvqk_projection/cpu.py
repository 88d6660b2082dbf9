"""Norm, projection and SiLU on a CPU, by chunks of tokens whose intermediate results stay in the cache.

Shape suffixes: T tokens, D width, E projected width, G groups, C tokens of a chunk, N blocks of rows.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.group_layer_norm.cpu import norm_backward, norm_forward, widened
from lightning_gr.ops.group_layer_norm.reference import NormInputs
from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.native import load_native

_TOKENS_PER_CHUNK = 2048  # fewer would slow the products down
_ROWS_PER_BLOCK = 64


def uvqk_projection_cpu(norm: NormInputs, weight_ED: Tensor, bias_E: Tensor, dtype: torch.dtype) -> Tensor:
    """As `uvqk_projection_reference`; float16 and bfloat16 are computed in float32."""
    norm = widened(norm)
    wide = norm.x_TD.dtype
    keeps = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*norm, weight_ED, bias_E)
    )
    out_TE: Tensor = _UVQKProjection.apply(keeps, weight_ED.to(wide), bias_E.to(wide), *norm)
    return out_TE.to(dtype)


class _UVQKProjection(torch.autograd.Function):
    """Keeps the product without its bias; norm(x) and the derivative of SiLU are computed again by chunk."""

    @staticmethod
    @override
    def forward(ctx: Any, keeps: bool, weight_ED: Tensor, bias_E: Tensor, *args: Any) -> Tensor:
        norm = NormInputs(*args)
        (num_tokens, dim), width = norm.x_TD.shape, weight_ED.shape[0]
        out_TE = empty_in_huge_pages(num_tokens, width, dtype=weight_ED.dtype)
        product_TE = empty_in_huge_pages(num_tokens, width, dtype=weight_ED.dtype) if keeps else out_TE
        normed_CD = norm.x_TD.new_empty(min(num_tokens, _TOKENS_PER_CHUNK), dim)
        for chunk in _chunks(num_tokens):
            normed = normed_CD[: chunk.stop - chunk.start]
            norm_forward(_part(norm, chunk), out=normed)
            torch.mm(normed, weight_ED.T, out=product_TE[chunk])
            _silu_forward(product_TE[chunk], bias_E, out=out_TE[chunk])
        if keeps:
            ctx.save_for_backward(weight_ED, bias_E, product_TE, *norm[:4])
            ctx.eps = norm.eps
        return out_TE

    @staticmethod
    @override
    def backward(ctx: Any, out_grad_TE: Tensor) -> Any:
        refuse_second_derivative("uvqk_projection", "cpu")
        weight_ED, bias_E, product_TE, x_TD, norm_weight_GD, norm_bias_GD, groups_T = ctx.saved_tensors
        norm = NormInputs(x_TD, norm_weight_GD, norm_bias_GD, groups_T, None, ctx.eps)
        (num_tokens, dim), width, dtype = norm.x_TD.shape, weight_ED.shape[0], weight_ED.dtype
        # The weight's gradient lies transposed: the product over a few tokens is up to 1.5 times as fast that way.
        weight_grad_DE, bias_grad_E = torch.zeros(dim, width, dtype=dtype), torch.zeros_like(bias_E)
        norm_weight_grad_GD, norm_bias_grad_GD = (torch.zeros_like(x) for x in (norm.weight_GD, norm.bias_GD))
        x_grad_TD = empty_in_huge_pages(num_tokens, dim, dtype=dtype)
        longest = min(num_tokens, _TOKENS_PER_CHUNK)
        normed_CD, normed_grad_CD = torch.empty(2, longest, dim, dtype=dtype)
        product_grad_CE = empty_in_huge_pages(longest, width, dtype=dtype)
        for chunk in _chunks(num_tokens):
            part, rows = _part(norm, chunk), slice(0, chunk.stop - chunk.start)
            product_grad, normed, normed_grad = product_grad_CE[rows], normed_CD[rows], normed_grad_CD[rows]
            bias_grad_E += _silu_backward(product_TE[chunk], bias_E, out_grad_TE[chunk], out=product_grad)
            norm_forward(part, out=normed)
            weight_grad_DE.addmm_(normed.T, product_grad)
            torch.mm(product_grad, weight_ED, out=normed_grad)
            weight_part_GD, bias_part_GD = norm_backward(part, normed_grad, x_grad_out=x_grad_TD[chunk])
            norm_weight_grad_GD += weight_part_GD
            norm_bias_grad_GD += bias_part_GD
        norm_grads = (x_grad_TD, norm_weight_grad_GD, norm_bias_grad_GD)
        return None, weight_grad_DE.T.contiguous(), bias_grad_E, *norm_grads, *[None] * 5


def _part(norm: NormInputs, chunk: slice) -> NormInputs:
    return norm._replace(x_TD=norm.x_TD[chunk], groups_T=None if norm.groups_T is None else norm.groups_T[chunk])


def _chunks(num_tokens: int) -> list[slice]:
    size = _TOKENS_PER_CHUNK
    return [slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size)]


def _silu_forward(product_CE: Tensor, bias_E: Tensor, *, out: Tensor) -> None:
    """Writes ``silu(product + bias)``; `out` may be `product_CE`."""
    native = load_native(Path(__file__).with_name("cpu.cpp")) if product_CE.dtype == torch.float32 else None
    if native is None:
        torch.add(product_CE, bias_E, out=out)
        F.silu(out, inplace=True)
        return
    bias_E = bias_E.contiguous()
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (product_CE, bias_E, out))
    native.silu_forward(*pointers, *(ctypes.c_int64(n) for n in product_CE.shape))


def _silu_backward(product_CE: Tensor, bias_E: Tensor, out_grad_CE: Tensor, *, out: Tensor) -> Tensor:
    """Writes the gradient of the product and returns that of the bias."""
    native = load_native(Path(__file__).with_name("cpu.cpp")) if product_CE.dtype == torch.float32 else None
    if native is None:
        torch.ops.aten.silu_backward.grad_input(out_grad_CE, product_CE + bias_E, grad_input=out)
        return out.sum(0)
    bias_E, out_grad_CE = bias_E.contiguous(), out_grad_CE.contiguous()
    blocks = -(-product_CE.shape[0] // _ROWS_PER_BLOCK)
    bias_grad_NE = torch.empty(blocks, product_CE.shape[1])
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (product_CE, bias_E, out_grad_CE, out, bias_grad_NE))
    native.silu_backward(*pointers, *(ctypes.c_int64(n) for n in (*product_CE.shape, _ROWS_PER_BLOCK)))
    return bias_grad_NE.sum(0)
