"""ReportCallback: keeps what a report of the run needs as training goes, and ends with the report itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch
from lightning_gr.observability.by_rank import by_rank as numbers_by_rank
from lightning_gr.observability.by_rank import is_log_step
from lightning_gr.report.balance import AS_THEY_COME, by_rank, work
from lightning_gr.report.environment import environment, without_secrets
from lightning_gr.report.lengths import FIRST_LENGTHS, count_lengths
from lightning_gr.report.run_files import RunFiles

if TYPE_CHECKING:
    from lightning_gr.plugins.stage_log import StageLog

_PAGE_FILENAME = "report.html"
_STAGES = ("fetch", "lookup", "train")
_MOST_STEPS, _MOST_BATCHES, _SECONDS_FOR_BALANCE = 1_000, 500, 2.0
_MOST_WORDS_OF_AN_ERROR = 300


class ReportCallback(pl.Callback):
    """Writes a run's metrics, data, settings and environment, and one self-contained ``report.html`` when it ends.

    Rank 0 appends to ``run.jsonl`` at every log step and after every validation whatever is in
    ``trainer.callback_metrics``, so monitors such as ``MFUMonitor`` are shown when they are there, and the lengths of
    the sequences trained on all ranks. A run that fails or is stopped has its report too; of one that was killed,
    ``lightning-gr report`` makes it from what was written. A resumed run goes on in the same files, where steps beyond
    the checkpoint's are dropped.

    What a configuration calls password, secret, token or key is left out. A report is not worth a run: what cannot be
    written costs one warning.

    Args:
        dirpath: folder of the files; None means ``report`` in the logger's folder, or in the Trainer's
            ``default_root_dir`` without a logger.
        name: how the run is called; None takes the name of the folder.
    """

    def __init__(self, *, dirpath: str | None = None, name: str | None = None) -> None:
        self.dirpath, self.name = dirpath, name
        self._folder = Path()
        self._files: RunFiles | None = None  # of rank 0, during a fit
        self._facts: dict[str, Any] = {}
        self._metrics: Mapping[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._step = 0
        self._is_open = False  # whether callbacks behind this one may still log something of that step
        self._lengths = np.zeros(len(FIRST_LENGTHS), dtype=np.int64)  # of this rank, since the last log step
        self._all_lengths = self._lengths.copy()
        self._began, self._seconds_before = 0.0, 0.0

    # ---- hooks -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            # log_dir is a collective: every rank asks, whether or not it needs the answer.
            log_dir = trainer.log_dir or trainer.default_root_dir
            self._folder = Path(log_dir, "report") if self.dirpath is None else Path(self.dirpath)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._metrics = trainer.callback_metrics
        self._seen, self._step, self._is_open = dict(self._metrics), trainer.global_step, False
        self._lengths[:] = self._all_lengths[:] = 0
        self._began, self._seconds_before = time.monotonic(), 0.0
        self._files = None
        if trainer.is_global_zero:
            with _Tried("start", self):
                self._begin(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._record_rest()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, SequenceBatch):
            real_B = batch.sample_ids_B != PADDING_SAMPLE_ID
            self._lengths += count_lengths(batch.token_counts_B4.sum(1)[real_B].numpy())
        if is_log_step(trainer):
            self._note(trainer)
            self._count_lengths()
            self._record(lengths=True)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record_rest()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._note(trainer)
            self._record()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._count_lengths()
        self._finish(trainer, pl_module, state="finished")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            reason = "" if isinstance(exception, KeyboardInterrupt) else "SIGTERM"
            self._finish(trainer, pl_module, state="interrupted", reason=reason)
        else:
            said = " ".join(f"{type(exception).__name__}: {exception}".split())
            self._finish(trainer, pl_module, state="failed", reason=said[:_MOST_WORDS_OF_AN_ERROR])

    # ---- while training ----------------------------------------------------------------------------------------

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        files = RunFiles(self._folder)
        earlier = Path(str(trainer.ckpt_path)).parent.parent / "report" if trainer.ckpt_path else None
        if self._step == 0 and files.has_lines:
            rank_zero_warn(f"ReportCallback: the report of an earlier run in {self._folder} is replaced by this one's")
        kept = files.begin(step=self._step, earlier=earlier)
        if self._step and not kept:
            rank_zero_warn(
                f"ReportCallback: {self._folder} has nothing of the steps up to {self._step}, and the report begins "
                "there; set dirpath to the folder of the run that this one goes on with"
            )
        for line in kept:
            self._seconds_before = max(self._seconds_before, float(line.get("seconds") or 0))
            if len(counts := line.get("lengths") or ()) == len(FIRST_LENGTHS):
                self._all_lengths[:] = counts
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors: list[Any] = [x for x in callbacks if isinstance(x, Checkpoint) and getattr(x, "monitor", None)]
        self._facts = {
            "name": self.name or _name_of(self._folder),
            "state": "running",
            "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "ranks": trainer.world_size,
            "monitor": {"name": monitors[0].monitor, "mode": getattr(monitors[0], "mode", "min")} if monitors else None,
            "config": _config(trainer, module),
            "environment": environment(module.device)
            | {
                "ranks": str(trainer.world_size),
                "strategy": type(trainer.strategy).__name__,
                "precision": str(trainer.precision),
            },
        }
        files.write_facts(self._facts)
        self._files = files

    def _note(self, trainer: pl.Trainer) -> None:
        """Reads metrics where all ranks do: Lightning may compute some, all ranks together."""
        self._metrics, self._step, self._is_open = trainer.callback_metrics, trainer.global_step, True

    def _count_lengths(self) -> None:
        names = [str(x) for x in FIRST_LENGTHS]
        ranks = numbers_by_rank(dict(zip(names, self._lengths.astype(float).tolist(), strict=True)))
        self._lengths[:] = 0
        self._all_lengths += np.array([int(sum(x)) for x in ranks.values()])

    def _record_rest(self) -> None:
        if self._is_open:
            self._record()
            self._is_open = False

    def _record(self, *, lengths: bool = False) -> None:
        """Appends the metrics that are new since they were last written."""
        new = {name: value for name, value in self._metrics.items() if self._seen.get(name) is not value}
        self._seen |= new
        self._write(new, lengths=lengths)

    def _write(self, metrics: Mapping[str, Any], *, lengths: bool = False) -> None:
        if self._files is None:
            return
        with _Tried("write", self):
            scalars = {name: float(x) for name, x in metrics.items() if not isinstance(x, Tensor) or x.numel() == 1}
            counts = self._all_lengths.tolist() if lengths and self._all_lengths.any() else None
            self._files.append(step=self._step, seconds=self._seconds, values=scalars, lengths=counts)

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    # ---- the end -----------------------------------------------------------------------------------------------

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule, *, state: str, reason: str = "") -> None:
        if self._files is None:
            return
        self._record_rest()
        self._write({}, lengths=True)
        files, seconds = self._files, self._seconds
        if files is None:  # it could not be written
            return
        with _Tried("end", self):
            self._facts |= {"state": state, "reason": reason, "step": trainer.global_step, "seconds": seconds}
            self._facts["histograms"] = {
                name: counts
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                for name, counts in getattr(callback, "histograms", {}).items()
            }
            files.write_facts(self._facts)
            self._facts["balance"] = _balance(trainer, module)
            files.write_facts(self._facts)
            page = write_report(self._folder)
            rank_zero_info(f"ReportCallback: the report is {page}")
        self._files, self._metrics, self._seen = None, {}, {}


class _Tried:
    """Turns whatever fails inside into one warning, after which no more is written: training goes on."""

    def __init__(self, what: str, callback: ReportCallback) -> None:
        self._what, self._callback = what, callback

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self._callback._files = None
        rank_zero_warn(
            f"ReportCallback: cannot {self._what} the report in {self._callback._folder} ({type(error).__name__}: "
            f"{error}); training goes on without it; set dirpath to a folder that can be written"
        )
        return True


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into the folder of a run's files, and returns its path.

    Args:
        folder: with ``run.jsonl``.

    Raises:
        ValueError: the run has no numbers.
    """
    from lightning_gr.report.page import write_page
    from lightning_gr.report.run import read_run

    page = folder / _PAGE_FILENAME
    write_page([read_run(folder)], page)
    return page


def _name_of(folder: Path) -> str:
    folder = folder.resolve()
    return (folder.parent if folder.name == "report" else folder).name or "run"


# ---- what is kept of the whole run -------------------------------------------------------------------------------


def _config(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """As YAML: what LightningCLI has resolved, else the hyper-parameters and what the Trainer says of itself."""
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

    settings: Any = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # By name: importing it would import jsonargparse.
        if any(x.__name__ == "SaveConfigCallback" for x in type(callback).__mro__):
            settings = yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))
    if settings is None:
        datamodule = getattr(trainer, "datamodule", None)
        settings = {
            "trainer": {
                name: getattr(trainer, name)
                for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
            },
            type(module).__name__: dict(module.hparams),
        }
        if datamodule is not None:
            settings[type(datamodule).__name__] = dict(datamodule.hparams)
    return str(yaml.safe_dump(without_secrets(settings), sort_keys=False, allow_unicode=True))


def _balance(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any] | None:
    """What each rank had to do, had samples been dealt out as they come, and as they were; None without a plan."""
    from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of
    from lightning_gr.data.plan import GlobalBatchPlan
    from lightning_gr.plugins import SequenceBalancedStrategy

    strategy, plan = trainer.strategy, getattr(trainer.train_dataloader, "plan", None)
    if not isinstance(strategy, SequenceBalancedStrategy) or not isinstance(plan, GlobalBatchPlan):
        return None
    method, cost = strategy.balancing.partitioner, strategy.balancing.cost
    if not isinstance(cost, SequenceCost):
        cost = TOKENS if cost == "tokens" else cost_of(module)
    steps = min(trainer.global_step, _MOST_STEPS)
    if steps < 1:
        return None
    dealt = {}
    for way in dict.fromkeys((AS_THEY_COME, method)):
        tokens_SR, costs_SR = work(
            plan,
            steps=steps,
            ranks=trainer.world_size,
            cost=cost,
            method=way,
            most_seconds=_SECONDS_FOR_BALANCE,
        )
        steps = len(tokens_SR)
        dealt[way] = tokens_SR, costs_SR
    return {
        "steps": steps,
        "partitioner": method,
        "dealt": {way: by_rank(*(x_SR[:steps] for x_SR in found)) for way, found in dealt.items()},
        "stages": {} if strategy.stage_log is None else stage_times(strategy.stage_log),
    }


def stage_times(log: StageLog) -> dict[str, dict[str, float]]:
    """Milliseconds that a stage took for a batch, of the last ones, and the share of it beside training.

    Args:
        log: of the strategy.
    """
    last = max((event.batch for event in log.events("train")), default=-1)
    latest = type(log)()
    for event in log.events():
        if last - _MOST_BATCHES < event.batch <= last:
            latest.add(event.stage, event.batch, event.start, event.end)
    found = {}
    for stage in _STAGES:
        events = latest.events(stage)
        seconds = sum(event.end - event.start for event in events)
        batches = len({event.batch for event in events})
        found[stage] = {"ms": 1e3 * seconds / max(batches, 1), "hidden": latest.hidden_fraction(stage)}
    return found
