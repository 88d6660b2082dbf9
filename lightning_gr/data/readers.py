"""Event logs in the forms their owners publish, read into one table: user_id, item_id, timestamp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lightning_gr.data import parquet_file

if TYPE_CHECKING:
    import polars as pl

LogFormat = Literal["auto", "csv", "parquet", "s3rec", "movielens"]

_MOVIELENS_NAMES = {"userId": "user_id", "movieId": "item_id"}
_KNOWN = "CSV with user_id,item_id[,timestamp], Parquet with the same columns, S3-Rec sequences, MovieLens ratings"


def read_events(path: str | Path, format: LogFormat = "auto") -> pl.DataFrame:
    """Reads an event log, sorted by user and time; equal times keep the order of the file.

    Args:
        path: `csv`: a header with ``user_id,item_id`` and, if there is one, ``timestamp`` in whole seconds.
            `parquet`: the same columns. `s3rec`: a user a line, ``user item item ...`` in time order. `movielens`:
            ``user::movie::rating::seconds``, tab-separated ``u.data``, or ``ratings.csv``.
        format: which of them; `auto` looks at the content.

    Returns:
        Columns ``user_id`` and ``item_id`` (int64 where every id is a whole number, else strings) and ``timestamp``
        (int64 seconds, or null where the log has none).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is not such a log; the message names file, line or column.
    """
    path = Path(path)
    if format not in get_args(LogFormat):
        raise ValueError(f"format={format!r}: expected one of {', '.join(get_args(LogFormat))}")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such event log; set data.path to one, or make one with `lightning-gr demo`"
        )
    if path.is_dir():
        raise ValueError(f"{path}: a directory; give the log file itself")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected {_KNOWN}")
    found = _detect(path) if format == "auto" else format
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        "csv": _read_csv,
        "parquet": parquet_file.read,
        "s3rec": _read_s3rec,
        "movielens": _read_movielens,
    }
    events = _checked(path, readers[found](path))
    if events.is_empty():
        raise ValueError(f"{path}: the log has no events")
    return events.sort("user_id", "timestamp", maintain_order=True)


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        for raw in file:
            if line := raw.decode("utf-8-sig", errors="replace").strip():
                return line
    return ""


def _detect(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    line = _first_line(path)
    columns = [name.strip().strip('"') for name in line.split(",")]
    if "::" in line or set(_MOVIELENS_NAMES) <= set(columns):
        return "movielens"
    if {"user_id", "item_id"} & set(columns):
        return "csv"
    tabbed, spaced = line.split("\t"), line.split()
    if len(tabbed) == 4 and all(field.strip().isdigit() for field in tabbed):
        return "movielens"
    if len(spaced) >= 2 and "," not in line and all(field.lstrip("-").isdigit() for field in spaced[1:]):
        return "s3rec"
    raise ValueError(
        f"{path}: line 1 {line[:60]!r} is no log that is known here; expected {_KNOWN}; a table with other columns is "
        f"made into a store: lightning-gr prepare {path} STORE --columns.user_id NAME --columns.item_id NAME"
    )


def _polars_error(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})")


def _read_csv(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        return pl.read_csv(path, infer_schema=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise _polars_error(path, error) from error


def _read_lines(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text") from error
    frame = pl.DataFrame({"line": lines}, schema={"line": pl.String}).with_row_index("number", 1)
    return frame.with_columns(pl.col("line").str.strip_chars()).filter(pl.col("line") != "")


def _read_s3rec(path: Path) -> pl.DataFrame:
    import polars as pl

    fields = _read_lines(path).with_columns(pl.col("line").str.extract_all(r"\S+"))
    alone = fields.filter(pl.col("line").list.len() < 2)
    if not alone.is_empty():
        raise ValueError(f"{path}: line {alone['number'][0]} has a user and no item; expected `user item item ...`")
    return fields.select(user_id=pl.col("line").list.first(), item_id=pl.col("line").list.slice(1)).explode("item_id")


def _read_movielens(path: Path) -> pl.DataFrame:
    import polars as pl

    line = _first_line(path)
    if "," in line:
        return _read_csv(path).rename(_MOVIELENS_NAMES, strict=False)
    separator = "::" if "::" in line else "\t"
    fields = _read_lines(path).with_columns(pl.col("line").str.split(separator))
    wrong = fields.filter(pl.col("line").list.len() != 4)
    if not wrong.is_empty():
        form = separator.replace("\t", "<tab>").join(["user", "movie", "rating", "seconds"])
        raise ValueError(
            f"{path}: line {wrong['number'][0]} has {len(wrong['line'][0])} field(s) instead of 4; expected {form}"
        )
    names = {"user_id": 0, "item_id": 1, "timestamp": 3}
    return fields.select(**{name: pl.col("line").list.get(index) for name, index in names.items()})


def _checked(path: Path, events: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    for name in ("user_id", "item_id"):
        if name not in events.columns:
            raise ValueError(
                f"{path}: has no column {name}; it has {', '.join(events.columns)[:100]}; rename one to {name}"
            )
    columns = [_ids(path, events, "user_id"), _ids(path, events, "item_id")]
    if "timestamp" not in events.columns:
        times = pl.Series("timestamp", [None] * len(events), dtype=pl.Int64)
    else:
        times = events["timestamp"]
        if times.dtype == pl.Date or isinstance(times.dtype, pl.Datetime):
            times = times.dt.epoch("s")
        times = times.cast(pl.Int64, strict=False)
        if times.null_count():
            row = int(times.is_null().arg_true()[0])
            raise ValueError(
                f"{path}: row {row + 1}, column timestamp: {events['timestamp'][row]!r} is no whole number of seconds"
            )
    return pl.DataFrame([*columns, times])


def _ids(path: Path, events: pl.DataFrame, name: str) -> pl.Series:
    import polars as pl

    ids = events[name]
    if ids.dtype == pl.String:
        ids = ids.str.strip_chars()
        ids = ids.set(ids == "", None)
    elif not ids.dtype.is_integer():
        raise ValueError(f"{path}: column {name} has type {ids.dtype}; expected whole numbers or strings")
    if ids.null_count():
        raise ValueError(f"{path}: row {int(ids.is_null().arg_true()[0]) + 1}, column {name}: the id is missing")
    numbers = ids.cast(pl.Int64, strict=False)
    # "007" and "7" are two ids, so they stay strings.
    return numbers if not numbers.null_count() and (numbers.cast(ids.dtype) == ids).all() else ids
