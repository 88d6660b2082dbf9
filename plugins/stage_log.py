"""StageLog: when each stage of a pipeline worked on which batch, for tests, profilers and curious users."""

from __future__ import annotations

import bisect
import csv
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path


@dataclass(frozen=True, slots=True)
class _StageEvent:
    stage: str
    batch: int
    start: float
    end: float


class StageLog:
    """The latest events of a pipeline, written by all of its threads.

    An event is a stage at work on a batch: the name of the stage, the number of the batch over all epochs of a fit, and
    start and end in seconds of the clock `time.perf_counter`.

    On a GPU an event is the time that the host spent; kernels run on after it.

    Args:
        capacity: how many events are kept; older ones are forgotten.

    Raises:
        ValueError: the capacity is below 1.
    """

    def __init__(self, *, capacity: int = 20_000) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: expected at least 1")
        self._events: deque[_StageEvent] = deque(maxlen=capacity)
        self._added = 0
        self._lock = threading.Lock()

    @contextmanager
    def record(self, stage: str, batch: int) -> Iterator[None]:
        """Records what runs inside as one event, also when it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, batch, start, time.perf_counter())

    def add(self, stage: str, batch: int, start: float, end: float) -> None:
        """Records an event that was timed elsewhere."""
        with self._lock:
            self._events.append(_StageEvent(stage, batch, start, end))
            self._added += 1

    @property
    def position(self) -> int:
        """Events so far, forgotten ones too."""
        return self._added

    def since(self, position: int) -> list[_StageEvent]:
        """The events after a position that are still kept, at no cost for those before it."""
        with self._lock:
            new = min(self._added - position, len(self._events))
            return [*islice(reversed(self._events), new)][::-1]

    def events(self, stage: str | None = None) -> list[_StageEvent]:
        """All events, or those of one stage, in the order in which they ended."""
        with self._lock:
            return [event for event in self._events if stage is None or event.stage == stage]

    def hidden_fraction(self, stage: str, behind: str = "train") -> float:
        """The share of a stage's time during which `behind` was at work on another batch; NaN without events."""
        others = sorted(self.events(behind), key=lambda event: event.start)
        ends = [other.end for other in others]  # ascending: a stage does one batch after another
        total = hidden = 0.0
        for event in self.events(stage):
            total += event.end - event.start
            for other in others[bisect.bisect_right(ends, event.start) :]:
                if other.start >= event.end:
                    break
                if other.batch != event.batch:
                    hidden += min(event.end, other.end) - max(event.start, other.start)
        return hidden / total if total else float("nan")

    def write_csv(self, path: str | Path) -> None:
        """Writes all events, one a line: stage, batch, start, end in seconds."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["stage", "batch", "start", "end"])
            writer.writerows([e.stage, e.batch, e.start, e.end] for e in self.events())
