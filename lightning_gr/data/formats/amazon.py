"""Amazon reviews: the 5-core JSON lines of 2014 and 2018, the reviews of 2023, and ratings-only CSV."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.formats.text import first_line

if TYPE_CHECKING:
    import polars as pl

_JSON_OLD = {"user": "reviewerID", "item": "asin", "rating": "overall", "time": "unixReviewTime"}
_JSON_NEW = {"user": "user_id", "item": "parent_asin", "rating": "rating", "time": "timestamp"}
_RATINGS = ["user_id", "item_id", "rating", "timestamp"]


def _keys(path: Path) -> dict[str, str] | None:
    line = first_line(path)
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return next((keys for keys in (_JSON_OLD, _JSON_NEW) if set(keys.values()) <= set(found)), None)


def recognise(path: Path) -> str | None:
    """`amazon`, or None."""
    if path.is_dir():
        return None
    if _keys(path) is not None:
        return "amazon"
    return "amazon" if re.fullmatch(r"A[0-9A-Z]{9,},[0-9A-Z]{10},[1-5](\.0)?,\d{9,10}", first_line(path)) else None


def open_amazon(path: Path) -> EventLog:
    """Reviews with their rating as a label; plain or compressed by gzip.

    Args:
        path: the file.
    """
    import polars as pl

    if first_line(path).startswith("{"):
        keys = _keys(path)
        if keys is None:
            raise ValueError(f"{path}: line 1 has not the keys of Amazon reviews, {', '.join(_JSON_OLD.values())}")

        def scan(file: Path) -> pl.LazyFrame:
            types = {keys["user"]: pl.String, keys["item"]: pl.String, keys["rating"]: pl.Float64}
            frame = pl.scan_ndjson(file, schema=types | {keys["time"]: pl.Int64})
            return frame.select(
                user_id=keys["user"], item_id=keys["item"], rating=keys["rating"], timestamp=keys["time"]
            )

    else:

        def scan(file: Path) -> pl.LazyFrame:
            return pl.scan_csv(file, has_header=False, new_columns=_RATINGS, infer_schema=False, encoding="utf8-lossy")

    return EventLog(form="amazon", files=(path,), scan=scan, labels=("rating",))
