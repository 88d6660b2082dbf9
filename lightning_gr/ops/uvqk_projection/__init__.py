"""The projection at the start of an HSTU block, ``silu(norm(x) W^T + b)``: checks and dispatch.

Shape suffixes: T tokens, D width, E projected width, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.group_layer_norm import check_norm, group_layer_norm_flops
from lightning_gr.ops.group_layer_norm.reference import NormInputs
from lightning_gr.ops.uvqk_projection.reference import uvqk_projection_reference

__all__ = ["uvqk_projection", "uvqk_projection_bytes", "uvqk_projection_flops"]


def uvqk_projection(
    x_TD: Tensor,
    *,
    norm_weight_GD: Tensor,
    norm_bias_GD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    groups_T: Tensor | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    """``silu(norm(x) W^T + b)`` of HSTU (arXiv 2402.17152, eq. 1); the layer splits the result into u, v, q and k.

    Args:
        x_TD: tokens, float.
        norm_weight_GD: factor of the norm by group and column; a plain layer norm has one group.
        norm_bias_GD: added by group and column.
        weight_ED: of the projection.
        bias_E: of the projection.
        groups_T: group of each token, int64 or int32, 0 ... G - 1; None where there is one group.
        eps: added to the variance.
        backend: which implementation; `auto` takes the best one there is for the device.

    Returns:
        (T, E), the dtype of x; under autocast its dtype, in which the product is then taken.

    Raises:
        ValueError: shapes, dtypes or devices disagree; see `group_layer_norm`.
    """
    check_norm(x_TD, groups_T, eps, norm_weight_GD=norm_weight_GD, norm_bias_GD=norm_bias_GD)
    if weight_ED.dim() != 2 or weight_ED.shape[0] < 1 or weight_ED.shape[1] != x_TD.shape[1]:
        raise ValueError(f"weight_ED: expected (projected width, {x_TD.shape[1]}), got shape {tuple(weight_ED.shape)}")
    if bias_E.shape != weight_ED.shape[:1]:
        raise ValueError(f"bias_E: expected {weight_ED.shape[0]} numbers, got shape {tuple(bias_E.shape)}")
    for name, tensor in (("weight_ED", weight_ED), ("bias_E", bias_E)):
        if not tensor.is_floating_point() or tensor.device != x_TD.device:
            raise ValueError(f"{name}: expected floats on {x_TD.device} like x_TD, got {tensor.dtype} {tensor.device}")
    device = x_TD.device.type
    # Autocast leaves float64 alone.
    casts = torch.is_autocast_enabled(device) and x_TD.dtype != torch.float64
    backend = choose_backend(backend, x_TD.device)
    if backend == "cpu":
        from lightning_gr.ops.uvqk_projection.cpu import uvqk_projection_cpu as run
    elif backend == "triton":
        from lightning_gr.ops.uvqk_projection.triton_kernel import uvqk_projection_triton as run
    else:
        run = uvqk_projection_reference
    dtype = torch.get_autocast_dtype(device) if casts else x_TD.dtype
    with torch.autocast(device, enabled=False):
        return run(NormInputs(x_TD, norm_weight_GD, norm_bias_GD, groups_T, None, eps), weight_ED, bias_E, dtype)


def uvqk_projection_flops(num_tokens: int, *, dim: int, projected_dim: int) -> int:
    """Forward floating-point operations: norm, product with bias, and four for each SiLU.

    Args:
        num_tokens: tokens.
        dim: width.
        projected_dim: width of u, v, q and k together.
    """
    norm = group_layer_norm_flops(num_tokens, dim=dim, gate=False)
    return norm + num_tokens * projected_dim * (2 * dim + 1 + 4)


def uvqk_projection_bytes(num_tokens: int, *, dim: int, projected_dim: int, element_size: int = 4) -> int:
    """Bytes that the forward of a training step reads and writes: x, weight, what is kept for backward, and the result.

    Args:
        num_tokens: tokens.
        dim: width.
        projected_dim: width of u, v, q and k together.
        element_size: bytes of an element.
    """
    return (num_tokens * (dim + 2 * projected_dim) + dim * projected_dim) * element_size
