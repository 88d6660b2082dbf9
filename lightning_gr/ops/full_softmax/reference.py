"""Softmax over items by the whole matrix of logits: the executable specification.

Shape suffixes: T tokens, C items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.ops.full_softmax.logits import Logits


def full_softmax_reference(of: Logits, targets_T: Tensor | None) -> Tensor:
    """The log-sum-exp of each token, less its target's logit; float16 and bfloat16 are computed in float32."""
    wide = torch.promote_types(of.queries_TD.dtype, torch.float32)
    logits_TC = of.scale * (of.queries_TD.to(wide) @ of.items_CD.to(wide).T)
    if of.log_weights_C is not None:
        logits_TC = logits_TC + of.log_weights_C
    if of.ids_C is not None and of.excluded_T is not None:
        logits_TC = logits_TC.masked_fill(of.ids_C == of.excluded_T[:, None], -torch.inf)
    nothing_T = (logits_TC == -torch.inf).all(1)
    # torch.logsumexp of nothing has the gradient NaN.
    total_T = logits_TC.masked_fill(nothing_T[:, None], 0.0).logsumexp(1).masked_fill(nothing_T, -torch.inf)
    return total_T if targets_T is None else total_T - logits_TC.gather(1, targets_T[:, None])[:, 0]
