"""Keyed shuffles: where a record of a list goes in a random order of its own, without making the order.

A Feistel network over a rectangle that hardly exceeds the list, walked on while it leaves the list (Black and Rogaway,
Ciphers with arbitrary finite domains, 2002, third method): each record costs the same, however long its list is, and
the way back is as cheap.

Shape suffixes: X records.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_gr.counter_random import counter_bits, mix64, name_key

Array = np.ndarray[Any, Any]
_ROUNDS = 8


def shuffled(places_X: Array, sizes_X: Array, keys_X: Array, *, seed: int, inverse: bool = False) -> Array:
    """Which record stands at each place of a random order.

    The order is a function of (seed, key, size) alone.

    Args:
        places_X: int64 places in the order, in ``0 ... size - 1``.
        sizes_X: records of the list that each place is of, fewer than 2**50.
        keys_X: int64 key of that list.
        seed: of all orders.
        inverse: the place at which each record stands instead.

    Returns:
        int64 records, or places, in ``0 ... size - 1``.
    """
    sizes, keys = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in (sizes_X, keys_X))
    lists = counter_bits(seed, name_key("shuffled"), keys, sizes)
    height = sizes.double().sqrt().ceil().long().clamp_(min=1)
    width = (sizes + height - 1) // height
    found = torch.from_numpy(np.array(places_X, dtype=np.int64))
    left = torch.arange(len(found))
    while len(left):
        found[left] = _network(found[left], lists[left], height[left], width[left], inverse=inverse)
        left = left[found[left] >= sizes[left]]
    result: Array = found.numpy()
    return result


def _network(
    numbers: torch.Tensor, lists: torch.Tensor, height: torch.Tensor, width: torch.Tensor, *, inverse: bool
) -> torch.Tensor:
    row, column = numbers // width, numbers % width
    sign = -1 if inverse else 1
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        if number % 2:
            column = (column + sign * _bits(lists, number, row)) % width
        else:
            row = (row + sign * _bits(lists, number, column)) % height
    return row * width + column


def _bits(lists: torch.Tensor, number: int, other: torch.Tensor) -> torch.Tensor:
    """Random bits, not negative and with room for a sum, of a round and the half that it leaves as it is."""
    return mix64(lists ^ mix64(other * _ROUNDS + number + 1)) & ((1 << 60) - 1)
