"""Any CSV, Parquet or JSON-lines log, by what its columns mean."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.data import parquet_file
from lightning_gr.data.event_log import EventLog
from lightning_gr.data.formats.feature_file import open_features
from lightning_gr.data.formats.text import first_line, first_lines, opened, scan_json

if TYPE_CHECKING:
    import polars as pl

_SEPARATORS = ",\t;|"
_ENDINGS = {"csv": (".csv", ".tsv"), "parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson", ".json")}
_SNIFFED = 1000
"""Lines of JSON whose keys are taken for those of the file."""


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
    if path.is_dir():
        kinds = [kind for kind in _ENDINGS if _of_kind(path, kind)]
        if len(kinds) > 1:
            raise ValueError(f"{path}: holds files of {' and '.join(kinds)}; give the form, one of {', '.join(kinds)}")
        if kinds:
            return kinds[0]
    files = _files(path, None)
    if not files:
        return None
    with opened(files[0]) as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    line = first_line(files[0])
    if line.startswith("{"):
        return "jsonl"
    # A name or number says nothing on its own, and neither does what is no text.
    return "csv" if line.isprintable() and any(separator in line for separator in _SEPARATORS) or "\t" in line else None


def open_csv(
    path: Path,
    *,
    columns: Columns,
    separator: str | None = None,
    users: Mapping[str, Any] | None = None,
    items: Mapping[str, Any] | None = None,
) -> EventLog:
    """CSV with a header; also with tabs, semicolons or bars, and compressed by gzip or zstd.

    Args:
        path: a file, a folder of files with one header, or a pattern as ``log/2024-*.csv``.
        columns: what the columns mean.
        separator: between fields; None takes the one that the first line has most of.
        users: features of users in a file beside the log: `path`, `sparse` and `dense`; see `open_features`.
        items: the same of items.
    """
    if separator is not None and len(separator.encode()) != 1:
        raise ValueError(f"separator={separator!r}: expected one character of ASCII")
    files = _files(path, "csv")
    line = first_line(files[0])
    chosen = separator or max(_SEPARATORS, key=line.count)

    def scan(file: Path) -> pl.LazyFrame:
        import polars as pl

        frame = pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy", separator=chosen)
        names = frame.collect_schema().names()
        return frame.rename({name: name.strip() for name in names if name != name.strip()})

    def names(file: Path) -> list[str]:
        try:
            header = [name.strip() for name in next(csv.reader([first_line(file)], delimiter=chosen), [])]
        except csv.Error as error:
            raise ValueError(f"{file}: line 1 is no header ({error}); get the file again") from error
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"{file}: has two columns {twice[0]}; rename one")
        return header

    return _with_features(_log("csv", files, scan, columns, names, first_row=2), users, items)


def open_parquet(
    path: Path,
    *,
    columns: Columns,
    users: Mapping[str, Any] | None = None,
    items: Mapping[str, Any] | None = None,
) -> EventLog:
    """Parquet with one row an event.

    Args:
        path: a file, a folder of files, or a pattern as ``log/day=*/*.parquet``.
        columns: what the columns mean.
        users: features of users in a file beside the log: `path`, `sparse` and `dense`; see `open_features`.
        items: the same of items.
    """
    log = _log("parquet", _files(path, "parquet"), parquet_file.scan, columns, parquet_file.column_names, first_row=1)
    return _with_features(log, users, items)


def open_jsonl(
    path: Path,
    *,
    columns: Columns,
    users: Mapping[str, Any] | None = None,
    items: Mapping[str, Any] | None = None,
) -> EventLog:
    """JSON lines, one object an event; also compressed by gzip or zstd.

    Args:
        path: a file, a folder of files, or a pattern as ``log/*.jsonl.gz``.
        columns: what the keys mean.
        users: features of users in a file beside the log: `path`, `sparse` and `dense`; see `open_features`.
        items: the same of items.
    """
    import polars as pl

    def names(file: Path) -> list[str]:
        found: dict[str, None] = {}
        for number, line in enumerate(first_lines(file, _SNIFFED), start=1):
            try:
                found |= dict.fromkeys(json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"{file}: line {number}, blank ones not counted, is no JSON object: {line[:40]!r}"
                ) from error
        return list(found)

    def scan(file: Path) -> pl.LazyFrame:
        # One key that only few lines have is no mistake; which are missing was seen when the log was opened.
        wanted = [name for _, name in _wanted(columns, log.timestamp)]
        frame = scan_json(file, list(dict.fromkeys(wanted)), row="__row")
        truths = [pl.col(name).replace({"true": "1", "false": "0"}) for name in (*log.dense, *log.labels)]
        return frame.with_columns(truths)

    log = _log("jsonl", _files(path, "jsonl"), scan, columns, names, first_row=None)
    return _with_features(log, users, items)


def _with_features(log: EventLog, users: Mapping[str, Any] | None, items: Mapping[str, Any] | None) -> EventLog:
    return replace(
        log, users=open_features("users", users, log.user_id), items=open_features("items", items, log.item_id)
    )


def _of_kind(folder: Path, kind: str) -> list[Path]:
    """The files of a form in a folder and those below it, sorted by name; what jobs write beside them is not."""
    files = (
        file
        for file in folder.rglob("*")
        if not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts) and file.is_file()
    )
    return sorted(file for file in files if re.sub(r"\.(gz|zst)$", "", file.name).endswith(_ENDINGS[kind]))


def _files(path: Path, kind: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        files = sorted(Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file())
    else:
        files = _of_kind(path, kind) if kind else []
        plain = (file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
        files = files or sorted(plain)
    if not files:
        raise FileNotFoundError(f"{path}: no file is there; give an event log")
    return files


def _log(
    form: str,
    files: list[Path],
    scan: Callable[[Path], pl.LazyFrame],
    columns: Columns,
    names: Callable[[Path], list[str]],
    *,
    first_row: int | None,
) -> EventLog:
    """The log, once every file was seen to have the columns; `first_row` None where `scan` numbers the lines."""
    timestamp = columns.timestamp
    for number, file in enumerate(files):
        found = names(file)
        if not found:
            raise ValueError(f"{file}: the file is empty")
        if number == 0 and timestamp == "timestamp" and timestamp not in found:
            timestamp = None
        for meaning, name in _wanted(columns, timestamp):
            if name not in found:
                near = difflib.get_close_matches(name, found, n=1)
                hint = f"it has {', '.join(found)[:200]}" + (f"; did you mean {near[0]}?" if near else "")
                setting = re.split("[=:]", meaning)[0]
                raise ValueError(f"{file}: has no column {name} ({meaning}); {hint}; name yours by --{setting}")
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
        row="__row" if first_row is None else None,
        first_row=first_row or 1,
    )


def _wanted(columns: Columns, timestamp: str | None) -> list[tuple[str, str]]:
    """What is asked for, with the setting that does."""
    single = {"user_id": columns.user_id, "item_id": columns.item_id, "timestamp": timestamp}
    wanted = [(f"columns.{meaning}={name}", name) for meaning, name in single.items() if name is not None]
    return wanted + [(f"columns: {name}", name) for name in (*columns.sparse, *columns.dense, *columns.labels)]
