"""ResumeCheckpoint: saves while training goes on, keeps the newest and the best, and finds what to resume from."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
import warnings
from typing import Any, Literal
from weakref import proxy

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_gr._compat import default_store
from lightning_gr.checkpoint.best import best_checkpoint
from lightning_gr.checkpoint.reader import META_FILENAME, complete_checkpoints
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.checkpoint.writer import remove_checkpoint, remove_unfinished
from lightning_gr.plugins import SequenceBalancedStrategy
from lightning_gr.plugins.save_options import SaveOptions

RUN_FILENAME = "run.json"
"""Says which run saves into a folder."""


class ResumeCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` whose defaults are those of a long run that will be interrupted.

    A checkpoint is saved after every so many optimizer steps or minutes, after each validation where a metric is
    watched, and when training ends; always between two steps, so that accumulated gradients are never lost. Those are
    kept that are among the newest, among the best, or that a kept one adds to. ``ckpt_path: last`` resumes from the
    newest complete one of the folder, whatever clocks say, and begins anew where there is none; a damaged one is
    passed over with a warning; ``best`` takes the best one. On a disk ``last.ckpt`` and ``best.ckpt`` are links to
    these two. On SIGTERM all processes save at the same step, and exit with code 0.

    The folder belongs to one run at a time: where a second run begins to save into it, the first one stops with an
    error at its next save, and nothing is lost.

    Args:
        dirpath: folder of the checkpoints, a path or a URL that fsspec knows; None means that of Lightning's
            `ModelCheckpoint`, beside the first logger's files.
        filename: of a checkpoint, from `epoch`, `step` and logged metrics.
        every_n_steps: optimizer steps between two checkpoints.
        every_n_minutes: minutes between two; with neither of both, one is saved at the end of each epoch.
        monitor: a metric of validation; the checkpoints with its best values are kept beside the newest.
        mode: whether `min` or `max` of it is best.
        save_top_k: how many of the best are kept; 0 keeps none for being good.
        keep_last: how many of the newest are kept; -1 keeps all.
        background: whether training goes on while files are written.
        full_every: every so many checkpoints hold all rows of dynamic tables, those between only what has changed
            since the one before; 1 makes all of them full.
        max_copied_bytes: most bytes of rows that each process keeps aside for a background save; beyond that training
            waits.
        on_other_plan: what to do where the checkpoint's data plan (seed, budget, data) is not this run's: `refuse` it,
            or `restart_epoch`: go on with its weights and optimisers, from the first batch of the epoch.
        save_on_sigterm: whether SIGTERM saves and ends the run.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        dirpath: str | None = None,
        filename: str = "{epoch}-{step}",
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        keep_last: int = 2,
        background: bool = True,
        full_every: int = 1,
        max_copied_bytes: int = 1 << 30,
        on_other_plan: Literal["refuse", "restart_epoch"] = "refuse",
        save_on_sigterm: bool = True,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("full_every", full_every, 1),
            ("save_top_k", save_top_k, 0),
            ("max_copied_bytes", max_copied_bytes, 1),
        ):
            if value is not None and value < least:
                raise MisconfigurationException(f"{name}={value}: expected at least {least}")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise MisconfigurationException(f"every_n_minutes={every_n_minutes}: expected more than 0")
        if keep_last < 1 and keep_last != -1:
            raise MisconfigurationException(f"keep_last={keep_last}: expected at least 1, or -1 for all")
        if "{step" not in filename:
            raise MisconfigurationException(
                f"filename={filename!r}: must have {{step}} in it, so that no checkpoint takes the place of another"
            )
        if on_other_plan not in ("refuse", "restart_epoch"):
            raise MisconfigurationException(f"on_other_plan={on_other_plan!r}: expected refuse or restart_epoch")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor is not None else 0,
            every_n_epochs=1,
        )
        self.every_n_steps, self.every_n_minutes, self.keep_last = every_n_steps, every_n_minutes, keep_last
        self.background, self.full_every, self.max_copied_bytes = background, full_every, max_copied_bytes
        self.on_other_plan, self.save_on_sigterm = on_other_plan, save_on_sigterm
        self._saved: dict[str, float | None] = {}
        self._bases: dict[str, str] = {}
        self._unpublished: str | None = None
        self._attempt = 0
        self._run = ""
        self._saves_by_time = 0
        self._last_step = self._validated_step = -1
        self._stops = False
        self._due = self._is_untidy = False
        self._last_time = 0.0
        self._signalled = False
        self._handler: Any = None
        self._fallbacks: list[str] = []

    trainer: pl.Trainer | None = None  # set by `lightning-gr`, so that the folder is known before `setup`
    _best_path, _is_set_up = "", False

    @property
    def best_model_path(self) -> str:
        """The best checkpoint so far; before anything has begun the best one that the folder has."""
        if self._best_path or self._is_set_up or (self.dirpath is None and self.trainer is None):
            return self._best_path
        folder = self._ModelCheckpoint__resolve_ckpt_dir(self.trainer)  # type: ignore[attr-defined]
        found = best_checkpoint(folder, callback=self.state_key, mode=self.mode)
        if found is None and self.trainer is not None and self.trainer.state.fn is not None:
            raise MisconfigurationException(f"ckpt_path=best: no complete checkpoint in {folder}; train or give a path")
        return found or ""

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        self._best_path = path

    @property
    @override
    def state_key(self) -> str:
        return type(self).__qualname__

    # ---- beginning and end -------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, SequenceBalancedStrategy):
            raise MisconfigurationException(
                f"strategy={type(trainer.strategy).__name__}: {type(self).__name__} saves the checkpoints of "
                "SequenceBalancedStrategy; use that, or Lightning's ModelCheckpoint"
            )
        self._is_set_up = True
        with warnings.catch_warnings():
            # A folder with checkpoints is what a resumed run wants.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage != TrainerFn.FITTING:
            return
        if self._unpublished is not None:  # by a fit that failed meanwhile
            self._saved.pop(self._unpublished, None)
            self._unpublished, self._is_untidy = None, False
        trainer.strategy.checkpoint_fallbacks = self._fallbacks
        self._attempt = trainer.strategy.broadcast(self._take_over(trainer))
        self._run = trainer.strategy.broadcast(self._run)

    def _take_over(self, trainer: pl.Trainer) -> int:
        """Makes the folder this run's; returns how many runs there were before."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 0
        folder = self._folder()
        folder.make()
        self._run = secrets.token_hex(8)
        run = {"run": self._run, "host": socket.gethostname(), "process": os.getpid()}
        folder.publish(RUN_FILENAME, json.dumps(run).encode())
        for storage in remove_unfinished(folder):
            rank_zero_info(f"checkpoint {storage}: removed, since its save was cut off")
        return max((x.manifest.attempt for x in complete_checkpoints(folder)), default=0) + 1

    def _still_ours(self) -> None:
        """Raises where another run has begun to save into the folder."""
        folder = self._folder()
        try:
            found = json.loads(folder.read_bytes(RUN_FILENAME))
        except (OSError, ValueError):
            found = {}
        if found.get("run") != self._run:
            raise RuntimeError(
                f"{folder.path_of(RUN_FILENAME)}: another run (process {found.get('process')} on {found.get('host')}) "
                "saves into this folder by now; this one stops, so that they do not mix: give each run a dirpath of "
                "its own"
            )

    def _folder(self) -> Storage:
        assert self.dirpath is not None
        return Storage(self.dirpath)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signalled = self._stops = self._due = False
        self._last_step = trainer.global_step
        self._last_time = time.monotonic()
        self._saves_by_time = 0
        if self.save_on_sigterm:
            # In the place of Lightning's, which starts a collective inside the handler.
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._signalled = True

    def _release_signal(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_saved(trainer) and not self._leaves_out(trainer):
            self._save(trainer, background=False)
        self._finish(trainer)
        self._release_signal()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release_signal()

    # ---- when --------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._leaves_out(trainer) or step == self._last_step:
            return  # between two steps of accumulation nothing is saved
        self._last_step = step
        self._poll(trainer)
        if self.save_on_sigterm and self._agreed(trainer, "stop", wanted=self._signalled):
            self._stops = True
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._due = True
        if self.every_n_minutes is not None and self._time_is_up(trainer):
            self._due = True
        if self._is_last_batch(trainer):
            return  # what belongs to the epoch's end comes first: Lightning would leave it out after a resume
        if trainer.should_stop or 0 <= trainer.max_steps <= step:
            self._due = True  # once training has ended in the middle of an epoch, Lightning takes it for finished
        loop = trainer.fit_loop
        if loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            return  # and so does a validation that is about to run
        if self._due:
            self._save(trainer)
        if self._stops:
            self._stop(trainer)

    @staticmethod
    def _is_last_batch(trainer: pl.Trainer) -> bool:
        return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        assert self.every_n_minutes is not None
        over = time.monotonic() - self._last_time >= 60 * self.every_n_minutes
        if self._agreed(trainer, f"save-{self._saves_by_time}", wanted=over and trainer.is_global_zero):
            self._saves_by_time += 1
            self._last_time = time.monotonic()
            return True
        return False

    def _agreed(self, trainer: pl.Trainer, what: str, *, wanted: bool) -> bool:
        """Whether this is the step at which all processes do what one of them wants.

        Who wants it says so at the end of a step, and means the end of the next: no other process can have come
        further, since a step needs the gradients of all.
        """
        step = trainer.global_step
        if trainer.world_size == 1:
            return wanted
        store, key = default_store(), f"lightning-gr/{self._run}/{what}"
        if store.check([key]):
            return int(store.get(key)) <= step
        if wanted:
            store.set(key, str(step + 1))
        return False

    def _stop(self, trainer: pl.Trainer) -> None:
        if not self._is_saved(trainer):
            self._save(trainer, background=False)
        self._finish(trainer)
        rank_zero_info(f"SIGTERM: saved {self.last_model_path} after step {trainer.global_step}; this run ends")
        raise SIGTERMException

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leaves_out(trainer) or trainer.global_step != self._last_step:
            return
        if self._is_last_batch(trainer):
            self._validated_step = trainer.global_step
        elif not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save_validated(trainer)
            if self._stops:
                self._stop(trainer)
        elif self.monitor is not None and self.save_top_k > 0:
            self._due = True
            rank_zero_warn(
                f"monitor={self.monitor!r}: validation ran between two batches of one step (accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}), where nothing is saved, so its value rates no checkpoint; "
                "validate after whole steps"
            )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leaves_out(trainer):
            return
        self._due |= self._by_epochs
        if self._validated_step == trainer.global_step:
            self._save_validated(trainer)
        elif self._due and not self._is_saved(trainer):
            self._save(trainer)
        if self._stops:
            self._stop(trainer)

    def _save_validated(self, trainer: pl.Trainer) -> None:
        """After a validation at this step."""
        score = self._score(trainer)
        if self._is_saved(trainer):
            if score is not None:
                self._rate(self.last_model_path, score)
                self._poll(trainer)
        elif self._due or score is not None or self._by_epochs:
            self._save(trainer, score=score)

    @property
    def _by_epochs(self) -> bool:
        return self.every_n_steps is None and self.every_n_minutes is None

    def _leaves_out(self, trainer: pl.Trainer) -> bool:
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        return dry or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking

    def _is_saved(self, trainer: pl.Trainer) -> bool:
        return self._last_global_step_saved == trainer.global_step

    # ---- saving ------------------------------------------------------------------------------------------------

    def _save(self, trainer: pl.Trainer, *, background: bool | None = None, score: float | None = None) -> None:
        candidates = self._monitor_candidates(trainer)
        path = self._get_metric_interpolated_filepath_name(candidates, trainer)
        if not self._folder().is_local:
            # Nothing can be renamed there: what an earlier run may still be writing has other names.
            path = f"{path.removesuffix(self.FILE_EXTENSION)}-{self._run[:6]}{self.FILE_EXTENSION}"
        self._saved[path] = None
        self._unpublished = path
        self._is_untidy = True
        self.last_model_path = path
        if score is not None:
            self._rate(path, score)  # before, so that the checkpoint knows it
        if self.monitor is None:
            self.best_model_path = path
        options = SaveOptions(
            background=self.background if background is None else background,
            full_every=self.full_every,
            max_copied_bytes=self.max_copied_bytes,
            attempt=self._attempt,
            still_ours=self._still_ours,
        )
        trainer.save_checkpoint(path, False, storage_options=options)
        assert isinstance(trainer.strategy, SequenceBalancedStrategy)
        if (base := trainer.strategy.checkpoints.last_base) is not None:
            self._bases[path] = os.path.join(os.path.dirname(path), base)
        self._due = False
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = path
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._poll(trainer)

    def _score(self, trainer: pl.Trainer) -> float | None:
        """What the watched metric is by now; None where none is watched, or not logged yet."""
        if self.monitor is None or self.save_top_k == 0:
            return None
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            if trainer.fit_loop.epoch_loop.val_loop._has_run:
                raise MisconfigurationException(
                    f"monitor={self.monitor!r}: not among the logged metrics "
                    f"({', '.join(sorted(trainer.callback_metrics))})"
                )
            return None
        score = float(value)
        worst = float("inf") if self.mode == "min" else float("-inf")
        return worst if score != score else score

    def _rate(self, path: str, score: float) -> None:
        """Notes how good a checkpoint is."""
        self._saved[path] = score
        self._is_untidy = True
        self.current_score = torch.tensor(score)
        best = self._best()
        self.best_k_models = {path: torch.tensor(self._saved[path]) for path in best}
        self.best_model_path, self.best_model_score = best[0], self.best_k_models[best[0]]
        self.kth_best_model_path, self.kth_value = best[-1], self.best_k_models[best[-1]]

    def _best(self) -> list[str]:
        rated = [path for path, score in self._saved.items() if score is not None]
        sign = 1 if self.mode == "min" else -1
        return sorted(rated, key=lambda path: sign * (self._saved[path] or 0.0))[: self.save_top_k]

    def _poll(self, trainer: pl.Trainer) -> None:
        """Raises the error of a background save that failed, and removes what is not kept once it has succeeded."""
        assert isinstance(trainer.strategy, SequenceBalancedStrategy)
        if trainer.strategy.checkpoints.poll():
            self._unpublished = None
            self._tidy(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        assert isinstance(trainer.strategy, SequenceBalancedStrategy)
        trainer.strategy.checkpoints.wait()
        self._unpublished = None
        self._tidy(trainer)
        trainer.strategy.barrier("ResumeCheckpoint")

    def _tidy(self, trainer: pl.Trainer) -> None:
        """Points `last.ckpt` and `best.ckpt` to what they say, where there are links, and removes what is not kept."""
        if not self._is_untidy:
            return
        self._is_untidy = False
        if trainer.is_global_zero and self._saved:
            folder = self._folder()
            folder.link("last.ckpt", os.path.basename(self.last_model_path))
            for path in self._best()[:1]:
                folder.link("best.ckpt", os.path.basename(path))
        self._prune(trainer)

    def _prune(self, trainer: pl.Trainer) -> None:
        """Removes this run's checkpoints but the newest, the best, and what these add to; none is being written."""
        paths = list(self._saved)
        waiting = [*(paths if self.keep_last == -1 else paths[-self.keep_last :]), *self._best()]
        kept = set()
        while waiting:
            kept.add(path := waiting.pop())
            base = self._bases.get(path)
            if base is not None and base not in kept:
                waiting.append(base)
        for path in [path for path in paths if path not in kept]:
            if trainer.is_global_zero:
                remove_checkpoint(Storage(path))
            del self._saved[path]
            self._bases.pop(path, None)

    @override
    def _format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        # Metrics are called val/loss, and a checkpoint is a folder beside others.
        return super()._format_checkpoint_name(*args, **kwargs).replace("/", "_")

    # ---- resuming ----------------------------------------------------------------------------------------------

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        folder = Storage(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        found = [x.storage for x in complete_checkpoints(folder)]
        self._fallbacks = [storage.location for storage in found]
        if not found:
            rank_zero_info(f"no complete checkpoint in {folder} yet: training begins anew")
            return set()
        # Lightning asks for the time of what it gets, which object stores know of files alone.
        return {found[0].location if found[0].is_local else found[0].path_of(META_FILENAME)}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
        for state in states:
            if isinstance(state, dict):
                state["on_other_plan"] = self.on_other_plan

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "saved": dict(self._saved), "bases": dict(self._bases)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath"):
            self._saved, self._bases = dict(state_dict.get("saved", {})), dict(state_dict.get("bases", {}))
            best = self._best()
            self.best_k_models = {path: torch.tensor(self._saved[path]) for path in best}
