"""KeyIndex: which row an (id, table) has, by open addressing, apart from the rows themselves.

Memory and search are described in `key_slots`, where the operations are in PyTorch; those in C++ are bound here.

Shape suffixes: N keys, K a part of them, U new keys, M slots or keys to insert, G groups of slots, T tables, S virtual
shards, P parts of the slots.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.embeddings.dynamic.key_slots import (
    EMPTY,
    GROUP,
    TOMBSTONE,
    Keys,
    Slots,
    TorchIndex,
    allocate_slots,
    capacity_for,
    key_hash,
    most_keys,
    signed64,
    top_bits,
)
from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.native import load_native

_SOURCE = Path(__file__).with_suffix(".cpp")

__all__ = ["IndexBackend", "KeyIndex", "Tables", "key_hash", "top_bits"]

Tables = Tensor | int
"""The table of each key (integers (N,)), or one table for all keys."""
IndexBackend = Literal["auto", "native", "torch", "triton"]

_MAX_ROWS = 1 << 31  # rows are int32
_MAX_TABLES = 1 << 15  # tables are int16
_PARTS = 256  # of the slots, in a scan by several threads


class KeyIndex:
    """From (int64 id, table) to a row number, in any number and order; every int64 is an ordinary id.

    Given the same calls, all backends give the same rows for the same keys; only the places of keys, hence the order of
    `entries`, may differ. A call that raises has changed nothing.

    Args:
        salts: a 64-bit number for each table, that sets its hashes apart from those of others (`name_key` of its name).
        capacity: slots to begin with, rounded up to a power of two, 8 at least.
        device: where keys are, and the slots.
        backend: `native` (C++, on a CPU), `torch` (any device), `triton` (CUDA); `auto` is the device's own.

    Raises:
        ValueError: no salts or too many, or a backend that does not run here.
        MemoryError: there is no memory for the slots.
    """

    def __init__(
        self,
        *,
        salts: Sequence[int],
        capacity: int = 64,
        device: torch.device | str = "cpu",
        backend: IndexBackend = "auto",
    ) -> None:
        if not 1 <= len(salts) <= _MAX_TABLES:
            raise ValueError(f"salts: expected one for each of 1 ... {_MAX_TABLES} tables, got {len(salts)}")
        self._device = torch.device(device)
        self._backend = _backend(backend, self._device)
        salts_T = torch.tensor([signed64(x) for x in salts], dtype=torch.int64, device=self._device)
        capacity = max(GROUP, 1 << (capacity - 1).bit_length())
        self._slots = Slots(*allocate_slots(capacity, len(salts), self._device), salts_T)
        self._num_keys = self._num_tombstones = 0

    def find(self, ids_N: Tensor, tables: Tables) -> Tensor:
        """The rows of keys; changes nothing.

        Args:
            ids_N: int64 ids, of which any may occur several times.
            tables: the table of each, or of all.

        Returns:
            int64 rows (N,), -1 where a key is absent.
        """
        return self._backend.find(self._slots, self._checked(ids_N, tables))

    def find_or_insert(self, ids_N: Tensor, tables: Tables, first_row: int) -> tuple[Tensor, Tensor]:
        """The rows of keys; those that are absent are inserted.

        Args:
            ids_N: int64 ids, of which any may occur several times.
            tables: the table of each, or of all.
            first_row: the row of the first new key; the next ones get the rows that follow.

        Returns:
            int64 rows (N,), and the positions (int64, ascending) of the first occurrence of each new key.

        Raises:
            ValueError: the rows would not fit into 31 bits.
            MemoryError: there is no memory for more slots.
        """
        keys = self._checked(ids_N, tables)
        rows_N = self._backend.find(self._slots, keys)
        missing_K = (rows_N < 0).nonzero().flatten()
        if not len(missing_K):
            return rows_N, missing_K
        if not 0 <= first_row <= _MAX_ROWS - len(missing_K):
            raise ValueError(f"first_row: {first_row} and {len(missing_K)} more rows are not in 0 ... {_MAX_ROWS - 1}")
        if not self._fits(len(missing_K)):  # unless some of them are the same
            self._make_room(len(self._backend.distinct(self._slots, keys.at(missing_K))[0]))
        positions_U, reused = self._backend.find_or_insert(self._slots, keys, missing_K, first_row, rows_N)
        self._num_keys += len(positions_U)
        self._num_tombstones -= reused
        return rows_N, positions_U

    def insert(self, ids_M: Tensor, tables: Tables, rows_M: Tensor) -> None:
        """Inserts keys with rows of the caller's choice.

        Args:
            ids_M: int64 ids; the keys are distinct and absent, which is not checked.
            tables: the table of each, or of all.
            rows_M: their rows (int64), in 0 ... 2**31 - 1.

        Raises:
            ValueError: there are more or fewer rows than ids.
            MemoryError: there is no memory for more slots.
        """
        keys = self._checked(ids_M, tables)
        if rows_M.shape != ids_M.shape:
            raise ValueError(f"rows_M: expected a row for each of {len(ids_M)} ids, got shape {tuple(rows_M.shape)}")
        self._make_room(len(ids_M))
        self._num_tombstones -= self._backend.insert(self._slots, keys, rows_M.to(self._device, torch.int64))
        self._num_keys += len(ids_M)

    def delete(self, ids_K: Tensor, tables: Tables) -> Tensor:
        """Removes keys.

        Args:
            ids_K: int64 ids; the keys are distinct, which is not checked.
            tables: the table of each, or of all.

        Returns:
            The rows that they had (int64), -1 where a key was absent.
        """
        found_K = self._backend.find_slots(self._slots, self._checked(ids_K, tables))
        slots_K = found_K[found_K >= 0]
        rows_K = torch.full_like(found_K, -1)
        rows_K[found_K >= 0] = self._slots.rows_M[slots_K].long()
        # No search goes beyond a group that has an empty slot, so another one in it does no harm.
        is_last_K = (self._slots.rows_M.view(-1, GROUP)[slots_K // GROUP] == EMPTY).any(1)
        self._slots.rows_M[slots_K] = torch.where(is_last_K, EMPTY, TOMBSTONE).int()
        self._num_keys -= len(slots_K)
        self._num_tombstones += len(slots_K) - int(is_last_K.sum())
        return rows_K

    def entries(self, num_slots: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, tables and rows (int64) of all keys, in no order that means anything.

        Args:
            num_slots: only of the keys in the first so many slots, a fair sample, since hashes choose the slots.
        """
        ids_M, rows_M, tables_M, salts_T = self._slots
        tables_M = None if tables_M is None else tables_M[:num_slots]
        keys, rows_K = Slots(ids_M[:num_slots], rows_M[:num_slots], tables_M, salts_T).entries()
        return keys.ids_N, torch.zeros_like(rows_K) if keys.tables_N is None else keys.tables_N.long(), rows_K

    def entries_of(self, shards_flagged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `entries`, of chosen virtual shards only.

        Args:
            shards_flagged: bool (tables, 2**b); the keys whose flag at [table, top b bits of the hash] is set.

        Raises:
            ValueError: the shape is another one.
        """
        num_tables, num_shards = shards_flagged.shape
        if num_tables != len(self._slots.salts_T) or num_shards & (num_shards - 1) or num_shards == 0:
            shape = f"({len(self._slots.salts_T)}, a power of two)"
            raise ValueError(f"shards_flagged: expected shape {shape}, got {tuple(shards_flagged.shape)}")
        return self._backend.entries_of(self._slots, shards_flagged.to(self._device, torch.bool))

    def copy(self) -> KeyIndex:
        """Another one with the same keys, for reading in another thread; quicker than `entries`."""
        other = copy.copy(self)
        ids_M, rows_M, tables_M, salts_T = self._slots
        tables_M = None if tables_M is None else _copy_of(tables_M)
        other._slots = Slots(_copy_of(ids_M), _copy_of(rows_M), tables_M, salts_T)
        return other

    def reserve(self, num_keys: int) -> None:
        """Makes room for `num_keys` keys in all, those that are there included.

        Raises:
            MemoryError: there is no memory for the slots.
        """
        self._make_room(max(0, num_keys - self._num_keys))

    def clear(self) -> None:
        """Removes all keys; the slots stay."""
        self._slots.rows_M.fill_(EMPTY)
        self._num_keys = self._num_tombstones = 0

    def __len__(self) -> int:
        return self._num_keys

    @property
    def capacity(self) -> int:
        """Slots, a power of two."""
        return len(self._slots.rows_M)

    @property
    def load_factor(self) -> float:
        """The share of slots that hold a key or a tombstone, 0.75 at most."""
        return (self._num_keys + self._num_tombstones) / self.capacity

    @property
    def num_tombstones(self) -> int:
        """Slots of deleted keys that searches still pass; the next rehash clears them."""
        return self._num_tombstones

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return sum(x.nbytes for x in self._slots[:3] if x is not None)

    def _fits(self, num_new: int) -> bool:
        return self._num_keys + self._num_tombstones + num_new <= most_keys(self.capacity)

    def _make_room(self, num_new: int) -> None:
        """Rehashes where `num_new` keys would not fit; the new slots are had before anything changes."""
        if self._fits(num_new):
            return
        # Where only tombstones are in the way the size stays, unless so few slots came free that it would soon recur.
        wanted = self._num_keys + num_new
        capacity = capacity_for(wanted + (self.capacity // 32 if self._num_tombstones else 0))
        memory = allocate_slots(max(capacity, self.capacity), len(self._slots.salts_T), self._device)
        new = Slots(*memory, self._slots.salts_T)
        self._backend.rehash(self._slots, new)
        self._slots, self._num_tombstones = new, 0

    def _checked(self, ids_N: Tensor, tables: Tables) -> Keys:
        if ids_N.dtype != torch.int64 or ids_N.dim() != 1 or ids_N.device.type != self._device.type:
            got = f"{ids_N.dtype} of shape {tuple(ids_N.shape)} on {ids_N.device}"
            raise ValueError(f"ids: expected int64 ids of shape (N,) on {self._device}, got {got}")
        num_tables = len(self._slots.salts_T)
        if isinstance(tables, int):
            if not 0 <= tables < num_tables:
                raise ValueError(f"tables: expected 0 ... {num_tables - 1}, got {tables}")
            return Keys(ids_N.contiguous(), None, tables)
        if tables.shape != ids_N.shape:
            raise ValueError(f"tables: expected one for each of {len(ids_N)} ids, got shape {tuple(tables.shape)}")
        if tables.device.type == "cpu" and len(tables):  # elsewhere this would wait for the device
            lowest, highest = (int(x) for x in tables.aminmax())
            if lowest < 0 or highest >= num_tables:
                raise ValueError(f"tables: expected 0 ... {num_tables - 1}, got {lowest if lowest < 0 else highest}")
        return Keys(
            ids_N.contiguous(), None if num_tables == 1 else tables.to(self._device, torch.int16).contiguous(), 0
        )


class _NativeKeys(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table", ctypes.c_int64),
        ("size", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, keys: Keys) -> _NativeKeys:
        return cls(keys.ids_N.data_ptr(), _pointer(keys.tables_N), keys.table, len(keys.ids_N))


class _NativeSlots(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("ids", "rows", "tables", "salts")] + [("groups", ctypes.c_int64)]

    @classmethod
    def of(cls, slots: Slots) -> _NativeSlots:
        pointers = (slots.ids_M, slots.rows_M, slots.tables_M, slots.salts_T)
        return cls(*(_pointer(x) for x in pointers), slots.num_groups)


class _NativeIndex(TorchIndex):
    """The operations in C++."""

    def _find(self, slots: Slots, keys: Keys, slots_N: Tensor | None, rows_N: Tensor | None) -> None:
        self._call("find", _NativeSlots.of(slots), _NativeKeys.of(keys), slots_N, rows_N)

    def _call(self, name: str, *arguments: ctypes.Structure | ctypes.c_int64 | Tensor | int | None) -> int:
        """A function of the library; tensors and structures go by pointers."""
        converted = (
            ctypes.byref(x)
            if isinstance(x, ctypes.Structure | ctypes.c_int64)
            else ctypes.c_int64(x)
            if isinstance(x, int)
            else ctypes.c_void_p(_pointer(x))
            for x in arguments
        )
        return getattr(_library(), name)(*converted)

    @override
    def find_slots(self, slots: Slots, keys: Keys) -> Tensor:
        found_N = torch.empty_like(keys.ids_N)
        self._find(slots, keys, found_N, None)
        return found_N

    @override
    def find(self, slots: Slots, keys: Keys) -> Tensor:
        rows_N = torch.empty_like(keys.ids_N)
        self._find(slots, keys, None, rows_N)
        return rows_N

    @override
    def insert(self, slots: Slots, keys: Keys, rows_N: Tensor) -> int:
        return self._call("insert", _NativeSlots.of(slots), _NativeKeys.of(keys), rows_N.contiguous())

    @override
    def distinct(self, slots: Slots, keys: Keys) -> tuple[Tensor, Tensor]:
        # An index of these keys alone tells them apart quicker than a sort.
        num_tables = len(slots.salts_T)
        memory = allocate_slots(capacity_for(len(keys.ids_N)), num_tables, keys.ids_N.device)
        number_N = torch.empty_like(keys.ids_N)
        everywhere_N = torch.arange(len(keys.ids_N))
        first_U, _ = self.find_or_insert(Slots(*memory, slots.salts_T), keys, everywhere_N, 0, number_N)
        return first_U, number_N

    @override
    def find_or_insert(
        self, slots: Slots, keys: Keys, missing_K: Tensor, first_row: int, rows_N: Tensor
    ) -> tuple[Tensor, int]:
        num_new = ctypes.c_int64()
        arguments = (missing_K, len(missing_K), first_row, rows_N, num_new)
        reused = self._call("find_or_insert", _NativeSlots.of(slots), _NativeKeys.of(keys), *arguments)
        return missing_K[: num_new.value].clone(), reused

    @override
    def rehash(self, old: Slots, new: Slots) -> None:
        left_over_G = torch.empty(old.num_groups, dtype=torch.uint8)
        self._call("rehash", _NativeSlots.of(old), _NativeSlots.of(new), left_over_G)

    @override
    def entries_of(self, slots: Slots, flags_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = min(_PARTS, slots.num_groups)
        places_P = torch.zeros(parts, dtype=torch.int64)
        where = (_NativeSlots.of(slots), flags_TS.contiguous(), flags_TS.shape[1].bit_length() - 1, parts)
        self._call("entries_of", *where, places_P, None, None, None)
        ids_K, tables_K, rows_K = torch.empty(3, int(places_P.sum()), dtype=torch.int64)
        self._call("entries_of", *where, places_P.cumsum(0) - places_P, ids_K, tables_K, rows_K)
        return ids_K, tables_K, rows_K


def _backend(backend: IndexBackend, device: torch.device) -> TorchIndex:
    if backend not in ("auto", "native", "torch", "triton"):
        raise ValueError(f"backend: expected auto, native, torch or triton, got {backend!r}")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from lightning_gr.embeddings.dynamic.key_index_triton import TritonIndex

        return TritonIndex(device)
    if backend == "torch" or device.type != "cpu":
        if backend == "native":
            raise ValueError(f"backend='native': the index is on {device}; use 'auto', 'torch' or 'triton'")
        return TorchIndex()
    if _library() is None and backend == "native":
        raise ValueError("backend='native': it cannot be compiled here; use 'auto' or 'torch'")
    return TorchIndex() if _library() is None else _NativeIndex()


@cache
def _library() -> ctypes.CDLL | None:
    library = load_native(_SOURCE)
    if library is not None:
        library.insert.restype = library.find_or_insert.restype = ctypes.c_int64
    return library


def _copy_of(tensor: Tensor) -> Tensor:
    on_host = tensor.device.type == "cpu"
    return empty_in_huge_pages(len(tensor), dtype=tensor.dtype).copy_(tensor) if on_host else tensor.clone()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
