"""Slots of a KeyIndex: what lies where, and the operations on them in PyTorch.

MTGenRec (arXiv 2505.12663, section 3.1) keeps keys apart from rows, in a power of two of slots, hashed by MurmurHash3's
finaliser, and probes them in groups by a stride of the key's own. Here a group is 8 slots, whose ids are a cache line.
Groups follow each other as `(first + t * stride) mod groups` with an odd stride, which visits every one once; a search
ends at a group that has an empty slot.

Shape suffixes: N keys, K keys still open or a part of all, U new keys, M slots, T tables, S virtual shards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gr.counter_random import mix64
from lightning_gr.ops.huge_pages import empty_in_huge_pages

GROUP = 8
EMPTY, TOMBSTONE = -1, -2
_LOW_32_BITS = (1 << 32) - 1


def signed64(value: int) -> int:
    """The two's-complement int64 of a 64-bit number, signed or not."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def key_hash(ids: Tensor, salts: Tensor | int) -> Tensor:
    """The hash of keys, `mix64(id ^ salt)`: its low bits are a key's home in an index, its high bits its virtual shard.

    Args:
        ids: int64 ids.
        salts: the salt of each id's table (int64, broadcast against `ids`), or one for all.
    """
    return mix64(ids ^ (salts if isinstance(salts, Tensor) else signed64(salts)))


def top_bits(hashes: Tensor, bits: int) -> Tensor:
    """The highest `bits` (0 ... 63) of int64 hashes, as numbers in [0, 2**bits)."""
    return (hashes >> (64 - bits)) & ((1 << bits) - 1) if bits else torch.zeros_like(hashes)


def first_occurrences(ids_N: Tensor, tables_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distinct keys in the order in which they first occur.

    Args:
        ids_N: int64 ids.
        tables_N: the table of each; None where there is one.

    Returns:
        Positions (int64, ascending) of the first of each distinct key, and for each key which of these it is (int64).
    """
    order_N = torch.argsort(ids_N, stable=True)
    if tables_N is not None:
        order_N = order_N[torch.argsort(tables_N[order_N], stable=True)]
    differs_N = torch.ones_like(order_N, dtype=torch.bool)
    sorted_ids_N = ids_N[order_N]
    differs_N[1:] = sorted_ids_N[1:] != sorted_ids_N[:-1]
    if tables_N is not None:
        sorted_tables_N = tables_N[order_N]
        differs_N[1:] |= sorted_tables_N[1:] != sorted_tables_N[:-1]
    # The sort is stable: the first of equal keys is the one that occurs first.
    first_U, by_occurrence_U = torch.sort(order_N[differs_N])
    rank_U = torch.empty_like(by_occurrence_U)
    rank_U[by_occurrence_U] = torch.arange(len(rank_U), device=rank_U.device)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = rank_U[differs_N.cumsum(0) - 1]
    return first_U, inverse_N


class Keys(NamedTuple):
    """Checked keys of a call."""

    ids_N: Tensor
    tables_N: Tensor | None  # int16; None where all are of one table
    table: int

    def at(self, positions_K: Tensor) -> Keys:
        """Some of the keys."""
        tables_K = None if self.tables_N is None else self.tables_N[positions_K]
        return Keys(self.ids_N[positions_K], tables_K, self.table)


class Slots(NamedTuple):
    """The memory of an index, the same for all backends."""

    ids_M: Tensor  # int64, anything where there is no key
    rows_M: Tensor  # int32; -1 empty, -2 a deleted key, behind which searches go on
    tables_M: Tensor | None  # int16; None where there is one table
    salts_T: Tensor

    @property
    def num_groups(self) -> int:
        """Groups of 8 slots, a power of two."""
        return len(self.rows_M) // GROUP

    def hashes(self, keys: Keys) -> Tensor:
        """The hash of each key."""
        return key_hash(keys.ids_N, self.salts_T[keys.table if keys.tables_N is None else keys.tables_N.long()])

    def entries(self) -> tuple[Keys, Tensor]:
        """All keys and their rows (int64), in the order of slots."""
        slots_K = (self.rows_M >= 0).nonzero().flatten()
        tables_K = None if self.tables_M is None else self.tables_M[slots_K]
        return Keys(self.ids_M[slots_K], tables_K, 0), self.rows_M[slots_K].long()


def probe_path(hashes_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The first group in which each key is looked for, and the odd stride to the next ones (modulo `num_groups`)."""
    return hashes_N & (num_groups - 1), ((hashes_N >> 32) & _LOW_32_BITS) | 1


def allocate_slots(capacity: int, num_tables: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, rows and tables of empty slots.

    Raises:
        MemoryError: there is no memory for them.
    """
    empty = empty_in_huge_pages if device.type == "cpu" else torch.empty
    place = {} if device.type == "cpu" else {"device": device}
    try:
        ids_M, rows_M = (empty(capacity, dtype=dtype, **place) for dtype in (torch.int64, torch.int32))
        tables_M = empty(capacity, dtype=torch.int16, **place) if num_tables > 1 else None
    except RuntimeError as error:  # what torch raises for want of memory on every device
        num_bytes = capacity * (12 if num_tables == 1 else 14)
        raise MemoryError(
            f"{capacity:,} slots of a key index, {num_bytes:,} bytes, cannot be had on {device}"
        ) from error
    return ids_M, rows_M.fill_(EMPTY), tables_M


def capacity_for(num_keys: int) -> int:
    """The smallest number of slots in which so many keys fit."""
    capacity = GROUP
    while most_keys(capacity) < num_keys:
        capacity *= 2
    return capacity


def most_keys(capacity: int) -> int:
    """How many keys and tombstones so many slots take: three quarters."""
    return capacity * 3 // 4


class TorchIndex:
    """An index's operations in PyTorch, vectorised, on any device."""

    def find_slots(self, slots: Slots, keys: Keys) -> Tensor:
        """The slot of each key (int64), -1 where absent."""
        found_N = torch.full_like(keys.ids_N, -1)
        open_K = torch.arange(len(found_N), device=found_N.device)
        group_K, stride_K = probe_path(slots.hashes(keys), slots.num_groups)
        while len(open_K):
            rows_K8 = slots.rows_M.view(-1, GROUP)[group_K]
            same_K8 = (slots.ids_M.view(-1, GROUP)[group_K] == keys.ids_N[open_K, None]) & (rows_K8 >= 0)
            if slots.tables_M is not None:
                tables_K1 = keys.table if keys.tables_N is None else keys.tables_N[open_K, None]
                same_K8 &= slots.tables_M.view(-1, GROUP)[group_K] == tables_K1
            hit_K = same_K8.any(1)
            found_N[open_K[hit_K]] = (group_K * GROUP + same_K8.byte().argmax(1))[hit_K]
            on_K = ~hit_K & (rows_K8 != EMPTY).all(1)
            open_K, stride_K = open_K[on_K], stride_K[on_K]
            group_K = (group_K[on_K] + stride_K) & (slots.num_groups - 1)
        return found_N

    def find(self, slots: Slots, keys: Keys) -> Tensor:
        """The row of each key (int64), -1 where absent."""
        found_N = self.find_slots(slots, keys)
        return torch.where(found_N >= 0, slots.rows_M[found_N.clamp(min=0)].long(), -1)

    def insert(self, slots: Slots, keys: Keys, rows_N: Tensor) -> int:
        """Inserts distinct keys that are absent; returns how many tombstones were reused."""
        open_K = torch.arange(len(rows_N), device=rows_N.device)
        group_K, stride_K = probe_path(slots.hashes(keys), slots.num_groups)
        reused = 0
        while len(open_K):
            # In a group the keys of lowest number take the free slots in order; the others go on.
            group_K, order_K = torch.sort(group_K, stable=True)
            open_K, stride_K = open_K[order_K], stride_K[order_K]
            rank_K = torch.arange(len(open_K), device=open_K.device) - torch.searchsorted(group_K, group_K)
            rows_K8 = slots.rows_M.view(-1, GROUP)[group_K]
            free_first_K8 = torch.argsort((rows_K8 >= 0).byte(), dim=1, stable=True)
            wins_K = rank_K < (rows_K8 < 0).sum(1)
            won_K, column_K1 = open_K[wins_K], rank_K[wins_K, None]
            slot_K = group_K[wins_K] * GROUP + free_first_K8[wins_K].gather(1, column_K1)[:, 0]
            reused += int((slots.rows_M[slot_K] == TOMBSTONE).sum())
            slots.ids_M[slot_K] = keys.ids_N[won_K]
            if slots.tables_M is not None:
                slots.tables_M[slot_K] = (
                    torch.tensor(keys.table, dtype=torch.int16, device=slot_K.device)
                    if keys.tables_N is None
                    else keys.tables_N[won_K]
                )
            slots.rows_M[slot_K] = rows_N[won_K].int()
            open_K, stride_K = open_K[~wins_K], stride_K[~wins_K]
            group_K = (group_K[~wins_K] + stride_K) & (slots.num_groups - 1)
        return reused

    def distinct(self, slots: Slots, keys: Keys) -> tuple[Tensor, Tensor]:
        """As `first_occurrences`."""
        return first_occurrences(keys.ids_N, keys.tables_N)

    def find_or_insert(
        self, slots: Slots, keys: Keys, missing_K: Tensor, first_row: int, rows_N: Tensor
    ) -> tuple[Tensor, int]:
        """Inserts the keys at `missing_K`, which are absent, and sets their rows; there is room for all of them.

        Returns:
            Positions of the first of each new key, and how many tombstones were reused.
        """
        first_U, inverse_K = self.distinct(slots, keys.at(missing_K))
        positions_U = missing_K[first_U]
        new_rows_U = torch.arange(first_row, first_row + len(first_U), device=rows_N.device)
        reused = self.insert(slots, keys.at(positions_U), new_rows_U)
        rows_N[missing_K] = first_row + inverse_K
        return positions_U, reused

    def rehash(self, old: Slots, new: Slots) -> None:
        """Puts all keys into empty slots."""
        self.insert(new, *old.entries())

    def entries_of(self, slots: Slots, flags_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, tables and rows of the keys whose (table, virtual shard) is flagged."""
        keys, rows_K = slots.entries()
        tables_K = torch.zeros_like(rows_K) if keys.tables_N is None else keys.tables_N.long()
        shards_K = top_bits(slots.hashes(keys), flags_TS.shape[1].bit_length() - 1)
        chosen_K = flags_TS[tables_K, shards_K]
        return keys.ids_N[chosen_K], tables_K[chosen_K], rows_K[chosen_K]
