"""Checks of labels and times when a run starts, with the file, the row and the event of what cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.task import Task, label_fields

Array = np.ndarray[Any, Any]
_LATEST = 7_258_118_400
"""2200-01-01 in seconds; a later time is taken for milliseconds or finer."""


def event_place(store: EventStore, row: int, event: int) -> str:
    """Where an event lies: the Parquet file, the user's row in it, and the event's place in the user's history.

    Args:
        store: the store.
        row: row of the user in the store.
        event: place in the user's history, counted from 0.
    """
    file, within = store.located(row)
    return f"{file}, row {within} (user {store.users[row]}), event {event}"


def check_events(store: EventStore, tasks: Mapping[str, Task], first_row: int, rows: UserRows) -> None:
    """Raises at the first label or time of some users that cannot be what it says.

    Args:
        store: the store.
        tasks: by the setting that says so, what is positive and what is not.
        first_row: row of the first of the users.
        rows: the users, with the fields of the tasks that take labels as they are.

    Raises:
        ValueError: a time beyond the year 2200, or a label other than 0 and 1 of a task without `at_least`.
    """

    def where(at: int) -> str:
        user = int(np.searchsorted(rows.offsets, at, side="right")) - 1
        return event_place(store, first_row + user, at - int(rows.offsets[user]))

    if rows.timestamps is not None and len(late := np.flatnonzero(rows.timestamps > _LATEST)):
        raise ValueError(
            f"timestamp: {int(rows.timestamps[late[0]])} is beyond the year 2200, in {where(int(late[0]))}; times of a "
            "store are seconds, so divide milliseconds by 1,000, or let lightning-gr prepare write the store"
        )
    for name, task in tasks.items():
        if task.at_least is not None:
            continue
        values = rows.event_fields[task.field]
        wrong = np.flatnonzero((values != 0) & (values != 1) & ~np.isnan(values))
        if len(wrong):
            raise ValueError(
                f"{name}: the label {task.field} is {float(values[wrong[0]]):g}, in {where(int(wrong[0]))}; expected "
                "0 or 1, so correct it, or say with at_least from which number on it is positive"
            )


def missing_labels(store: EventStore, tasks: Mapping[str, Task]) -> dict[str, Array]:
    """By task, the events without a label, int64 places among all events of the store, ascending.

    Reads only label fields that the index cannot answer for, and checks what it reads, see `check_events`.
    """
    return _missing_labels(store, tuple(tasks.items()))


@lru_cache(maxsize=2)
def _missing_labels(store: EventStore, tasks: tuple[tuple[str, Task], ...]) -> dict[str, Array]:
    read = {
        name: task
        for name, task in tasks
        if task.at_least is None
        or task.where is not None
        or int(store.label_counts(task.field).sum(dtype=np.int64)) < store.num_events
    }
    missing: dict[str, list[Array]] = {name: [np.zeros(0, dtype=np.int64)] for name, _ in tasks}
    before = 0
    for group in range(len(store.group_bounds) - 1) if read else ():
        rows = store.read_group(group, label_fields(read))
        check_events(
            store, {f"tasks.{name}": task for name, task in read.items()}, int(store.group_bounds[group]), rows
        )
        for name, task in read.items():
            missing[name].append(np.flatnonzero(np.isnan(task.of(rows.event_fields))) + before)
        before += len(rows.items)
    return {name: np.concatenate(parts) for name, parts in missing.items()}
