"""EventLog: what reading a log needs to know of it, whoever published it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Features:
    """Features of users or of items, one row an id.

    Args:
        frame: loads them.
        key: column of the id, as the log spells it.
        sparse: categorical columns, scalars or lists of whole numbers or strings.
        dense: numeric columns.
    """

    frame: Callable[[], pl.DataFrame]
    key: str
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class EventLog:
    """An event log in files: how each is scanned, and what its columns mean.

    Args:
        form: who publishes such logs, for messages: `csv`, `kuairand`, ...
        files: read in this order.
        scan: a file to a lazy table of raw columns; cells may still be text.
        user_id: column of the user.
        item_id: column of the item.
        timestamp: column of the time; None means that the order of the log is the order of time.
        sparse: categorical columns of an event.
        dense: numeric columns of an event.
        labels: columns that tasks predict; a missing value or NaN is no label.
        row: column with the line number in the file, counted from 1, where `scan` makes one.
        first_row: line number of a file's first event, where it does not; 2 under a header.
        users: features of users.
        items: features of items.
        history: events that are history alone, in a log of its own without further columns; user, item and time are
            named as in this one.
        tasks: column that users stand for, as whoever prepares the log calls it; None where they are users. See
            `lightning_gr.data.formats.with_tasks`.
        required: those of `sparse` that each event must have.
        left_out: features of users that such a log cannot keep.
        joined: columns that `scan` takes from other files than the log's.
        digest: changes with what `scan` takes from other files than the log's.
    """

    form: str
    files: tuple[Path, ...]
    scan: Callable[[Path], pl.LazyFrame]
    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str | None = "timestamp"
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    row: str | None = None
    first_row: int = 1
    users: Features | None = None
    items: Features | None = None
    history: EventLog | None = None
    tasks: str | None = None
    required: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    joined: int = 0
    digest: Callable[[], str] | None = None

    @property
    def all_files(self) -> tuple[Path, ...]:
        """The files of the log and of its history."""
        return self.files + (self.history.files if self.history is not None else ())
