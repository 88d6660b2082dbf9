"""ExponentialMovingAverage: averaged weights, sharded tables included, for evaluation and for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import override

from lightning_gr.checkpoint.tensors import read_tensors
from lightning_gr.plugins import SequenceBalancedStrategy

RAW_PREFIX = "ema_raw."
"""Begins the names of the weights in training, beside the averages, in a checkpoint directory."""

_RAW_KEY = "ema_raw_state_dict"


class ExponentialMovingAverage(pl.Callback):
    """Keeps ``average = d * average + (1 - d) * weight`` of all parameters, updated after every optimiser step.

    Rows of sharded tables are averaged where they are, each rank its own, at the cost of their memory once more and a
    pass over the whole tables a step. Validation during fit sees the averages, and after fit the module holds them, so
    ``test`` and ``predict`` do too. Buffers and rows of dynamic tables are not averaged.

    A checkpoint's weights are the averages, whoever reads it; those in training are stored beside them, so that a fit
    with ``ckpt_path`` and this callback goes on exactly, on any number of ranks.

    Args:
        decay: d, the weight of the old average, from 0 up to but not including 1.
        start_step: optimiser steps after which averaging begins; before, the average is the weight itself.
        warmup: uses the smaller of `decay` and ``(1 + n) / (10 + n)`` at the n-th update, so that the first weights are
            forgotten sooner.

    Raises:
        MisconfigurationException: a setting, strategy or ModelCheckpoint that this one cannot work with, by name.
        ValueError: a checkpoint that lacks what is needed to go on.
    """

    def __init__(self, *, decay: float = 0.999, start_step: int = 0, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise MisconfigurationException(f"decay={decay}: expected a number from 0 up to but not including 1")
        if start_step < 0:
            raise MisconfigurationException(f"start_step={start_step}: expected at least 0")
        self.decay = decay
        self.start_step = start_step
        self.warmup = warmup
        self._module: pl.LightningModule | None = None
        self._forget()

    def _forget(self) -> None:
        self._averages: dict[str, Any] | None = None  # by name; holds the weights in training while swapped
        self._swapped = False
        self._updates = 0
        self._weights: list[Tensor] = []  # local tensors during training, and the averages of each
        self._averages_of: list[Tensor] = []
        self._latest_step = 0
        self._resumes = False
        self._saved_raw: Mapping[str, Tensor] | None = None

    # ---- a run -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._check(trainer)
        if trainer.ckpt_path is not None or pl_module is not self._module or self._averages is None:
            self._forget()
        self._module = pl_module

    def _check(self, trainer: pl.Trainer) -> None:
        name = type(self).__name__
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"strategy={type(trainer.strategy).__name__}: {name} does not know how it keeps weights; use "
                "SequenceBalancedStrategy, DDP or one device"
            )
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "save_weights_only", False):
                raise MisconfigurationException(
                    f"save_weights_only=True: {type(callback).__name__} would save the weights in training instead of "
                    f"the averages of {name}; leave it out"
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._swapped:  # by the end of an earlier fit
            self._swap(trainer)

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = _averaged_weights(trainer)
        dynamic = getattr(trainer.strategy, "dynamic", None)
        if dynamic is not None and dynamic.engines:
            rank_zero_warn(
                f"{', '.join(dynamic.engines)}: rows of dynamic tables are not averaged, all other weights are"
            )
        for name, weight in weights.items():
            if weight.dtype.itemsize < torch.float32.itemsize:
                raise MisconfigurationException(
                    f"{name}: {weight.dtype} is too coarse for {type(self).__name__}, whose steps would be rounded "
                    "away; use 32-true or bf16-mixed"
                )
        if self._averages is None:
            averages = _copies(weights)
            if self._resumes:
                self._read_raw(trainer, weights)
            self._averages = averages
        pairs = _pairs(weights, self._averages)
        self._weights, self._averages_of = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self._latest_step = trainer.global_step

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._latest_step:  # gradients are still being accumulated
            return
        self._latest_step = trainer.global_step
        if trainer.global_step <= self.start_step:
            decay = 0.0
        else:
            self._updates += 1
            decay = min(self.decay, (1 + self._updates) / (10 + self._updates)) if self.warmup else self.decay
        if self._weights:
            get_ema_multi_avg_fn(decay)(self._averages_of, self._weights, None)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not self._swapped:
            self._swap(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._swapped:
            self._swap(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._swapped:
            self._swap(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._weights, self._averages_of = [], []
        if not self._swapped:
            self._swap(trainer)

    @torch.no_grad()
    def _swap(self, trainer: pl.Trainer) -> None:
        """Exchanges averages and weights in place; without averages, nothing."""
        if self._averages is None:
            return
        for weight, average in _pairs(_averaged_weights(trainer), self._averages):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._swapped = not self._swapped

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._averages is None else {"updates": self._updates}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates = int(state_dict["updates"])
        self._resumes = True

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._averages is None:
            return
        state = checkpoint["state_dict"]
        raw = self._averages if self._swapped else {name: state[name] for name in self._averages}
        if not self._swapped:
            state.update(self._averages)
        if isinstance(trainer.strategy, SequenceBalancedStrategy):
            # The strategy writes what is under state_dict as shards, and reads of it what the module has.
            state.update({RAW_PREFIX + name: weight for name, weight in raw.items()})
        else:
            checkpoint[_RAW_KEY] = raw

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._saved_raw = checkpoint.get(_RAW_KEY)
        if self.state_key not in checkpoint["callbacks"]:
            rank_zero_warn(
                f"checkpoint {trainer.ckpt_path}: was saved without {type(self).__name__}; the average begins at its "
                "weights"
            )

    def _read_raw(self, trainer: pl.Trainer, weights: Mapping[str, Any]) -> None:
        """Puts the weights in training, of the checkpoint, in the place of the averages that Lightning has loaded."""
        lacks = f"checkpoint {trainer.ckpt_path}: has no weights in training of"
        remedy = f"fit from it with init_from, or without {type(self).__name__}"
        if not isinstance(trainer.strategy, SequenceBalancedStrategy):
            saved, self._saved_raw = self._saved_raw or {}, None
            for name, weight in weights.items():
                if name not in saved:
                    raise ValueError(f"{lacks} {name}; {remedy}")
                weight.copy_(saved[name])
            return
        reader = trainer.strategy.checkpoints.loaded
        assert reader is not None
        shapes = reader.shapes()
        raw = {RAW_PREFIX + name: weight for name, weight in weights.items()}
        for name in raw:
            if f"state_dict.{name}" not in shapes:
                raise ValueError(f"{lacks} {name.removeprefix(RAW_PREFIX)}; {remedy}")
        read_tensors(reader.storage, {"state_dict": raw})


def _averaged_weights(trainer: pl.Trainer) -> dict[str, Any]:
    """Sharded tables and parameters in floating point, by name; they share memory with the module."""
    parameters = {name for name, _ in trainer.lightning_module.named_parameters(remove_duplicate=False)}
    state = trainer.strategy.lightning_module_state_dict()
    return {
        name: value
        for name, value in state.items()
        if hasattr(value, "local_shards") or (name in parameters and value.is_floating_point())
    }


def _copies(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of each, the same one for two names of one tensor."""
    made: dict[Any, Any] = {}
    copies = {}
    for name, weight in weights.items():
        tied = name if hasattr(weight, "local_shards") else (weight.data_ptr(), weight.shape, weight.stride())
        if tied not in made:
            made[tied] = weight.clone()
        copies[name] = made[tied]
    return copies


def _pairs(weights: Mapping[str, Any], averages: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Local tensors of the weights and their averages, each once."""
    once = {id(averages[name]): (weights[name], averages[name]) for name in averages}
    return [pair for weight, average in once.values() for pair in zip(_local(weight), _local(average), strict=True)]


def _local(value: Any) -> list[Tensor]:
    if hasattr(value, "local_shards"):
        return [shard.tensor for shard in value.local_shards()]
    return [value]
