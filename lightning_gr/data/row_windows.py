"""RowWindows: users' events in memory, a few windows of row groups at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gr.data.event_table import EventTable, UserRows

Array = np.ndarray[Any, Any]
_WINDOWS_IN_MEMORY = 2


@dataclass(frozen=True)
class _Window:
    """Groups read together: where each begins, in store rows and among the rows read."""

    first_rows: Array
    starts: Array
    ends: Array
    rows: UserRows

    def locate(self, rows: Array) -> tuple[Array, Array]:
        """For each row whether it is here, and at which place."""
        slot = np.searchsorted(self.first_rows, rows, side="right") - 1
        here = (slot >= 0) & (rows < self.ends[slot])
        return here, self.starts[slot] + rows - self.first_rows[slot]


class RowWindows:
    """Reads the windows that a plan names and keeps the last few; pickles without them.

    Args:
        table: the log.
        columns: fields of events and users to be read beside items and times.
    """

    def __init__(self, table: EventTable, columns: Sequence[str] = ()) -> None:
        self._table, self._columns = table, tuple(columns)
        self._held: OrderedDict[tuple[int, ...], _Window] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}

    def _window(self, groups: tuple[int, ...]) -> _Window:
        if groups in self._held:
            self._held.move_to_end(groups)
            return self._held[groups]
        while len(self._held) >= _WINDOWS_IN_MEMORY:
            self._held.popitem(last=False)
        groups_up = sorted(groups)
        rows = UserRows.concatenate([self._table.read_group(group, self._columns) for group in groups_up])
        bounds = self._table.group_bounds
        first_rows, ends = bounds[groups_up], bounds[np.array(groups_up) + 1]
        sizes = ends - first_rows
        window = _Window(first_rows, np.cumsum(sizes) - sizes, ends, rows)
        self._held[groups] = window
        return window

    def of(self, rows: Array, windows: Sequence[tuple[int, ...]]) -> tuple[UserRows, Array]:
        """Rows in memory that hold some users, and each user's place among them.

        Args:
            rows: rows of the users.
            windows: groups to be held together, which hold all of them.
        """
        held = [self._window(groups) for groups in windows]
        if len(held) == 1:
            here, places = held[0].locate(rows)
            assert here.all(), "a plan names the windows of its samples"
            return held[0].rows, places
        # A batch on the seam of two windows takes its own users out of both.
        parts, places = [], np.zeros(len(rows), dtype=np.int64)
        taken = 0
        for window in held:
            here, at = window.locate(rows)
            parts.append(take_users(window.rows, at[here]))
            places[here] = taken + np.arange(int(here.sum()))
            taken += int(here.sum())
        assert taken == len(rows), "a plan names the windows of its samples"
        if not parts:
            parts = [take_users(self._window((0,)).rows, places)]
        return UserRows.concatenate(parts), places


def spread(offsets: Array, places: Array) -> tuple[Array, Array]:
    """Where the values of some rows lie, row after row, and how many each has."""
    lengths = offsets[places + 1] - offsets[places]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(offsets[places] - (ends - lengths), lengths), lengths


def take_users(rows: UserRows, places: Array) -> UserRows:
    """Some of the users."""
    at, lengths = spread(rows.offsets, places)
    fields = {}
    for name, (values, offsets) in rows.user_fields.items():
        of_field, counts = spread(offsets, places)
        fields[name] = (values[of_field], np.concatenate([[0], np.cumsum(counts)]))
    return UserRows(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=rows.items[at],
        timestamps=None if rows.timestamps is None else rows.timestamps[at],
        event_fields={name: values[at] for name, values in rows.event_fields.items()},
        user_fields=fields,
    )
