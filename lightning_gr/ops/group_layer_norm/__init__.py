"""Layer norm with affine parameters by group of the token, times a gate: checks and dispatch.

Shape suffixes: T tokens, D width, G groups.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.group_layer_norm.reference import NormInputs, group_layer_norm_reference

__all__ = ["check_norm", "group_layer_norm", "group_layer_norm_bytes", "group_layer_norm_flops"]


def group_layer_norm(
    x_TD: Tensor,
    *,
    weight_GD: Tensor,
    bias_GD: Tensor,
    groups_T: Tensor | None,
    gate_TD: Tensor | None = None,
    eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``dropout(gate * (norm(x) * weight[group] + bias[group]))``: MTGR's group layer norm (arXiv 2505.18654, eq. 5-6).

    Mean and variance are those of the token over D. With one group and a gate it is HSTU's ``norm(x) * U``.

    Args:
        x_TD: tokens, float.
        weight_GD: factor by group and column.
        bias_GD: added by group and column.
        groups_T: group of each token, int64 or int32, 0 ... G - 1; None where there is one group.
        gate_TD: multiplied with the result, the dtype of x; None for none.
        eps: added to the variance.
        dropout: probability of dropping an element of the result while training. The draw is a function of a seed
            that comes from torch's generator of the CPU, the same on every backend.
        training: whether `dropout` is applied.
        backend: which implementation; `auto` takes the best one there is for the device.

    Returns:
        (T, D), the dtype of x. Half precision is computed in float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a group on the CPU is outside 0 ... G - 1; those on a device
            are looked at under ``LIGHTNING_GR_DEBUG=1``.
    """
    check_norm(x_TD, groups_T, eps, weight_GD=weight_GD, bias_GD=bias_GD)
    if gate_TD is not None:
        if gate_TD.shape != x_TD.shape:
            raise ValueError(f"gate_TD: expected the shape of x_TD, {tuple(x_TD.shape)}, got {tuple(gate_TD.shape)}")
        if gate_TD.dtype != x_TD.dtype or gate_TD.device != x_TD.device:
            raise ValueError(
                f"gate_TD: expected {x_TD.dtype} on {x_TD.device} like x_TD, got {gate_TD.dtype} on {gate_TD.device}"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    backend = choose_backend(backend, x_TD.device)
    if backend == "cpu":
        from lightning_gr.ops.group_layer_norm.cpu import group_layer_norm_cpu as run
    elif backend == "triton":
        from lightning_gr.ops.group_layer_norm.triton_kernel import group_layer_norm_triton as run
    else:
        run = group_layer_norm_reference
    dropout = dropout if training else 0.0
    # Drawn on the host: a draw on a device would have to be read back.
    seed = int(torch.randint(2**31, ())) if dropout else 0
    with torch.autocast(x_TD.device.type, enabled=False):
        return run(NormInputs(x_TD, weight_GD, bias_GD, groups_T, gate_TD, eps, dropout, seed))


def check_norm(x_TD: Tensor, groups_T: Tensor | None, eps: float, **affine: Tensor) -> None:
    """Checks the arguments of a group layer norm.

    Args:
        x_TD: tokens.
        groups_T: group of each token, or None.
        eps: added to the variance.
        **affine: the two parameters, (G, D), by the names that messages call them.

    Raises:
        ValueError: see `group_layer_norm`.
    """
    if x_TD.dim() != 2 or x_TD.shape[1] < 1 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD: expected floats of shape (tokens, width), got {x_TD.dtype} {tuple(x_TD.shape)}")
    num_tokens, dim = x_TD.shape
    num_groups = len(first) if (first := next(iter(affine.values()))).dim() else 0
    for name, tensor in affine.items():
        if tensor.shape != (num_groups, dim) or num_groups < 1:
            raise ValueError(f"{name}: expected ({max(num_groups, 1)} groups, {dim}), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.device != x_TD.device:
            raise ValueError(f"{name}: expected floats on {x_TD.device} like x_TD, got {tensor.dtype} {tensor.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of 0 or more, got {eps}")
    if groups_T is None:
        if num_groups != 1:
            raise ValueError(f"groups_T=None: there are {num_groups} groups; give the group of each token")
        return
    if groups_T.shape != (num_tokens,) or groups_T.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"groups_T: expected int64 or int32 for each of {num_tokens} tokens, got {groups_T.dtype} of shape "
            f"{tuple(groups_T.shape)}"
        )
    if groups_T.device != x_TD.device:
        raise ValueError(f"groups_T: expected the device of x_TD, {x_TD.device}, got {groups_T.device}")
    if num_tokens and (groups_T.device.type == "cpu" or os.environ.get("LIGHTNING_GR_DEBUG") == "1"):
        low, high = (int(x) for x in groups_T.aminmax())
        if low < 0 or high >= num_groups:
            raise ValueError(
                f"groups_T: expected 0 ... {num_groups - 1}, got {low if low < 0 else high}; give as many rows of "
                f"parameters as there are groups"
            )


def group_layer_norm_flops(num_tokens: int, *, dim: int, gate: bool = True) -> int:
    """Forward floating-point operations: two for each of mean, variance, norm and affine, and one for the gate.

    Args:
        num_tokens: tokens.
        dim: width.
        gate: whether there is one.
    """
    return num_tokens * dim * (8 + gate)


def group_layer_norm_bytes(num_tokens: int, *, dim: int, gate: bool = True, element_size: int = 4) -> int:
    """Bytes that one pass reads and writes in the forward: x, gate and result; parameters are small against them.

    Args:
        num_tokens: tokens.
        dim: width.
        gate: whether there is one.
        element_size: bytes of an element.
    """
    return num_tokens * dim * (2 + gate) * element_size
