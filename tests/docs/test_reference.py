"""docs/reference: every public name is on a page, and says what it takes."""

from __future__ import annotations

import importlib
import inspect
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = {
    name: page.name
    for page in (ROOT / "docs" / "reference").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)
}
PACKAGES = [
    "lightning_gr",
    *(f"lightning_gr.{x}" for x in ("balancing", "callbacks", "data", "embeddings", "embeddings.dynamic", "layers")),
    *(f"lightning_gr.{x}" for x in ("metrics", "models", "negatives", "plugins")),
]


def found(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_a_page(package: str) -> None:
    names = [f"{package}.{name}" for name in importlib.import_module(package).__all__ if not name.startswith("__")]
    assert names
    assert [name for name in names if name not in LISTED] == []


def test_every_name_of_a_page_is_there() -> None:
    assert len(LISTED) > 150
    for name in LISTED:
        found(name)


def undocumented(thing: Any) -> list[str]:
    """Parameters that neither the docstring nor, of a class, that of a base names."""
    if inspect.isclass(thing):
        text = "\n".join(
            inspect.cleandoc(x.__doc__ or "") for x in thing.__mro__ if x.__module__.startswith("lightning_gr")
        )
        text += "\n" + (inspect.getdoc(thing.__init__) or "")
    else:
        text = inspect.getdoc(thing) or ""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    wanted = [x.name for x in parameters if x.kind not in kinds and not x.name.startswith("_")]
    return [name for name in wanted if not re.search(rf"^ +(?:\w+, )*{name}(?:, \w+)*(?: \([^)]*\))?:", text, re.M)]


@pytest.mark.parametrize("name", sorted(LISTED))
def test_a_name_says_what_it_takes(name: str) -> None:
    thing = found(name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)) or (
        inspect.isclass(thing) and issubclass(thing, Enum)
    ):
        return  # a constant, or names of them
    assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    assert undocumented(thing) == [], f"{name}: of these the docstring does not say what they are"
