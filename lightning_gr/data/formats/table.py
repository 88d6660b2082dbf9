"""Any CSV, Parquet or JSON-lines log, by what its columns mean."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.formats.text import first_line

if TYPE_CHECKING:
    import polars as pl

_SEPARATORS = ",\t;|"


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean.

    Args:
        user_id: column of the user.
        item_id: column of the item.
        timestamp: column of the time: seconds, milliseconds and finer, or ISO dates; None where the order of the log is
            the order of time. Where it is left at `timestamp` and the log has none, it counts as None.
        sparse: categories of an event, whole numbers or text.
        dense: numbers of an event.
        labels: numbers that tasks predict; empty or NaN is no label.
    """

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str | None = "timestamp"
    sparse: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def recognise(path: Path) -> str | None:
    """`csv`, `parquet`, `jsonl`, or None."""
    files = _files(path) if path.is_dir() else [path]
    if not files:
        return None
    first = files[0]
    with first.open("rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    line = first_line(first)
    if line.startswith("{"):
        return "jsonl"
    return "csv" if any(separator in line for separator in _SEPARATORS) else None


def open_csv(path: Path, *, columns: Columns, separator: str | None = None) -> EventLog:
    """CSV with a header; also with tabs, semicolons or bars, and compressed by gzip or zstd.

    Args:
        path: a file, or a folder of files with one header.
        columns: what the columns mean.
        separator: between fields; None takes the one that the first line has most of.
    """
    import polars as pl

    files = _files(path)
    line = first_line(files[0])
    separator = separator or max(_SEPARATORS, key=line.count)
    header = next(csv.reader([line], delimiter=separator))

    def scan(file: Path) -> pl.LazyFrame:
        frame = pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy", separator=separator)
        names = frame.collect_schema().names()
        return frame.rename({name: name.strip() for name in names if name != name.strip()})

    return _log("csv", files, scan, columns, [name.strip() for name in header], first_row=2)


def open_parquet(path: Path, *, columns: Columns) -> EventLog:
    """Parquet with one row an event.

    Args:
        path: a file, or a folder of files.
        columns: what the columns mean.
    """
    import polars as pl

    files = _files(path)
    try:
        names = pl.read_parquet_schema(files[0])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{files[0]}: no Parquet file that can be read ({str(error).splitlines()[0]})") from error
    return _log("parquet", files, pl.scan_parquet, columns, list(names), first_row=1)


def open_jsonl(path: Path, *, columns: Columns) -> EventLog:
    """JSON lines, one object an event; also compressed by gzip or zstd.

    Args:
        path: a file, or a folder of files.
        columns: what the keys mean.
    """
    import polars as pl

    files = _files(path)
    try:
        names = pl.scan_ndjson(files[0], infer_schema_length=1000).collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{files[0]}: cannot be read as JSON lines ({str(error).splitlines()[0]})") from error

    def scan(file: Path) -> pl.LazyFrame:
        return pl.scan_ndjson(file, infer_schema_length=1000)

    return _log("jsonl", files, scan, columns, names, first_row=1)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    if not files:
        raise FileNotFoundError(f"{path}: the folder has no files; give an event log")
    return files


def _log(
    form: str,
    files: list[Path],
    scan: Callable[[Path], pl.LazyFrame],
    columns: Columns,
    names: list[str],
    *,
    first_row: int,
) -> EventLog:
    timestamp = columns.timestamp
    if timestamp == "timestamp" and timestamp not in names:
        timestamp = None
    wanted = {"user_id": columns.user_id, "item_id": columns.item_id} | ({"timestamp": timestamp} if timestamp else {})
    wanted |= {name: name for name in (*columns.sparse, *columns.dense, *columns.labels)}
    for meaning, name in wanted.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"it has {', '.join(names)[:200]}" + (f"; did you mean {near[0]}?" if near else "")
            what = f"columns.{meaning}={name}" if meaning in ("user_id", "item_id", "timestamp") else f"columns: {name}"
            raise ValueError(f"{files[0]}: has no column {name} ({what}); {hint}")
    return EventLog(
        form=form,
        files=tuple(files),
        scan=scan,
        user_id=columns.user_id,
        item_id=columns.item_id,
        timestamp=timestamp,
        sparse=tuple(columns.sparse),
        dense=tuple(columns.dense),
        labels=tuple(columns.labels),
        first_row=first_row,
    )
