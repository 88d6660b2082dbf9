"""docs/communication.md, followed by somebody who types what it says."""

from __future__ import annotations

import contextlib
import io
import re

import yaml

from lightning_gr.plugins import SequenceBalancedStrategy
from tests.test_readme import ROOT

PAGE = ROOT / "docs" / "communication.md"
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_its_settings_are_the_defaults() -> None:
    (code,) = (code for kind, code in BLOCKS if kind == "yaml")
    written = yaml.safe_load(code)["trainer"]["strategy"]["init_args"]
    default = SequenceBalancedStrategy()
    assert written == {name: getattr(default, name) for name in written}


def test_its_code_prints_what_it_says() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(next(code for kind, code in BLOCKS if kind == "python"), {})
    assert ("text", printed.getvalue()) in BLOCKS


def test_what_it_names_is_there() -> None:
    text = PAGE.read_text()
    for name in re.findall(r"`((?:tests|benchmarks|docs)/[\w/.-]+)", text):
        assert (ROOT / name).exists(), name
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (PAGE.parent / image).is_file(), image
