"""prepare: the stages from a log to a store, each taken up again where a run that was cut off had left it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.event_store import EventStore, Field, StoreWriter
from lightning_gr.data.event_store.fields import EXPOSED
from lightning_gr.data.event_store.writer import refuse_to_replace
from lightning_gr.data.prepare.cells import NotWhole
from lightning_gr.data.prepare.core import Core
from lightning_gr.data.prepare.features import FeatureTable
from lightning_gr.data.prepare.part import by_user_and_time, out_of_order, repeats, users_of, without_repeats
from lightning_gr.data.prepare.settings import PrepareSettings
from lightning_gr.data.prepare.spill import ITEM, TIME, USER, num_buckets, read_bucket, spill
from lightning_gr.data.prepare.summary import Summary, histogram
from lightning_gr.data.prepare.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl

Progress = Callable[[str, int, int], None]
_VERSION = 2
"""Of what lies in the work folder; another one is not taken up."""


def prepare(
    log: EventLog,
    output: str | Path,
    *,
    settings: PrepareSettings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EventStore:
    """Reads a log and writes an event store.

    Everything is written beside `output`, in ``.<name>.prepare``, and moved there last. A run that was cut off is taken
    up where it was by another one of the same log and settings. The result is a function of the log and the settings.

    Args:
        log: the log.
        output: where the store goes.
        settings: what is kept; None keeps everything and refuses bad rows.
        overwrite: whether a store that is there already is replaced.
        progress: is told the stage, what is done and what there is.

    Returns:
        The store; its `summary` says what was read, kept and left out.

    Raises:
        FileExistsError: something lies at `output`.
        FileNotFoundError: a file of the log is not there.
        ValueError: the log or a setting cannot be used; the message names file, row and column.
        OSError: the disk is full, or a folder cannot be written to.
    """
    output, settings = Path(output), settings or PrepareSettings()
    refuse_to_replace(output, overwrite=overwrite)
    for file in log.all_files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.parent / f".{output.name}.prepare"
    try:
        store = _Run(log, output, work, settings, overwrite, progress or (lambda stage, done, total: None)).run()
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise OSError(
                errno.ENOSPC, f"{work}: the disk is full; make room and run again, what is done is kept"
            ) from error
        raise
    shutil.rmtree(work)
    return store


class _Run:
    def __init__(
        self, log: EventLog, output: Path, work: Path, settings: PrepareSettings, overwrite: bool, progress: Progress
    ) -> None:
        self._log, self._output, self._work, self._settings = log, output, work, settings
        self._overwrite, self._progress = overwrite, progress
        self._buckets = num_buckets(log, settings)
        self._sparse = (*log.sparse, *([EXPOSED] if log.history is not None else []))

    # ---- what lies in the work folder --------------------------------------------------------------------------

    def _identity(self) -> str:
        """Names the log's files as they are now, how they are read, and the settings."""
        files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self._log.all_files]
        columns = {name: value for name, value in vars(self._log).items() if isinstance(value, str | tuple | int)}
        for name in ("files", "required", "left_out", "joined"):
            columns.pop(name)
        what = [_VERSION, files, repr(sorted(columns.items())), self._plan(), repr(self._settings)]
        if self._log.history is not None:
            what.append(len(self._log.files))
        if self._log.digest is not None:
            what.append(self._log.digest())
        return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()

    def _plan(self) -> str:
        """What `scan` does with a file, its filters included; nothing where the file cannot be read, said later."""
        import polars as pl

        try:
            return self._log.scan(self._log.files[0]).explain(optimized=False)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
            return ""

    def _state(self) -> dict[str, Any]:
        """What an earlier run left, or nothing where it was another one."""
        file = self._work / "state.json"
        try:
            state = json.loads(file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            state = {}
        if not isinstance(state, dict) or state.get("identity") != self._identity():
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
            state = {"identity": self._identity(), "as_text": []}
            self._save(state)
        return state

    def _save(self, state: dict[str, Any]) -> None:
        _write_whole(self._work / "state.json", state)

    # ---- the stages --------------------------------------------------------------------------------------------

    def run(self) -> EventStore:
        state = self._state()
        while True:
            try:
                self._counts = spill(
                    self._log,
                    self._work,
                    self._settings,
                    buckets=self._buckets,
                    as_text=set(state["as_text"]),
                    progress=self._progress,
                )
                break
            except NotWhole as error:
                # What looked like whole numbers is text after all; all of it is read again as such.
                state["as_text"].append(error.column)
                shutil.rmtree(self._work / "spill")
                self._save(state)
        self._core = Core(
            min_user_events=self._settings.min_user_events, min_item_events=self._settings.min_item_events
        )
        if self._counts.rows == 0:
            raise ValueError(f"{self._log.files[0]}: the log has no events")
        self._core.settle(self._buckets, self._read)
        self._learn()
        if not len(self._vocabularies[ITEM]):
            raise ValueError(
                f"{self._log.files[0]}: no event is left of {self._counts.rows}; see bad_rows, min_user_events and "
                "min_item_events"
            )
        return self._write()

    def _read(self, bucket: int, names: Sequence[str] = ()) -> pl.DataFrame:
        """The kept events of a bucket as far as they are known, with the columns that are needed."""
        if self._settings.duplicates == "drop":
            return without_repeats(read_bucket(self._work, bucket))
        return read_bucket(self._work, bucket, [USER, ITEM, *names])

    def _learn(self) -> None:
        """The vocabularies of items and of every sparse field, and the features of users and items."""
        import polars as pl

        self._vocabularies = {name: Vocabulary(name) for name in (ITEM, *self._sparse)}
        if EXPOSED in self._sparse:
            self._vocabularies[EXPOSED].add(pl.Series([0, 1]))
        self._users: FeatureTable | None = None
        users_type: pl.DataType | None = None
        for bucket in range(self._buckets):
            events = self._core.keep(self._read(bucket, self._sparse))
            self._progress("numbering", bucket + 1, self._buckets)
            if events.is_empty():
                continue
            for name, vocabulary in self._vocabularies.items():
                vocabulary.add(events[name])
            if self._log.users is not None:
                if users_type is None:
                    users_type = events[USER].dtype
                    self._users = FeatureTable(self._log.users, per="user", ids=users_type)
                assert self._users is not None
                self._users.learn(self._users.join(events[USER].unique(maintain_order=True)))
        self._items: FeatureTable | None = None
        if self._log.items is not None and len(self._vocabularies[ITEM]):
            self._items = FeatureTable(self._log.items, per="item", ids=self._vocabularies[ITEM].dtype)
            self._items.learn(self._items.join(self._vocabularies[ITEM].values))

    def _fields(self) -> list[Field]:
        fields = [Field(name, "sparse", "event", len(self._vocabularies[name])) for name in self._sparse]
        fields += [Field(name, "dense", "event") for name in self._log.dense]
        fields += [Field(name, "label", "event") for name in self._log.labels]
        for table in (self._users, self._items):
            fields += table.all_fields() if table is not None else []
        names = [field.name for field in fields]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"column {twice[0]}: named for more than one of events, users and items; rename one")
        return fields

    def _write(self) -> EventStore:
        summary = Summary(self._log, self._counts)
        writer = StoreWriter(
            path=self._output,
            fields=self._fields(),
            has_timestamps=self._log.timestamp is not None,
            work=self._work,
            overwrite=self._overwrite,
        )
        self._write_parts(writer, summary)
        for name, vocabulary in self._vocabularies.items():
            writer.write_vocabulary("item_id" if name == ITEM else name, vocabulary.values)
        for table in (self._users, self._items):
            for name, vocabulary in (table.vocabularies if table is not None else {}).items():
                writer.write_vocabulary(name, vocabulary.values)
        if self._items is not None:
            ids = self._vocabularies[ITEM].values
            fields = self._items.encode(self._items.join(ids))
            writer.write_items(fields.insert_column(0, ids.alias("item_id")))
        writer.finish(summary=summary.finish(self._settings))
        return EventStore(self._output)

    def _write_parts(self, writer: StoreWriter, summary: Summary) -> None:
        """Every part that is not there; one is written while the next one is made."""
        self._forget_parts_of_other_features()
        writing: Future[None] | None = None
        done = 0

        def finished() -> None:
            nonlocal done
            if writing is not None:
                writing.result()
            done += 1
            self._progress("writing", done, self._buckets)

        with ThreadPoolExecutor(1) as background:
            for bucket in range(self._buckets):
                notes = self._work / f"part-{bucket:05d}.json"
                users: pl.DataFrame | None = None
                if writer.has_part(bucket) and notes.is_file():
                    of_part = json.loads(notes.read_text())
                else:
                    users, of_part = self._part(bucket)
                summary.add(of_part)
                if bucket:
                    finished()
                writing = background.submit(_write_part, writer, users, notes, of_part)
            finished()

    def _forget_parts_of_other_features(self) -> None:
        """Parts hold features of users, which may have changed since an earlier run; files of the log have not."""
        digest = self._users.digest() if self._users is not None else ""
        file = self._work / "users.json"
        if not file.is_file() or json.loads(file.read_text()) != digest:
            for notes in self._work.glob("part-*.json"):
                notes.unlink()
            _write_whole(file, digest)

    def _part(self, bucket: int) -> tuple[pl.DataFrame, dict[str, Any]]:
        """A bucket's users, one row each, and what there is to say of them."""
        import polars as pl

        raw = read_bucket(self._work, bucket)
        if raw.is_empty():
            raw = self._nothing()
        events = by_user_and_time(raw)
        del raw
        repeated = repeats(events)
        notes: dict[str, Any] = {"usable": len(events), "duplicates": int(repeated.sum())}
        if self._settings.duplicates == "drop" and repeated.any():
            events = events.filter(pl.Series(~repeated))
        events = self._core.keep(events)
        notes |= {"kept": len(events), "late": out_of_order(events)}
        if EXPOSED in self._sparse:
            # Each log has an order of its own.
            logs = [events.filter(pl.col(EXPOSED) == code) for code in (0, 1)]
            notes |= {"history": len(logs[0]), "late": sum(out_of_order(of_log) for of_log in logs)}
        columns = {"user_id": events[USER], "item_id": self._vocabularies[ITEM].encode(events[ITEM])}
        if self._log.timestamp is not None:
            columns["timestamp"] = events[TIME] // 10**6
            if len(events):
                times = columns["timestamp"].to_numpy()
                notes["times"] = [int(times.min()), int(times.max())]
        columns |= {name: self._vocabularies[name].encode(events[name]) for name in self._sparse}
        columns |= {name: events[name] for name in (*self._log.dense, *self._log.labels)}
        users = users_of(columns)
        if self._users is not None:
            fields = self._users.encode(self._users.join(users["user_id"]))
            users = users.hstack(fields.get_columns())
        lengths = users["item_id"].list.len().to_numpy()
        notes["lengths"] = histogram(lengths)
        notes["longest"] = int(lengths.max(initial=0))
        return users, notes

    def _nothing(self) -> pl.DataFrame:
        """No events with the columns of a bucket that has some."""
        for bucket in range(self._buckets):
            events = read_bucket(self._work, bucket)
            if len(events):
                return events.clear()
        raise AssertionError("a log without events is refused before")


def _write_part(writer: StoreWriter, users: pl.DataFrame | None, notes: Path, of_part: dict[str, Any]) -> None:
    """Writes a part and then, as the sign that it is whole, what there is to say of it; None is there already."""
    if users is None:
        writer.skip_part()
        return
    writer.write_users(users)
    _write_whole(notes, of_part)


def _write_whole(file: Path, content: Any) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)
