"""Logits of named rows by materialising them: the executable specification.

Shape suffixes: T tokens, K rows that a token names, U rows of the table, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_logits_reference(queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``queries_TD[t] . rows_UD[indices_TK[t, k]]``; float16 and bfloat16 are computed in float32."""
    queries_TD, rows_UD = _widened(queries_TD, rows_UD)
    return (queries_TD[:, None] * rows_UD[indices_TK]).sum(-1)


dots = sampled_logits_reference


def queries_gradient(weights_TK: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``out[t] = sum_k weights[t, k] rows[indices[t, k]]``."""
    weights_TK, rows_UD = _widened(weights_TK, rows_UD)
    return (weights_TK[..., None] * rows_UD[indices_TK]).sum(1)


def rows_gradient(weights_TK: Tensor, queries_TD: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
    """``out[u] = sum over (t, k) with indices[t, k] = u of weights[t, k] queries[t]``."""
    weights_TK, queries_TD = _widened(weights_TK, queries_TD)
    parts_TKD = weights_TK[..., None] * queries_TD[:, None]
    out_UD = queries_TD.new_zeros(num_rows, queries_TD.shape[1])
    return out_UD.index_add_(0, indices_TK.flatten(), parts_TKD.flatten(0, 1))


def _widened(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return one.to(wide), other.to(wide)
