"""EventTable: users' events as sources read them, from memory or from a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class UserRows:
    """Consecutive users' events as jagged arrays; user u owns the events ``offsets[u] ... offsets[u + 1] - 1``.

    Args:
        offsets: int64 (U + 1,).
        items: item row of each event (E,), oldest first.
        timestamps: int64 seconds (E,), ascending within a user; None where the log has no times.
        event_fields: by name, one value an event (E,).
        user_fields: by name, values and their offsets (U + 1,).
    """

    offsets: Array
    items: Array
    timestamps: Array | None = None
    event_fields: dict[str, Array] = field(default_factory=dict)
    user_fields: dict[str, tuple[Array, Array]] = field(default_factory=dict)

    @staticmethod
    def concatenate(parts: Sequence[UserRows]) -> UserRows:
        """The users of all parts, in order; the parts have the same fields."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return UserRows(
            offsets=_joined_offsets([part.offsets for part in parts]),
            items=np.concatenate([part.items for part in parts]),
            timestamps=None
            if first.timestamps is None
            else np.concatenate([part.timestamps for part in parts if part.timestamps is not None]),
            event_fields={
                name: np.concatenate([part.event_fields[name] for part in parts]) for name in first.event_fields
            },
            user_fields={
                name: (
                    np.concatenate([part.user_fields[name][0] for part in parts]),
                    _joined_offsets([part.user_fields[name][1] for part in parts]),
                )
                for name in first.user_fields
            },
        )


def _joined_offsets(offsets: Sequence[Array]) -> Array:
    lengths = np.concatenate([np.diff(part) for part in offsets])
    joined = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=joined[1:])
    return joined


class EventTable(Protocol):
    """Users by row. Lengths are known without reading events; events are read by groups of consecutive rows."""

    @property
    def fingerprint(self) -> str:
        """Identifies the content."""
        ...

    @property
    def lengths(self) -> Array:
        """Events of each user, of any integer type."""
        ...

    @property
    def group_bounds(self) -> Array:
        """int64 first row of each group, and the number of rows."""
        ...

    @property
    def has_timestamps(self) -> bool:
        """Whether events have times."""
        ...

    @property
    def num_items(self) -> int:
        """Item rows."""
        ...

    def read_group(self, group: int, columns: Sequence[str] = ()) -> UserRows:
        """A group's users, with items, times and the named fields."""
        ...
