"""The sequence files of the S3-Rec line of papers: a user a line, items in the order of time, no times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.formats.text import first_line, scan_lines

if TYPE_CHECKING:
    import polars as pl


def recognise(path: Path) -> str | None:
    """`s3rec`, or None."""
    if path.is_dir():
        return "s3rec" if len(_sequences(path)) == 1 else None
    words = first_line(path).split()
    # Four tabbed numbers are a MovieLens rating, which is asked first.
    return "s3rec" if len(words) >= 2 and all(word.removeprefix("-").isdigit() for word in words) else None


def _sequences(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.txt")) if recognise(file)]


def open_s3rec(path: Path, *, attributes: str | None = None) -> EventLog:
    """``user item item ...``, and item attributes as a multi-hot feature where they are published beside it.

    Args:
        path: the sequence file, or a folder with one.
        attributes: a JSON object of attribute numbers by item; None looks for one beside the file.

    Raises:
        FileNotFoundError: the file of attributes is not there.
        ValueError: the first line is no sequence, or the folder has no or several sequence files.
    """
    if path.is_dir():
        files = _sequences(path)
        if len(files) != 1:
            found = f"{len(files)} sequence files: {', '.join(file.name for file in files)}"[:200]
            raise ValueError(f"{path}: the folder has {found.rstrip(': ')}; give one file")
        path = files[0]
    line = first_line(path)
    if len(line.split()) < 2 or any(mark in line for mark in ",;{|"):
        raise ValueError(f"{path}: line 1 {line[:60]!r} is no sequence; expected user item item ...")
    beside = Path(attributes) if attributes else _beside(path)
    if attributes and (beside is None or not beside.is_file()):
        raise FileNotFoundError(f"attributes={attributes}: no such file")

    def scan(file: Path) -> pl.LazyFrame:
        import polars as pl

        words = scan_lines(file).with_columns(pl.col("line").str.extract_all(r"\S+"))
        return words.select("row", user_id=pl.col("line").list.first(), item_id=pl.col("line").list.slice(1)).explode(
            "item_id", empty_as_null=True
        )

    items = None
    if beside is not None:
        items = Features(frame=lambda: _attributes(beside), key="item_id", sparse=("attributes",))
    return EventLog(form="s3rec", files=(path,), scan=scan, timestamp=None, row="row", items=items)


def _beside(path: Path) -> Path | None:
    stem = path.name.removesuffix(".txt").removesuffix("_sequences")
    names = [f"{stem}_item2attributes.json", f"{stem}_item_attributes.json"]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def _attributes(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        of_item = json.loads(path.read_text(encoding="utf-8"))
        lists = [[int(number) for number in numbers] for numbers in of_item.values()]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object of lists of whole numbers by item ({error})") from error
    attributes = pl.Series("attributes", lists, dtype=pl.List(pl.Int64))
    return pl.DataFrame([pl.Series("item_id", list(of_item), dtype=pl.String), attributes])
