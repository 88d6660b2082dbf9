"""One run of ``lightning-gr compare`` and ``verify``: a fit and the test of its best, or a test; leaves its result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from typing_extensions import override

from lightning_gr.cli.errors import UserError
from lightning_gr.cli.quiet import quiet_library_noise
from lightning_gr.cli.training import GRCLI


def main(argv: Sequence[str]) -> int:
    """Runs ``FOLDER KEY fit --config ...``, or ``test``, and returns the exit code."""
    quiet_library_noise()
    folder, key, *words = argv
    _RunCLI(args=words, folder=Path(folder), key=key)
    return 0


class _RunCLI(GRCLI):
    """A `fit` whose outputs stay in one folder, followed by the test of its best checkpoint; or a `test` of another.

    Args:
        args: the words of ``lightning-gr fit`` or ``test``.
        folder: where everything goes, as an absolute path.
        key: what the result is known by.
    """

    def __init__(self, *, args: list[str], folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        super().__init__(args=args)

    @override
    def before_instantiate_classes(self) -> None:
        """Loggers and checkpoints of the configuration would share one folder among all runs."""
        super().before_instantiate_classes()
        trainer = self.config[str(self.subcommand)].trainer
        logs = {"save_dir": str(self.folder), "name": "", "version": "logs"}
        trainer.default_root_dir = str(self.folder)
        trainer.logger = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(logs))
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        for callback in callbacks:
            settings = getattr(callback, "init_args", None) or {}
            if settings.get("dirpath") is not None:
                settings["dirpath"] = str(self.folder / "logs" / "checkpoints")

    @override
    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(_Recorder(self.folder / "training.json"))

    def after_fit(self) -> None:
        """Tests, in the processes that have trained."""
        if self.trainer.checkpoint_callback is None:
            raise UserError("trainer.callbacks: no ModelCheckpoint, so there is nothing to test; add one")
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best")
        if self.trainer.is_global_zero:
            training = json.loads((self.folder / "training.json").read_text(encoding="utf-8"))
            self._leave(**training, checkpoint=checkpoint)

    def after_test(self) -> None:
        """Leaves what the checkpoint of a `test` reaches."""
        if self.trainer.is_global_zero:
            self._leave(checkpoint=self.config.test.ckpt_path)

    def _leave(self, **facts: Any) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        _write(self.folder / "result.json", {"key": self.key, "metrics": metrics, **facts})


class _Recorder(pl.Callback):
    """Counts parameters and seconds of the training; a file carries them out of spawned processes.

    Args:
        file: where rank 0 writes them.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.started = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.monotonic() - self.started
        once = {name for name, _ in pl_module.named_parameters()}
        tied = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)} - once
        skipped = tied | {name for name, _ in pl_module.named_buffers()}
        # A sharded table's size is the whole table's here; among the parameters it is the rank's own part.
        state = pl_module.state_dict().items()
        sizes = [value.size() for name, value in state if name not in skipped and hasattr(value, "size")]
        if trainer.is_global_zero:
            _write(self.file, {"parameters": sum(size.numel() for size in sizes), "seconds": seconds})


def _write(file: Path, content: Any) -> None:
    """The file appears whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
