"""``lightning-gr compare``: recipes trained with the same seeds, their test metrics beside each other."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_gr.cli.compare_asked import Contender, contenders, overlays, parse_seeds, refuse_seed
from lightning_gr.cli.compare_runs import ONE_RUN, Stop, folder_of, train
from lightning_gr.cli.compare_statistics import CONFIDENCE, Interval, interval, paired
from lightning_gr.cli.errors import Parser, UserError

METRICS = ("test/HR@10", "test/NDCG@10")
_WIDTH_OF_FILES = 160


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if list(argv[:1]) == [ONE_RUN]:
        from lightning_gr.cli import compare_run

        return compare_run.main(argv[1:])
    words, settings = _halves(list(argv))
    args = _parser().parse_args(words)
    seeds = parse_seeds(args.seeds)
    metrics = list(dict.fromkeys(args.metrics))
    asked = contenders(args.recipes)
    overlays(settings)
    refuse_absent_folder(args.json)
    with Stop() as stop:
        train(
            asked,
            seeds=seeds,
            metrics=metrics,
            asked_by="--metrics",
            settings=settings,
            output=args.output,
            stop=stop,
            force=args.force,
        )
    if any(contender.results for contender in asked):
        _show(asked, seeds, metrics)
    if args.json is not None:
        write_json(args.json, _numbers(asked, seeds, metrics, settings))
    failed = [(x.name, seed, why) for x in asked for seed, why in sorted(x.failures.items())]
    if failed:
        places = ", ".join(str(folder_of(args.output, name, seed) / "log.txt") for name, seed, _ in failed)
        total = len(asked) * len(seeds)
        raise UserError(f"compare: {len(failed)} of {total} runs failed; read {places}; the others are not run again")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-gr compare",
        usage="lightning-gr compare RECIPE [RECIPE ...] [--seeds N] [--metrics NAME ...] [-- --setting VALUE ...]",
        description="Trains every recipe once a seed, tests its best checkpoint, and shows the means with their 95 % "
        "intervals and the differences to the first recipe, paired by seed. What follows -- are settings of every run.",
    )
    parser.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="a recipe's name or a YAML file; A+B is A with the settings of B on top, as with two --config",
    )
    parser.add_argument("--seeds", default="3", help="how many (1, 2, ...), or which: 7,8,9 (default 3)")
    parser.add_argument("--metrics", nargs="+", default=METRICS, metavar="NAME", help=f"default {' '.join(METRICS)}")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="where the runs go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--force", action="store_true", help="repeat runs that are there already")
    return parser


def _halves(words: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the settings after ``--``."""
    if "--" not in words:
        return words, []
    middle = words.index("--")
    settings = words[middle + 1 :]
    refuse_seed(settings)
    return words[:middle], settings


# ---- what is shown -----------------------------------------------------------------------------------------------


def _against(contender: Contender, base: Contender, metric: str) -> tuple[dict[int, float], Interval | None]:
    differences = paired(contender.values(metric), base.values(metric))
    return differences, interval(list(differences.values())) if differences else None


def _above_zero(difference: Interval) -> bool | None:
    return None if difference.lower is None else difference.lower > 0


def _show(contenders: list[Contender], seeds: list[int], metrics: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    base = contenders[0]
    table = Table(title="Test metrics: mean over seeds ± half of the 95 % interval", title_justify="left")
    table.add_column("recipe", overflow="fold")
    for column in ("seeds", *metrics, "parameters", "minutes"):
        table.add_column(column, justify="right")
    for contender in contenders:
        if not contender.results:
            continue
        cells = [f"{len(contender.results)} of {len(seeds)}"]
        for metric in metrics:
            lines = [f"{interval(list(contender.values(metric).values())):.4f}"]
            difference = None if contender is base else _against(contender, base, metric)[1]
            if difference is not None:
                above = {None: "one seed", True: "above 0", False: "not above 0"}[_above_zero(difference)]
                lines += [f"{difference:+.4f}", above]
            cells.append("\n".join(lines))
        cells += [f"{contender.parameters:,}", f"{contender.minutes:.2f}"]
        table.add_row(Text(contender.name), *cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    console.print()
    console.print(table, highlight=False)
    if len(contenders) > 1:
        said = f"Second line: the difference to {base.name}, paired by seed; above 0: the interval's lower end is."
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    for contender in contenders:
        if not contender.results:
            said = f"{contender.name} is left out: none of its runs went through."
            console.print(said, highlight=False, markup=False, soft_wrap=True)


def _numbers(contenders: list[Contender], seeds: list[int], metrics: list[str], settings: list[str]) -> dict[str, Any]:
    base, rows = contenders[0], []
    for contender in contenders:
        first, *overlays = map(str, contender.files)
        row: dict[str, Any] = {"recipe": contender.name, "file": first, "overlays": overlays}
        row["failed"] = {str(seed): why for seed, why in contender.failures.items()}
        row["runs"] = {str(seed): result for seed, result in contender.results.items()}
        if contender.results:
            row |= {"parameters": contender.parameters, "minutes": contender.minutes, "metrics": {}}
            for metric in metrics:
                found = interval(list(contender.values(metric).values()))
                row["metrics"][metric] = {"mean": found.mean, "half_width": found.half_width}
        if contender is not base:
            row["against_first"] = {}
            for metric in metrics:
                differences, difference = _against(contender, base, metric)
                if difference is not None:
                    row["against_first"][metric] = {
                        "differences": {str(seed): value for seed, value in differences.items()},
                        "mean": difference.mean,
                        "half_width": difference.half_width,
                        "lower": difference.lower,
                        "above_zero": _above_zero(difference),
                    }
        rows.append(row)
    return {"confidence": CONFIDENCE, "seeds": seeds, "metrics": metrics, "settings": settings, "recipes": rows}


def refuse_absent_folder(file: Path | None) -> None:
    """Raises `UserError` where ``--json`` names a file in a folder that is not there."""
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json {file}: no such folder; make it first")


def write_json(file: Path, numbers: Any) -> None:
    """Writes the numbers, whole or not at all.

    Args:
        file: is replaced where it is there.
        numbers: dictionaries, lists and numbers; what is not finite becomes null.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(finite(numbers), indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def finite(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no NaN and no infinity.

    Args:
        value: a number, a text, or dictionaries and lists of such.
    """
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
