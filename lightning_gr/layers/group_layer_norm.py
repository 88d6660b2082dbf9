"""Layer norm whose factors and biases are those of a token's group (MTGR, arXiv 2505.18654, section 3.3).

Shape suffixes: T tokens, D width, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.ops.group_layer_norm import group_layer_norm


class GroupLayerNorm(nn.Module):
    """``norm(x) * weight[group] + bias[group]``: mean and variance are a token's own, affine parameters its group's.

    With equal rows it is `torch.nn.LayerNorm`. Statistics over a whole group would let candidates see each other.

    Args:
        num_groups: groups of tokens.
        dim: width.
        eps: added to the variance.

    Raises:
        ValueError: fewer than 1 group, or a width below 1.
    """

    def __init__(self, *, num_groups: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        for name, size in (("num_groups", num_groups), ("dim", dim)):
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_groups, dim))
        self.bias = nn.Parameter(torch.zeros(num_groups, dim))

    @override
    def forward(self, x_TD: Tensor, groups_T: Tensor) -> Tensor:
        """(T, D) to (T, D).

        Args:
            x_TD: tokens.
            groups_T: int64 group of each token, 0 ... G - 1.

        Raises:
            ValueError: see `lightning_gr.ops.group_layer_norm.group_layer_norm`.
        """
        return group_layer_norm(x_TD, weight_GD=self.weight, bias_GD=self.bias, groups_T=groups_T, eps=self.eps)


def affine_rows(norm: nn.LayerNorm | GroupLayerNorm, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm of `x_TD`, one row a group: what the fused operators take.

    A norm without them has ones and zeros, in at least float32 on the device of `x_TD`.
    """
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    if weight is None or bias is None:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        ones = x_TD.new_ones((1, x_TD.shape[1]), dtype=dtype)
        return ones, torch.zeros_like(ones)
    return (weight, bias) if weight.dim() == 2 else (weight[None], bias[None])
