"""Fuzzed recipes: the command line takes a configuration, or refuses it in one line that names the culprit."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

import lightning_gr
from lightning_gr.cli import errors
from tests.fuzz.mutations import edited, edits
from tests.fuzz.outcome import Finding, Target, refusal

RECIPES = ("hstu/tiny", "hstu/tiny-dynamic", "mtgr/tiny", "sasrec/amazon-beauty", "turbogr/fuxi-tiny")

# No large sizes: a layer that does not fit into memory is another matter.
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 0.5, -0.5, 1e308, float("inf"), float("nan"), "", " ", "x", "yes", "1", "-1", "1e5"),
    *([], {}, [[]], [None], {"": None}, {"class_path": ""}, {"class_path": "x.Y"}, {"class_path": 3}),
    *({"class_path": "lightning_gr"}, {"class_path": "lightning_gr.layers.HSTUEncoder"}, {"init_args": {"dim": 4}}),
    *({"class_path": "lightning_gr.models.Nothing"}, {"class_path": "lightning_gr.callbacks.TopKWriter"}),
    *("lightning_gr.layers.HSTUEncoder", "${x}", "é" * 50, "a.b.c", "../x", "\u2028", "\x00", "[1", "{a: 1}", "null"),
)
KEYS = (
    "",
    " ",
    "x",
    "class_path",
    "init_args",
    "dict_kwargs",
    "trainer",
    "model",
    "config",
    "__path__",
    "é",
    "a.b",
    "3",
)

_change = st.tuples(
    st.sampled_from(["value", "value", "delete", "rename", "add", "wrap", "move"]),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.integers(0, 255),
)
_config = st.fixed_dictionaries(
    {
        "recipe": st.sampled_from(RECIPES),
        "changes": st.lists(_change, min_size=1, max_size=3),
        # A third are changed as text.
        "text": st.none() | st.none() | edits,
    }
)


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@functools.cache
def _imports() -> None:
    """Has every recipe parsed once, so that what it imports counts for no input and no time limit falls into it."""
    for name in RECIPES:
        place = _folder() / "whole.yaml"
        place.write_bytes(_recipe(name))
        _parse(place)


@functools.cache
def _recipe(name: str) -> bytes:
    return (Path(lightning_gr.__file__).parent / "recipes" / f"{name}.yaml").read_bytes()


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries."""
    items: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    return [x for key, value in items for x in ((*path, key), *_places(value, (*path, key)))]


def _changed(config: Any, change: tuple[str, int, int, int]) -> Any:
    kind, first, second, number = change
    places = _places(config)
    if not places:
        return config
    path = places[first * len(places) // 65536]
    holder = functools.reduce(lambda node, key: node[key], path[:-1], config)
    key, junk = path[-1], copy.deepcopy(JUNK[number % len(JUNK)])
    if kind == "value" or (isinstance(holder, list) and kind in ("rename", "add")):
        holder[key] = junk
    elif kind == "delete":
        del holder[key]
    elif kind == "rename":
        holder[KEYS[number % len(KEYS)] if second % 2 else f"{key}x"] = holder.pop(key)
    elif kind == "add":
        holder[KEYS[second % len(KEYS)]] = junk
    elif kind == "wrap":
        holder[key] = [holder[key]] if second % 2 else {KEYS[number % len(KEYS)]: holder[key]}
    else:
        other = places[second * len(places) // 65536]
        found = functools.reduce(lambda node, key: node[key], other, config)
        holder[key] = copy.deepcopy(found)
    return config


def _written(asked: dict[str, Any]) -> bytes:
    data = _recipe(asked["recipe"])
    if asked["text"] is not None:
        return edited(data, asked["text"])
    config = yaml.safe_load(data)
    for change in asked["changes"]:
        config = _changed(config, change)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode("utf-8", errors="replace")


def _parse(place: Path) -> None:
    """Parses and makes the objects, as `fit` does before it begins."""
    from lightning_gr.cli.training import GRCLI

    class Parsed(GRCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Does not run."""

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            Parsed(args=["fit", "--config", str(place)])
        except SystemExit as error:
            raise Finding(f"SystemExit({error.code})") from error
        except Exception as error:
            line = errors.one_line(error)
            if line is None:
                raise Finding(
                    f"{type(error).__name__}, shown as a traceback: {traceback.format_exc(limit=-6)}"
                ) from error
            raise ValueError(line) from None


def _check(asked: dict[str, Any]) -> str:
    _imports()
    place = _folder() / "mine.yaml"
    place.write_bytes(_written(asked))
    before, kept = os.getcwd(), dict(os.environ)
    os.chdir(_folder())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = refusal(lambda: _parse(place))
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(kept)
    if said is not None and "\n" in said.strip():
        raise Finding(f"more than one line: {said}")
    return "accepted" if said is None else "refused"


CONFIGS = Target("configs", "the command line: recipes with other keys, values and bytes", _config, _check)
