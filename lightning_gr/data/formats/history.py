"""A log of exposures with a second one, of what its users did elsewhere, which is history alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.event_store.fields import EXPOSED
from lightning_gr.data.formats import table


def with_history(log: EventLog, path: str | Path) -> EventLog:
    """The log with a table of history beside it, whose columns of user, item and time have the log's names.

    Args:
        log: the exposures.
        path: the history: a CSV, Parquet or JSON-lines file, a folder of such, or a pattern.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the history is no table, lacks a column, or the log cannot have one; the message says which.
    """
    path = Path(path)
    if log.timestamp is None:
        raise ValueError(f"history={path}: {log.files[0]} has no times, so it cannot be put in order with a second log")
    if EXPOSED in (*log.sparse, *log.dense, *log.labels, log.user_id, log.item_id, log.timestamp):
        raise ValueError(
            f"columns: {EXPOSED} is what history is told from exposures by; rename the column, or leave out the history"
        )
    if not path.exists() and not any(mark in str(path) for mark in "*?["):
        raise FileNotFoundError(f"history={path}: no such file or folder")
    form = table.recognise(path)
    if form is None:
        raise ValueError(f"history={path}: no table of CSV, Parquet or JSON lines; it needs one row an event")
    columns = table.Columns(user_id=log.user_id, item_id=log.item_id, timestamp=log.timestamp)
    opened = {"csv": table.open_csv, "parquet": table.open_parquet, "jsonl": table.open_jsonl}[form](
        path, columns=columns
    )
    if opened.timestamp is None:
        raise ValueError(
            f"{opened.files[0]}: has no column {log.timestamp}; a history needs the time of each event, by which it is "
            "put in order with the exposures"
        )
    if both := set(opened.files) & set(log.files):
        raise ValueError(
            f"history={path}: {sorted(both)[0]} is a file of the exposures too; give each log files of its own"
        )
    return replace(log, history=opened)
