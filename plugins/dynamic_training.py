"""DynamicTraining: what a strategy does for the dynamic tables of a module in a training step and a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_gr.batch import SequenceBatch

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine
    from lightning_gr.embeddings.dynamic.table_files import TablesSnapshot


class DynamicTraining:
    """The dynamic tables of one module, stepped together with its dense optimiser.

    Their gradients stay apart until the dense ones are complete, so that accumulation, one norm over everything and
    loss scaling are those of one process with one large batch.

    Args:
        module: with sharded dynamic collections, or none.

    Attributes:
        engines: by path, the tables.
        in_background: whether gradients and updates are waited for where they are needed, rather than in the step.
        refuses_norm: why gradients cannot be clipped by their norm; None where they can.
    """

    def __init__(self, module: nn.Module) -> None:
        from lightning_gr.plugins.dynamic_sharding import sharded_dynamic_collections

        self.engines: dict[str, DynamicEngine] = {
            path: collection.engine for path, collection in sharded_dynamic_collections(module).items()
        }
        self.in_background = False
        self.refuses_norm: str | None = None
        self._wants_time = any(
            config.policy.ttl_seconds is not None for engine in self.engines.values() for config in engine.configs
        )

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses settings under which updating rows in backward would not be exact.

        Raises:
            MisconfigurationException: names the setting.
        """
        for path, engine in self.engines.items():
            if not engine.fused_update:
                continue
            for name, value in (
                ("accumulate_grad_batches", trainer.accumulate_grad_batches > 1 and trainer.accumulate_grad_batches),
                ("gradient_clip_val", trainer.gradient_clip_val),
                ("precision", trainer.precision == "16-mixed" and trainer.precision),
            ):
                if value:
                    raise MisconfigurationException(
                        f"{name}={value}: rows of {path} are updated in backward, before it could apply; set "
                        "dynamic_tables.update to step"
                    )

    # ---- a step ------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: Iterable[Any], *, lr_factor: float) -> None:
        """Tells tables the schedule's share of their learning rate, and the time of a batch where they need it."""
        for engine in self.engines.values():
            engine.lr_factor = lr_factor
        for batch in inputs:
            if (latest := self.time_of(batch)) is not None:
                for engine in self.engines.values():
                    engine.observe_time(latest)

    def time_of(self, batch: Any) -> int | None:
        """The clock of the data at a batch; None where it has none, or no table asks and reading it would wait."""
        times_T = batch.timestamps_T if isinstance(batch, SequenceBatch) else None
        if times_T is None or not len(times_T):
            return None
        # On a GPU reading the time back waits for it.
        if self.engines and (self._wants_time or times_T.device.type == "cpu"):
            return int(times_T.max())
        return None

    def end_backward(self) -> None:
        """Completes the exchange of gradients of a micro-batch, where every rank comes by in the same order."""
        for engine in self.engines.values():
            engine.flush(wait=not self.in_background)

    def flush(self, dense_parameters: list[Tensor], scaler: torch.amp.GradScaler | None) -> bool:
        """Completes the sparse gradients after backward; with a scaler, unscales them.

        Args:
            dense_parameters: of the optimiser that is about to step.
            scaler: of `16-mixed`.

        Returns:
            Whether some gradient, dense or sparse, of any rank is not finite, so that the step must be left out. A
            dense gradient is then infinite on every rank, by which the scaler leaves out its step too.
        """
        self.end_backward()
        if scaler is None or not self.engines:
            return False
        grads = [p.grad for p in dense_parameters if p.grad is not None]
        finite = all(bool(grad.isfinite().all()) for grad in grads)
        finite = finite and all(engine.gradients_are_finite() for engine in self.engines.values())
        device = next(iter(self.engines.values())).device
        infinite = torch.tensor(float(not finite), device=device)
        dist.all_reduce(infinite, op=dist.ReduceOp.MAX)
        if bool(infinite):
            if grads:
                grads[0].fill_(torch.inf)
            return True
        for engine in self.engines.values():
            engine.scale_gradients(1.0 / scaler.get_scale())
        return False

    def clip_by_norm(self, dense_parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scales dense and sparse gradients so that their one norm is at most `limit`; returns the norm before."""
        if self.refuses_norm is not None:
            raise MisconfigurationException(f"clipping by norm: {self.refuses_norm}")
        grads = [p.grad for p in dense_parameters if p.grad is not None]
        device = next(iter(self.engines.values())).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for engine in self.engines.values():
            engine.join()
            if engine.is_first_replica:
                total += engine.squared_norm()
        dist.all_reduce(total)
        for norm in torch._foreach_norm(grads) if grads else []:
            total += norm.double() ** 2
        norm = total.sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0).float()
        if grads:
            torch._foreach_mul_(grads, factor)
        for engine in self.engines.values():
            engine.scale_gradients(factor)
        return norm

    def clip_by_value(self, limit: float) -> None:
        """Cuts every element of the sparse gradients to [-limit, limit]."""
        for engine in self.engines.values():
            engine.clamp_gradients(limit)

    def step(self, *, leave_out: bool) -> None:
        """Updates rows after the dense optimiser's step, or ends the step without."""
        for engine in self.engines.values():
            if leave_out:
                engine.end_step()
            else:
                engine.step()

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def begin_save(
        self, *, since: Mapping[str, int] | None, journals: bool, max_copied_bytes: int
    ) -> dict[str, TablesSnapshot]:
        """What every collection holds at this moment, to be written while training goes on or before it does.

        Args:
            since: by collection, the step from which on changes are saved; None saves all rows.
            journals: whether the tables note from now on what the next save of changes needs.
            max_copied_bytes: of rows kept aside in all collections; beyond that training waits for the writer.
        """
        if not self.engines:
            return {}
        from lightning_gr.embeddings.dynamic.table_files import begin_save

        snapshots = {}
        for path, engine in self.engines.items():
            engine.settle()
            if not engine.idle:
                rank_zero_warn(
                    f"{path}: saved before the optimiser's step, so this step's gradients are not in the checkpoint"
                )
            snapshots[path] = begin_save(
                engine,
                touched_since=None if since is None else since[path],
                journals=journals,
                max_copied_bytes=max_copied_bytes // len(self.engines),
            )
        return snapshots

    def load(
        self,
        collections: Mapping[str, Sequence[Storage]],
        *,
        confirm: Callable[[], None],
        otherwise: Callable[[str], None],
    ) -> None:
        """Reads the rows of this rank's virtual shards, whatever number of ranks wrote them.

        Args:
            collections: by collection, its folders: the full one, then what adds to it.
            confirm: called before anything changes; raises where the files are damaged.
            otherwise: does something about a collection that is not there.

        Raises:
            ValueError: the checkpoint does not fit.
        """
        if not self.engines:
            confirm()
            return
        from lightning_gr.embeddings.dynamic.table_files import load_tables

        for path, engine in self.engines.items():
            if path in collections:
                load_tables(collections[path], engine, confirm=confirm)
            else:
                confirm()
                otherwise(path)

    def load_values(self, collections: Mapping[str, Sequence[Storage]]) -> list[str]:
        """Reads rows and nothing else of them; training begins with step 0.

        Args:
            collections: as of `load`.

        Returns:
            The collections that the checkpoint does not have.
        """
        from lightning_gr.embeddings.dynamic.table_files import load_tables

        for path in sorted(self.engines.keys() & collections.keys()):  # every rank in one order
            load_tables(collections[path], self.engines[path], values_only=True)
        return sorted(self.engines.keys() - collections.keys())


def clipping_with(dynamic: DynamicTraining, precision_plugin: Any) -> None:
    """Makes Lightning's clipping reach the sparse gradients, so that `gradient_clip_val` is the one knob."""
    by_value: Callable[..., None] = type(precision_plugin).clip_grad_by_value

    def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
        dynamic.clip_by_norm(precision_plugin.main_params(optimizer), float(clip_val))

    def clip_grad_by_value(optimizer: Any, clip_val: float) -> None:
        by_value(precision_plugin, optimizer, clip_val)
        dynamic.clip_by_value(float(clip_val))

    precision_plugin.clip_grad_by_norm = clip_grad_by_norm
    precision_plugin.clip_grad_by_value = clip_grad_by_value
