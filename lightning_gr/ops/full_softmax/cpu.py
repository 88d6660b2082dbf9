"""Softmax over items on a CPU: compiled in float32, by tiles of logits otherwise.

Compiled code multiplies in tiles that stay in the cache, and takes the gradients at once where it is told to: see
README.md. Otherwise torch's matrix product makes tiles of logits; a small matrix of them is one tile, and its
exponentials are kept for the backward pass.

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
"""Sizes of a tile: 32 MiB of float64. Smaller ones gain little on one thread, and threads would meet more often."""
_KEPT_BYTES = 128 << 20
"""Exponentials of all logits are kept up to here: backward takes a third less time, or a half."""
_BLOCK_BYTES, _BYTES_OF_ITEM = 64 << 20, 4 * 112
"""Compiled code that takes gradients at once keeps the exponentials of a block of tokens: so many bytes an item."""


def forward(of: Logits, early: tuple[bool, bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The log-sum-exp of each token, and what backward wants: gradients of its sum, or exponentials and their sums.

    Args:
        of: the logits.
        early: whether to take the gradients of queries, and of items, now; followed by compiled code alone.
    """
    of = _widened(of)
    if (native := _native(of)) is None:
        return _forward_by_tiles(of)
    total_T = of.queries_TD.new_full((len(of.queries_TD),), -torch.inf)
    if not any(early) or _BYTES_OF_ITEM * len(of.items_CD) > _BLOCK_BYTES:
        _call(native.log_sum_exp, of, total_T, None, None)
        return total_T, ()
    kept = [_gradient_of(x, of) if wanted else None for x, wanted in zip(of[:2], early, strict=True)]
    _call(native.log_sum_exp, of, total_T, *kept)
    return total_T, tuple(kept)


def backward(
    of: Logits,
    kept: tuple[Tensor | None, ...],
    targets_T: Tensor | None,
    total_T: Tensor,
    gradient_T: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of queries and items, with the logits computed again where what was kept does not suffice."""
    of = _widened(of)
    if (native := _native(of)) is None:
        gradients = _backward_by_tiles(of, kept, total_T, gradient_T)
    else:
        gradients = _backward_compiled(native, of, kept, total_T, gradient_T, wanted)
    d_queries_TD, d_items_CD = gradients
    if targets_T is not None:
        factor_T1 = (gradient_T * of.scale)[:, None]
        if d_queries_TD is not None:
            d_queries_TD.addcmul_(factor_T1, of.items_CD[targets_T], value=-1)
        if d_items_CD is not None:
            d_items_CD.index_add_(0, targets_T, factor_T1 * of.queries_TD, alpha=-1)
    return d_queries_TD, d_items_CD


def recomputes(num_tokens: int, num_items: int, *, uniform_gradient: bool) -> bool:
    """Whether backward computes the float32 logits again."""
    if _library() is None:
        return not keeps_logits(num_tokens, num_items)
    return not uniform_gradient or _BYTES_OF_ITEM * num_items > _BLOCK_BYTES


# ---- compiled --------------------------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL | None:
    return load_native(Path(__file__).with_name("cpu.cpp"))


def _native(of: Logits) -> ctypes.CDLL | None:
    return _library() if of.queries_TD.dtype == torch.float32 else None


def _backward_compiled(
    native: ctypes.CDLL,
    of: Logits,
    kept: tuple[Tensor | None, ...],
    total_T: Tensor,
    gradient_T: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    d_queries_TD, d_items_CD = kept or (None, None)
    if d_queries_TD is not None:
        d_queries_TD = d_queries_TD * gradient_T[:, None]
    if d_items_CD is not None:
        # Taken as if all tokens had the gradient 1.
        uniform = bool((gradient_T == gradient_T[:1]).all())
        d_items_CD = d_items_CD * gradient_T[:1] if uniform and len(gradient_T) else None
    found = (d_queries_TD, d_items_CD)
    anew = [
        _gradient_of(x, of) if want and have is None else None
        for x, want, have in zip(of[:2], wanted, found, strict=True)
    ]
    if any(x is not None for x in anew):
        _call(native.log_sum_exp_backward, of, total_T, gradient_T, *anew)
    both = [x if y is None else y for x, y in zip(found, anew, strict=True)]
    return both[0], both[1]


def _gradient_of(matrix: Tensor, of: Logits) -> Tensor:
    """Where compiled code writes a gradient; it writes none where there are no tokens or no items."""
    return torch.empty_like(matrix) if len(of.queries_TD) and len(of.items_CD) else torch.zeros_like(matrix)


def _call(function: ctypes._NamedFuncPointer, of: Logits, *tensors: Tensor | None) -> None:
    sizes = (len(of.queries_TD), *of.items_CD.shape, torch.get_num_threads())
    if not (sizes[0] and sizes[1]):
        return
    weights_C = None if of.log_weights_C is None else of.log_weights_C.float()
    inputs = (of.queries_TD, of.items_CD, weights_C, of.ids_C, of.excluded_T, *tensors)
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in inputs]
    function(*pointers, ctypes.c_double(of.scale), *(ctypes.c_int64(n) for n in sizes))


# ---- by tiles --------------------------------------------------------------------------------------------------------


def keeps_logits(num_tokens: int, num_items: int, *, element_size: int = 4) -> bool:
    """Whether backward by tiles finds the exponentials of all logits, instead of computing them again."""
    return num_tokens * num_items * element_size <= _KEPT_BYTES


def _forward_by_tiles(of: Logits) -> tuple[Tensor, tuple[Tensor, ...]]:
    """With a running maximum."""
    lowest = torch.finfo(of.queries_TD.dtype).min  # not -inf: where nothing counts, -inf - -inf would be NaN
    maximum_T = of.queries_TD.new_full((len(of.queries_TD),), lowest)
    sum_T = torch.zeros_like(maximum_T)
    size = len(of.queries_TD), len(of.items_CD)
    keeps = keeps_logits(*size, element_size=sum_T.element_size())
    kept: tuple[Tensor, ...] = ()
    for tokens, items, logits_NM in _tiles(of, *(size if keeps else (_TOKENS, _ITEMS))):
        maximum_N, sum_N = maximum_T[tokens], sum_T[tokens]
        before_N = maximum_N.clone()
        torch.maximum(before_N, _completed(of, tokens, items, logits_NM).amax(1), out=maximum_N)
        sum_N *= before_N.sub_(maximum_N).exp_()
        sum_N += logits_NM.sub_(maximum_N[:, None]).exp_().sum(1)
        kept = (logits_NM, sum_T) if keeps else ()
    return maximum_T + sum_T.log(), kept


def _backward_by_tiles(
    of: Logits, kept: tuple[Tensor | None, ...], total_T: Tensor, gradient_T: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    factor_T = gradient_T * of.scale
    if kept:
        exponentials_TC, sum_T = kept
        assert exponentials_TC is not None
        assert sum_T is not None
        # The sum is 0 where no item counts, and otherwise at least 1, the largest exponential.
        share_T1 = (factor_T / sum_T.clamp(min=1))[:, None]
        return (exponentials_TC @ of.items_CD).mul_(share_T1), exponentials_TC.T @ (share_T1 * of.queries_TD)
    d_queries_TD, d_items_CD = torch.zeros_like(of.queries_TD), torch.zeros_like(of.items_CD)
    for tokens, items, logits_NM in _tiles(of, _TOKENS, _ITEMS):
        total_N, factor_N = total_T[tokens], factor_T[tokens]
        _completed(of, tokens, items, logits_NM).sub_(total_N[:, None]).exp_().mul_(factor_N[:, None])
        d_queries_TD[tokens].addmm_(logits_NM, of.items_CD[items])
        d_items_CD[items].addmm_(logits_NM.T, of.queries_TD[tokens])
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
