"""Layer norm by group of the token, times a gate, in plain PyTorch: the executable specification.

Shape suffixes: T tokens, D width, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_LOW_32_BITS = 0xFFFFFFFF


class NormInputs(NamedTuple):
    """What the implementations are called with; `seed` is that of the dropout."""

    x_TD: Tensor
    weight_GD: Tensor
    bias_GD: Tensor
    groups_T: Tensor | None
    gate_TD: Tensor | None
    eps: float
    dropout: float = 0.0
    seed: int = 0


def group_layer_norm_reference(inputs: NormInputs) -> Tensor:
    """``dropout(gate * (norm(x) * weight[group] + bias[group]))``; see `group_layer_norm`."""
    x_TD, weight_GD, bias_GD, groups_T, gate_TD, eps, dropout, seed = inputs
    if groups_T is None:
        out_TD = F.layer_norm(x_TD, x_TD.shape[1:], weight_GD[0].to(x_TD.dtype), bias_GD[0].to(x_TD.dtype), eps)
    else:
        normed_TD = F.layer_norm(x_TD, x_TD.shape[1:], eps=eps)
        # By index_select: its gradient is a plain sum by index, that of weight_GD[groups_T] sorts first.
        weight_TD = weight_GD.to(x_TD.dtype).index_select(0, groups_T)
        out_TD = torch.addcmul(bias_GD.to(x_TD.dtype).index_select(0, groups_T), normed_TD, weight_TD)
    if gate_TD is not None:
        out_TD = out_TD * gate_TD
    if dropout:
        kept_TD = kept_elements(seed, *x_TD.shape, drop_below=drop_below(dropout), device=x_TD.device)
        out_TD = out_TD * kept_TD * (1 / (1 - dropout))
    return out_TD


def drop_below(dropout: float) -> int:
    """An element is dropped where its 32 random bits are below this."""
    return round(dropout * 2**32)


def kept_elements(seed: int, num_tokens: int, dim: int, *, drop_below: int, device: torch.device) -> Tensor:
    """Which elements dropout keeps, bool (T, D): a function of (seed, token, column), so nobody has to store it."""
    tokens_T1 = torch.arange(num_tokens, device=device)[:, None]
    columns_D = torch.arange(dim, device=device)
    bits_TD = _mix(_mix((seed + tokens_T1 * 0x9E3779B9) & _LOW_32_BITS) ^ columns_D)
    return bits_TD >= drop_below


def _mix(x: Tensor) -> Tensor:
    """Scrambles 32 bits held in int64: shifts and products, each of which can be undone."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32_BITS
    return x ^ (x >> 16)
