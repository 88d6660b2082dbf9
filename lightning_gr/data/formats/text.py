"""Text files as published: first lines, small files in their own encoding, and big ones line by line."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    import polars as pl

_NO_SEPARATOR = "\x01"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; compressed ones, known by their content as polars does it, are unpacked as they are read.

    Raises:
        ValueError: the compressed file was cut off or is none.
    """
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        try:
            if magic.startswith(_GZIP):
                with gzip.open(raw) as unpacked:
                    yield cast(BinaryIO, unpacked)
            elif magic == _ZSTD:
                import pyarrow as pa

                with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
                    yield io.BufferedReader(stream)  # the stream itself has no lines
            else:
                yield raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: no gzip file that can be read ({error}); get it again") from error
        except OSError as error:
            if magic != _ZSTD:
                raise
            raise ValueError(f"{path}: no zstd file that can be read ({error}); get it again") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank: UTF-8, or Latin-1 where a line is not.

    Only a line feed ends a line: in Latin-1, titles hold bytes that Python takes for other line ends.
    """
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                line = raw.decode("latin-1")
            if line.strip():
                yield number, line.rstrip("\r\n")


def first_lines(path: Path, count: int) -> list[str]:
    """The first lines that are not blank."""
    return [line for _, line in islice(lines(path), count)]


def first_line(path: Path) -> str:
    """The first line that is not blank, stripped; empty where there is none."""
    return next(iter(first_lines(path, 1)), "").strip()


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


def scan_fields(path: Path, separator: str, names: Sequence[str]) -> pl.LazyFrame:
    """Fields of a file without header whose separator may have more than one character, and ``row``.

    Fields that a line lacks are null; what it has too many stays with the last, which is then no number.
    """
    import polars as pl

    fields = pl.col("line").str.splitn(separator, len(names)).struct.rename_fields(list(names))
    return scan_lines(path).select("row", fields.struct.unnest())


def scan_json(path: Path, keys: Sequence[str], *, row: str = "row") -> pl.LazyFrame:
    """The values of some keys of JSON lines, as text, and the line number as `row`; a missing key is null.

    Reading it raises polars' `ComputeError`, with the number of the line, where that is no JSON object.
    """
    import polars as pl

    kind = pl.Struct(dict.fromkeys(keys, pl.String))

    def decode(batch: pl.Series) -> pl.Series:
        text, numbers = batch.struct.field("line"), batch.struct.field("row")
        try:
            found = text.str.json_decode(kind)
        except pl.exceptions.ComputeError:
            # NaN, or no JSON: line by line, so that the culprit can be named.
            pairs = zip(numbers, text, strict=True)
            return pl.Series("line", [_decoded(number, line, keys) for number, line in pairs], dtype=kind)
        empty = found.struct.unnest().select(pl.all_horizontal(pl.all().is_null())).to_series()
        if empty.any():
            # Such a line must not pass for a blank one.
            raise pl.exceptions.ComputeError(f"line {numbers.filter(empty)[0]} has none of the keys {', '.join(keys)}")
        return found

    both = pl.struct("row", "line").map_batches(decode, return_dtype=kind, is_elementwise=True).alias("line")
    return scan_lines(path).select(pl.col("row").alias(row), both).unnest("line")


def _decoded(row: int, line: str, keys: Sequence[str]) -> dict[str, str | None]:
    import polars as pl

    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise pl.exceptions.ComputeError(f"line {row} is no JSON: {line[:40]!r}") from error
    if not isinstance(found, dict) or all(found.get(key) is None for key in keys):
        raise pl.exceptions.ComputeError(f"line {row} is no JSON object with {', '.join(keys)}: {line[:40]!r}")
    return {key: _as_text(row, key, found.get(key)) for key in keys}


def _as_text(row: int, key: str, value: Any) -> str | None:
    import polars as pl

    if isinstance(value, list | dict):
        raise pl.exceptions.ComputeError(f"line {row}, key {key}: a list or object; expected a number or text")
    if value is None or value != value:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
