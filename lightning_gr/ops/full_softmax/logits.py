"""What the logits of tokens and items are made of; shape suffixes: T tokens, C items, D width."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Logits(NamedTuple):
    """``scale * queries . items + log_weights``, minus infinity where an item's id is the token's excluded one."""

    queries_TD: Tensor
    items_CD: Tensor
    scale: float
    log_weights_C: Tensor | None
    ids_C: Tensor | None
    excluded_T: Tensor | None
