"""Event logs in the forms their owners publish, each turned into an `EventLog`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.formats import amazon, kuairand, movielens, recbole, s3rec, table
from lightning_gr.data.formats.history import with_history
from lightning_gr.data.formats.table import Columns
from lightning_gr.data.formats.tasks import with_tasks
from lightning_gr.data.formats.text import first_line

FORMS: dict[str, Callable[..., EventLog]] = {
    "kuairand": kuairand.open_kuairand,
    "movielens": movielens.open_movielens,
    "amazon": amazon.open_amazon,
    "recbole": recbole.open_recbole,
    "s3rec": s3rec.open_s3rec,
    "csv": table.open_csv,
    "parquet": table.open_parquet,
    "jsonl": table.open_jsonl,
}
_RECOGNISED = (kuairand, movielens, recbole, amazon, s3rec, table)
"""In this order: the general table comes last."""
_TABLES = ("csv", "parquet", "jsonl")

__all__ = ["FORMS", "Columns", "open_log", "with_history", "with_tasks"]


def open_log(path: str | Path, form: str = "auto", *, columns: Columns | None = None, **options: Any) -> EventLog:
    """Opens a log for `prepare`; nothing but first lines is read.

    Args:
        path: a file, or a publisher's folder; of a table, also a pattern as ``log/*.parquet``.
        form: one of `FORMS`; `auto` recognises it by names and first lines.
        columns: what the columns of a CSV, Parquet or JSONL log mean; published forms know their own.
        **options: of the form, see its function.

    Raises:
        FileNotFoundError: nothing is there, or a part of it is missing.
        ValueError: the form or an option is unknown or does not fit; the message names it.
    """
    path = Path(path)
    if form != "auto" and form not in FORMS:
        raise ValueError(f"form={form!r}: expected auto or one of {', '.join(FORMS)}")
    if not path.exists() and not any(mark in str(path) for mark in "*?["):
        raise FileNotFoundError(f"{path}: no such file or folder; give an event log")
    if path.is_file() and (path.stat().st_size == 0 or (form != "parquet" and not first_line(path))):
        raise ValueError(f"{path}: the file is empty")
    if form == "auto":
        form = _recognised(path, columns)
    known = [name for name in inspect.signature(FORMS[form]).parameters if name not in ("path", "columns")]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"options: {unknown[0]} is none of the form {form}; it has {', '.join(known) or 'none'}")
    if form in _TABLES:
        return FORMS[form](path, columns=columns or Columns(), **options)
    if columns is not None and columns != Columns():
        raise ValueError(f"columns: a log of form {form} has its own; leave them out, or give the form of a table")
    return FORMS[form](path, **options)


def _recognised(path: Path, columns: Columns | None) -> str:
    named = columns is not None and columns != Columns()
    # Whoever names columns means a table, and so does who gives a pattern.
    for publisher in (table,) if named or not path.exists() else _RECOGNISED:
        if (form := publisher.recognise(path)) is not None:
            return form
    raise ValueError(f"{path}: no log that is known here; give the form, one of {', '.join(FORMS)}")
