"""Text files as published: first lines, whole small files in their own encoding, and big ones line by line."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_NO_SEPARATOR = "\x01"


def first_line(path: Path) -> str:
    """The first line that is not blank, whatever its encoding; empty where there is none."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for raw in file:
                if line := raw.decode("utf-8-sig", errors="replace").strip():
                    return line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: no gzip file that can be read ({error}); get it again") from error
    return ""


def whole(path: Path) -> str:
    """A small file: UTF-8, or Latin-1 where it is not, as older publishers write."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def scan_lines(path: Path) -> pl.LazyFrame:
    """``line`` and ``row``, its number from 1, lazily; blank lines are left out."""
    import polars as pl

    frame = pl.scan_csv(
        path,
        has_header=False,
        separator=_NO_SEPARATOR,
        quote_char=None,
        infer_schema=False,
        new_columns=["line"],
        encoding="utf8-lossy",
    )
    frame = frame.with_row_index("row", 1).with_columns(pl.col("line").str.strip_chars())
    return frame.filter(pl.col("line").is_not_null() & (pl.col("line") != ""))


def scan_fields(path: Path, separator: str, names: list[str]) -> pl.LazyFrame:
    """Fields of a file without header whose separator may have more than one character, and ``row``."""
    import polars as pl

    fields = scan_lines(path).with_columns(pl.col("line").str.split(separator))
    return fields.select("row", *(pl.col("line").list.get(i, null_on_oob=True).alias(x) for i, x in enumerate(names)))
