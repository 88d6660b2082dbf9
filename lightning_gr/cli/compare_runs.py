"""Runs of ``lightning-gr compare`` and ``verify``: each in a process and a folder of its own, and not run twice."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self

from lightning_gr import __version__
from lightning_gr.cli.compare_asked import Contender, overlays
from lightning_gr.cli.errors import TRACEBACK_VARIABLE, UserError

ONE_RUN = "--one-run"
"""The first word of the command ``compare`` that is started for every run; see `compare_run`."""

_SECONDS_TO_STOP = 5.0
_LARGE = 1 << 24
"""Bytes from which on a file is known by when it changed."""
_ERROR = "lightning-gr: error: "
_INTERRUPTED = 130


def train(
    contenders: Sequence[Contender],
    *,
    seeds: Sequence[int],
    metrics: Sequence[str],
    asked_by: str,
    settings: Sequence[str],
    output: Path,
    stop: Stop,
    force: bool = False,
    until_failure: bool = False,
) -> None:
    """Fits and tests every recipe with every seed, and notes results and failures in the contenders.

    The runs go seed by seed, so that what is wrong with the last recipe is known early. One whose result is in its
    folder already is not run again.

    Args:
        contenders: the recipes.
        seeds: of the runs of each.
        metrics: that every run must have logged.
        asked_by: where the metrics were asked for, named where one is missing.
        settings: words of ``lightning-gr fit`` for all runs.
        output: folder of the runs.
        stop: what may interrupt them.
        force: whether to repeat runs that are there already.
        until_failure: whether the first failure is the end.

    Raises:
        UserError: a run has logged no such metric, or a setting names a file that is not there.
    """
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    further = overlays(list(settings))
    total, number = len(contenders) * len(seeds), 0
    for seed in seeds:
        for contender in contenders:
            number += 1
            folder = folder_of(output, contender.name, seed)
            who = f"[{number}/{total}] {contender.name}, seed {seed}"
            key = fingerprint([*contender.files, *further], settings, seed)
            result = None if force else stored(folder, key)
            if result is not None:
                said = "there already"
            else:
                console.print(f"{who}: started, log in {folder / 'log.txt'}")
                started = time.monotonic()
                configs = [word for file in contender.files for word in ("--config", str(file))]
                words = ["fit", *configs, *settings, "--seed_everything", str(seed)]
                failure = run(words, folder=folder, key=key, stop=stop)
                result = stored(folder, key) if failure is None else None
                said = f"{time.monotonic() - started:.0f} s"
                if result is None:
                    contender.failures[seed] = failure or "wrote no result"
                    console.print(f"{who}: failed after {said}: {contender.failures[seed]}")
                    if until_failure:
                        return
                    continue
            check_metrics(contender.name, result, metrics, asked_by=asked_by)
            contender.results[seed] = result
            reached = ", ".join(f"{metric} {result['metrics'][metric]:.4f}" for metric in metrics)
            console.print(f"{who}: {said}, {reached}")


def check_metrics(name: str, result: Mapping[str, Any], metrics: Sequence[str], *, asked_by: str) -> None:
    """Raises `UserError` where a run has not logged what is wanted of it.

    Args:
        name: of the recipe.
        result: of the run.
        metrics: that are wanted.
        asked_by: where they were asked for.
    """
    for metric in metrics:
        if metric not in result["metrics"]:
            known = ", ".join(sorted(result["metrics"]))
            raise UserError(f"{asked_by} {metric}: {name} has no such metric; there are: {known}")


def folder_of(output: Path, name: str, seed: int) -> Path:
    """Where a run of this recipe and seed writes."""
    return output / name / f"seed-{seed}"


def fingerprint(files: Sequence[Path], settings: Sequence[str], seed: int) -> str:
    """What decides a run's outcome: the files' text, the settings, the seed, and where relative paths start.

    Args:
        files: of the configuration; the comment at their head decides nothing.
        settings: words of ``lightning-gr fit``.
        seed: of the run.
    """
    environment = {x: y for x, y in os.environ.items() if x.startswith("LIGHTNING_GR_") and x != TRACEBACK_VARIABLE}
    parts: list[Any] = [__version__, os.getcwd(), str(seed), sorted(environment.items()), list(settings)]
    parts.append([_without_header(file.read_text(encoding="utf-8")) for file in files])
    parts.append([_state_of(Path(x.partition("=")[2] if x.startswith("-") else x)) for x in settings])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _state_of(path: Path) -> str | int | None:
    """The text of a file that is given as a setting, or when a large one changed; None where there is no file."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _LARGE:
            return path.stat().st_mtime_ns
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except (OSError, ValueError):
        return None  # longer than names may be


def _without_header(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(itertools.dropwhile(lambda line: line.startswith("#"), lines))


def stored(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of an earlier run of the same configuration."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("key") == key else None


def run(words: Sequence[str], *, folder: Path, key: str, stop: Stop) -> str | None:
    """Fits and tests, or tests, in a process of its own, where the user stands; returns why it failed.

    Args:
        words: of ``lightning-gr fit`` or ``test``, the command first.
        folder: where the run writes, ``result.json`` at the end.
        key: what its result is known by.
        stop: what may interrupt it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for name in ("result.json", "training.json"):
        (folder / name).unlink(missing_ok=True)
    ours = [sys.executable, "-m", "lightning_gr", "compare", ONE_RUN, str(folder.resolve()), key]
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        with stop.held():  # a process that was started is known before anything interrupts
            # A group of its own: whatever processes the run has started end with it.
            process = subprocess.Popen(
                [*ours, *words],
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


class Stop:
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
        """Lets an interrupt wait until the block is left."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def raise_if_told(self) -> None:
        """Interrupts now where it was asked for while `held`."""
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
