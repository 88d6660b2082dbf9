"""A bucket of events in the order of the log to a part of the store: one row a user, oldest event first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data.prepare.spill import FINE, TIME, USER

if TYPE_CHECKING:
    import polars as pl

Array = np.ndarray[Any, Any]


PLACE = "__place"
"""Column that `by_user_and_time` adds: ascending in the order of the log, for each user."""


def by_user_and_time(events: pl.DataFrame) -> pl.DataFrame:
    """Orders events that stand in the order of the log; equal times keep it.

    One stable sort by user, and then only the users whose events are not in the order of time: logs mostly are.
    """
    import polars as pl

    events = events.sort(USER, maintain_order=True)
    order = np.arange(len(events))
    if TIME in events.columns and len(events):
        time, fine = events[TIME].to_numpy(), events[FINE].to_numpy()
        starts = _starts(events[USER])
        before = (time[1:] < time[:-1]) | ((time[1:] == time[:-1]) & (fine[1:] < fine[:-1]))
        late = np.flatnonzero(before & ~starts[1:]) + 1
        if len(late):
            user = np.cumsum(starts) - 1
            unordered = np.zeros(int(user[-1]) + 1, dtype=bool)
            unordered[user[late]] = True
            rows = np.flatnonzero(unordered[user])
            order[rows] = rows[np.lexsort((fine[rows], time[rows], user[rows]))]
            events = events.select(pl.all().gather(pl.Series(order))).with_columns(pl.col(USER).set_sorted())
    return events.with_columns(pl.Series(PLACE, order))


def out_of_order(events: pl.DataFrame) -> int:
    """How many events follow, in time, one that stands later in the log."""
    if len(events) < 2:
        return 0
    place = events[PLACE].to_numpy()
    return int(np.count_nonzero((place[1:] < place[:-1]) & ~_starts(events[USER])[1:]))


def repeats(events: pl.DataFrame) -> Array:
    """Rows that repeat an earlier one in every column, of events by user and time."""
    import polars as pl

    repeated = np.zeros(len(events), dtype=bool)
    if len(events) < 2:
        return repeated
    same = ~_starts(events[USER])[1:]
    if TIME in events.columns:
        for name in (TIME, FINE):
            values = events[name].to_numpy()
            same &= values[1:] == values[:-1]
    # Only events of one user and one time can repeat each other; few are.
    near = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    rows = np.flatnonzero(near)
    if len(rows):
        candidates = events.select(pl.exclude(PLACE).gather(pl.Series(rows)))
        first = candidates.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
        repeated[rows] = ~first
    return repeated


def without_repeats(events: pl.DataFrame) -> pl.DataFrame:
    """Events in their order without the rows that repeat an earlier one."""
    return events.unique(keep="first", maintain_order=True) if len(events) else events


def users_of(columns: dict[str, pl.Series]) -> pl.DataFrame:
    """One row a user with lists of the other columns, from events by user."""
    import polars as pl

    frame = pl.DataFrame([column.alias(name) for name, column in columns.items()])
    return frame.group_by("user_id", maintain_order=True).agg(pl.all())


def _starts(users: pl.Series) -> Array:
    """Where a user begins in a sorted column of users."""
    return (users != users.shift(1)).fill_null(True).to_numpy()
