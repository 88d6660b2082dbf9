"""Which recipes, seeds and settings ``lightning-gr compare`` and ``verify`` were asked for."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gr import recipes
from lightning_gr.cli.errors import UserError
from lightning_gr.cli.recipes import resolve_config

_MAX_SEED = 2**32 - 1


@dataclass
class Contender:
    """A recipe, its file and those of its overlays, and what its runs gave, by seed."""

    name: str
    files: tuple[Path, ...]
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def values(self, metric: str) -> dict[int, float]:
        """A metric's value, by seed."""
        return {seed: result["metrics"][metric] for seed, result in self.results.items()}

    @property
    def minutes(self) -> float:
        """Minutes of training, the mean of its runs."""
        return statistics.fmean(result["seconds"] for result in self.results.values()) / 60

    @property
    def parameters(self) -> int:
        """How many numbers a run trains."""
        return next(iter(self.results.values()))["parameters"]


def parse_seeds(text: str) -> list[int]:
    """The seeds of ``3`` (1, 2 and 3) or of ``7,8,9``.

    Args:
        text: the value of ``--seeds``.

    Raises:
        UserError: neither a count nor a list of different seeds.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f"--seeds {text}: no number of seeds; give a count such as 3, or seeds such as 7,8,9")
    if "," not in text:
        if int(text) < 1:
            raise UserError(f"--seeds {text}: no seeds; give at least 1")
        return list(range(1, int(text) + 1))
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed is there twice; give different ones")
    if max(seeds) > _MAX_SEED:
        raise UserError(f"--seeds {text}: {max(seeds)} is too large; give at most {_MAX_SEED}")
    return seeds


def contenders(given: list[str]) -> list[Contender]:
    """Every recipe with a name of its own, by which its row and its folder go.

    Args:
        given: names of recipes or files, each with any number of overlays behind a plus.

    Raises:
        UserError: there is no such recipe or file, or one is there twice.
    """
    stacks = [tuple(_file(part) for part in _parts(value)) for value in given]
    for number, files in enumerate(stacks):
        if files in stacks[:number]:
            raise UserError(f"{given[number]}: is there twice; name every recipe once")
    shipped = {recipes.path(name).resolve(): name for name in recipes.ls()}
    every = list(dict.fromkeys(file for files in stacks for file in files))
    names = {file: shipped.get(file, file.stem) for file in every}
    for depth in range(2, max(len(file.parts) for file in every)):
        # Files of one name: as much of the path as tells them apart.
        taken = list(names.values())
        for file in [x for x in every if taken.count(names[x]) > 1 and x not in shipped]:
            names[file] = "/".join(file.with_suffix("").parts[-depth:])
    joined = ["+".join(names[file] for file in files) for files in stacks]
    if len(set(joined)) < len(joined):
        raise UserError(f"{', '.join(given)}: two have the same name; rename one")
    return [Contender(name, files) for name, files in zip(joined, stacks, strict=True)]


def _parts(value: str) -> list[str]:
    """A recipe and its overlays; a file's own name may hold a plus."""
    return [value] if Path(value).expanduser().is_file() else value.split("+")


def _file(value: str) -> Path:
    try:
        file = Path(resolve_config(value))
    except UserError as error:
        raise UserError(str(error).removeprefix("--config ")) from None
    if not file.is_file():
        raise UserError(f"{value}: no recipe and no file; see lightning-gr recipes ls")
    return file.resolve()


def overlays(settings: list[str]) -> list[Path]:
    """The files of every ``--config`` among the settings.

    Args:
        settings: words of the command ``lightning-gr fit``.

    Raises:
        UserError: one of them is neither a file nor a recipe.
    """
    files = []
    for word, following in zip(settings, [*settings, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in ("-c", "--config") and (value if equals else following):
            files.append(Path(resolve_config(value if equals else following)))
    return [file for file in files if file.is_file()]


def refuse_seed(settings: list[str]) -> None:
    """Raises `UserError` where settings of all runs hold a seed."""
    for word in settings:
        if word.partition("=")[0] == "--seed_everything":
            raise UserError("--seed_everything: every run has its own; give the seeds with --seeds before --")
