"""Softmax over items on a CPU: tiles of logits by torch's matrix product, and their exponentials in place.

A small matrix of logits is one tile, and its exponentials are kept for the backward pass. Exponentials are compiled in
float32, PyTorch's otherwise.

Shape suffixes: T tokens, C items, D width, N tokens of a tile, M items of a tile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_gr.ops.full_softmax.logits import Logits
from lightning_gr.ops.native import load_native

_TOKENS, _ITEMS = 2048, 2048
"""Sizes of a tile: 16 MiB of float32. Smaller ones gain little on one thread, and threads would meet more often."""
_KEPT_BYTES = 128 << 20
"""Exponentials of all logits are kept up to here: backward takes a third less time, or a half."""


def forward(of: Logits) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The log-sum-exp of each token, tile by tile with a running maximum; exponentials and their sums, if kept."""
    of = _widened(of)
    lowest = torch.finfo(of.queries_TD.dtype).min  # not -inf: where nothing counts, -inf - -inf would be NaN
    maximum_T = of.queries_TD.new_full((len(of.queries_TD),), lowest)
    sum_T = torch.zeros_like(maximum_T)
    size = len(of.queries_TD), len(of.items_CD)
    keeps = keeps_logits(*size, element_size=sum_T.element_size())
    kept: tuple[Tensor, ...] = ()
    for tokens, items, logits_NM in _tiles(of, *(size if keeps else (_TOKENS, _ITEMS))):
        maximum_N, sum_N = maximum_T[tokens], sum_T[tokens]
        if not _compiled("add_exponentials", of, tokens, items, logits_NM, maximum_N, sum_N):
            before_N = maximum_N.clone()
            torch.maximum(before_N, _completed(of, tokens, items, logits_NM).amax(1), out=maximum_N)
            sum_N *= before_N.sub_(maximum_N).exp_()
            sum_N += logits_NM.sub_(maximum_N[:, None]).exp_().sum(1)
        kept = (logits_NM, sum_T) if keeps else ()
    return maximum_T + sum_T.log(), kept


def keeps_logits(num_tokens: int, num_items: int, *, element_size: int = 4) -> bool:
    """Whether backward finds the exponentials of all logits, instead of computing them again."""
    return num_tokens * num_items * element_size <= _KEPT_BYTES


def backward(
    of: Logits, kept: tuple[Tensor, ...], targets_T: Tensor | None, total_T: Tensor, gradient_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and items, with the logits computed again where no exponentials were kept."""
    of = _widened(of)
    factor_T = gradient_T * of.scale
    if kept:
        exponentials_TC, sum_T = kept
        # The sum is 0 where no item counts, and otherwise at least 1, the largest exponential.
        share_T1 = (factor_T / sum_T.clamp(min=1))[:, None]
        d_queries_TD = (exponentials_TC @ of.items_CD).mul_(share_T1)
        d_items_CD = exponentials_TC.T @ (share_T1 * of.queries_TD)
    else:
        d_queries_TD, d_items_CD = torch.zeros_like(of.queries_TD), torch.zeros_like(of.items_CD)
        for tokens, items, logits_NM in _tiles(of, _TOKENS, _ITEMS):
            total_N, factor_N = total_T[tokens], factor_T[tokens]
            if not _compiled("slopes", of, tokens, items, logits_NM, total_N, factor_N):
                _completed(of, tokens, items, logits_NM).sub_(total_N[:, None]).exp_().mul_(factor_N[:, None])
            d_queries_TD[tokens].addmm_(logits_NM, of.items_CD[items])
            d_items_CD[items].addmm_(logits_NM.T, of.queries_TD[tokens])
    if targets_T is not None:
        d_queries_TD.addcmul_(factor_T[:, None], of.items_CD[targets_T], value=-1)
        d_items_CD.index_add_(0, targets_T, factor_T[:, None] * of.queries_TD, alpha=-1)
    return d_queries_TD, d_items_CD


def _widened(of: Logits) -> Logits:
    wide = torch.promote_types(of.queries_TD.dtype, torch.float32)
    return of._replace(queries_TD=of.queries_TD.to(wide), items_CD=of.items_CD.to(wide))


def _tiles(of: Logits, num_tokens: int, num_items: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tokens, items and scaled products of one tile at a time; the caller may overwrite the products."""
    scratch = of.queries_TD.new_empty(min(len(of.queries_TD), num_tokens) * min(len(of.items_CD), num_items))
    for tokens in _slices(len(of.queries_TD), num_tokens):
        scaled_ND = of.queries_TD[tokens] * of.scale
        for items in _slices(len(of.items_CD), num_items):
            shape = (tokens.stop - tokens.start, items.stop - items.start)
            products_NM = scratch[: shape[0] * shape[1]].view(shape)
            torch.mm(scaled_ND, of.items_CD[items].T, out=products_NM)
            yield tokens, items, products_NM


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, max(step, 1)))


def _completed(of: Logits, tokens: slice, items: slice, products_NM: Tensor) -> Tensor:
    """The products made to logits in place, by the weights and what is excluded."""
    if of.log_weights_C is not None:
        products_NM += of.log_weights_C[items]
    if of.ids_C is not None and of.excluded_T is not None:
        products_NM.masked_fill_(of.ids_C[items] == of.excluded_T[tokens, None], -torch.inf)
    return products_NM


def _compiled(name: str, of: Logits, tokens: slice, items: slice, products_NM: Tensor, *by_token: Tensor) -> bool:
    """Runs a function of the C++ file on a tile; False where there is none for the dtype or the machine."""
    native = load_native(Path(__file__).with_name("cpu.cpp")) if products_NM.dtype == torch.float32 else None
    if native is None:
        return False
    parts = ((of.log_weights_C, items), (of.ids_C, items), (of.excluded_T, tokens))
    tensors = (products_NM, *(None if x is None else x[part] for x, part in parts), *by_token)
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    getattr(native, name)(*pointers, *(ctypes.c_int64(n) for n in products_NM.shape))
    return True
