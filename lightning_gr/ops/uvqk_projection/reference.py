"""Norm, projection and SiLU in plain PyTorch: the executable specification.

Shape suffixes: T tokens, D width, E projected width, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.ops.group_layer_norm.reference import NormInputs, group_layer_norm_reference


def uvqk_projection_reference(norm: NormInputs, weight_ED: Tensor, bias_E: Tensor, dtype: torch.dtype) -> Tensor:
    """``silu(norm(x) W^T + b)``; see `uvqk_projection`. `dtype` is that of the product and of the result."""
    normed_TD = group_layer_norm_reference(norm)
    return F.silu(F.linear(normed_TD.to(dtype), weight_ED.to(dtype), bias_E.to(dtype)))
