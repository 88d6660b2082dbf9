"""Softmax over items on a CPU: tiles of logits, made by torch's matrix product and used in place.

Shape suffixes: T tokens, C items, D width, N tokens of a tile, M items of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_gr.ops.full_softmax.logits import Logits

_TOKENS, _ITEMS = 2048, 2048
"""Sizes of a tile: 16 MiB of float32. Smaller ones are no faster on one thread, and threads would meet more often."""


def forward(of: Logits) -> Tensor:
    """The log-sum-exp of each token, tile by tile with a running maximum."""
    of = _widened(of)
    lowest = torch.finfo(of.queries_TD.dtype).min  # not -inf: where nothing counts, -inf - -inf would be NaN
    maximum_T = of.queries_TD.new_full((len(of.queries_TD),), lowest)
    sum_T = torch.zeros_like(maximum_T)
    for tokens, _, logits_NM in _tiles(of):
        before_N = maximum_T[tokens]
        maximum_N = torch.maximum(before_N, logits_NM.amax(1))
        sum_T[tokens] *= (before_N - maximum_N).exp_()
        sum_T[tokens] += logits_NM.sub_(maximum_N[:, None]).exp_().sum(1)
        maximum_T[tokens] = maximum_N
    return maximum_T + sum_T.log()


def backward(of: Logits, targets_T: Tensor | None, total_T: Tensor, gradient_T: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and items, with the logits computed again."""
    of = _widened(of)
    d_queries_TD, d_items_CD = torch.zeros_like(of.queries_TD), torch.zeros_like(of.items_CD)
    slope_T1 = gradient_T[:, None] * of.scale
    for tokens, items, logits_NM in _tiles(of):
        slope_NM = logits_NM.sub_(total_T[tokens, None]).exp_().mul_(slope_T1[tokens])
        d_queries_TD[tokens].addmm_(slope_NM, of.items_CD[items])
        d_items_CD[items].addmm_(slope_NM.T, of.queries_TD[tokens])
    if targets_T is not None:
        d_queries_TD.addcmul_(slope_T1, of.items_CD[targets_T], value=-1)
        d_items_CD.index_add_(0, targets_T, slope_T1 * of.queries_TD, alpha=-1)
    return d_queries_TD, d_items_CD


def _widened(of: Logits) -> Logits:
    wide = torch.promote_types(of.queries_TD.dtype, torch.float32)
    return of._replace(queries_TD=of.queries_TD.to(wide), items_CD=of.items_CD.to(wide))


def _tiles(of: Logits) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tokens, items and logits of one tile at a time; the caller may overwrite the logits."""
    scratch = of.queries_TD.new_empty(min(len(of.queries_TD), _TOKENS) * min(len(of.items_CD), _ITEMS))
    for tokens in _slices(len(of.queries_TD), _TOKENS):
        scaled_ND = of.queries_TD[tokens] * of.scale
        for items in _slices(len(of.items_CD), _ITEMS):
            shape = (tokens.stop - tokens.start, items.stop - items.start)
            logits_NM = scratch[: shape[0] * shape[1]].view(shape)
            torch.mm(scaled_ND, of.items_CD[items].T, out=logits_NM)
            if of.log_weights_C is not None:
                logits_NM += of.log_weights_C[items]
            if of.ids_C is not None and of.excluded_T is not None:
                logits_NM.masked_fill_(of.ids_C[items] == of.excluded_T[tokens, None], -torch.inf)
            yield tokens, items, logits_NM


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))
