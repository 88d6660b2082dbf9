"""Streams of users' events, day by day: from a growing folder of Parquet files, or from an iterator of one's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from lightning_gr.data.event_store.fields import ITEM, TIME
from lightning_gr.data.event_store.store import jagged
from lightning_gr.data.event_table import UserRows

Array = np.ndarray[Any, Any]
NEW_EVENTS = "new_events"
CLOSED = "_SUCCESS"
_PREFIX = "day="


@dataclass(frozen=True)
class Block:
    """Some users of a day.

    Args:
        rows: their events up to that day, oldest first.
        new_U: of each user, how many of the last events are that day's, and so targets; int64.
    """

    rows: UserRows
    new_U: Array


class EventStream(Protocol):
    """Days of users' events. A day's blocks come in the same order whenever they are asked for.

    A stream whose `blocks` takes ``step`` too gives every ``step``-th block from the first on, so that ranks which
    share a day by blocks need not read those of others.
    """

    def days(self) -> list[str]:
        """The days that are complete so far, in order; later calls may know more."""
        ...

    def blocks(self, day: str, first: int = 0) -> Iterator[Block]:
        """The blocks of a day from the given one on."""
        ...


class ParquetDays(EventStream):
    """A growing folder: ``day=<name>/*.parquet``, one row a user, in the columns of an event store.

    A column ``new_events`` says how many of a row's last events are the day's own; without it all are. A day is
    complete, and only then read, when its folder holds ``_SUCCESS`` or a later day's folder is there. Days are taken in
    the order of their names, files of a day too.

    Args:
        folder: where the days are.

    Raises:
        FileNotFoundError: the folder is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give one with {_PREFIX}<name>/*.parquet in it")

    @override
    def days(self) -> list[str]:
        found = sorted(p.name[len(_PREFIX) :] for p in self.folder.glob(f"{_PREFIX}*") if p.is_dir())
        return [day for i, day in enumerate(found) if i + 1 < len(found) or (self._of(day) / CLOSED).exists()]

    def _of(self, day: str) -> Path:
        return self.folder / f"{_PREFIX}{day}"

    @override
    def blocks(self, day: str, first: int = 0, step: int = 1) -> Iterator[Block]:
        import pyarrow.parquet as pq

        number = 0
        for path in sorted(self._of(day).glob("*.parquet")):
            try:
                parquet = pq.ParquetFile(path, memory_map=True)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: no Parquet file that can be read ({str(error).splitlines()[0]})") from error
            names = parquet.schema_arrow.names
            if ITEM not in names:
                raise ValueError(f"{path}: has no column {ITEM}; it has {', '.join(names)}")
            columns = [name for name in (ITEM, TIME, NEW_EVENTS) if name in names]
            for group in range(parquet.num_row_groups):
                if number >= first and (number - first) % step == 0:
                    table = parquet.read_row_group(group, columns=columns, use_threads=False)
                    yield _block(path, table)
                number += 1


def _block(path: Path, table: Any) -> Block:
    items, offsets = jagged(table.column(ITEM))
    lengths = np.diff(offsets)
    times = None
    if TIME in table.column_names:
        times, ends = jagged(table.column(TIME))
        if not np.array_equal(ends, offsets):
            raise ValueError(f"{path}: columns {ITEM} and {TIME} have lists of different lengths")
    new = lengths
    if NEW_EVENTS in table.column_names:
        new = jagged(table.column(NEW_EVENTS))[0].astype(np.int64)
        if (wrong := np.flatnonzero((new < 0) | (new > lengths))).size:
            row = int(wrong[0])
            raise ValueError(
                f"{path}: row {row} has {new[row]} new events of {lengths[row]}; expected 0 ... its length"
            )
    return Block(UserRows(offsets, items, times), new)


def wait_for_day(stream: EventStream, number: int, *, wait_s: float, poll_s: float) -> str | None:
    """The day of a number, once it is complete; None where it is not within the time.

    Args:
        stream: the days.
        number: which, counted from 0.
        wait_s: seconds to wait for it.
        poll_s: seconds between looks.
    """
    deadline = time.monotonic() + wait_s
    while True:
        days = stream.days()
        if number < len(days):
            return days[number]
        if time.monotonic() >= deadline:
            return None
        time.sleep(min(poll_s, max(deadline - time.monotonic(), 0)))
