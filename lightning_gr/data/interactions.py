"""Interactions: a log held in memory as jagged arrays with items numbered by row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data.event_table import UserRows

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Interactions:
    """Events of U users; user u owns the events ``offsets[u] ... offsets[u + 1] - 1``, oldest first.

    The `EventTable` of a log that was not prepared: one group of all users.

    Args:
        users: raw user ids (U,), ascending.
        offsets: int64 (U + 1,).
        items: int64 row of each event's item (E,), 0 ... number of items - 1.
        timestamps: int64 seconds (E,), or None where the log has no times.
        item_ids: raw item id of each row, ascending, so that the numbering is the same on every machine.
    """

    users: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    items: np.ndarray[Any, Any]
    timestamps: np.ndarray[Any, Any] | None
    item_ids: np.ndarray[Any, Any]

    @classmethod
    def from_events(cls, events: pl.DataFrame) -> Interactions:
        """Numbers the items of a table that `read_events` made; nothing is dropped."""
        item_ids, items = np.unique(events["item_id"].to_numpy(), return_inverse=True)
        users, counts = np.unique(events["user_id"].to_numpy(), return_counts=True)
        times = events["timestamp"]
        return cls(
            users=users,
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            items=items.astype(np.int64),
            timestamps=None if times.null_count() else times.to_numpy().astype(np.int64),
            item_ids=item_ids,
        )

    @property
    def num_items(self) -> int:
        """Items that occur in the log."""
        return len(self.item_ids)

    @property
    def has_timestamps(self) -> bool:
        """Whether events have times."""
        return self.timestamps is not None

    @cached_property
    def lengths(self) -> np.ndarray[Any, Any]:
        """int64 events of each user."""
        return np.diff(self.offsets)

    @cached_property
    def group_bounds(self) -> np.ndarray[Any, Any]:
        """One group of all users."""
        return np.array([0, len(self.users)] if len(self.users) else [0], dtype=np.int64)

    def read_group(self, group: int, columns: Sequence[str] = ()) -> UserRows:
        """All users.

        Raises:
            ValueError: a field is asked for; a log in memory has none.
        """
        if columns:
            raise ValueError(
                f"features={list(columns)}: a log read directly has none; make a store with `lightning-gr prepare`"
            )
        assert group == 0
        return UserRows(offsets=self.offsets, items=self.items, timestamps=self.timestamps)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the content, the same on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.offsets, self.items, self.timestamps):
            digest.update(b"-" if array is None else np.ascontiguousarray(array, dtype="<i8").tobytes())
        for ids in (self.users, self.item_ids):
            digest.update("\n".join(map(str, ids.tolist())).encode())
        return digest.hexdigest()
