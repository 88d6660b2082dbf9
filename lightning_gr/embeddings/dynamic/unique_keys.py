"""Distinct keys of a batch, and who owns them: before ids travel, and again where they arrive.

Two-stage deduplication of MTGenRec (arXiv 2505.12663): each stage merges equal keys and adds up how often they occur.

Shape suffixes: N ids, U distinct keys, T tables, T1 tables + 1, W ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.key_slots import first_occurrences, key_hash, signed64, top_bits
from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.native import load_native

_SOURCE = Path(__file__).with_suffix(".cpp")


class UniqueKeys(NamedTuple):
    """Distinct keys, by table and within a table in the order in which they first occur."""

    ids_U: Tensor
    """int64"""
    offsets_T1: list[int]
    """where the keys of each table begin, and the number of keys"""
    inverse_N: Tensor
    """int64, the key of each id"""
    counts_U: Tensor
    """int64, how often each key occurs, or the sum of its weights"""


class Route(NamedTuple):
    """Keys sorted by the rank that owns them and by table, equal ones in their order."""

    order_U: Tensor
    """int64, which key comes where"""
    counts_WT: Tensor
    """int64 on the CPU, keys of each owner and table"""


def unique_keys(ids_N: Tensor, offsets_T1: Sequence[int], weights_N: Tensor | None = None) -> UniqueKeys:
    """Merges equal ids within each table.

    Args:
        ids_N: int64 ids of table 0, then of table 1, ...
        offsets_T1: where the ids of each table begin, and N.
        weights_N: int64, how often each id counts; once where it is None.

    Raises:
        ValueError: the ids are not int64 (N,), the offsets do not go from 0 to N, or there are not N weights.
        MemoryError: there is no memory for the work.
    """
    _check(ids_N, offsets_T1)
    if weights_N is not None and weights_N.shape != ids_N.shape:
        raise ValueError(f"weights_N: expected one for each of {len(ids_N)} ids, got shape {tuple(weights_N.shape)}")
    ids_N = ids_N.contiguous()
    weights_N = None if weights_N is None else weights_N.to(ids_N.device, torch.int64).contiguous()
    native = _native() if ids_N.device.type == "cpu" else None
    if native is None:
        return _unique_in_torch(ids_N, offsets_T1, weights_N)
    size, given_T1 = len(ids_N), _int64(offsets_T1)
    assert size < 1 << 32  # positions take 4 bytes
    ids_U, inverse_N, counts_U, part_ids_N, counts_N = (empty_in_huge_pages(size, dtype=torch.int64) for _ in range(5))
    part_positions_N = empty_in_huge_pages(size, dtype=torch.int32)
    bits, before = torch.empty(2, -(-size // 64), dtype=torch.int64)
    begins_T1 = torch.empty_like(given_T1)
    outputs = (ids_U, begins_T1, inverse_N, counts_U, part_ids_N, part_positions_N, counts_N, bits, before)
    num_keys = native.unique_keys(
        _pointer(ids_N),
        _pointer(given_T1),
        ctypes.c_int64(len(offsets_T1) - 1),
        _pointer(weights_N),
        *(_pointer(x) for x in outputs),
    )
    if num_keys < 0:
        raise MemoryError(f"no memory to find the distinct ones of {len(ids_N):,} ids")
    # Copies, so that the memory of all N is free again.
    return UniqueKeys(ids_U[:num_keys].clone(), begins_T1.tolist(), inverse_N, counts_U[:num_keys].clone())


def route(
    ids_U: Tensor,
    offsets_T1: Sequence[int],
    salts: Sequence[int],
    group_bits: Sequence[int],
    rotations: Sequence[int],
    world_size: int,
) -> Route:
    """Sorts keys by the rank that owns them.

    Keys are owned in groups: those of a table with the same top bits of `key_hash` belong to one rank. Group g of 2**b
    belongs to rank (g * world_size >> b) + rotation, modulo `world_size`.

    Args:
        ids_U: int64 ids of the keys of table 0, then of table 1, ...
        offsets_T1: where the keys of each table begin, and U.
        salts: the salt of each table, see `key_hash`.
        group_bits: b of each table, 0 ... 31.
        rotations: by how many ranks the owners of a table's groups are shifted.
        world_size: how many ranks there are.

    Raises:
        ValueError: an argument has another shape or range.
        MemoryError: there is no memory for the work.
    """
    _check(ids_U, offsets_T1)
    num_tables = len(offsets_T1) - 1
    for name, values in (("salts", salts), ("group_bits", group_bits), ("rotations", rotations)):
        if len(values) != num_tables:
            raise ValueError(f"{name}: expected one for each of {num_tables} tables, got {len(values)}")
    if any(not 0 <= bits < 32 for bits in group_bits):
        raise ValueError(f"group_bits: expected 0 ... 31, got {list(group_bits)}")
    if world_size < 1:
        raise ValueError(f"world_size: expected 1 or more, got {world_size}")
    rotations = [x % world_size for x in rotations]
    native = _native() if ids_U.device.type == "cpu" else None
    if native is None:
        return _route_in_torch(ids_U, offsets_T1, salts, group_bits, rotations, world_size)
    order_U = torch.empty_like(ids_U)
    counts_WT = torch.zeros(world_size, num_tables, dtype=torch.int64)
    by_table = [_int64(x) for x in (offsets_T1, [signed64(x) for x in salts], group_bits, rotations)]
    inputs, outputs = (ids_U.contiguous(), *by_table), (order_U, counts_WT)
    sizes = (ctypes.c_int64(num_tables), ctypes.c_int64(world_size))
    status = native.route(*(_pointer(x) for x in inputs), *sizes, *(_pointer(x) for x in outputs))
    if status < 0:
        raise MemoryError(f"no memory to sort {len(ids_U):,} keys by owner")
    return Route(order_U, counts_WT)


def _unique_in_torch(ids_N: Tensor, offsets_T1: Sequence[int], weights_N: Tensor | None) -> UniqueKeys:
    first_U, inverse_N = first_occurrences(ids_N, _tables(offsets_T1, ids_N.device))
    counts_U = torch.zeros_like(first_U)
    counts_U.index_add_(0, inverse_N, torch.ones_like(ids_N) if weights_N is None else weights_N)
    begins_T1 = torch.searchsorted(first_U, _int64(offsets_T1).to(first_U.device))
    return UniqueKeys(ids_N[first_U], begins_T1.tolist(), inverse_N, counts_U)


def _route_in_torch(
    ids_U: Tensor,
    offsets_T1: Sequence[int],
    salts: Sequence[int],
    group_bits: Sequence[int],
    rotations: Sequence[int],
    world_size: int,
) -> Route:
    owner_U = torch.empty_like(ids_U)
    for table, bits in enumerate(group_bits):
        of_table = slice(offsets_T1[table], offsets_T1[table + 1])
        group = top_bits(key_hash(ids_U[of_table], salts[table]), bits)
        owner_U[of_table] = ((group * world_size >> bits) + rotations[table]) % world_size
    num_tables = len(group_bits)
    cell_U = owner_U * num_tables + _tables(offsets_T1, ids_U.device)
    counts_WT = torch.bincount(cell_U, minlength=world_size * num_tables).view(world_size, num_tables).cpu()
    return Route(torch.argsort(owner_U, stable=True), counts_WT)  # keys lie by table already


def _tables(offsets_T1: Sequence[int], device: torch.device) -> Tensor:
    return torch.repeat_interleave(_int64(offsets_T1).diff()).to(device)


def _check(ids_N: Tensor, offsets_T1: Sequence[int]) -> None:
    if ids_N.dtype != torch.int64 or ids_N.dim() != 1:
        raise ValueError(f"ids: expected int64 ids of shape (N,), got {ids_N.dtype} of shape {tuple(ids_N.shape)}")
    ascends = all(a <= b for a, b in zip(offsets_T1, offsets_T1[1:], strict=False))
    if len(offsets_T1) < 2 or offsets_T1[0] != 0 or offsets_T1[-1] != len(ids_N) or not ascends:
        raise ValueError(f"offsets_T1: expected ascending numbers from 0 to {len(ids_N)}, got {list(offsets_T1)}")


@cache
def _native() -> ctypes.CDLL | None:
    library = load_native(_SOURCE)
    if library is not None:
        library.unique_keys.restype = library.route.restype = ctypes.c_int64
    return library


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
