"""Logits of named rows by materialising them: the executable specification.

Shape suffixes: T tokens, K rows that a token names, U rows of the table, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_logits_reference(queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
    """``queries_TD[t] . rows_UD[indices_TK[t, k]]``; float16 and bfloat16 are computed in float32."""
    wide = torch.promote_types(torch.promote_types(queries_TD.dtype, rows_UD.dtype), torch.float32)
    return (queries_TD.to(wide)[:, None] * rows_UD.to(wide)[indices_TK]).sum(-1)
