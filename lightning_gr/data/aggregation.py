"""Aggregation: how the exposures of a user become one sample a window of time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_gr.data.task import Task

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Aggregation:
    """One sample for a user and a window of time (MTGR, arXiv 2505.18654, section 3.2).

    Candidates are the user's exposures in the window. Static history is what happened before the window, real-time
    history what happened in it before the last candidate.

    Args:
        window: length of a window: a number with s, m, h, d or w, or seconds. Windows begin at multiples of it since
            1970 UTC.
        max_candidates: most candidates of a sample; a window with more of them becomes several samples.
        max_static: most events of static history, the latest ones.
        max_realtime: most events of real-time history, the latest ones.
        history: only events that are positive in it are history, as clicks; None takes every event. Events of a
            history log of its own (``exposed`` 0) are always history.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    window: str | int = "1d"
    max_candidates: int = 64
    max_static: int = 200
    max_realtime: int = 100
    history: Task | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_candidates", 1), ("max_static", 0), ("max_realtime", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"aggregation.{name}={getattr(self, name)}: expected at least {least}")
        _ = self.seconds

    @property
    def seconds(self) -> int:
        """Length of a window."""
        found = re.fullmatch(r"(\d+)\s*([smhdw]?)", str(self.window).strip())
        seconds = int(found[1]) * _SECONDS[found[2] or "s"] if found else 0
        if seconds < 1:
            raise ValueError(
                f"aggregation.window={self.window!r}: expected a length such as 90m, 1d or 2w, or seconds, at least 1"
            )
        return seconds
