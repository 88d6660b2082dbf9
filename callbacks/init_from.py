"""InitFrom: a fit that begins with the weights of a checkpoint and with nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_gr.callbacks.ema import RAW_PREFIX
from lightning_gr.checkpoint.export_format import Export, is_export
from lightning_gr.checkpoint.export_tables import load_exported_tables
from lightning_gr.checkpoint.reader import CheckpointReader
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.checkpoint.tensors import read_tensors
from lightning_gr.plugins import SequenceBalancedStrategy

_Shapes = Mapping[str, tuple[int, ...]]


class InitFrom(pl.Callback):
    """Loads the weights of a checkpoint before training starts; step, epoch, loops and optimisers begin at zero.

    Weights of the same name and shape are loaded, sharded and dynamic tables on any number of ranks; all others keep
    their first values and are listed in one warning. The module's ``on_load_checkpoint`` is called, so its own checks
    apply. A fit that is resumed with ``ckpt_path`` leaves the weights to that checkpoint.

    Args:
        path: a checkpoint directory of ``SequenceBalancedStrategy`` or an export, or the URL of one; or a file of
            Lightning.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no checkpoint, or no weight of it fits the module.
    """

    def __init__(self, *, path: str) -> None:
        storage = Storage(path)
        self.path = path
        if not storage.exists():
            raise FileNotFoundError(f"init_from={path}: no such file or directory; give the path of a saved checkpoint")
        if not storage.is_file():
            Export(storage) if is_export(storage) else CheckpointReader(storage)
        self._resumed = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._resumed = trainer.ckpt_path is not None

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = True  # Slurm's own checkpoint, say, which is no ckpt_path

    @override
    @torch.no_grad()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._resumed:
            return
        storage = Storage(trainer.strategy.broadcast(self.path))
        state = trainer.strategy.lightning_module_state_dict()
        weights = {name: value for name, value in state.items() if isinstance(value, Tensor) or _is_sharded(value)}
        dynamic = getattr(trainer.strategy, "dynamic", None)
        absent: list[str] = []
        if is_export(storage):
            export = Export(storage)
            export.verify()
            pl_module.on_load_checkpoint(export.meta())
            matching = self._matching(weights, export.shapes())
            export.load_weights(matching)
            if dynamic is not None:
                collections = export.collections()
                for name in sorted(dynamic.engines.keys() & collections.keys()):  # every rank in one order
                    load_exported_tables(dynamic.engines[name], collections[name], values_only=True)
                absent = sorted(dynamic.engines.keys() - collections.keys())
        elif not storage.is_file():
            if isinstance(trainer.strategy, SequenceBalancedStrategy):
                reader = trainer.strategy.checkpoints.verified(storage.location)
            else:
                reader = CheckpointReader(storage)
                reader.verify()
            pl_module.on_load_checkpoint(reader.meta())
            saved = {
                key.removeprefix("state_dict."): shape
                for key, (shape, _) in reader.shapes().items()
                if key.startswith("state_dict.") and not key.startswith(f"state_dict.{RAW_PREFIX}")
            }
            matching = self._matching(weights, saved)
            read_tensors(reader.storage, {"state_dict": matching})
            if dynamic is not None:
                absent = dynamic.load_values(reader.collections())
        else:
            checkpoint = _read_file(self.path)
            pl_module.on_load_checkpoint(checkpoint)
            tensors = {name: x for name, x in checkpoint["state_dict"].items() if isinstance(x, Tensor)}
            matching = self._matching(weights, {name: tuple(x.shape) for name, x in tensors.items()})
            for name, weight in matching.items():
                _copy(tensors[name], weight)
        if absent:
            rank_zero_warn(f"init_from={self.path}: has no dynamic tables of {', '.join(absent)}")
        trainer.strategy.barrier("InitFrom: weights loaded")
        rank_zero_info(f"{len(matching)} weights are those of {self.path}")

    def _matching(self, weights: Mapping[str, Any], saved: _Shapes) -> dict[str, Any]:
        """Weights that the checkpoint has in the same shape; warns of everything else."""
        wanted = {name: tuple(weight.size()) for name, weight in weights.items()}
        matching = {name: weights[name] for name, shape in wanted.items() if saved.get(name) == shape}
        rest = {
            "not in the checkpoint": [name for name in wanted if name not in saved],
            "of another shape": [
                f"{name} {saved[name]} for {shape}"
                for name, shape in wanted.items()
                if name in saved and saved[name] != shape
            ],
            "not in the model": [name for name in saved if name not in wanted],
        }
        said = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in rest.items() if names)
        if not matching:
            raise ValueError(f"init_from={self.path}: no weight fits the model ({said}); use a checkpoint of its kind")
        if said:
            rank_zero_warn(f"init_from={self.path}: {len(matching)} weights loaded; {said}")
        return matching


def _is_sharded(value: Any) -> bool:
    return hasattr(value, "local_shards")


def _read_file(path: str) -> dict[str, Any]:
    """A checkpoint file of Lightning; nothing is unpickled but tensors and plain containers."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch's legacy format fails in as many ways as there are bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"init_from={path}: cannot be read ({reason}); use another checkpoint") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"init_from={path}: holds no state_dict; use a checkpoint that Lightning has saved")
    return checkpoint


def _copy(saved: Tensor, weight: Any) -> None:
    """Copies a whole tensor into a weight, or into the local shards of one."""
    if not _is_sharded(weight):
        weight.copy_(saved)
        return
    for shard in weight.local_shards():
        offsets, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        shard.tensor.copy_(saved[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))])
