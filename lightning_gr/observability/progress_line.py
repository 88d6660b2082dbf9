"""Line: how far a run is, on one line of a terminal or of a log; and the display that shows it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.live import Live

_MIN_BAR, _MAX_BAR, _BAR_STEP = 10, 40, 10  # columns


@dataclass
class Line:
    """The line's parts, and how they look with and without a terminal.

    What does not fit beside the bar goes on a row below, and validation metrics on one of their own.

    Args:
        label: epoch and step, or the phase.
        done: batches.
        total: all batches; None where nobody knows.
        where: what stands behind the bar.
        facts: metrics and speed.
        validation: metrics of the last validation.
    """

    label: str
    done: int
    total: int | None
    where: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)

    def plain(self) -> str:
        """All of it on one line, without control codes."""
        return joined([self.label, *self.where, *self.facts, *self.validation])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        where, facts, validation = (
            Text(joined(parts), style=style, no_wrap=True, overflow="ellipsis")
            for parts, style in ((self.where, ""), (self.facts, ""), (self.validation, "green"))
        )
        label = Text(self.label, style="bold", no_wrap=True, overflow="ellipsis")
        details = [part for part in (facts, validation) if part]
        room = options.max_width - len(label) - len(where) - 4
        room_beside = room - sum(len(part) + 2 for part in details)
        if beside := room_beside >= _MIN_BAR:
            room = room_beside
        # In big steps, or the bar would twitch with every digit beside it.
        width = min(room // _BAR_STEP * _BAR_STEP, _MAX_BAR)
        bar = [Bar(total=self.total, completed=self.done, width=width)] if width >= _MIN_BAR else []
        rows: list[list[Any]] = [[label, *bar, where]]
        if beside:
            rows[0] += details
        elif sum(len(part) + 2 for part in details) <= options.max_width:
            rows.append([Text(), *details])
        else:
            rows += [[Text(), part] for part in details]
        for row in rows:
            grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
            grid.add_row(*row)
            yield grid


class Display:
    """A live line on a terminal, or lines printed one after the other.

    Attributes:
        live: of rich; None where there is no terminal.
    """

    def __init__(self) -> None:
        from rich import get_console
        from rich.live import Live

        self._console = get_console()
        self.live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        # FORCE_COLOR makes rich take a pipe for a terminal; a log file must not get control codes for it.
        if self._console.is_interactive and self._console.file.isatty():
            own = {stream: name for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
            # No thread: the line is drawn when there is something new, and nothing is left running after an error.
            self.live = Live(console=self._console, auto_refresh=False)
            self.live.start()
            # Handlers hold the streams of their first day, and would write into the line.
            for handler in _stream_handlers():
                if handler.stream in own:
                    self._redirected.append((handler, handler.stream))
                    handler.setStream(getattr(sys, own[handler.stream]))

    def show(self, line: Line) -> None:
        """Puts a line in place of the one before, or under it."""
        if self.live is not None:
            self.live.update(line, refresh=True)
        else:
            print(line.plain(), file=self._console.file, flush=True)

    def close(self) -> None:
        """Leaves the last line where it is."""
        for handler, stream in self._redirected:
            handler.setStream(stream)
        if self.live is not None:
            self.live.stop()


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    for name in ("", "lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler


def named(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics by name; of a mean over the epoch beside the step's value the latter."""
    shown = {name: value for name, value in metrics.items() if not name.endswith("_epoch") or name[:-6] not in metrics}
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]


def joined(parts: Sequence[str]) -> str:
    """What is there, side by side."""
    return "  ".join(part for part in parts if part)


def percent(done: int, total: int | None) -> str:
    """The share done."""
    return f"{100 * done // total}%" if total else ""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def short(number: float) -> str:
    """Three digits and a letter."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
