"""check_store: says what is wrong with a store, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gr.data.event_store.fields import EVENTS, ITEM, TIME, USER, Field
from lightning_gr.data.event_store.store import EventStore, jagged

_TOLD = 20


@dataclass(frozen=True)
class Problem:
    """Something wrong with a store.

    Args:
        file: where, relative to the store.
        row: row of the file, counted from 0; None where it concerns the whole file.
        column: the column, or empty.
        what: what is wrong.
    """

    file: str
    row: int | None
    column: str
    what: str

    def __str__(self) -> str:
        where = [self.file]
        if self.row is not None:
            where.append(f"row {self.row}")
        if self.column:
            where.append(f"column {self.column}")
        return f"{', '.join(where)}: {self.what}"


def check_store(path: str | Path, *, most: int = _TOLD) -> list[Problem]:
    """Reads a whole store and compares it with its schema and its index.

    Args:
        path: the store.
        most: problems after which it stops looking.

    Returns:
        What is wrong, in the order of the files; nothing where all is well.
    """
    try:
        store = EventStore(path)
    except (ValueError, FileNotFoundError) as error:
        return [Problem(".", None, "", str(error))]
    return list(islice(_problems(store), most))


def _problems(store: EventStore) -> Iterator[Problem]:
    import pyarrow.parquet as pq

    seen: set[Any] = set()
    row_of_store = group_of_store = 0
    for part in store.parts:
        name = f"{EVENTS}/{part.name}"
        try:
            parquet = pq.ParquetFile(part)
        except (OSError, ValueError) as error:
            yield Problem(name, None, "", f"cannot be read ({str(error).splitlines()[0]})")
            return
        first = 0
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group)
            except (OSError, ValueError) as error:
                yield Problem(name, first, "", f"row group {group} cannot be read ({str(error).splitlines()[0]})")
                return
            if table.num_rows == 0:
                continue
            yield from _of_group(store, table, name, first)
            for row, user in enumerate(table.column(USER).to_pylist()):
                if user is None or user in seen:
                    yield Problem(name, first + row, USER, "missing" if user is None else f"{user!r} occurs twice")
                seen.add(user)
            lengths = np.diff(jagged(table.column(ITEM))[1])
            indexed = store.lengths[row_of_store : row_of_store + table.num_rows]
            if len(indexed) != len(lengths) or (indexed != lengths).any():
                yield Problem(name, first, ITEM, "the index has other lengths; run `lightning-gr store index`")
                return
            if group_of_store + 1 >= len(store.group_bounds) or store.group_bounds[group_of_store] != row_of_store:
                yield Problem(name, first, "", "the index has other row groups; run `lightning-gr store index`")
                return
            for field in store.fields:
                if field.kind == "label":
                    yield from _labels(store, table, field, name, first, row_of_store)
            first += table.num_rows
            row_of_store += table.num_rows
            group_of_store += 1
    if row_of_store != store.num_users:
        yield Problem("store.json", None, "", f"says {store.num_users} users; the files have {row_of_store}")
    for field in store.fields:
        if field.per == "item" and field.name not in store.items().columns:
            yield Problem("items.parquet", None, field.name, "the column is missing")
    if len(store.item_ids) != store.num_items:
        yield Problem("vocabulary/item_id.parquet", None, "value", f"has {len(store.item_ids)} of {store.num_items}")


def _of_group(store: EventStore, table: Any, name: str, first: int) -> Iterator[Problem]:
    """Problems inside one row group: nulls, lengths that differ, times out of order, codes out of range."""
    _, offsets = jagged(table.column(ITEM))
    lengths = np.diff(offsets)
    events = {ITEM: store.num_items} | ({TIME: None} if store.has_timestamps else {})
    events |= {field.name: field.cardinality for field in store.fields if field.per == "event"}
    kinds: dict[str, Field] = {field.name: field for field in store.fields}
    for column in [*events, *(field.name for field in store.fields if field.per == "user")]:
        if table.column(column).null_count:
            row = int(np.flatnonzero(table.column(column).is_null().to_numpy())[0])
            yield Problem(name, first + row, column, "missing")
            continue
        values, ends = jagged(table.column(column))
        if column in events and (np.diff(ends) != lengths).any():
            row = int(np.flatnonzero(np.diff(ends) != lengths)[0])
            yield Problem(
                name, first + row, column, f"has {int(np.diff(ends)[row])} values for {int(lengths[row])} events"
            )
            continue
        if values.dtype == object or (column not in kinds and values.dtype.kind == "f"):
            yield Problem(name, first, column, "a value inside a list is missing")
            continue
        size = events.get(column) if column in events else kinds[column].cardinality
        if size is not None and len(values):
            wrong = np.flatnonzero((values < 0) | (values >= size) | (values != values))
            if len(wrong):
                row = int(np.searchsorted(ends, wrong[0], side="right")) - 1
                yield Problem(name, first + row, column, f"code {values[wrong[0]]}: expected 0 ... {size - 1}")
        if column == TIME and len(values) > 1:
            falls = np.diff(values) < 0
            inner = offsets[1:-1]
            falls[inner[(inner > 0) & (inner < len(values))] - 1] = False
            if falls.any():
                at = int(np.flatnonzero(falls)[0])
                row = int(np.searchsorted(offsets, at, side="right")) - 1
                yield Problem(name, first + row, column, f"{values[at + 1]} comes after {values[at]}; sort by time")


def _labels(store: EventStore, table: Any, field: Field, name: str, first: int, row_of_store: int) -> Iterator[Problem]:
    values, ends = jagged(table.column(field.name))
    if values.dtype == object:
        return
    if np.isinf(values).any():
        row = int(np.searchsorted(ends, int(np.flatnonzero(np.isinf(values))[0]), side="right")) - 1
        yield Problem(name, first + row, field.name, "an infinite label; write NaN where there is none")
    counts = np.diff(np.concatenate([[0], np.cumsum(~np.isnan(values))])[ends])
    indexed = store.label_counts(field.name)[row_of_store : row_of_store + table.num_rows]
    if (indexed != counts).any():
        yield Problem(name, first, field.name, "the index has other label counts; run `lightning-gr store index`")
