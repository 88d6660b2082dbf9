"""A log whose records are grouped by another column than its user, for meta learning.

The column is called a task, G-Meta's word (arXiv 2401.04338).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.event_store.fields import ITEM, USER

if TYPE_CHECKING:
    import polars as pl

LOG_USER = "user"
"""Sparse field of events: the log's user, where tasks are another column."""
_KEY = "__key"


def with_tasks(log: EventLog, column: str) -> EventLog:
    """The log with the values of a column in the place of its users, each of which becomes a row of the store.

    Items stay items. Where the column is not the user, the log's user becomes a category `user` of each event, and
    features of users become those of events, but for lists.

    Args:
        log: the log.
        column: the user, the item, a column of events, or a feature of users or items that is no list.

    Raises:
        ValueError: there is no such column, or it cannot be one of tasks; the message says which there are.
    """
    names = log.scan(log.files[0]).collect_schema().names()
    if column == log.user_id or (column == USER and column not in names):
        return replace(log, tasks=column)
    column = log.item_id if column == ITEM and column not in names else column
    _check(log, column, names)
    of_users = _Table(log.users, log.user_id) if log.users is not None else None
    of_items = None
    if column not in names and (of_users is None or column not in of_users.columns):
        assert log.items is not None
        of_items = _Table(log.items, log.item_id, only=column)
    for table in (of_users, of_items):
        if table is not None and column in table.lists:
            raise ValueError(f"tasks={column}: holds lists; a record has one task, so choose a column of single values")
    # The item keeps its own column.
    task = f"{column} (task)" if column == log.item_id else column
    sparse = (LOG_USER, *log.sparse, *(of_users.sparse if of_users is not None else ()))
    dense = (*log.dense, *(of_users.dense if of_users is not None else ()))

    def scan(file: Path) -> pl.LazyFrame:
        import polars as pl

        frame = log.scan(file)
        for table in (of_users, of_items):
            if table is not None:
                frame = table.joined(frame)
        copies = [pl.col(log.user_id).alias(LOG_USER)]
        if task != column:
            copies.append(pl.col(column).alias(task))
        return frame.with_columns(copies)

    return replace(
        log,
        scan=scan,
        user_id=task,
        sparse=tuple(name for name in sparse if name != column),
        dense=tuple(name for name in dense if name != column),
        users=None,
        tasks=column,
        required=(LOG_USER,),
        left_out=tuple(of_users.lists) if of_users is not None else (),
        joined=sum(len(table.sparse) + len(table.dense) for table in (of_users, of_items) if table is not None),
        digest=lambda: "".join(table.digest() for table in (of_users, of_items) if table is not None),
    )


def _check(log: EventLog, column: str, names: Sequence[str]) -> None:
    if log.history is not None:
        raise ValueError(
            f"tasks={column}: the events of {log.history.files[0]} have user, item and time alone; set tasks={USER}, "
            "or leave the history out"
        )
    if column in (*log.labels, log.timestamp):
        what = "the time" if column == log.timestamp else "a label"
        raise ValueError(f"tasks={column}: is {what} of the log; records are grouped by what is known beforehand")
    of_users, of_items = (
        [*features.sparse, *features.dense] if features is not None else [] for features in (log.users, log.items)
    )
    used = {*log.sparse, *log.dense, *log.labels, *of_users}
    if LOG_USER in used or log.item_id == LOG_USER:
        raise ValueError(
            f"columns: {LOG_USER} is what the log's user is called where tasks={column}; rename the column {LOG_USER}"
        )
    there = [USER, ITEM, *(x for x in (*names, *of_users, *of_items) if x not in (log.row, log.timestamp, *log.labels))]
    if column not in there:
        hint = "; of JSON lines, name it in columns.sparse too" if log.form == "jsonl" else ""
        raise ValueError(f"tasks={column}: the log has no such column; it has {', '.join(dict.fromkeys(there))}{hint}")


class _Table:
    """Features as columns of events.

    Args:
        features: of users or items.
        key: column of the log by which they are found.
        only: the one feature that is wanted; None wants all.
    """

    def __init__(self, features: Features, key: str, *, only: str | None = None) -> None:
        import polars as pl

        self._key = key
        raw = features.frame()
        wanted = [name for name in (*features.sparse, *features.dense) if only in (None, name)]
        if missing := [name for name in (features.key, *wanted) if name not in raw.columns]:
            raise ValueError(f"features: no column {missing[0]}; there are {', '.join(raw.columns)[:200]}")
        self.lists = [name for name in wanted if isinstance(raw[name].dtype, pl.List)]
        self.columns = wanted
        self.sparse = tuple(name for name in features.sparse if name in wanted and name not in self.lists)
        self.dense = tuple(name for name in features.dense if name in wanted and name not in self.lists)
        columns = [raw[features.key].cast(pl.String).str.strip_chars().alias(_KEY)]
        columns += [_category(raw[name]) if name in self.sparse else raw[name] for name in (*self.sparse, *self.dense)]
        frame = pl.DataFrame(columns)
        self._frame = frame.filter(pl.col(_KEY).is_not_null()).unique(_KEY, keep="first", maintain_order=True)
        self.digest = cache(self._digest)

    def joined(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """The events of a log with these columns; missing where a user or item has none."""
        import polars as pl

        # A column of the log that it does not use may have the name of a feature.
        own = frame.drop([*self.sparse, *self.dense], strict=False)
        own = own.with_columns(pl.col(self._key).cast(pl.String).str.strip_chars().alias(_KEY))
        return own.join(self._frame.lazy(), on=_KEY, how="left", maintain_order="left").drop(_KEY)

    def _digest(self) -> str:
        rows = self._frame.hash_rows().to_numpy().tobytes()
        return hashlib.blake2b(repr(self._frame.schema).encode() + rows, digest_size=16).hexdigest()


def _category(column: pl.Series) -> pl.Series:
    """Categories as whole numbers or text, where they stand as other numbers."""
    import polars as pl

    if not column.dtype.is_float():
        return column
    whole = column.cast(pl.Int64, strict=False)
    return whole if (whole.cast(column.dtype) == column).fill_null(True).all() else column.cast(pl.String)
