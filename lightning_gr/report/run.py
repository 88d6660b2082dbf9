"""Run: what is known of a training run, read from the folder in which it wrote."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gr.report.lengths import FIRST_LENGTHS
from lightning_gr.report.run_files import FACTS_FILENAME, FORMAT, LINES_FILENAME, read_lines

_CONFIGS = ("config.yaml", "hparams.yaml")
_CSV_FILENAME = "metrics.csv"
_LOOKED_FOR = f"report/{LINES_FILENAME}, {LINES_FILENAME} (ReportCallback) or {_CSV_FILENAME} (CSVLogger)"


@dataclass
class Series:
    """One metric over a run; NaN stands for whatever was not finite.

    Args:
        steps: optimizer steps, ascending.
        values: one a step.
        seconds: of training until then; NaN where nobody knows.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [x for x in self.values if math.isfinite(x)]


@dataclass
class Run:
    """A training run.

    Args:
        name: how it is called where several are shown.
        series: by metric.
        facts: of the run as a whole; see `lightning_gr.report.run_files`.
        lengths: sequences trained, by bucket of `lightning_gr.report.lengths`; empty where nobody knows.
        notes: what a reader should know of the files.
    """

    name: str
    series: dict[str, Series]
    facts: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step of which there is a number."""
        return max((one.steps[-1] for one in self.series.values() if one.steps), default=0)


def read_run(folder: str | Path) -> Run:
    """Reads a run that `ReportCallback` or a ``CSVLogger`` has written.

    Args:
        folder: of the run, or the ``report`` folder in it.

    Raises:
        ValueError: there is no such folder, no run in it, or no numbers in the run.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run")
    for inside in (path / "report", path):
        if (inside / LINES_FILENAME).is_file():
            run = _read_report(inside, name=_name_of(path))
            break
    else:
        if not (path / _CSV_FILENAME).is_file():
            raise ValueError(f"{folder}: holds no run; looked for {_LOOKED_FOR}")
        run = _read_csv(path)
    if not any(one.finite for one in run.series.values()):
        raise ValueError(f"{folder}: the run is empty, not one number was logged; train for at least one log step")
    return run


def merged(lines: Iterable[dict[str, Any]]) -> tuple[dict[str, Series], list[int]]:
    """Metrics by name, and the last counts of lengths; of two values at a step the later one holds.

    Args:
        lines: of a ``run.jsonl``.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    lengths: list[int] = []
    for line in lines:
        seconds = _number(line.get("seconds"))
        values = line.get("values")
        for name, value in values.items() if isinstance(values, dict) else ():
            found.setdefault(str(name), {})[line["step"]] = (_number(value), seconds)
        counts = line.get("lengths")
        if isinstance(counts, list) and len(counts) == len(FIRST_LENGTHS):
            lengths = [int(x) for x in counts]
    series = {}
    for name, by_step in found.items():
        steps = sorted(by_step)
        series[name] = Series(steps, [by_step[x][0] for x in steps], [by_step[x][1] for x in steps])
    return series, lengths


def _read_report(folder: Path, *, name: str) -> Run:
    lines, torn = read_lines(folder / LINES_FILENAME)
    series, lengths = merged(lines)
    run = Run(name, series, lengths=lengths)
    if torn:
        what = "1 line was" if torn == 1 else f"{torn} lines were"
        run.notes.append(f"{what} torn or foreign in {LINES_FILENAME} and left out.")
    try:
        facts = json.loads((folder / FACTS_FILENAME).read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError
    except FileNotFoundError:
        run.notes.append(f"{FACTS_FILENAME} is missing: configuration and environment are not known.")
    except ValueError:
        run.notes.append(f"{FACTS_FILENAME} cannot be read: configuration and environment are not known.")
    else:
        run.facts = facts
        if facts.get("format") != FORMAT:
            run.notes.append(f"{FACTS_FILENAME} is of format {facts.get('format')}, this is for {FORMAT}.")
        if facts.get("name"):
            run.name = str(facts["name"])
    return run


def _read_csv(folder: Path) -> Run:
    lines: list[dict[str, Any]] = []
    torn = 0
    with (folder / _CSV_FILENAME).open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row.get("step") or "")
                values = {name: float(x) for name, x in row.items() if name and x and name not in ("step", "epoch")}
            except (TypeError, ValueError):
                torn += 1
                continue
            lines.append({"step": step, "values": values})
    run = Run(_name_of(folder), merged(lines)[0])
    run.notes.append(f"Read from {_CSV_FILENAME}: ReportCallback would have kept more.")
    if torn:
        run.notes.append(f"{torn} lines of {_CSV_FILENAME} cannot be read and were left out.")
    for name in _CONFIGS:
        if (folder / name).is_file():
            run.facts["config"] = (folder / name).read_text(encoding="utf-8", errors="replace")
            break
    return run


def _name_of(folder: Path) -> str:
    parts = [x for x in folder.resolve().parts if x != "report"]
    # Loggers' versions are named alike in all runs.
    own = parts[-2:] if parts and re.fullmatch(r"csv|tensorboard|version_\d+", parts[-1]) else parts[-1:]
    return "/".join(own) if own else str(folder)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
