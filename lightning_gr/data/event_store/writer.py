"""StoreWriter: builds a store beside its place and moves it there whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data.event_store.fields import EVENTS, ITEMS, STORE_FORMAT, STORE_VERSION, VOCABULARY, Field
from lightning_gr.data.event_store.index import complete_store
from lightning_gr.data.event_store.store import is_store, manifest_path

if TYPE_CHECKING:
    import polars as pl

_GROUP_USERS = 1024
_GROUP_EVENTS = 1 << 18


class StoreWriter:
    """Writes a store under `work`, part by part; `finish` moves it to `path`, so a half-written one never lies there.

    Args:
        path: where the store goes.
        fields: columns beside user, item and time.
        has_timestamps: whether events have times.
        work: folder to build in, on the same disk as `path`; parts that lie there already are kept, for restarts.
        overwrite: whether a store at `path` is replaced.

    Raises:
        FileExistsError: something lies at `path` that may not be replaced.
    """

    def __init__(
        self, *, path: Path, fields: Sequence[Field], has_timestamps: bool, work: Path, overwrite: bool = False
    ) -> None:
        refuse_to_replace(path, overwrite=overwrite)
        self._path, self._work = path, work / "store"
        self._fields, self._has_timestamps = tuple(fields), has_timestamps
        (self._work / EVENTS).mkdir(parents=True, exist_ok=True)
        (self._work / VOCABULARY).mkdir(exist_ok=True)
        self._next = 0

    def has_part(self, number: int) -> bool:
        """Whether the part was finished before, by this writer or by a run that was cut off."""
        return self._part(number).is_file()

    def skip_part(self) -> None:
        """Counts the next part as written, where `has_part` says that it is there."""
        assert self.has_part(self._next)
        self._next += 1

    def write_users(self, users: pl.DataFrame) -> None:
        """Writes the next part: one row a user, in the order in which the store numbers them.

        Args:
            users: ``user_id``, ``item_id`` (lists of item rows), ``timestamp`` (lists of seconds, oldest first) if the
                store has times, and the fields of events (lists) and users.
        """
        import pyarrow.parquet as pq

        names = ["user_id", "item_id"] + ["timestamp"] * self._has_timestamps
        names += [field.name for field in self._fields if field.per != "item"]
        table = users.select(names).to_arrow()
        lengths = users["item_id"].list.len().to_numpy().astype(np.int64)
        part = self._part(self._next)
        temporary = part.with_suffix(".tmp")
        # Ids and times hardly repeat within a row group: a dictionary of them would only be in the way.
        repeating = [f"{f.name}.list.element" for f in self._fields if f.per == "event"]
        with pq.ParquetWriter(
            temporary, table.schema, compression="zstd", compression_level=1, use_dictionary=repeating or False
        ) as writer:
            for first, last in _groups(lengths):
                writer.write_table(table.slice(first, last - first), row_group_size=max(last - first, 1))
        os.replace(temporary, part)
        self._next += 1

    def write_vocabulary(self, field: str, values: pl.Series) -> None:
        """Writes the raw value of each code of a field, `item_id` included."""
        self._write(values.alias("value").to_frame(), self._work / VOCABULARY / f"{field}.parquet")

    def write_items(self, items: pl.DataFrame) -> None:
        """Writes the fields of items: row i describes item i."""
        self._write(items, self._work / ITEMS)

    def finish(self, *, summary: dict[str, Any]) -> None:
        """Indexes what was written and moves the store to its place.

        Args:
            summary: what became of the log, kept in the manifest.
        """
        manifest = {
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "has_timestamps": self._has_timestamps,
            "fields": [field.to_dict() for field in self._fields],
            "summary": summary,
        }
        manifest_path(self._work).write_text(json.dumps(manifest))
        complete_store(self._work)
        retired = None
        if self._path.exists():
            # A folder cannot be replaced in one step; the old store steps aside until the new one stands.
            retired = self._path.with_name(f".{self._path.name}.replaced")
            shutil.rmtree(retired, ignore_errors=True)
            os.replace(self._path, retired)
        os.replace(self._work, self._path)
        if retired is not None:
            shutil.rmtree(retired)

    def _part(self, number: int) -> Path:
        return self._work / EVENTS / f"part-{number:05d}.parquet"

    @staticmethod
    def _write(frame: pl.DataFrame, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        frame.write_parquet(temporary)
        os.replace(temporary, path)


def refuse_to_replace(path: Path, *, overwrite: bool) -> None:
    """Raises where something at `path` is not a store, or is one that may not be replaced.

    Raises:
        FileExistsError: names `path` and the remedy.
    """
    if not path.exists():
        return
    if not is_store(path):
        raise FileExistsError(f"{path}: exists and is no event store; give another place, or remove it yourself")
    if not overwrite:
        raise FileExistsError(f"{path}: an event store is there already; give another place, or --overwrite true")


def _groups(lengths: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Runs of users that become row groups: small in users and in events, so that a reader's window is bounded."""
    ends = np.cumsum(lengths)
    groups, first = [], 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + _GROUP_EVENTS, side="right"))
        last = min(max(last, first + 1), first + _GROUP_USERS, len(lengths))
        groups.append((first, last))
        first = last
    return groups
