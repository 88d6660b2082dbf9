"""ResumableCSVLogger: a run's ``metrics.csv`` that a later test, or a resumed training, goes on with."""

from __future__ import annotations

import csv
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from typing_extensions import override

_VALIDATE = "validate/"
_APART = ("test/", _VALIDATE)
_NO_METRICS = ("step", "epoch")


class ResumableCSVLogger(CSVLogger):
    """Lightning's `CSVLogger`, which keeps the rows that are there already.

    Lightning's own deletes the file of its folder wherever one of a fixed version is used again. Here `validate`,
    `test` and `predict` add rows; so does a `fit` that resumes from a checkpoint, in the place of the rows from the
    step on with which it begins to log, for these steps are trained again. Rows of `validate` and `test` stay. A `fit`
    that begins anew replaces the file, and says so. A `validate` by itself, which knows no step of training, logs
    ``val/loss`` as ``validate/loss``: under its own name it would be a point of the training's curve, at step 0.

    Args:
        save_dir: folder of all runs.
        name: of the experiment, a folder in it.
        version: of the run, a folder in that; None takes the next free number.
        prefix: put before all names.
        flush_logs_every_n_steps: how often rows are written.
    """

    def __init__(
        self,
        save_dir: str,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self._fit: pl.Trainer | None = None
        self._goes_on = self._validates = False

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> _KeepingWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, _KeepingWriter)
        return self._experiment

    @override
    @rank_zero_only
    def log_graph(self, model: torch.nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Draws nothing: Lightning calls it where a run begins.

        Args:
            model: of the run.
            input_array: is not used.
        """
        if not isinstance(model, pl.LightningModule):
            return
        trainer = model.trainer
        self._fit = trainer if trainer.state.fn == TrainerFn.FITTING else None
        self._goes_on = trainer.global_step > 0  # the same Trainer's second fit; a checkpoint is not read by now
        self._validates = trainer.state.fn == TrainerFn.VALIDATING and not self._goes_on

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._fit is not None and step is not None:
            goes_on = self._goes_on or self._fit.ckpt_path is not None
            self._fit = None
            self.experiment.begin(step if goes_on else None)
        if self._validates:
            own = {x: x if x in _NO_METRICS else _VALIDATE + x.removeprefix("val/") for x in metrics}
            metrics = {own[name]: value for name, value in metrics.items()}
        super().log_metrics(metrics, step)


class _KeepingWriter(ExperimentWriter):
    """Adds to a file that is there, whatever columns it has."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = self._keys()

    @override
    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the file."""

    @override
    def save(self) -> None:
        # Another process may have added columns: a test beside a training.
        if self.metrics and (keys := self._keys()):
            self.metrics_keys = keys
        super().save()

    def _keys(self) -> list[str]:
        """The columns of the file, by its first line alone."""
        if not self._fs.isfile(self.metrics_file_path):
            return []
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            return next(csv.reader(file), [])

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self._fs.isfile(self.metrics_file_path):
            return [], []
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            reader = csv.DictReader(file)
            keys = list(reader.fieldnames or [])
            return keys, [row for row in reader if None not in row and None not in row.values()]

    def begin(self, step: int | None) -> None:
        """Removes the rows from this step on, but those of `test` and `validate`; with None the whole file.

        Args:
            step: of the first row that a resumed training logs.
        """
        if not self._fs.isfile(self.metrics_file_path):
            return
        keys, rows = self._read()
        if step is None:
            if rows:
                rank_zero_warn(
                    f"{self.metrics_file_path}: {len(rows)} rows of an earlier run are replaced, since this one begins "
                    "anew; ckpt_path=last would go on with it"
                )
            self._fs.rm_file(self.metrics_file_path)
            self.metrics_keys = []
            return
        # Always, since the last line may be torn; under another name first, so that the file is never half written.
        beside = f"{self.metrics_file_path}.new"
        with self._fs.open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=keys)
            writer.writeheader()
            writer.writerows(row for row in rows if _stays(row, step))
        self._fs.mv(beside, self.metrics_file_path)


def _stays(row: dict[str, Any], step: int) -> bool:
    """Whether training from this step on does not log the row again; a torn row cannot be told and goes."""
    names = [name for name, value in row.items() if value and name not in _NO_METRICS]
    try:
        return int(row["step"]) < step or all(name.startswith(_APART) for name in names)
    except (KeyError, TypeError, ValueError):
        return False
