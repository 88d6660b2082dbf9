"""docs/troubleshooting.md: every message that it explains is still one that the program says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FROM_OTHERS = {"CUDA out of memory", "Killed"}
MESSAGES = [
    message
    for cell in re.findall(r"^\| (`.+?) \|", TEXT, re.M)
    for message in re.findall(r"`([^`]+)`", cell)
    if message not in FROM_OTHERS
]
GAP = "\0"


def texts(node: ast.AST) -> str:
    """A literal with a gap for every value in it; what is added to it, too."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return texts(node.left) + texts(node.right)
    return GAP


def said() -> Iterator[str]:
    for room in ("lightning_gr", "plugins", "callbacks"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant):
                    yield texts(node)


SAID = "\n".join(sorted({text for text in said() if len(text) > 10}))


def is_said(message: str) -> bool:
    parts = [re.escape(part) for part in message.split("…")]
    return re.search(r"[^\n]*?".join(parts), SAID) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_the_program_says(message: str) -> None:
    assert is_said(message)


def test_a_message_that_nobody_says_is_found() -> None:
    assert len(MESSAGES) > 40
    assert not is_said("torchrec was never installed")
    assert not is_said("no such command; … no recipe and no file")
