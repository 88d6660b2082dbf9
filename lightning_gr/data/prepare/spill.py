"""The first stage of prepare: reads a log in pieces, checks and casts them, and spills events by user to disk."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.event_store.fields import EXPOSED
from lightning_gr.data.prepare import cells
from lightning_gr.data.prepare.settings import PrepareSettings

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

USER, ITEM, TIME, FINE = "__user", "__item", "__time", "__fine"
"""`TIME` is in whole microseconds, `FINE` the nanoseconds beyond them."""
_BATCH_ROWS = 1 << 19
_RAW_SHARE = 1 / 16
"""Of the memory, how much raw log a bucket may hold: sorted and grouped it takes several times as much."""
_MOST_BUCKETS = 512
_PACKED = {b"\x1f\x8b": 5, b"\x28\xb5\x2f\xfd": 5, b"PAR1": 5}
"""How many times as much a file takes unpacked, by its first bytes: gzip, zstd, Parquet."""


@dataclass
class Counts:
    """What was seen while reading.

    Args:
        rows: rows read.
        bad: rows left out, by reason.
        missing: cells of numbers and labels that hold none, by column.
        units: times by the unit they stood in.
        blank: rows of text without anything in a column that is used; they are no events.
        history: rows read of the log of history.
    """

    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    blank: int = 0
    history: int = 0

    def add(self, other: Counts) -> None:
        """Adds another part's counts."""
        self.rows += other.rows
        self.blank += other.blank
        self.history += other.history
        for name in ("bad", "missing", "units"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count


def num_buckets(log: EventLog, settings: PrepareSettings) -> int:
    """How many parts the users are cut into, so that each fits into memory."""
    size = sum(file.stat().st_size * _packed(file) for file in log.all_files)
    columns = 3 + len(log.sparse) + len(log.dense) + len(log.labels)
    size = size * columns // (columns - log.joined)
    return int(min(max(-(-size // int(settings.memory_gb * 1e9 * _RAW_SHARE)), 1), _MOST_BUCKETS))


def _packed(file: Path) -> int:
    with file.open("rb") as opened:
        first = opened.read(4)
    return next((factor for magic, factor in _PACKED.items() if first.startswith(magic)), 1)


def spill(
    log: EventLog,
    work: Path,
    settings: PrepareSettings,
    *,
    buckets: int,
    as_text: set[str],
    progress: Callable[[str, int, int], None],
) -> Counts:
    """Spills every file that was not spilled before.

    Args:
        log: the log.
        work: folder to spill into.
        settings: what is kept.
        buckets: parts the users are cut into.
        as_text: id columns that are read as text.
        progress: is told the stage, what is done and what there is.

    Raises:
        NotWhole: a column taken for whole numbers has something else.
        ValueError: a file or row cannot be used; the message names it.
    """
    total, done = Counts(), 0
    sizes = [file.stat().st_size for file in log.all_files]
    for number, file in enumerate(log.all_files):
        folder = work / "spill" / f"{number:05d}"
        finished = folder / "finished.json"
        if not finished.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            of = log if number < len(log.files) else log.history
            assert of is not None
            counts = _spill_file(log, of, file, number, folder, settings, buckets, as_text, progress, done, sum(sizes))
            temporary = finished.with_suffix(".tmp")
            temporary.write_text(json.dumps(counts.__dict__))
            os.replace(temporary, finished)
        counts = Counts(**json.loads(finished.read_text()))
        total.add(counts)
        if counts.rows == 0 and number >= len(log.files):
            warnings.warn(
                f"history={file}: has no rows below its header, so it adds nothing; give the file that has the events, "
                "or leave it out",
                stacklevel=2,
            )
        done += sizes[number]
        progress("reading", done, sum(sizes))
    return total


def _spill_file(
    log: EventLog,
    of: EventLog,
    file: Path,
    number: int,
    folder: Path,
    settings: PrepareSettings,
    buckets: int,
    as_text: set[str],
    progress: Callable[[str, int, int], None],
    done: int,
    size: int,
) -> Counts:
    import polars as pl

    counts, rows = Counts(), 0
    writers: dict[int, pa.RecordBatchStreamWriter] = {}
    own = file.stat().st_size
    writing: Future[None] | None = None
    # Events are written while the next ones are read and cast.
    with ThreadPoolExecutor(1) as background:
        try:
            for batch in _batches(of, file):
                lines = batch[of.row].to_numpy() if of.row else np.arange(rows, rows + len(batch)) + of.first_row
                rows += len(batch)
                blank = _blank(batch, of.row)
                if blank.any():
                    # Blank lines are nobody's mistake.
                    batch, lines = batch.filter(pl.Series(~blank)), lines[~blank]
                events, of_batch = _typed(log, of, file, batch, lines, settings, as_text)
                if writing is not None:
                    writing.result()
                writing = background.submit(_write, events, buckets, folder, writers)
                of_history = len(batch) if of is log.history else 0
                counts.add(
                    Counts(len(batch), of_batch.reasons, of_batch.missing, of_batch.units, int(blank.sum()), of_history)
                )
                # How far a compressed file has been read cannot be known; a row is taken for fifty bytes at least.
                progress("reading", done + min(own, rows * 50), size)
            if writing is not None:
                writing.result()
        finally:
            background.shutdown(wait=True)
            for writer in writers.values():
                writer.close()
    return counts


def _blank(batch: pl.DataFrame, row: str | None) -> np.ndarray[Any, Any]:
    """Rows of text without any cell; a table that knows types has no blank lines."""
    import polars as pl

    cells_ = batch.drop(row) if row else batch
    if any(dtype not in (pl.String, pl.Null) for dtype in cells_.dtypes) or not all(cells_.null_count().row(0)):
        return np.zeros(len(batch), dtype=bool)
    return cells_.select(pl.all_horizontal(pl.all().is_null())).to_series().to_numpy()


def _batches(log: EventLog, file: Path) -> Iterator[pl.DataFrame]:
    import polars as pl

    wanted = [log.user_id, log.item_id, *([log.timestamp] if log.timestamp else []), *log.sparse, *log.dense]
    wanted += [*log.labels, *([log.row] if log.row else [])]
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if wanted.count(name) > 1)
        raise ValueError(f"columns: {twice} is named twice; a column has one meaning")
    if bad := next((name for name in wanted if "\0" in name), None):
        raise ValueError(f"{file}: column {bad!r} has a NUL in its name, and no store can hold that; rename it")
    try:
        frame = log.scan(file)
        names = frame.collect_schema().names()
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(
                f"{file}: has no column {missing[0]}; it has {', '.join(names)[:200]}; name yours in columns"
            )
        yield from frame.select(wanted).collect_batches(chunk_size=_BATCH_ROWS, maintain_order=True)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        # A compressed file that was cut off ends up here too.
        raise ValueError(f"{file}: cannot be read ({str(error).splitlines()[0]}); get it again or repair it") from error


class _Batch(cells.BadRows):
    """What is wrong with a batch, and what was counted in it."""

    def __init__(self, rows: int) -> None:
        super().__init__(np.ones(rows, dtype=bool))
        self.missing: dict[str, int] = {}
        self.units: dict[str, int] = {}


def _typed(
    log: EventLog,
    of: EventLog,
    file: Path,
    batch: pl.DataFrame,
    lines: np.ndarray[Any, Any],
    settings: PrepareSettings,
    as_text: set[str],
) -> tuple[pl.DataFrame, _Batch]:
    """The usable rows of a batch with typed columns; of history, those that the log has beyond it hold nothing."""
    import polars as pl

    bad = _Batch(len(batch))
    try:
        columns = [
            cells.ids(batch[name], name, bad, as_text=name in as_text, required=True).alias(alias)
            for name, alias in ((log.user_id, USER), (log.item_id, ITEM))
        ]
        if log.timestamp is not None:
            found, fine, bad.units = cells.times(batch[log.timestamp], log.timestamp, settings.time_unit, bad)
            columns += [found.alias(TIME), fine.alias(FINE)]
        for name in log.sparse:
            raw = batch[name] if of is log else pl.repeat(None, len(batch), dtype=pl.Null, eager=True)
            required = name in log.required
            columns.append(cells.ids(raw, name, bad, as_text=name in as_text, required=required).alias(name))
        for name in (*log.dense, *log.labels):
            if of is not log:
                columns.append(pl.Series(name, np.full(len(batch), np.nan, dtype=np.float32)))
                continue
            found, missing = cells.numbers(batch[name], name, bad)
            columns.append(found.alias(name))
            bad.missing[name] = missing
        if log.history is not None:
            columns.append(pl.Series(EXPOSED, np.full(len(batch), int(of is log), dtype=np.int64)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if bad.first is not None and settings.bad_rows == "refuse":
        row, column, what = bad.first
        raise ValueError(f"{file}: row {int(lines[row])}, column {column}: {what}; correct it, or set bad_rows to drop")
    frame = pl.DataFrame(columns)
    return (frame if bad.usable.all() else frame.filter(pl.Series(bad.usable))), bad


def bucket_of(users: pl.Series, buckets: int) -> np.ndarray[Any, Any]:
    """The part of each user; a function of the raw id alone, on every machine and version."""
    import polars as pl

    if buckets == 1:
        return np.zeros(len(users), dtype=np.int64)
    if users.dtype == pl.Int64:
        x = users.to_numpy().view(np.uint64)
        with np.errstate(over="ignore"):
            x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        return ((x ^ (x >> np.uint64(33))) % np.uint64(buckets)).astype(np.int64)
    distinct = users.unique()
    hashes = pl.Series([zlib.crc32(user.encode()) % buckets for user in distinct.to_list()], dtype=pl.Int64)
    of_user = pl.DataFrame({"user": distinct, "bucket": hashes})
    joined = users.alias("user").to_frame().join(of_user, on="user", how="left", maintain_order="left")
    return joined["bucket"].to_numpy()


def _write(events: pl.DataFrame, buckets: int, folder: Path, writers: dict[int, pa.RecordBatchStreamWriter]) -> None:
    import polars as pl
    import pyarrow as pa

    if events.is_empty():
        return
    if buckets == 1:
        parts = [(0, events)]
    else:
        bucket = pl.Series("__bucket", bucket_of(events[USER], buckets))
        grouped = events.with_columns(bucket).partition_by("__bucket", as_dict=True, include_key=False)
        parts = [(int(key[0]), part) for key, part in grouped.items()]
    for key, part in parts:
        table = part.to_arrow(compat_level=pl.CompatLevel.oldest())
        if key not in writers:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            writers[key] = pa.ipc.new_stream(folder / f"{key:05d}.arrow", table.schema, options=options)
        writers[key].write_table(table)


def read_bucket(work: Path, bucket: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The events of a bucket, in the order of the log; no rows and no columns where there are none.

    Args:
        work: folder that was spilled into.
        bucket: which.
        columns: those needed; None means all.
    """
    import polars as pl
    import pyarrow as pa

    tables = []
    for folder in sorted((work / "spill").iterdir()):
        path = folder / f"{bucket:05d}.arrow"
        if path.is_file():
            with pa.OSFile(str(path)) as file:
                names = pa.ipc.open_stream(file).schema.names
            chosen = [names.index(name) for name in columns] if columns is not None else None
            options = pa.ipc.IpcReadOptions(included_fields=chosen)
            with pa.OSFile(str(path)) as file:
                tables.append(pa.ipc.open_stream(file, options=options).read_all())
    if not tables:
        return pl.DataFrame()
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return frame
