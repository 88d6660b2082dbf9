"""``lightning-gr resume-check``: a run that is killed and resumed has to end as one that never stopped."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_gr.cli.errors import Parser, UserError
from lightning_gr.cli.recipes import resolve_config
from lightning_gr.cli.resume_check_process import ONE_RUN
from lightning_gr.cli.resume_check_runs import Runs, processes

if TYPE_CHECKING:
    from lightning_gr.cli.resume_check_compare import Difference

DEMO_LOG = "outputs/demo/events.csv"
"""The data of recipes that name no others; made where it is not there."""
MARK = "resume-check.json"
"""What an output folder has, by which it may be used again."""

_OURS = {
    "--ckpt_path": "the runs have their own",
    "--trainer.max_steps": "use --steps",
    "--trainer.devices": "use --world",
    "--trainer.num_nodes": "all processes are on this machine",
}
_WIDTH_OF_FILES = 160


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 0 where all is equal, 1 where not."""
    if list(argv[:1]) == [ONE_RUN]:
        from lightning_gr.cli import resume_check_process

        return resume_check_process.main(argv[1:])
    args, settings = _parser().parse_known_args(argv)
    worlds = parse_worlds(args.world)
    _check_steps(args.steps, args.at)
    _check_settings(settings)
    files = [resolve_config(value) for value in args.config]
    words = [word for file in files for word in ("--config", file)] + settings
    _prepare(args.output)
    started = time.monotonic()
    _make_demo_log(files, settings)
    with _told_to_stop():
        runs = Runs(args.output.absolute(), words, args.steps, args.at, background=args.background)
        runs.train(worlds)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # torch, when one process reads
    found = {world: runs.differences(world) for world in worlds if world not in runs.failures}
    ok = show(found, runs, worlds)
    report = report_of(found, runs, worlds, ok=ok) | {"seconds": round(time.monotonic() - started, 1)}
    (args.output / MARK).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report))
    return 0 if ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-gr resume-check",
        usage="lightning-gr resume-check --config RECIPE ... [--world 1,2] [--steps 12] [--at 7] [--setting VALUE ...]",
        description="Trains some steps without a stop; the same again, saved in between and killed by SIGKILL some "
        "steps later; resumes that on each number of processes; and compares all that the last checkpoints hold. Exit "
        "code 0 means that all is equal, 1 that something is not. Further words are settings of every run, as fit "
        "takes them.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, metavar="RECIPE", help="may be repeated")
    parser.add_argument("--world", default="1,2", help="numbers of processes; the first one saves (default 1,2)")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of the whole run (default 12)")
    parser.add_argument("--at", type=int, default=7, help="the step after which it is saved (default 7)")
    parser.add_argument("--background", action="store_true", help="save while training goes on")
    parser.add_argument("--output", type=Path, default=Path("outputs/resume-check"), help="where the runs go")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object in the last line")
    return parser


# ---- what was asked for ------------------------------------------------------------------------------------------


def parse_worlds(text: str) -> list[int]:
    """The numbers of processes of ``1,2,3``.

    Args:
        text: the value of ``--world``.

    Raises:
        UserError: no list of different numbers that this machine could run.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--world {text}: no numbers of processes; give some such as 1,2,3")
    worlds = [int(word) for word in words]
    if len(set(worlds)) < len(worlds):
        raise UserError(f"--world {text}: a number is there twice; give different ones")
    most = max(8, 4 * (os.cpu_count() or 1))
    if max(worlds) > most:
        raise UserError(f"--world {text}: {max(worlds)} processes are too many for this machine; give at most {most}")
    return worlds


def _check_steps(steps: int, at: int) -> None:
    if at < 1:
        raise UserError(f"--at {at}: no step; give at least 1")
    if steps <= at:
        raise UserError(f"--steps {steps}: nothing is left to train after --at {at}; give more steps")


def _check_settings(settings: list[str]) -> None:
    for word in settings:
        name = word.partition("=")[0]
        if name in _OURS:
            raise UserError(f"{name}: is set by resume-check; {_OURS[name]}")


def _prepare(output: Path) -> None:
    """Empties a folder of an earlier check, and no other."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARK).is_file():
        raise UserError(f"--output {output}: is not empty and of no earlier resume-check; give another folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARK).write_text("{}\n", encoding="utf-8")


def _make_demo_log(files: Sequence[str], settings: Sequence[str]) -> None:
    """Makes the demo's data where a recipe wants them and the demo has not run."""
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

    path = None
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8") if os.path.isfile(file) else file)
        except yaml.YAMLError:
            return  # fit says where it is wrong
        for key in ("data", "init_args", "path"):
            content = content.get(key) if isinstance(content, dict) else None
        path = content or path
    replaced = any(word.partition("=")[0] in ("--data.init_args.path", "--data.path", "--data") for word in settings)
    if path == DEMO_LOG and not replaced and not Path(DEMO_LOG).exists():
        from rich.console import Console

        from lightning_gr.cli.demo import _synthetic_log

        Path(DEMO_LOG).parent.mkdir(parents=True, exist_ok=True)
        _synthetic_log(Path(DEMO_LOG).parent, Console())


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """Lets a batch system's end of time interrupt this command as Ctrl-C does, so that no process stays behind."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- what is shown -----------------------------------------------------------------------------------------------


def show(found: dict[int, dict[str, Difference]], runs: Runs, worlds: Sequence[int]) -> bool:
    """Prints the table and the verdict; returns that."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lightning_gr.cli.resume_check_compare import KINDS, TOLERANCE

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    title = f"Killed, resumed from step {runs.at}, and compared at step {runs.steps} with a run that never stopped"
    table = Table(title=title, title_justify="left")
    table.add_column("largest difference (relative)")
    for world in worlds:
        table.add_column(processes(world), justify="right")
    table.add_column("tolerance")
    wrong = [f"{processes(world)}: {failure}" for world, failure in runs.failures.items()]
    for kind, is_approximate in KINDS.items():
        cells = []
        for world in worlds:
            difference = found.get(world, {}).get(kind)
            if difference is None or not difference.entries and not difference.problems:
                cells.append(Text("failed" if difference is None else "-", "red" if difference is None else "dim"))
                continue
            tolerance = _tolerance(kind, world, worlds)
            ok = difference.within(tolerance)
            cells.append(Text(_cell(difference), "" if ok else "red"))
            if not ok:
                what = difference.problems[0] if difference.problems else f"{difference.worst} by {_cell(difference)}"
                more = len(difference.problems) - 1
                wrong.append(f"{kind}, {processes(world)}: {what}" + f" (and {more} more)" * (more > 0))
        exact = "0" if not is_approximate or len(worlds) == 1 else f"0; other worlds {TOLERANCE:g} relative"
        table.add_row(kind, *cells, exact)
    console.print()
    console.print(table, highlight=False)
    for note in _notes(runs, worlds):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for line in wrong:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    verdict = f"resume-check: FAILED ({len(wrong)})" if wrong else "resume-check: OK"
    console.print(verdict, style="bold red" if wrong else "bold green", highlight=False, soft_wrap=True)
    console.print(f"runs        {runs.folder}", highlight=False, soft_wrap=True)
    return not wrong


def _notes(runs: Runs, worlds: Sequence[int]) -> list[str]:
    if len(worlds) == 1:
        return []
    notes = ["Random generators of processes that one of two runs does not have are not compared."]
    if runs.has_dropout:
        notes.append(
            f"Dropout is drawn by processes: other worlds are compared with {processes(worlds[0])} resumed, both "
            "without it."
        )
    return notes


def _tolerance(kind: str, world: int, worlds: Sequence[int]) -> float:
    from lightning_gr.cli.resume_check_compare import KINDS, TOLERANCE

    return TOLERANCE if KINDS[kind] and world != worlds[0] else 0.0


def _cell(difference: Difference) -> str:
    if difference.problems:
        return "not the same"
    if not difference.absolute:
        return "0"
    return f"{difference.absolute:.1e} ({difference.relative:.1e})"


def report_of(
    found: dict[int, dict[str, Difference]], runs: Runs, worlds: Sequence[int], *, ok: bool
) -> dict[str, Any]:
    """All numbers, as JSON has them."""
    rows: dict[str, Any] = {}
    for world in worlds:
        if world in runs.failures:
            rows[str(world)] = {"ok": False, "failure": runs.failures[world]}
            continue
        kinds = {}
        for kind, difference in found[world].items():
            tolerance = _tolerance(kind, world, worlds)
            numbers = {x: None if y == math.inf else y for x, y in asdict(difference).items()}  # JSON has no infinity
            kinds[kind] = numbers | {"tolerance": tolerance, "ok": difference.within(tolerance)}
        rows[str(world)] = {"ok": all(x["ok"] for x in kinds.values()), "kinds": kinds}
    return {
        "ok": ok,
        "words": runs.words,
        "steps": runs.steps,
        "at": runs.at,
        "without_dropout": [world for world in worlds[1:] if runs.has_dropout],
        "worlds": rows,
    }
