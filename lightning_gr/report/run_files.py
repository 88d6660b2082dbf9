"""RunFiles: what a training run writes of itself as it goes, so that a crash costs at most one line.

``run.jsonl`` has one JSON object a line: ``step``, ``seconds`` of training so far, and any of ``values`` (numbers by
name; null is one that is not finite) and ``lengths`` (sequences trained so far, by bucket of their length).
``run.json`` has what is known of the run as a whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LINES_FILENAME = "run.jsonl"
FACTS_FILENAME = "run.json"
FORMAT = 1


class RunFiles:
    """Appends a run's lines and replaces its facts.

    Args:
        folder: where the files are; made if it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def has_lines(self) -> bool:
        """Whether a run has written here before."""
        file = self.folder / LINES_FILENAME
        return file.is_file() and file.stat().st_size > 0

    def begin(self, *, step: int, earlier: str | Path | None = None) -> list[dict[str, Any]]:
        """Starts anew at step 0; at a later step goes on behind the lines up to it, and drops those beyond.

        Args:
            step: optimizer steps that the run has done.
            earlier: a folder whose lines are taken where this one has none: the run before wrote there.

        Returns:
            The lines that are kept.
        """
        kept: list[dict[str, Any]] = []
        if step > 0:
            for folder in (self.folder, earlier):
                if folder is not None and (file := Path(folder) / LINES_FILENAME).is_file():
                    kept = [line for line in read_lines(file)[0] if line["step"] <= step]
                    break
        text = "".join(json.dumps(line) + "\n" for line in kept)
        _replace(self.folder / LINES_FILENAME, text)
        return kept

    def append(
        self,
        *,
        step: int,
        seconds: float,
        values: Mapping[str, float] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Writes a line, handed to the operating system at once; nothing where there is nothing to write."""
        line: dict[str, Any] = {"step": step, "seconds": round(seconds, 3)}
        if values:
            line["values"] = _finite(dict(values))
        if lengths:
            line["lengths"] = list(lengths)
        if len(line) > 2:
            with (self.folder / LINES_FILENAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replaces what is known of the run as a whole."""
        _replace(self.folder / FACTS_FILENAME, json.dumps({"format": FORMAT, **_finite(dict(facts))}, indent=2) + "\n")


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a ``run.jsonl`` that can be read, and how many cannot: a crash may have torn the last one."""
    found, torn = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            torn += 1
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
        else:
            torn += 1
    return found, torn


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {str(key): _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
