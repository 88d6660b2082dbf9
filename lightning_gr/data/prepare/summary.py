"""Summary: what became of a log, gathered part by part and kept with the store."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_gr.data.event_log import EventLog
from lightning_gr.data.prepare.settings import PrepareSettings
from lightning_gr.data.prepare.spill import Counts

_LONGEST_COUNTED = 100_000


def histogram(lengths: np.ndarray[Any, Any]) -> list[int]:
    """How many users have 0, 1, 2, ... events."""
    return np.bincount(np.minimum(lengths, _LONGEST_COUNTED)).tolist()


class Summary:
    """What became of a log.

    Args:
        log: the log.
        counts: what was seen while reading it.
    """

    def __init__(self, log: EventLog, counts: Counts) -> None:
        self._log, self._counts = log, counts
        self._totals = {"usable": 0, "duplicates": 0, "kept": 0, "late": 0, "history": 0}
        self._lengths = np.zeros(1, dtype=np.int64)
        self._longest = 0
        self._times: list[int] = []

    def add(self, notes: dict[str, Any]) -> None:
        """Takes what was noted of a part."""
        for name in self._totals:
            self._totals[name] += notes.get(name, 0)
        lengths = np.array(notes["lengths"], dtype=np.int64)
        longer, shorter = (self._lengths, lengths) if len(self._lengths) >= len(lengths) else (lengths, self._lengths)
        self._lengths = longer.copy()
        self._lengths[: len(shorter)] += shorter
        self._longest = max(self._longest, notes["longest"])
        self._times += notes.get("times", [])

    def finish(self, settings: PrepareSettings) -> dict[str, Any]:
        """The summary that the store keeps."""
        counts, totals = self._counts, self._totals
        users = int(self._lengths.sum())
        ranks = np.cumsum(self._lengths)
        dropped = {f"bad row, {reason}": count for reason, count in sorted(counts.bad.items())}
        if settings.duplicates == "drop" and totals["duplicates"]:
            dropped["duplicate"] = totals["duplicates"]
        left = counts.rows - sum(dropped.values()) - totals["kept"]
        if left:
            row = "user" if self._log.tasks is None else "task"
            least = {row: settings.min_user_events, "item": settings.min_item_events}
            small = " or ".join(f"{what} with fewer than {n} events" for what, n in least.items() if n > 1)
            dropped[f"of a {small}" if small.startswith(row) else f"of an {small}"] = left
        further: dict[str, Any] = {}
        if self._log.history is not None:
            further = {
                "history_files": [file.name for file in self._log.history.files],
                "history_rows_read": counts.history,
                "history_events_kept": totals["history"],
            }
        if self._log.tasks is not None:
            further["tasks"] = self._log.tasks
        if self._log.left_out:
            further["left_out_features"] = list(self._log.left_out)
        return further | {
            "form": self._log.form,
            "files": [file.name for file in self._log.files],
            "rows_read": counts.rows,
            "blank_rows": counts.blank,
            "events_kept": totals["kept"],
            "dropped": dropped,
            "duplicates": totals["duplicates"],
            "out_of_order": totals["late"],
            "missing": {name: count for name, count in counts.missing.items() if count},
            "time_units": counts.units,
            "first_time": min(self._times) if self._times else None,
            "last_time": max(self._times) if self._times else None,
            "users": users,
            "users_with_one_event": int(self._lengths[1]) if len(self._lengths) > 1 else 0,
            "mean_length": round(totals["kept"] / max(users, 1), 2),
            "median_length": int(np.searchsorted(ranks, (users + 1) // 2)),
            "p99_length": int(np.searchsorted(ranks, users * 0.99)),
            "longest": self._longest,
        }
