"""The runs of ``lightning-gr resume-check``: all processes from one that has imported what they need."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import UserError
from lightning_gr.cli.resume_check_process import FINAL, LOG, PRELOADED, SAVED, Run, Said, start

if TYPE_CHECKING:
    from lightning_gr.cli.resume_check_compare import Difference

_ERROR = "lightning-gr: error: "
_STEPS_BEFORE_DEATH = 2
_SECONDS_TO_EXPLAIN = 5.0


class Runs:
    """All runs of a check, each in a folder of its own.

    Args:
        folder: of them, absolute.
        words: of ``lightning-gr fit``.
        steps: of a whole run.
        at: the step that is saved.
        background: whether that is done while training goes on.

    Attributes:
        failures: why runs on a number of processes could not be resumed.
        checkpoint: with which runs were resumed.
        has_dropout: whether the model drops out, so that other numbers of processes are compared without.
    """

    def __init__(self, folder: Path, words: list[str], steps: int, at: int, *, background: bool) -> None:
        self.folder, self.words, self.steps, self.at, self.background = folder, words, steps, at, background
        self.failures: dict[int, str] = {}
        self.checkpoint = ""
        self.has_dropout = False
        self.first = 0
        self._alive: set[Any] = set()
        self._is_over = False
        # One thread a process, as torchrun has it: the runs share this machine, and the same bits need the same sums.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def train(self, worlds: Sequence[int]) -> None:
        """All of them, two at a time where they share no GPU.

        Raises:
            UserError: one that begins anew has failed.
        """
        self.first = worlds[0]
        with ThreadPoolExecutor(1 if shutil.which("nvidia-smi") else 2) as pool, self._killed_at_the_end(pool):
            death = min(self.at + _STEPS_BEFORE_DEATH, self.steps)
            killed = self._run("killed", worlds[0], die_at=death)
            reference = self._run("reference", worlds[0])
            jobs = [pool.submit(self._finish, run) for run in (killed, reference)]
            from lightning_gr.cli import resume_check_compare  # noqa: F401  # seconds of imports while others train

            for run, job in zip((killed, reference), jobs, strict=True):
                if (failure := job.result()) is not None:
                    raise UserError(
                        f"resume-check: the {name_of(run)} run failed: {failure}; its log is {run.folder}/{LOG}"
                    )
                if run is killed:
                    self.checkpoint = self._find_checkpoint(killed)
            self.has_dropout = self._said(reference)[0].has_dropout
            resumed = [self._resumed(world) for world in worlds]
            if self.has_dropout and len(worlds) > 1:
                resumed.append(self._resumed(worlds[0], plain=True))
            failures = dict(zip(map(name_of, resumed), pool.map(self._finish, resumed), strict=True))
        for world in worlds:
            failure = failures[name_of(self._resumed(world))]
            if world != worlds[0]:
                failure = failure or failures.get(name_of(self._resumed(worlds[0], plain=True)))
            if failure is not None:
                self.failures[world] = failure

    @contextlib.contextmanager
    def _killed_at_the_end(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """No process outlives an error; threads wait for theirs."""
        try:
            yield
        finally:
            self._is_over = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._alive):
                _kill(process)

    def _run(self, name: str, world: int, **settings: Any) -> Run:
        folder = str(self.folder / name)
        return Run(folder, self.words, world, self.steps, save_every=self.at, background=self.background, **settings)

    def _resumed(self, world: int, *, plain: bool = False) -> Run:
        """The run that goes on from the killed one's checkpoint.

        Dropout belongs to processes: other worlds than the first go without, and so does what they are compared with.
        """
        name = f"resumed-{world}" + "-without-dropout" * plain
        dropout = world == self.first and not plain
        return self._run(name, world, checkpoint=self.checkpoint, dropout=dropout)

    def _find_checkpoint(self, killed: Run) -> str:
        from lightning_gr.checkpoint.reader import newest_complete

        reader = newest_complete(Path(killed.folder, SAVED))
        if reader is None or reader.manifest.step != self.at:
            there = "none" if reader is None else f"one of step {reader.manifest.step}"
            raise UserError(f"resume-check: the killed run left no complete checkpoint of step {self.at}, but {there}")
        return str(reader.storage)

    def _finish(self, run: Run) -> str | None:
        """Trains a run to its end; returns why it failed."""
        Path(run.folder).mkdir(parents=True)
        started = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks: list[Any] = []
        try:
            for rank in range(run.world_size):
                process = self._context.Process(target=start, args=(run, rank, port))
                process.start()
                ranks.append(process)
                self._alive.add(process)
                if self._is_over:  # while it was being started
                    _kill(process)
            while not any(process.exitcode for process in ranks):
                if not (left := [process.sentinel for process in ranks if process.exitcode is None]):
                    break
                wait(left)
            if run.die_at is None:
                for process in ranks:  # the others tell what they know of a failure, too
                    process.join(_SECONDS_TO_EXPLAIN)
        finally:
            for process in ranks:
                _kill(process)
                process.join()
                self._alive.discard(process)
        if self._is_over:
            return "interrupted"
        if run.die_at is not None:
            is_done = run.death.exists()  # others may have failed by it before their own
        else:
            is_done = run.said_by(0).is_file() and not any(process.exitcode for process in ranks)
        if not is_done:
            return _failure(run, [process.exitcode for process in ranks])
        seconds = time.monotonic() - started
        print(f"{name_of(run)}, {processes(run.world_size)}: {seconds:.0f} s", flush=True)
        return None

    # ---- results -----------------------------------------------------------------------------------------------

    def _said(self, run: Run) -> list[Said]:
        return [Said(**json.loads(run.said_by(rank).read_text(encoding="utf-8"))) for rank in range(run.world_size)]

    def differences(self, world: int) -> dict[str, Difference]:
        """How far a resumed run is off from the one that it has to be equal to."""
        from lightning_gr.checkpoint.reader import CheckpointReader
        from lightning_gr.cli.resume_check_compare import compare, read_state

        other = world != self.first
        plain = other and self.has_dropout
        wanted = self._resumed(self.first, plain=True) if plain else self._run("reference", self.first)
        states = [
            read_state(
                CheckpointReader(Path(run.folder, FINAL)),
                self._said(run),
                after=self.at,
                ranks=min(world, self.first),
                merged=other,
            )
            for run in (self._resumed(world), wanted)
        ]
        return compare(*states)


def _kill(process: Any) -> None:
    """Ends a process and what it has started."""
    process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def name_of(run: Run) -> str:
    """As it is called, in a folder of that name."""
    return Path(run.folder).name


def processes(count: int) -> str:
    """So many, in words."""
    return f"{count} process" + "es" * (count > 1)


def _failure(run: Run, codes: Sequence[int | None]) -> str:
    log = Path(run.folder, LOG)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
    if told:
        return told[0]
    if not any(codes):
        return f"it ended before step {run.die_at or run.steps}; let it have more data or epochs, or give fewer --steps"
    return lines[-1].strip() if lines else f"exit codes {', '.join(map(str, codes))}"
