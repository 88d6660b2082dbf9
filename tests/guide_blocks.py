"""A guide's fenced blocks: files by the name in their first line, and commands, for tests that follow the page."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
_NAME = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block of ``docs/<page>``."""
    return _FENCE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def files_of(page: str) -> dict[str, str]:
    """Blocks that are files, by the name in their first line."""
    found = {}
    for language, text in blocks_of(page):
        name = _NAME.match(text)
        if language in ("python", "yaml") and name is not None:
            assert name[1] not in found, f"docs/{page} has {name[1]} twice"
            found[name[1]] = text
    return found


def commands_of(page: str) -> list[str]:
    """Lines of the page's bash blocks."""
    return [line for language, text in blocks_of(page) if language == "bash" for line in text.splitlines()]


def words_of(line: str) -> list[str]:
    """A ``lightning-gr`` or ``python`` command by this interpreter."""
    first, *words = shlex.split(line)
    return [sys.executable, *({"lightning-gr": ["-m", "lightning_gr"], "python": []}[first]), *words]
