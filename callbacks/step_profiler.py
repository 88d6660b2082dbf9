"""StepProfiler: records a few steps on every rank, and says where their time went."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from lightning_gr.observability.by_rank import by_rank, is_log_step
from lightning_gr.observability.fetch_times import FetchTimes
from lightning_gr.observability.step_trace import StepTrace, add_stages, write_trace
from lightning_gr.observability.time_shares import CLASSES, Span, exposed_exchanges, spans_of, without
from lightning_gr.plugins.stage_log import StageLog

if TYPE_CHECKING:
    from rich.table import Table

_REQUEST, _STEP = "record", "lightning-gr step "


class StepProfiler(pl.Callback):
    """Records optimizer steps with torch.profiler on every rank, once or whenever it is asked to.

    Each rank writes ``trace-step=<first>-rank=<rank>.json.gz``, a Chrome trace (open it in ui.perfetto.dev), with the
    stages of `SequenceBalancedStrategy`'s pipeline where it has one. Rank 0 prints a table, and writes it to
    ``time-shares-step=<first>.txt`` and ``.json``: of each rank the milliseconds of a step, and their shares, of

    - *compute*: on a GPU kernels but NCCL's, on the CPU operators of the training thread;
    - *exposed exchange*: exchanges between ranks during which nothing is computed, waiting for other ranks included;
    - *copy*: of batches to the device; on a GPU any copy, where neither of the above is under way;
    - *data wait*: the training thread waits for its next batch to be fetched; on a GPU, while the device idles;
    - *idle*: the rest, such as Python between operators.

    These add up to the time of the steps, evaluations left out. While a run trains, creating a file ``record`` in the
    folder has the next steps recorded; rank 0 looks for it at log steps and removes it. Recorded steps are slower, by
    what torch.profiler costs; the others are not. No number of training changes.

    Args:
        start_step: optimizer steps of the whole training before the first one that is recorded; None records on request
            only.
        num_steps: optimizer steps in a recording, with all of their batches.
        dirpath: folder, of every rank; None means ``profile`` in the logger's folder, or in the Trainer's
            ``default_root_dir`` without a logger.

    Raises:
        MisconfigurationException: a number is too small, the folder cannot be written, or the Trainer has a profiler
            that uses torch.profiler too.
    """

    def __init__(self, *, start_step: int | None = 10, num_steps: int = 5, dirpath: str | None = None) -> None:
        if start_step is not None and start_step < 0:
            raise MisconfigurationException(f"start_step={start_step}: expected at least 0, or none for on request")
        if num_steps < 1:
            raise MisconfigurationException(f"num_steps={num_steps}: expected at least 1")
        self.start_step = start_step
        self.num_steps = num_steps
        self.dirpath = dirpath
        self.folder: Path | None = None
        self._due: int | None = None
        self._looks = True
        self._fetches: FetchTimes | None = None
        self._recording: _Recording | None = None
        self._paused_at = 0.0

    # ---- hooks -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.profiler, PyTorchProfiler):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "StepProfiler: Trainer(profiler=PyTorchProfiler) records with torch.profiler too, which two cannot; "
                "leave one of them out"
            )
        # log_dir is a collective: every rank asks, whether or not it needs the answer.
        log_dir = trainer.log_dir or trainer.default_root_dir
        self.folder = Path(log_dir) / "profile" if self.dirpath is None else Path(self.dirpath)
        problem = _problem_of(self.folder, trainer.global_rank)
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            raise MisconfigurationException(
                f"dirpath={str(self.folder)!r}: StepProfiler cannot write there on "
                f"{'another rank' if problem is None else f'rank {trainer.global_rank} ({problem})'}; choose a folder "
                "that all ranks can write"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fetches, self._looks = FetchTimes(trainer), True
        self._due = self.start_step
        if self._due is not None and trainer.global_step > self._due:
            rank_zero_warn(
                f"StepProfiler: start_step={self.start_step} lies before step {trainer.global_step}, from which "
                f"training goes on, so nothing is recorded by itself; create {self._request} to have steps recorded"
            )
            self._due = None
        self._begin_if_due(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        if self._recording is not None:
            is_last = self._recording.steps + 1 == self.num_steps
            self._recording.step(None if is_last else trainer.global_step)
            if is_last:
                self._end(trainer)
        elif self._due is not None:
            self._begin_if_due(trainer)
        elif self._looks and is_log_step(trainer):
            self._begin_if_asked(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused_at = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recording is not None:
            self._recording.pauses.append((self._paused_at, time.perf_counter()))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recording is not None:
            rank_zero_warn(
                f"StepProfiler: training ended after {self._recording.steps} of num_steps={self.num_steps} steps; what "
                "was recorded is written"
            )
            self._end(trainer)
        elif self._due is not None:
            rank_zero_warn(
                f"StepProfiler: training ended at step {trainer.global_step}, before start_step={self.start_step}: "
                "nothing was recorded; choose an earlier step"
            )
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.stop()
        self._detach()

    def _detach(self) -> None:
        if self._fetches is not None:
            self._fetches.detach()
        self._fetches, self._due = None, None

    # ---- when --------------------------------------------------------------------------------------------------

    @property
    def _request(self) -> Path:
        assert self.folder is not None
        return self.folder / _REQUEST

    def _begin_if_due(self, trainer: pl.Trainer) -> None:
        if self._due is not None and trainer.global_step >= self._due:
            self._due = None
            self._begin(trainer)

    def _begin_if_asked(self, trainer: pl.Trainer) -> None:
        asked = trainer.is_global_zero and self._request.exists()
        if by_rank({"asked": float(asked)})["asked"][0]:
            if trainer.is_global_zero:
                try:
                    self._request.unlink()
                except OSError as error:
                    rank_zero_warn(f"StepProfiler: cannot remove {self._request} ({error}); this is the last recording")
            self._looks = not by_rank({"stuck": float(trainer.is_global_zero and self._request.exists())})["stuck"][0]
            self._begin(trainer)

    # ---- a recording -------------------------------------------------------------------------------------------

    def _begin(self, trainer: pl.Trainer) -> None:
        assert self._fetches is not None
        log: StageLog | None = getattr(trainer.strategy, "stage_log", None)
        self._fetches.take()
        # torch.profiler takes its time to begin, on some ranks more than on others.
        self._recording = _Recording(
            trainer.strategy.root_device, trainer.global_step, log, ready=lambda: by_rank({"ready": 1.0})
        )

    def _end(self, trainer: pl.Trainer) -> None:
        recording, self._recording = self._recording, None
        assert recording is not None
        assert self.folder is not None
        assert self._fetches is not None
        recording.stop()
        name = f"trace-step={recording.first}-rank={trainer.global_rank}.json.gz"
        try:
            own = recording.write(self.folder / name, self._fetches.take())
        except (OSError, ValueError) as error:  # a disk that is full is not worth the run
            warnings.warn(f"StepProfiler: rank {trainer.global_rank} cannot write {name} ({error})", stacklevel=2)
            own = dict.fromkeys(CLASSES, math.nan)
        ranks = by_rank(own)
        if not trainer.is_global_zero or not recording.steps:
            return
        rows = [
            {name: 1e3 * ranks[name][rank] / recording.steps for name in CLASSES} for rank in range(trainer.world_size)
        ]
        self._report(rows, recording)

    def _report(self, rows: list[dict[str, float]], recording: _Recording) -> None:
        """Writes and prints what rank 0 knows of all ranks: milliseconds of a step by class."""
        from rich.console import Console

        assert self.folder is not None
        last = recording.first + recording.steps - 1
        table = _table(rows, f"where a step's time went, steps {recording.first} to {last}, in ms")
        plain = Console(file=StringIO(), width=110, color_system=None)
        plain.print(table)
        found = {
            "first_step": recording.first,
            "steps": recording.steps,
            "ranks": [
                {"rank": rank, "ms": row, "share": {name: _share(row, name) for name in CLASSES}}
                for rank, row in enumerate(rows)
            ],
        }
        path = self.folder / f"time-shares-step={recording.first}.txt"
        try:
            assert isinstance(plain.file, StringIO)
            path.write_text(plain.file.getvalue())
            path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            rank_zero_warn(f"StepProfiler: cannot write {path} ({error})")
        Console().print(table)
        rank_zero_info(f"StepProfiler: traces and time shares of {recording.steps} steps are in {self.folder}")


@dataclass
class _Recording:
    """Steps that are being recorded; making one begins.

    Args:
        device: that computes.
        first: number of the first step.
        log: of the pipeline.
        ready: returns when all ranks record.
    """

    device: torch.device
    first: int
    log: StageLog | None
    ready: Callable[[], Any]
    steps: int = 0
    pauses: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._position = 0 if self.log is None else self.log.position
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self.ready()
        self._wait()
        self._annotation: record_function | None = None
        self._mark = f"{_STEP}{self.first}"
        self._began = self._ended = time.perf_counter()
        self._annotate(self.first)

    def step(self, number: int | None) -> None:
        """Ends one, and begins the one of this number."""
        self.steps += 1
        self._annotate(number)

    def stop(self) -> None:
        self._wait()
        self._ended = time.perf_counter()
        self._annotate(None)
        self._profiler.stop()

    def _annotate(self, number: int | None) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        self._annotation = None if number is None else record_function(f"{_STEP}{number}")
        if self._annotation is not None:
            self._annotation.__enter__()

    def write(self, path: Path, fetches: list[Span]) -> dict[str, float]:
        """Writes the trace; seconds of the recorded steps by class."""
        part = path.with_name(f".{path.name}.raw.json")
        try:
            self._profiler.export_chrome_trace(str(part))
            trace = json.loads(part.read_text(errors="replace"))
        finally:
            with suppress(OSError):
                part.unlink()
        stages = [] if self.log is None else self.log.since(self._position)
        add_stages(trace, stages, mark=self._mark, marked=self._began)
        write_trace(trace, path)
        found = StepTrace.of(trace["traceEvents"], mark=self._mark, marked=self._began)
        window = without([(self._began, self._ended)], self.pauses)
        is_pipelined = any(event.stage == "await_lookup" for event in stages)
        waits = spans_of(stages, "await_fetch") if is_pipelined else fetches
        if self.device.type == "cuda":
            return found.divided_by_gpu(window, data_waits=waits)
        return found.divided_by_cpu(
            window, data_waits=waits, copies=spans_of(stages, "copy"), exchanges=exposed_exchanges(stages)
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _problem_of(folder: Path, rank: int) -> str | None:
    """Why a rank cannot write to a folder, which is made."""
    probe = folder / f".writable-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return str(error)
    return None


def _share(row: dict[str, float], name: str) -> float:
    whole = sum(row.values())
    return row[name] / whole if whole else math.nan


def _table(rows: list[dict[str, float]], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for name in ("rank", "step", *CLASSES):
        table.add_column(name, justify="right")
    for rank, row in enumerate(rows):
        cells = [f"{row[name]:.1f} ({_share(row, name):.0%})" for name in CLASSES]
        table.add_row(str(rank), f"{sum(row.values()):.1f}", *cells)
    return table
