"""``lightning-gr verify``: whether a recipe, or a checkpoint of it, reaches what its header expects of the test."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_gr.cli.compare import finite
from lightning_gr.cli.compare_asked import Contender, contenders, overlays, parse_seeds, refuse_seed
from lightning_gr.cli.compare_runs import Stop, check_metrics, folder_of, run, stored, train
from lightning_gr.cli.compare_statistics import CONFIDENCE, interval
from lightning_gr.cli.demo_data import makes
from lightning_gr.cli.errors import Parser, UserError
from lightning_gr.recipes.expectation import Header, header_fields, read_header

NOT_REACHED = 1
"""Exit code where a metric is not within its tolerance."""

SEEDS = "3"
_USAGE = (
    "lightning-gr verify RECIPE [--seeds N] [--ckpt_path CHECKPOINT] [--output FOLDER] [--json] [--force] "
    "[--setting VALUE ...]"
)
_PATH_SETTINGS = ("--data.init_args.path", "--data.path")
_MAY_HOLD_A_PATH = ("--config", "-c", "--data", "--data.init_args")
_HEADER = "# Expected:"
_LINKS = ("best.ckpt", "last.ckpt")
_WIDTH_OF_FILES = 160


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0 where all metrics are within their tolerances, 1 where one is not."""
    args, settings = _parse(list(argv))
    seeds = parse_seeds(SEEDS if args.seeds is None else args.seeds)
    (recipe,) = contenders([args.recipe])
    header, warnings = _expectation(recipe)
    overlays(settings)
    _refuse_missing_data(recipe, settings)
    metrics = [one.metric for one in header.expected]
    with Stop() as stop:
        checkpoint = None if args.ckpt_path is None else _checkpoint(args.ckpt_path, warnings)
        if checkpoint is None:
            _train(recipe, seeds, metrics, settings, args.output, stop, force=args.force)
        else:
            print(f"{recipe.name}: testing {checkpoint}")
            _evaluate(recipe, checkpoint, metrics, settings, args.output, stop)
    numbers = _numbers(recipe, header, settings, checkpoint) | {"warnings": warnings}
    _show(recipe, header, numbers)
    if args.json:
        print(json.dumps(finite(numbers)))
    return 0 if numbers["within"] else NOT_REACHED


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own words, and those of ``lightning-gr fit``, which may stand among them."""
    parser = Parser(
        prog="lightning-gr verify",
        usage=_USAGE,
        description="Trains the recipe once a seed and tests its best checkpoint, or tests the checkpoint given, and "
        f"compares with what the recipe's header expects. Exit code 0: every mean is within its tolerance; "
        f"{NOT_REACHED}: one is not; 2: a mistake. Other words are settings, as those of lightning-gr fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", help=f"how many (1, 2, ...), or which: 7,8,9 (default {SEEDS})")
    parser.add_argument("--ckpt_path", metavar="CHECKPOINT", help="test this one, and train nothing")
    parser.add_argument("--output", type=Path, default=Path("outputs/verify"), help="where the runs go")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object in the last line")
    parser.add_argument("--force", action="store_true", help="repeat runs that are there already")
    middle = words.index("--") if "--" in words else len(words)
    ours, settings = words[:middle], words[middle + 1 :]
    recipe = ours.pop(0) if ours and not ours[0].startswith("-") else None
    args, others = parser.parse_known_args(ours)
    if recipe is None:
        raise UserError(f"verify: the recipe is missing; it comes first: {_USAGE}")
    if others and not others[0].startswith("-"):
        raise UserError(f"verify: {others[0]}: is neither a setting nor its value; give one recipe at a time")
    args.recipe = recipe
    settings = others + settings
    refuse_seed(settings)
    if args.ckpt_path is not None and args.seeds is not None:
        raise UserError(f"--seeds {args.seeds}: a checkpoint is trained already; leave out --seeds or --ckpt_path")
    return args, settings


# ---- what would go wrong ------------------------------------------------------------------------------------------


def _expectation(recipe: Contender) -> tuple[Header, list[str]]:
    """The header that judges: the last overlay's with figures, else the recipe's own; and what is to be said of it."""
    for file in reversed(recipe.files[1:]):
        with contextlib.suppress(ValueError):  # the head of an overlay need not be one
            if (header := read_header(file)).expected:
                return header, []
    header = read_header(recipe.files[0])
    if header.expected:
        names = ", ".join(file.name for file in recipe.files[1:])
        of_base = f"{recipe.name}: judged by the header of {recipe.files[0].name}, since {names} expects no figures"
        return header, [of_base] if names else []
    published = f" Published: {header.published}." if header.published else ""
    raise UserError(
        f"{recipe.name}: nothing to verify, its header says: {header.text}.{published} Measure it with lightning-gr "
        f"compare {recipe.name} --seeds {SEEDS}, and write the figures into the header of a copy"
    )


def _refuse_missing_data(recipe: Contender, settings: list[str]) -> None:
    """A run would say so too, but later, and not what to do."""
    given = _given_path(settings)
    path = given or _default_path(recipe, settings)
    if path is None or "://" in path or makes(path) or Path(path).expanduser().exists():
        return
    if given is not None:
        raise UserError(f"{_PATH_SETTINGS[0]} {path}: no such file or folder; check the path")
    needed = header_fields(recipe.files[0]).get("Data")
    raise UserError(
        f"{recipe.name}: data.init_args.path={path}: no such file or folder; give the data with {_PATH_SETTINGS[0]} "
        f"PATH{f' ({needed})' if needed else ''}"
    )


def _given_path(settings: list[str]) -> str | None:
    found = None
    for word, following in zip(settings, [*settings, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in _PATH_SETTINGS:
            found = value if equals else following
    return found


def _default_path(recipe: Contender, settings: list[str]) -> str | None:
    """The data's path in the recipe; None where something else may decide it."""
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

    if any(word.partition("=")[0] in _MAY_HOLD_A_PATH for word in settings):
        return None
    if any(name.startswith(("LIGHTNING_GR_FIT__DATA", "LIGHTNING_GR_TEST__DATA")) for name in os.environ):
        return None
    path = None
    for file in recipe.files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            path = content.get("data", {}).get("init_args", {}).get("path", path)
        except (AttributeError, ValueError, yaml.YAMLError):
            return None  # whoever parses it says why
    return path if isinstance(path, str) else None


def _checkpoint(given: str, warnings: list[str]) -> str:
    """A checkpoint, or the best one of a folder of checkpoints; where that is the last one, `warnings` says so."""
    if "://" in given:
        return given
    path = Path(given).expanduser()
    if not path.exists():
        raise UserError(f"--ckpt_path {given}: no such file or folder; give a checkpoint, or a folder with best.ckpt")
    if path.is_dir():
        from lightning_gr.checkpoint.reader import META_FILENAME

        if (path / META_FILENAME).is_file():
            return str(path.resolve())
        for name in _LINKS:
            if (path / name).exists():
                if name != _LINKS[0]:
                    warnings.append(f"--ckpt_path {given}: has no {_LINKS[0]}; what is tested is {name}")
                return str((path / name).resolve())
        raise UserError(
            f"--ckpt_path {given}: is no complete checkpoint, and has neither {' nor '.join(_LINKS)}; "
            f"lightning-gr checkpoint ls {given} lists what is there"
        )
    return str(path.resolve())


# ---- runs --------------------------------------------------------------------------------------------------------


def _train(
    recipe: Contender,
    seeds: list[int],
    metrics: list[str],
    settings: list[str],
    output: Path,
    stop: Stop,
    *,
    force: bool,
) -> None:
    train(
        [recipe],
        seeds=seeds,
        metrics=metrics,
        asked_by=_HEADER,
        settings=settings,
        output=output,
        stop=stop,
        force=force,
        until_failure=True,
    )
    for seed, why in recipe.failures.items():
        log = folder_of(output, recipe.name, seed) / "log.txt"
        raise UserError(f"verify: {recipe.name}, seed {seed}: {why} (read {log}; runs that ended are not repeated)")


def _evaluate(
    recipe: Contender, checkpoint: str, metrics: list[str], settings: list[str], output: Path, stop: Stop
) -> None:
    """Tests one checkpoint; anew each time, since what is in a file may change."""
    folder, key = output / recipe.name / "checkpoint", secrets.token_hex(16)
    configs = [word for file in recipe.files for word in ("--config", str(file))]
    failure = run(["test", *configs, *settings, "--ckpt_path", checkpoint], folder=folder, key=key, stop=stop)
    result = stored(folder, key)
    if failure is not None or result is None:
        why = (failure or "wrote no result").removeprefix(f"checkpoint {checkpoint}: ")
        raise UserError(
            f"--ckpt_path {checkpoint}: its test as {recipe.name} failed: {why} (read {folder / 'log.txt'}); give a "
            "checkpoint that this recipe has trained, with the settings it was trained with"
        )
    check_metrics(recipe.name, result, metrics, asked_by=_HEADER)
    recipe.results[0] = result


# ---- what is shown -----------------------------------------------------------------------------------------------


def _numbers(recipe: Contender, header: Header, settings: list[str], checkpoint: str | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for one in header.expected:
        values = recipe.values(one.metric)
        found = interval(list(values.values()))
        metrics[one.metric] = {
            "expected": one.value,
            "tolerance": one.tolerance,
            "values": {str(seed): value for seed, value in values.items()},
            "mean": found.mean,
            "half_width": found.half_width,
            "verdict": one.verdict(found.mean),
        }
    seeds = sorted(recipe.results) if checkpoint is None else []
    return {
        "recipe": recipe.name,
        "files": [str(file) for file in recipe.files],
        "settings": settings,
        "seeds": seeds,
        "checkpoint": checkpoint,
        "confidence": CONFIDENCE,
        "metrics": metrics,
        "within": all(one["verdict"] == "within" for one in metrics.values()),
    }


def _show(recipe: Contender, header: Header, numbers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds, checkpoint = numbers["seeds"], numbers["checkpoint"]
    table = Table(title=f"{recipe.name}: expected, and reached", title_justify="left")
    table.add_column("metric")
    single = [f"seed {seed}" for seed in seeds] if checkpoint is None else []
    for column in ("expected", *single, "mean" if len(seeds) > 1 else "reached", "verdict"):
        table.add_column(column, justify="right")
    for one in header.expected:
        values = recipe.values(one.metric)
        shown = [f"{values[seed]:.4f}" for seed in seeds]
        verdict = numbers["metrics"][one.metric]["verdict"]
        mean = f"{interval(list(values.values())):.4f}"
        table.add_row(one.metric, f"{one.value:.4f} ± {one.tolerance:.4f}", *shown, mean, verdict)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    console.print()
    console.print(table, highlight=False)
    for warning in numbers["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if len(seeds) > 1:
        said = "Mean ± half of its 95 % interval (Student's t over seeds). The verdict is the mean's."
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    outside = [name for name, one in numbers["metrics"].items() if one["verdict"] != "within"]
    said = f"not as expected: {', '.join(outside)}" if outside else "as expected"
    console.print(f"{recipe.name}: {said}. Header: {header.text}", highlight=False, markup=False, soft_wrap=True)
