"""One process of a run of ``lightning-gr resume-check``: a `fit` that saves, is killed, or is resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ONE_RUN = "--one-run"
"""The first word of the command that every process of a run is given."""
FINAL = "final"
"""The checkpoint of a run's last step."""
SAVED = "checkpoints"
"""Where a run has its other checkpoints."""
LOG = "log.txt"
PRELOADED = [
    "lightning_gr.cli.training",
    "torchrec",
    "lightning_gr.plugins.dynamic_sharding",
    "torch.distributed.optim",
]
"""What takes seconds to import and is done once for all processes."""
_SECONDS_TO_PUBLISH = 60.0


@dataclass(frozen=True)
class Run:
    """What a run has to do.

    Args:
        folder: where everything of it goes; absolute.
        words: of ``lightning-gr fit``, without that.
        world_size: processes.
        steps: optimiser steps at the end.
        save_every: steps between checkpoints. What runs ahead of a step is forgotten at a save, so all runs save at the
            same steps.
        background: whether these are written while training goes on.
        die_at: the step at whose end all processes kill themselves.
        checkpoint: with which it begins.
        dropout: as the recipe has it; False turns it off.
    """

    folder: str
    words: list[str]
    world_size: int
    steps: int
    save_every: int
    background: bool = False
    die_at: int | None = None
    checkpoint: str | None = None
    dropout: bool = True

    def said_by(self, rank: int) -> Path:
        """Where a process leaves its `Said`."""
        return Path(self.folder, f"said-{rank}.json")

    @property
    def death(self) -> Path:
        """A file that a process makes before it kills itself."""
        return Path(self.folder, "died")


@dataclass(frozen=True)
class Said:
    """What a process tells beside its checkpoint.

    Args:
        losses: by step and micro-batch, as training_step gave them on this process.
        has_dropout: whether some module drops out.
        reductions: how states of metrics and logged values of several processes become one, by name; None where they
            do not.
    """

    losses: dict[str, float]
    has_dropout: bool
    reductions: dict[str, str | None]


def start(run: Run, rank: int, port: int) -> None:
    """Is one process of a run, with the environment that torchrun would give it; never returns."""
    os.setsid()  # what it starts ends with it
    log = os.open(Path(run.folder, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(run.world_size),
        "LOCAL_WORLD_SIZE": str(run.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "resume-check",
    }
    from lightning_gr.cli import main as command

    code = command(["resume-check", ONE_RUN, json.dumps(asdict(run))])
    sys.stdout.flush()
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs what `start` was given and returns the exit code."""
    import lightning.pytorch as pl
    import torch
    from jsonargparse import Namespace
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar
    from typing_extensions import override

    from lightning_gr.callbacks import ResumeCheckpoint, TableMonitor
    from lightning_gr.checkpoint.reader import newest_complete
    from lightning_gr.cli.quiet import quiet_library_noise
    from lightning_gr.cli.training import GRCLI

    run = Run(**json.loads(argv[0]))
    saved = Path(run.folder, SAVED)

    class Watch(pl.Callback):
        """Notes losses, kills its process where the run has to die, and saves the last step."""

        def __init__(self) -> None:
            self.losses: dict[str, float] = {}
            self.has_dropout = self.is_saved = False
            self.before = (-1, 0)

        @override
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.has_dropout = _dropout(pl_module, turn_off=not run.dropout)

        @override
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            step, micro = self.before
            self.before = (trainer.global_step, micro + 1 if step == trainer.global_step else 0)

        @override
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(loss, torch.Tensor):
                self.losses[f"{self.before[0] + 1}.{self.before[1]}"] = float(loss)
            if trainer.global_step == run.die_at:
                if run.background:
                    _wait(lambda: newest_complete(saved) is not None)
                run.death.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if trainer.global_step >= run.steps and not self.is_saved:
                self.is_saved = True
                said = Said(self.losses, self.has_dropout, _reductions(trainer, pl_module))
                run.said_by(trainer.global_rank).write_text(json.dumps(asdict(said)), encoding="utf-8")
                trainer.save_checkpoint(Path(run.folder, FINAL))
                # What comes now is not compared; an EarlyStopping would miss the metric of an epoch that is cut off.
                trainer.callbacks = [self]  # type: ignore[attr-defined]

    class CheckCLI(GRCLI):
        """A `fit` whose outputs stay in one folder."""

        @override
        def before_instantiate_classes(self) -> None:
            fit = self.config.fit
            fit.ckpt_path = run.checkpoint
            if run.checkpoint is not None:
                fit.init_from = None  # the reference began with it
            super().before_instantiate_classes()
            logs = {"save_dir": run.folder, "name": "", "version": "logs"}
            fit.trainer.default_root_dir = run.folder
            fit.trainer.logger = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(logs))
            fit.trainer.update(Namespace(max_steps=run.steps, devices=run.world_size, num_nodes=1))

        @override
        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            # A TableMonitor keeps how many keys ranks exchanged, of which more ranks have more.
            left_out = ProgressBar | Checkpoint | TableMonitor
            kept = [x for x in trainer.callbacks if not isinstance(x, left_out)]  # type: ignore[attr-defined]
            kept.append(ResumeCheckpoint(dirpath=str(saved), every_n_steps=run.save_every, background=run.background))
            trainer.callbacks = [*kept, Watch()]  # type: ignore[attr-defined]
            return trainer

    quiet_library_noise()
    CheckCLI(args=["fit", *run.words])
    return 0


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + _SECONDS_TO_PUBLISH
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _dropout(module: Any, *, turn_off: bool) -> bool:
    """Whether anything inside drops out, which other processes would do otherwise."""
    found = False
    for part in module.modules():
        names = ["p"] if "Dropout" in type(part).__name__ else [name for name in vars(part) if "dropout" in name]
        for name in names:
            rate = getattr(part, name, None)
            if isinstance(rate, float) and rate > 0:
                found = True
                if turn_off:
                    setattr(part, name, 0.0)
    return found


def _reductions(trainer: Any, module: Any) -> dict[str, str | None]:
    """How ranks' states become one, by the names that checkpoints give them."""
    from torchmetrics import Metric

    found: dict[str, str | None] = {}
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            for state, reduction in metric._reductions.items():
                told = getattr(reduction, "__name__", "").removeprefix("dim_zero_")
                found[f"metrics.{name}.states.{state}"] = told or None
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        is_max, is_min = result.meta.is_max_reduction, result.meta.is_min_reduction
        found[f"logged.{key}.value"] = "max" if is_max else "min" if is_min else "sum"
        found[f"logged.{key}.weight"] = "sum"
    return found
