"""Counters of keys that wait for admission: exact, or a count-min sketch of fixed size.

Shape suffixes: N keys, T tables, V virtual shards, R rows of a sketch, W counters of a row, B buffered occurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.counter_random import mix64
from lightning_gr.embeddings.dynamic.key_index import KeyIndex, key_hash, top_bits
from lightning_gr.embeddings.dynamic.row_storage import RowStorage
from lightning_gr.embeddings.dynamic.unique_keys import unique_keys

_SKETCH_ROWS = 4
_PRUNE_EVERY = 64


State = tuple[dict[str, Tensor], list[int]]
"""Tensors whose rows are sorted by virtual shard, and where each shard's begin."""


class AdmissionCounter(Protocol):
    """Occurrences of keys in finished steps; those of the running step are buffered until it is committed."""

    def counts(self, ids_N: Tensor, *, committing: int | None = None) -> Tensor:
        """Occurrences in finished steps, int64 (N,); with the number of the running step, as they will be after it."""
        ...

    def add(self, ids_N: Tensor, counts_N: Tensor) -> None:
        """Buffers occurrences of the running step."""
        ...

    def forget(self, ids_N: Tensor) -> None:
        """Drops keys that were admitted; distinct."""
        ...

    def commit(self, step: int) -> None:
        """Takes what was buffered as having occurred in `step`."""
        ...

    def freeze(self, shard_bits: int) -> Callable[[], State]:
        """`state` of now, to be had later and in any thread."""
        ...

    def state(self, shard_bits: int) -> State:
        """What finished steps have counted."""
        return self.freeze(shard_bits)()

    def load(self, state: dict[str, Tensor]) -> None:
        """Adds the rows of some shards."""
        ...


class _Buffered:
    """The occurrences of the running step."""

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, ids_N: Tensor, counts_N: Tensor) -> None:
        occurred_N = counts_N > 0
        if len(ids_N := ids_N[occurred_N]):
            self._ids.append(ids_N)
            self._counts.append(counts_N[occurred_N])

    def _buffered(self) -> tuple[Tensor, Tensor] | None:
        """Distinct keys and their occurrences in the running step; None without any."""
        if not self._ids:
            return None
        ids_B, counts_B = torch.cat(self._ids), torch.cat(self._counts)
        unique = unique_keys(ids_B, [0, len(ids_B)], counts_B)
        self._ids, self._counts = [unique.ids_U], [unique.counts_U]
        return unique.ids_U, unique.counts_U

    def _taken(self) -> tuple[Tensor, Tensor] | None:
        taken = self._buffered()
        self._ids, self._counts = [], []
        return taken


class ExactCounter(_Buffered, AdmissionCounter):
    """One counter a key.

    Args:
        salt: of the table.
        forget_after_steps: keys that have not occurred for so many steps are dropped; None keeps all.
        device: where they are.
    """

    def __init__(self, *, salt: int, forget_after_steps: int | None, device: torch.device) -> None:
        super().__init__()
        self._salt, self._forget_after_steps, self._device = salt, forget_after_steps, device
        self._index = KeyIndex(salts=[salt], device=device)
        self._rows = RowStorage(dim=1, state_width=0, device=device)

    def __len__(self) -> int:
        return len(self._index)

    @override
    def counts(self, ids_N: Tensor, *, committing: int | None = None) -> Tensor:
        metadata = self._rows.read_metadata(self._index.find(ids_N, 0))  # zeros where there is no row
        counts_N = metadata.counts.clone()
        if committing is None:
            return counts_N
        added_N = torch.zeros_like(ids_N)
        if (buffered := self._buffered()) is not None:
            added_N = _sums_at(ids_N, *buffered)
        if self._prunes(committing):
            assert self._forget_after_steps is not None
            old_N = (metadata.last_steps < committing - self._forget_after_steps) & (added_N == 0)
            counts_N.masked_fill_(old_N, 0)
        return counts_N + added_N

    def _prunes(self, step: int) -> bool:
        return self._forget_after_steps is not None and step % _PRUNE_EVERY == 0

    @override
    def forget(self, ids_N: Tensor) -> None:
        rows_N = self._index.delete(ids_N, 0)
        self._rows.free(rows_N[rows_N >= 0])

    @override
    def commit(self, step: int) -> None:
        if (taken := self._taken()) is not None:
            self._add(*taken, step)
        if self._prunes(step):
            assert self._forget_after_steps is not None
            ids_N, _, rows_N = self._index.entries()
            old_N = self._rows.read_metadata(rows_N).last_steps < step - self._forget_after_steps
            self.forget(ids_N[old_N])

    def _add(self, ids_N: Tensor, counts_N: Tensor, steps: int | Tensor) -> None:
        rows_N = self._index.find(ids_N, 0)
        new_N = rows_N < 0
        rows_N[new_N] = self._rows.allocate(int(new_N.sum()))
        self._index.insert(ids_N[new_N], 0, rows_N[new_N])
        counts_N = counts_N + self._rows.read_metadata(rows_N).counts
        steps_N = torch.full_like(counts_N, steps) if isinstance(steps, int) else steps
        self._rows.write_metadata(rows_N, counts=counts_N, last_steps=steps_N)

    @override
    def freeze(self, shard_bits: int) -> Callable[[], State]:
        index, metadata_R3 = self._index.copy(), self._rows.copy_of_metadata()

        def state() -> State:
            ids_N, _, rows_N = index.entries()
            shards_N = top_bits(key_hash(ids_N, self._salt), shard_bits)
            order = ids_N.argsort()
            order = order[shards_N[order].argsort(stable=True)]
            counts_N, last_steps_N, _ = metadata_R3[rows_N[order]].unbind(1)
            counts_V = torch.bincount(shards_N, minlength=1 << shard_bits)
            found = {"ids": ids_N[order], "counts": counts_N, "last_steps": last_steps_N}
            return found, [0, *counts_V.cumsum(0).tolist()]

        return state

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        moved = {name: x.to(self._device) for name, x in state.items()}
        self._add(moved["ids"], moved["counts"], moved["last_steps"])


class SketchCounter(_Buffered, AdmissionCounter):
    """A count-min sketch a virtual shard (Cormode and Muthukrishnan, 2005), so that it can be cut over processes.

    Args:
        salt: of the table.
        shard_bits: hash bits that number the virtual shards.
        width: counters of each of its four rows.
        device: where it is.
    """

    def __init__(self, *, salt: int, shard_bits: int, width: int, device: torch.device) -> None:
        super().__init__()
        self._salt, self._shard_bits, self._width = salt, shard_bits, width
        self._cells_VRW = torch.zeros(1 << shard_bits, _SKETCH_ROWS, width, dtype=torch.int32, device=device)

    def _places(self, ids_N: Tensor) -> Tensor:
        """Cells of each key in the flattened sketch, (N, R)."""
        hash_N = key_hash(ids_N, self._salt)
        rows_R = torch.arange(_SKETCH_ROWS, device=ids_N.device)
        columns_NR = (mix64(hash_N[:, None] + 1 + rows_R) >> 16 & 0x7FFFFFFF) % self._width
        shards_N = top_bits(hash_N, self._shard_bits)
        return (shards_N[:, None] * _SKETCH_ROWS + rows_R) * self._width + columns_NR

    @override
    def counts(self, ids_N: Tensor, *, committing: int | None = None) -> Tensor:
        places_NR = self._places(ids_N)
        counts_NR = self._cells_VRW.view(-1)[places_NR].to(torch.int64)
        if committing is not None and (buffered := self._buffered()) is not None:
            places_BR = self._places(buffered[0]).reshape(-1)
            added = _sums_at(places_NR.reshape(-1), places_BR, buffered[1].repeat_interleave(_SKETCH_ROWS))
            counts_NR += added.view_as(counts_NR)
        return counts_NR.amin(1)

    @override
    def forget(self, ids_N: Tensor) -> None:
        """Nothing: other keys count in the same cells."""

    @override
    def commit(self, step: int) -> None:
        if (taken := self._taken()) is not None:
            places_NR = self._places(taken[0])
            counts_NR = taken[1].to(torch.int32)[:, None].expand_as(places_NR)
            self._cells_VRW.view(-1).index_add_(0, places_NR.reshape(-1), counts_NR.reshape(-1))

    @override
    def freeze(self, shard_bits: int) -> Callable[[], State]:
        assert shard_bits == self._shard_bits
        used_V = self._cells_VRW.flatten(1).any(1)
        shards = used_V.nonzero()[:, 0]
        state = {"shards": shards, "cells": self._cells_VRW[shards]}, [0, *used_V.cumsum(0).tolist()]
        return lambda: state

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        device = self._cells_VRW.device
        if state["cells"].shape[1:] != self._cells_VRW.shape[1:]:
            raise ValueError(
                f"admission: the saved sketch has {state['cells'].shape[2]} counters a row, not "
                f"{self._width}; set sketch_width to that"
            )
        self._cells_VRW[state["shards"].to(device)] = state["cells"].to(device)


def _sums_at(wanted_N: Tensor, keys_B: Tensor, counts_B: Tensor) -> Tensor:
    """Of each wanted key the sum of the counts that it has among some keys."""
    keys_U, inverse_B = keys_B.unique(return_inverse=True)
    sums_U = counts_B.new_zeros(len(keys_U)).index_add_(0, inverse_B, counts_B)
    at_N = torch.searchsorted(keys_U, wanted_N).clamp(max=len(keys_U) - 1)
    return torch.where(keys_U[at_N] == wanted_N, sums_U[at_N], 0)


def salts_of(names: Sequence[str]) -> list[int]:
    """A number of each table by its name alone, so that another table changes no key's hash."""
    from lightning_gr.counter_random import name_key

    return [key - (1 << 64) if (key := name_key(name)) >= 1 << 63 else key for name in names]
