"""GRProgressBar: one line for a whole training run, with tokens per second; plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_gr.observability.progress_line import Display, Line, duration, named, percent, short
from lightning_gr.observability.run_length import batches_left_of, tokens_of

_LOSS_NAMES = ("train/loss", "train_loss", "loss")
_RATE_WINDOW_S = 10.0
_SPEED = ("gr/tokens_per_second", "gr/mfu", "gr/imbalance_flops", "gr/imbalance_tokens")


class GRProgressBar(ProgressBar):
    """Shows how far the whole training is, not only the epoch, on one line.

    The line has the epoch, the step, the time left of the run (validation so far included; by tokens where the loader
    knows how many are left, as that of a `SequenceDataModule` does, else by batches), the loss, tokens a second over
    all ranks (samples or batches a second where batches do not know their tokens) and the last validation metrics.
    Beside an `MFUMonitor` tokens a second are those that it has counted, and the MFU is shown; beside a
    `BalanceMonitor` the imbalance, largest rank over mean.

    Without a terminal, as in CI or a pipe, it prints a plain line now and then and after each validation. Metrics are
    read from the device only when a line is shown: everything logged with ``prog_bar=True``, and ``train/loss``,
    ``train_loss``, ``loss`` or the step's own loss.

    Args:
        refresh_every_s: seconds between updates on a terminal.
        plain_every_s: seconds between lines where there is no terminal.

    Raises:
        MisconfigurationException: a time is negative.
    """

    def __init__(self, *, refresh_every_s: float = 0.5, plain_every_s: float = 10.0) -> None:
        super().__init__()
        for name, seconds in (("refresh_every_s", refresh_every_s), ("plain_every_s", plain_every_s)):
            if seconds < 0:
                raise MisconfigurationException(f"{name}={seconds}: expected seconds >= 0")
        self.refresh_every_s = refresh_every_s
        self.plain_every_s = plain_every_s
        self._enabled = True
        self._display: Display | None = None
        self._shown_at = -math.inf
        self._run = _Run()
        self._evaluation = _Evaluation()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but a live display, which cannot follow into a spawned process."""
        return self.__dict__ | {"_display": None}

    # ---- Lightning's interface ---------------------------------------------------------------------------------

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown; Lightning asks before it prints through the bar."""
        return self._enabled

    @property
    def is_disabled(self) -> bool:
        """The opposite of `is_enabled`."""
        return not self._enabled

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False
        self._close()

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        # A live display takes what is written to sys.stdout and puts it above itself.
        print(*args, **kwargs)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    # ---- training ----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled:
            self._run = _Run(started_at=monotonic())
            self._open()
            self._shown_at = -math.inf

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_disabled:
            return
        run, now = self._run, monotonic()
        run.rate.add(batch, trainer.world_size)
        run.batches += 1
        if run.batches == 1:
            # The first batch compiles and allocates, so speed is measured from its end.
            run.first_batch_at = now
            run.rate.mark(now)
        run.done = trainer.fit_loop.total_batch_idx + 1
        left = batches_left_of(trainer, run.done)
        run.total = None if left is None else run.done + left
        run.label = _train_label(trainer)
        due = self._is_due(now)
        tokens = None if left is None else tokens_of(trainer, left)
        run.tokens_left = None if tokens is None else tokens[1]
        if tokens is not None and run.batches > 1:
            run.tokens_done += tokens[0]
        if due or left == 0 or trainer.is_last_batch:
            run.metrics = self._train_metrics(trainer, pl_module, outputs)
            run.speed = _speed(trainer.callback_metrics)
        if due:
            run.rate.mark(now)
            self._show(self._train_line(now), now)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled and self._run.batches:
            now = monotonic()
            self._run.rate.mark(now)
            self._show(self._train_line(now, ended=True), now)
        self._close()

    def _train_line(self, now: float, *, ended: bool = False) -> Line:
        run = self._run
        if ended:
            time = f"in {duration(now - run.started_at)}"
        elif run.total is not None and run.batches > 1:
            left = (run.total - run.done) / (run.batches - 1)
            if run.tokens_left is not None and run.tokens_done:
                left = run.tokens_left / run.tokens_done
            time = f"{duration(left * (now - run.first_batch_at))} left"
        else:
            time = ""
        facts = [
            *named(run.metrics),
            run.speed.get("tokens", run.rate.text()),
            *(run.speed[x] for x in ("mfu", "imbalance") if x in run.speed),
        ]
        return Line(run.label, run.done, run.total, [percent(run.done, run.total), time], facts, named(run.validation))

    def _train_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any) -> dict[str, Any]:
        metrics: dict[str, Any] = dict(self.get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        shown = {*self._run.validation, *_SPEED}
        metrics = {name: value for name, value in metrics.items() if name not in shown}
        if not any("loss" in name for name in metrics):
            logged = trainer.callback_metrics
            name = next((name for name in _LOSS_NAMES if name in logged), None)
            loss = logged[name] if name else outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, Tensor) and loss.numel() == 1:
                metrics = {name or "loss": loss.item()} | metrics
        return metrics

    # ---- validation, test and predict --------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            self._start(self.sanity_check_description, trainer.num_sanity_val_batches)
        else:
            self._start(self.validation_description, trainer.num_val_batches)
            self._evaluation.metrics_before = dict(trainer.callback_metrics)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(trainer, batch)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_disabled or trainer.sanity_checking:
            return
        # Of a sanity check Lightning computes no metrics; reading them would compute, on this rank and no other.
        before, self._evaluation.metrics_before = self._evaluation.metrics_before, {}
        new = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if before.get(name) is not value and not name.startswith("gr/")
        }
        self._run.validation = {name: value.item() for name, value in new.items() if value.numel() == 1}
        self._finish(trainer, self._run.validation)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(self.test_description, trainer.num_test_batches)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(trainer, batch)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(self.predict_description, trainer.num_predict_batches)

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(trainer, batch)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)

    def _start(self, name: str, batches: Sequence[int | float] | int | float) -> None:
        if self.is_disabled:
            return
        now = monotonic()
        total = sum(batches) if isinstance(batches, Sequence) else batches
        self._evaluation = _Evaluation(name, now, int(total) if math.isfinite(total) else None)
        self._evaluation.rate.mark(now)
        if self._display is None:
            self._open()
            if not self._display_is_live:
                self._shown_at = now  # a phase shorter than an interval needs no line but its last

    def _advance(self, trainer: pl.Trainer, batch: Any) -> None:
        if self.is_disabled:
            return
        self._evaluation.done += 1
        self._evaluation.rate.add(batch, trainer.world_size)
        now = monotonic()
        if self._is_due(now):
            self._evaluation.rate.mark(now)
            self._show(self._evaluation_line(trainer), now)

    def _evaluation_line(self, trainer: pl.Trainer) -> Line:
        phase, run = self._evaluation, self._run
        count = f"{phase.done}" if phase.total is None else f"{phase.done}/{phase.total}"
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return Line(f"{phase.name} {count}", phase.done, phase.total, facts=[phase.rate.text()])
        where = [percent(run.done, run.total), f"{phase.name} {count}"]
        return Line(run.label, run.done, run.total, where, named(run.metrics), named(run.validation))

    def _finish(self, trainer: pl.Trainer, metrics: Mapping[str, float] | None = None) -> None:
        if self.is_disabled:
            return
        now = monotonic()
        phase, run, shown = self._evaluation, self._run, named(metrics or {})
        took = f"in {duration(now - phase.started_at)}"
        if trainer.state.fn != TrainerFn.FITTING:
            phase.rate.mark(now)
            line = Line(f"{phase.name} {phase.done}", phase.done, phase.total, [took], [phase.rate.text()], shown)
            self._show(line, now)
            self._close()
            return
        run.rate.skip(now - phase.started_at)
        if self._display_is_live:
            self._show(self._train_line(now), now)
        else:
            where = [percent(run.done, run.total), f"{phase.name} {took}"]
            self._show(Line(run.label, run.done, run.total, where, named(run.metrics), shown), now)

    # ---- display -----------------------------------------------------------------------------------------------

    @property
    def _display_is_live(self) -> bool:
        return self._display is not None and self._display.live is not None

    def _open(self) -> None:
        if self._display is None:
            self._display = Display()
            self._shown_at = -math.inf

    def _close(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.close()

    def _is_due(self, now: float) -> bool:
        return now - self._shown_at >= (self.refresh_every_s if self._display_is_live else self.plain_every_s)

    def _show(self, line: Line, now: float) -> None:
        self._shown_at = now
        self._open()
        assert self._display is not None
        self._display.show(line)


class _Rate:
    """Tokens, samples or batches a second over the last seconds, the time spent in other phases left out."""

    def __init__(self) -> None:
        self._unit = ""
        self._total = 0
        self._marks: deque[tuple[float, int]] = deque()

    def add(self, batch: Any, world_size: int) -> None:
        count, self._unit = _size(batch, self._unit)
        self._total += count * world_size

    def mark(self, now: float) -> None:
        self._marks.append((now, self._total))
        while len(self._marks) > 2 and self._marks[1][0] <= now - _RATE_WINDOW_S:
            self._marks.popleft()

    def skip(self, seconds: float) -> None:
        self._marks = deque((time + seconds, total) for time, total in self._marks)

    def text(self) -> str:
        if not self._marks or self._marks[-1][0] <= self._marks[0][0] or self._marks[-1][1] == self._marks[0][1]:
            return ""
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return f"{short((after - before) / (last - first))} {self._unit}/s"


@dataclass
class _Run:
    """What is known of the training in progress."""

    started_at: float = 0.0
    first_batch_at: float = 0.0
    batches: int = 0  # in this process; `done` counts those before a resume too
    done: int = 0
    total: int | None = None
    label: str = ""
    tokens_left: float | None = None
    tokens_done: float = 0.0  # since the first batch
    metrics: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, str] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    rate: _Rate = field(default_factory=_Rate)


@dataclass
class _Evaluation:
    """What is known of the validation, test or prediction in progress."""

    name: str = ""
    started_at: float = 0.0
    total: int | None = None
    done: int = 0
    metrics_before: dict[str, Tensor] = field(default_factory=dict)
    rate: _Rate = field(default_factory=_Rate)


def _speed(logged: Mapping[str, Tensor]) -> dict[str, str]:
    """What monitors have measured last."""
    shown = {}
    if (rate := logged.get("gr/tokens_per_second")) is not None:
        shown["tokens"] = f"{short(float(rate))} tokens/s"
    if (mfu := logged.get("gr/mfu")) is not None:
        percents = 100 * float(mfu)
        shown["mfu"] = f"MFU {percents:.0f}%" if percents >= 10 else f"MFU {percents:.2g}%"
    imbalance = next((logged[name] for name in _SPEED if "imbalance" in name and name in logged), None)
    if imbalance is not None:
        shown["imbalance"] = f"imbalance {float(imbalance):.2f}"
    return shown


def _train_label(trainer: pl.Trainer) -> str:
    of_epochs = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs >= 0 else ""
    of_steps = f"/{trainer.max_steps}" if trainer.max_steps >= 0 else ""
    return f"epoch {trainer.current_epoch + 1}{of_epochs}  step {trainer.global_step}{of_steps}"


def _size(batch: Any, unit: str) -> tuple[int, str]:
    """How much a batch holds, in `unit` ("" takes the finest it knows); never reads from a device."""
    for name in ("tokens", "samples"):
        if unit in ("", name) and isinstance(count := getattr(batch, f"num_{name}", None), int):
            return count, name
    while isinstance(batch, (Mapping, Sequence)) and not isinstance(batch, str) and len(batch):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    if unit in ("", "samples") and isinstance(batch, Tensor) and batch.dim():
        return batch.shape[0], "samples"
    return (1, "batches") if unit in ("", "batches") else (0, unit)
