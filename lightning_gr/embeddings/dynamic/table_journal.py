"""TableJournal: what became of keys since a save that a look at their rows does not tell.

Shape suffixes: N keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Note(NamedTuple):
    table: int
    ids_N: Tensor
    removed: bool


class TableJournal:
    """Keys of a physical table that were removed, or changed without a use.

    Attributes:
        base_step: number of the step after the save from which on the journal is whole; None before there is one.
    """

    def __init__(self) -> None:
        self.base_step: int | None = None
        self._notes: list[_Note] = []
        self._num_forgotten = 0

    def note(self, table: int, ids_N: Tensor, *, removed: bool) -> None:
        """Of keys that were removed, or else changed."""
        if len(ids_N):
            self._notes.append(_Note(table, ids_N, removed))

    @property
    def end(self) -> int:
        """The place behind the last note."""
        return self._num_forgotten + len(self._notes)

    def ids(self, table: int, *, removed: bool, end: int) -> Tensor:
        """Distinct ids of a table's notes before a place, in ascending order, on the host."""
        notes = self._notes[: end - self._num_forgotten]
        found = [x.ids_N.cpu() for x in notes if (x.table, x.removed) == (table, removed)]
        return torch.cat(found).unique() if found else torch.zeros(0, dtype=torch.int64)

    def forget(self, end: int, base_step: int) -> None:
        """Forgets what is before a place, where a save now is the base of the next one."""
        num = max(end - self._num_forgotten, 0)
        del self._notes[:num]
        self._num_forgotten += num
        self.base_step = base_step
