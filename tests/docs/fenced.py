"""Fenced blocks of README.md and docs/*.md, and commands that are parsed as they would be, without running them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from lightning_gr import recipes
from lightning_gr.cli.config_trust import Trust
from lightning_gr.cli.training import GRCLI, with_lists_replaced

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_MARK = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*\Z")
_PAGE_MARK = re.compile(r"<!-- not run on this page: (?P<reason>[^>]+) -->")
_FILE = re.compile(r'(?:#|""") ?([\w.-]+\.(?:py|yaml|sh|sbatch))\b')
_BEFORE_A_COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ |timeout (?:--\S+ \S+ )?\S+ |nice (?:-n \d+ )?|\.venv/bin/|srun )+")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: name of its page, as ``strategy.md``.
        line: where it begins.
        language: the word behind the fence.
        text: what is in it.
        reason: why it is not run, if a comment before it, or one for the whole page, says so.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that it shows, by the name in its first line; a script of the shell begins with its interpreter."""
        first, *rest = self.text.splitlines() or [""]
        found = _FILE.match(rest[0] if first.startswith("#!") and rest else first)
        return found[1] if found is not None else None

    @property
    def commands(self) -> list[str]:
        """Its lines, where they are commands; continued lines as one, without what stands before the program."""
        if self.language not in ("bash", "console"):
            return []
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = [line.strip().removeprefix("$ ") for line in joined]
        return [_BEFORE_A_COMMAND.sub("", line) for line in lines if line and not line.startswith("#")]


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    whole = _PAGE_MARK.search(text)
    for found in _FENCE.finditer(text):
        mark = _MARK.search(text[: found.start()]) or whole
        yield Block(
            page=page.name,
            line=text.count("\n", 0, found.start()) + 1,
            language=found["language"],
            text=re.sub(f"^{found['indent']}", "", found["text"], flags=re.M),
            reason=mark["reason"] if mark is not None else None,
        )


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


class _Read(GRCLI):
    """Reads what a training command says, and neither builds nor runs it."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def read(self, words: list[str]) -> None:
        """Reads another command by the same parsers, which take seconds to make."""
        with Trust(words) as self._trust:
            self.parse_arguments(self.parser, with_lists_replaced(self._trust.words))


@cache
def _reader() -> _Read:
    return _Read(args=["fit", "--config", "hstu/tiny"])


class _Stop(Exception):
    def __init__(self, found: argparse.Namespace, others: list[str]) -> None:
        super().__init__()
        self.others = others
        # Configurations that the tool takes by itself.
        configs = getattr(found, "config", None)
        for name in configs if isinstance(configs, list) else []:
            self.others = ["--config", name, *self.others]


def _own_words(command: str, words: list[str]) -> list[str]:
    """Has the tool's own parser take its words; what it leaves are settings of a recipe."""
    from lightning_gr.cli import _dispatch

    original = argparse.ArgumentParser.parse_known_args

    def parse(self: Any, *args: Any, **kwargs: Any) -> Any:
        found, others = original(self, *args, **kwargs)
        raise _Stop(found, others)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse):
        try:
            _dispatch([command, *words])
        except _Stop as stop:
            return stop.others
    raise AssertionError(f"lightning-gr {command} parses nothing")


def parse_ours(words: list[str]) -> None:
    """Takes a ``lightning-gr`` command as far as its parsers do.

    Raises:
        UserError: it is none, as whoever types it would be told.
    """
    command, rest = words[0], words[1:]
    if command in ("fit", "validate", "test", "predict"):
        try:
            _reader().read(words)
        except SystemExit as stop:
            if stop.code:  # else --print_config or --help
                raise
    elif command == "prepare":
        from lightning_gr.cli import prepare

        prepare._parse(prepare._named(rest))
    elif command == "compare":
        from lightning_gr.cli import compare

        own, settings = compare._halves(rest)
        found = compare._parser().parse_args(own)
        for asked in found.recipes:
            parse_ours(["fit", *(word for name in asked.split("+") for word in ("--config", name)), *settings])
    elif command == "verify":
        from lightning_gr.cli import verify

        args, settings = verify._parse(rest)
        parse_ours(["fit", "--config", args.recipe, *settings])
    elif command == "doctor":
        assert rest in ([], ["--json"])
    else:
        settings = _own_words(command, rest)
        if command in ("plan", "mask", "export", "resume-check"):
            parse_ours(["fit", *settings])
        else:
            assert settings == [], f"lightning-gr {command}: {settings}"


def own_options(script: Path) -> set[str]:
    """Options that a script of ours declares, in itself or in a neighbour that it imports."""
    text = script.read_text(encoding="utf-8")
    texts = [text]
    for name in re.findall(r"(?:from|import) (?:benchmarks\.)?([\w.]+)", text):
        neighbour = ROOT / "benchmarks" / f"{name.replace('.', '/')}.py"
        texts += [neighbour.read_text(encoding="utf-8")] if neighbour.is_file() else []
    return set(re.findall(r'"(--[\w-]+)"', "\n".join(texts)))


def copy_recipe(name: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipes.path(name).read_text(encoding="utf-8"), encoding="utf-8")


def words_of(line: str) -> list[str]:
    """Words of one command: redirections and what follows a pipe are left out."""
    words = shlex.split(line, comments=True)
    for sign in (">", "|", "&&", "&", ">>"):
        words = words[: words.index(sign)] if sign in words else words
    return words
