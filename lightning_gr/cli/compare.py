"""``lightning-gr compare``: recipes trained with the same seeds, their test metrics beside each other."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import Self

from lightning_gr import __version__, recipes
from lightning_gr.cli.errors import TRACEBACK_VARIABLE, Parser, UserError
from lightning_gr.cli.recipes import resolve_config

CONFIDENCE = 0.95
METRICS = ("test/HR@10", "test/NDCG@10")
ONE_RUN = "--one-run"
"""The first word of the command that this one starts for every run; see `compare_run`."""

_MAX_SEED = 2**32 - 1
_SECONDS_TO_STOP = 5.0
_ERROR = "lightning-gr: error: "
_INTERRUPTED = 130
_WIDTH_OF_FILES = 160


@dataclass(frozen=True)
class Interval:
    """A mean, and the half width of its interval of confidence; None of fewer than two values."""

    mean: float
    half_width: float | None

    @property
    def lower(self) -> float | None:
        """The interval's lower end."""
        return None if self.half_width is None else self.mean - self.half_width

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.4f}"


@dataclass
class _Contender:
    """A recipe, its file and those of its overlays, and what its runs gave, by seed."""

    name: str
    files: tuple[Path, ...]
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def values(self, metric: str) -> dict[int, float]:
        return {seed: result["metrics"][metric] for seed, result in self.results.items()}

    @property
    def minutes(self) -> float:
        return statistics.fmean(result["seconds"] for result in self.results.values()) / 60

    @property
    def parameters(self) -> int:
        return next(iter(self.results.values()))["parameters"]


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if list(argv[:1]) == [ONE_RUN]:
        from lightning_gr.cli import compare_run

        return compare_run.main(argv[1:])
    words, settings = _halves(list(argv))
    args = _parser().parse_args(words)
    seeds = parse_seeds(args.seeds)
    metrics = list(dict.fromkeys(args.metrics))
    contenders = _contenders(args.recipes)
    overlays = _overlays(settings)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder; make it first")
    with _Stop() as stop:
        _train(contenders, seeds, metrics, settings, overlays, args.output, stop, force=args.force)
    if any(contender.results for contender in contenders):
        _show(contenders, seeds, metrics)
    if args.json is not None:
        _write_json(args.json, _numbers(contenders, seeds, metrics, settings))
    failed = [(x.name, seed, why) for x in contenders for seed, why in sorted(x.failures.items())]
    if failed:
        places = ", ".join(str(_folder(args.output, name, seed) / "log.txt") for name, seed, _ in failed)
        total = len(contenders) * len(seeds)
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


# ---- what was asked for ------------------------------------------------------------------------------------------


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


def _halves(words: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the settings after ``--``."""
    if "--" not in words:
        return words, []
    middle = words.index("--")
    settings = words[middle + 1 :]
    for word in settings:
        if word.partition("=")[0] == "--seed_everything":
            raise UserError("--seed_everything: every run has its own; give the seeds with --seeds before --")
    return words[:middle], settings


def _contenders(given: list[str]) -> list[_Contender]:
    """Every recipe with a name of its own, by which its row and its folder go."""
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
    return [_Contender(name, files) for name, files in zip(joined, stacks, strict=True)]


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


def _overlays(settings: list[str]) -> list[Path]:
    """The files of every ``--config`` among the settings."""
    files = []
    for word, following in zip(settings, [*settings, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in ("-c", "--config") and (value if equals else following):
            files.append(Path(resolve_config(value if equals else following)))
    return [file for file in files if file.is_file()]


# ---- runs --------------------------------------------------------------------------------------------------------


def _train(
    contenders: list[_Contender],
    seeds: list[int],
    metrics: list[str],
    settings: list[str],
    overlays: list[Path],
    output: Path,
    stop: _Stop,
    *,
    force: bool,
) -> None:
    """All runs, seed by seed, so that what is wrong with the last recipe is known early."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    total, number = len(contenders) * len(seeds), 0
    for seed in seeds:
        for contender in contenders:
            number += 1
            folder = _folder(output, contender.name, seed)
            who = f"[{number}/{total}] {contender.name}, seed {seed}"
            key = _fingerprint([*contender.files, *overlays], settings, seed)
            result = None if force else _stored(folder, key)
            if result is not None:
                said = "there already"
            else:
                console.print(f"{who}: started, log in {folder / 'log.txt'}")
                started = time.monotonic()
                failure = _run(contender.files, seed, settings, folder, key, stop)
                result = _stored(folder, key) if failure is None else None
                said = f"{time.monotonic() - started:.0f} s"
                if result is None:
                    contender.failures[seed] = failure or "wrote no result"
                    console.print(f"{who}: failed after {said}: {contender.failures[seed]}")
                    continue
            for metric in metrics:
                if metric not in result["metrics"]:
                    known = ", ".join(sorted(result["metrics"]))
                    raise UserError(f"--metrics {metric}: {contender.name} has no such metric; there are: {known}")
            contender.results[seed] = result
            reached = ", ".join(f"{metric} {result['metrics'][metric]:.4f}" for metric in metrics)
            console.print(f"{who}: {said}, {reached}")


def _folder(output: Path, name: str, seed: int) -> Path:
    return output / name / f"seed-{seed}"


def _fingerprint(files: list[Path], settings: list[str], seed: int) -> str:
    """What decides a run's outcome: the files' text, the settings, the seed, and where relative paths start."""
    environment = {x: y for x, y in os.environ.items() if x.startswith("LIGHTNING_GR_") and x != TRACEBACK_VARIABLE}
    parts = [__version__, os.getcwd(), str(seed), sorted(environment.items()), settings]
    parts.append([file.read_text(encoding="utf-8") for file in files])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _stored(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of an earlier run of the same configuration."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("key") == key else None


def _run(files: Sequence[Path], seed: int, settings: list[str], folder: Path, key: str, stop: _Stop) -> str | None:
    """Fits and tests in a process of its own, where the user stands; returns why it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for name in ("result.json", "training.json"):
        (folder / name).unlink(missing_ok=True)
    ours = [sys.executable, "-m", "lightning_gr", "compare", ONE_RUN, str(folder.resolve()), key]
    configs = [word for file in files for word in ("--config", str(file))]
    theirs = ["fit", *configs, *settings, "--seed_everything", str(seed)]
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        with stop.held():  # a process that was started is known before anything interrupts
            # A group of its own: whatever processes the run has started end with it.
            process = subprocess.Popen(
                [*ours, *theirs],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            stop.raise_if_told()
            code = process.wait()
        finally:
            _stop(process)
    if code == 0:
        return None
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
    return told[-1] if told else lines[-1].strip() if lines else f"exit code {code}"


class _Stop:
    """Lets a closed terminal or a batch system's end of time interrupt this command as Ctrl-C does.

    Within `held` an interrupt waits.
    """

    def __init__(self) -> None:
        self._is_held = self._is_told = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(one)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._before[one] = handler
                signal.signal(one, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def raise_if_told(self) -> None:
        if self._is_told:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self._is_told = True
        if not self._is_held:
            raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a run: gently while it lives, then whatever it left behind."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_STOP)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- statistics --------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval by Student's t.

    Args:
        values: one a seed, at least one.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    if not all(map(math.isfinite, values)):
        return Interval(mean, math.nan)
    return Interval(mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """The differences to the base of the seeds that both have.

    Args:
        values: a metric by seed.
        base: the same of the recipe that is compared with.
    """
    return {seed: value - base[seed] for seed, value in values.items() if seed in base}


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t within which Student's distribution has this probability on both sides of 0.

    Args:
        freedom: degrees of freedom, a whole number of at least 1.
        confidence: the probability, between 0 and 1.
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), the finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


# ---- what is shown -----------------------------------------------------------------------------------------------


def _against(contender: _Contender, base: _Contender, metric: str) -> tuple[dict[int, float], Interval | None]:
    differences = paired(contender.values(metric), base.values(metric))
    return differences, interval(list(differences.values())) if differences else None


def _above_zero(difference: Interval) -> bool | None:
    return None if difference.lower is None else difference.lower > 0


def _show(contenders: list[_Contender], seeds: list[int], metrics: list[str]) -> None:
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


def _numbers(contenders: list[_Contender], seeds: list[int], metrics: list[str], settings: list[str]) -> dict[str, Any]:
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


def _write_json(file: Path, numbers: Any) -> None:
    def finite(value: Any) -> Any:
        """JSON has no NaN and no infinity: null."""
        if isinstance(value, dict):
            return {key: finite(x) for key, x in value.items()}
        if isinstance(value, list):
            return [finite(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(finite(numbers), indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
