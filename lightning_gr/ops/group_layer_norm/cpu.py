"""Layer norm by group of the token, times a gate, on a CPU: compiled in float32, by the reference otherwise.

Shape suffixes: T tokens, D width, G groups, N blocks of rows.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.group_layer_norm.reference import NormInputs, drop_below, group_layer_norm_reference
from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.native import load_native


def group_layer_norm_cpu(inputs: NormInputs) -> Tensor:
    """As `group_layer_norm_reference`; float16 and bfloat16 are computed in float32."""
    out_TD: Tensor = _GroupLayerNorm.apply(*widened(inputs))
    return out_TD.to(inputs.x_TD.dtype)


def widened(inputs: NormInputs) -> NormInputs:
    """The floats in float32, or in float64 where x is, and the groups in int64."""
    wide = torch.float64 if inputs.x_TD.dtype == torch.float64 else torch.float32
    floats = {name: x.to(wide) for name, x in _floats(inputs).items()}
    groups_T = None if inputs.groups_T is None else inputs.groups_T.to(torch.int64).contiguous()
    return inputs._replace(**floats, groups_T=groups_T)


def _floats(inputs: NormInputs) -> dict[str, Any]:
    """The tensors that are differentiated, by name."""
    return {name: x for name, x in inputs._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()}


class _GroupLayerNorm(torch.autograd.Function):
    """Keeps its inputs alone: statistics of a row in the cache cost nothing to compute again."""

    @staticmethod
    @override
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = NormInputs(*args)
        ctx.save_for_backward(*inputs[:5])
        ctx.settings = inputs[5:]
        out_TD = empty_in_huge_pages(*inputs.x_TD.shape, dtype=inputs.x_TD.dtype)
        norm_forward(inputs, out=out_TD)
        return out_TD

    @staticmethod
    @override
    def backward(ctx: Any, out_grad_TD: Tensor) -> Any:
        refuse_second_derivative("group_layer_norm", "cpu")
        inputs = NormInputs(*ctx.saved_tensors, *ctx.settings)
        x_grad_TD = empty_in_huge_pages(*inputs.x_TD.shape, dtype=inputs.x_TD.dtype)
        gate_grad_TD = None
        if inputs.gate_TD is not None:
            gate_grad_TD = empty_in_huge_pages(*inputs.x_TD.shape, dtype=inputs.x_TD.dtype)
        affine_grads = norm_backward(inputs, out_grad_TD, x_grad_out=x_grad_TD, gate_grad_out=gate_grad_TD)
        return x_grad_TD, *affine_grads, None, gate_grad_TD, None, None, None


class _Arguments(ctypes.Structure):
    """Mirrors `Arguments` in cpu.cpp."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "groups", "gate")),
        ("gate_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("drop_below", ctypes.c_uint32),
        ("kept_scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "num_groups")),
    ]


def norm_forward(inputs: NormInputs, *, out: Tensor) -> None:
    """Writes the result of `widened` inputs; `out` is contiguous."""
    native = _native(inputs)
    if native is None:
        out.copy_(group_layer_norm_reference(inputs))
        return
    arguments, _kept = _arguments(inputs)
    native.norm_forward(ctypes.byref(arguments), ctypes.c_void_p(out.data_ptr()))


def norm_backward(
    inputs: NormInputs, out_grad_TD: Tensor, *, x_grad_out: Tensor, gate_grad_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of x and gate, contiguous both, and returns those of weight and bias."""
    native = _native(inputs)
    if native is None:
        return _backward_by_reference(inputs, out_grad_TD, x_grad_out, gate_grad_out)
    arguments, _kept = _arguments(inputs)
    out_grad_TD = out_grad_TD.contiguous()
    num_groups, dim = inputs.weight_GD.shape
    rows_per_block = max(64, 16 * num_groups)
    blocks = -(-inputs.x_TD.shape[0] // rows_per_block)
    weight_sums_NGD, bias_sums_NGD = sums = torch.empty(2, blocks, num_groups, dim)
    pointers = (
        ctypes.c_void_p(None if x is None else x.data_ptr())
        for x in (out_grad_TD, x_grad_out, gate_grad_out, weight_sums_NGD, bias_sums_NGD)
    )
    native.norm_backward(ctypes.byref(arguments), *pointers, ctypes.c_int64(rows_per_block))
    weight_grad_GD, bias_grad_GD = sums.sum(1)
    return weight_grad_GD, bias_grad_GD


def _backward_by_reference(
    inputs: NormInputs, out_grad_TD: Tensor, x_grad_out: Tensor, gate_grad_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    floats = {name: x.detach().requires_grad_() for name, x in _floats(inputs).items()}
    with torch.enable_grad():
        out_TD = group_layer_norm_reference(inputs._replace(**floats))
    gradients = torch.autograd.grad(out_TD, list(floats.values()), out_grad_TD)
    x_grad_out.copy_(gradients[0])
    if gate_grad_out is not None:
        gate_grad_out.copy_(gradients[3])
    return gradients[1], gradients[2]


def _native(inputs: NormInputs) -> ctypes.CDLL | None:
    return load_native(Path(__file__).with_name("cpu.cpp")) if inputs.x_TD.dtype == torch.float32 else None


def _arguments(inputs: NormInputs) -> tuple[_Arguments, tuple[Tensor | None, ...]]:
    """The arguments, and the tensors that they point to, to be held as long as they are used."""
    x_TD, weight_GD, bias_GD = _rows(inputs.x_TD), inputs.weight_GD.contiguous(), inputs.bias_GD.contiguous()
    groups_T, gate_TD = inputs.groups_T, None if inputs.gate_TD is None else _rows(inputs.gate_TD)
    arguments = _Arguments(
        x=x_TD.data_ptr(),
        x_stride=x_TD.stride(0),
        weight=weight_GD.data_ptr(),
        bias=bias_GD.data_ptr(),
        groups=None if groups_T is None else groups_T.data_ptr(),
        gate=None if gate_TD is None else gate_TD.data_ptr(),
        gate_stride=0 if gate_TD is None else gate_TD.stride(0),
        eps=inputs.eps,
        seed=inputs.seed,
        drop_below=drop_below(inputs.dropout),
        kept_scale=1 / (1 - inputs.dropout),
        rows=x_TD.shape[0],
        dim=x_TD.shape[1],
        num_groups=weight_GD.shape[0],
    )
    return arguments, (x_TD, weight_GD, bias_GD, groups_T, gate_TD)


def _rows(x_TD: Tensor) -> Tensor:
    """The tensor itself where each row lies in one piece, as in a split of wider rows; else a copy."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
