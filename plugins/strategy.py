"""SequenceBalancedStrategy: data parallel dense layers beside sharded TorchRec tables, inside Lightning's own loop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_gr._compat import default_store, end_children, give_ranks_time_to_explain
from lightning_gr.balancing.settings import Balancing
from lightning_gr.batch import SequenceBatch
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.checkpoint.writer import remove_checkpoint
from lightning_gr.embeddings import deferred_tables
from lightning_gr.plugins.checkpoints import Checkpoints
from lightning_gr.plugins.communication_settings import (
    Schedule,
    SparseUpdate,
    check_communication,
    check_table_groups,
    run_in_background,
)
from lightning_gr.plugins.dynamic_training import DynamicTraining, clipping_with
from lightning_gr.plugins.module_wrapping import wrap_module
from lightning_gr.plugins.process_groups import group_named
from lightning_gr.plugins.rank_watch import RankWatch
from lightning_gr.plugins.save_options import SaveOptions
from lightning_gr.plugins.sharding import Sharding, SparseOptimizer, static_collections
from lightning_gr.plugins.staged_batch import StagedBatch
from lightning_gr.plugins.table_groups_memory import (
    check_group_memory,
    device_memory,
    host_memory,
    table_budgets,
)
from lightning_gr.plugins.training_pipeline import TrainingPipeline
from lightning_gr.substrate import require_torchrec

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.optim import Optimizer
    from torchrec.distributed.model_parallel import DistributedModelParallel

    from lightning_gr.plugins.stage_log import StageLog

log = logging.getLogger(__name__)
_SECONDS_TO_EXPLAIN = 15.0
"""How long the processes of a failed run may take to say whose fault it is, before they are killed."""


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a strategy in which a failed communication is explained by the rank that caused it."""

    @functools.wraps(method)
    def guarded(self: SequenceBalancedStrategy, *args: Any, **kwargs: Any) -> Any:
        with self._guard():
            return method(self, *args, **kwargs)

    return guarded


class SequenceBalancedStrategy(DDPStrategy):
    """Trains any LightningModule on 1 to N processes; TorchRec collections inside it are sharded over the ranks.

    The LightningModule itself is wrapped in TorchRec's ``DistributedModelParallel``: its embedding collections, static
    and dynamic, become sharded, everything else is data parallel. Rows of static tables are updated inside backward by
    the sparse optimiser named here, those of dynamic tables together with the dense step; the module's own optimiser
    sees the dense parameters. Checkpoints are directories in Lightning's sharded format and can be read on another
    number of ranks.

    The gradient is that of one process on the union of the ranks' batches when the loss is a local sum over a global
    denominator: a `SequenceBatch` carries what that takes, and any other module may return
    ``{"loss": ..., "loss_sums": {task: (sum, count)}}`` from ``training_step``. Otherwise the ranks' means are
    averaged, which is said once.

    Args:
        sharding: how the tables of an ``EmbeddingCollection`` are cut: by rows, by columns, or placed whole.
        sparse_optimizer: optimiser of the tables that have none attached by the module.
        sparse_lr: its learning rate. It follows the schedule of the first dense parameter group: the rate of a step
            is ``sparse_lr * lr / initial_lr`` of that group, set before the step's forward.
        static_dedup: makes the ids of static ``EmbeddingCollection`` tables distinct before they travel. Dynamic tables
            have settings of their own.
        balancing: how samples are dealt out over the ranks; None takes the defaults.
        pipeline_depth: batches that are fetched, copied and looked up ahead of the one that trains; 0 turns that off.
        schedule: `lookup_ahead` prepares batches in the stages fetch, copy and lookup; `six_stage` is TurboGR's, with
            up to six batches in flight: ids are sent in one stage and received in another. It takes a `pipeline_depth`
            of at least 4.
        sparse_update: of dynamic tables (TurboGR, arXiv 2605.13433, section 4.2.2). `sync` looks up a batch once the
            step before has updated its rows; `semi_async` reads and sends the next batch's rows during a step, so that
            they lack that step's update and no other; `exact_async` does so but for rows that the step updates, which
            changes no number.
        sync_steps: optimizer steps that are trained synchronously before `semi_async` or `exact_async` begins.
        table_groups: into how many groups of consecutive ranks the processes are cut, each with a full set of the
            dynamic tables (hierarchical sparse parallelism, section 4.2.1): lookups stay inside a group, and between
            groups travel the keys and gradients of the rows that a batch touches.
        find_unused_parameters: lets DDP look for dense parameters that a step did not use; costs time. On three and
            more processes a CPU, or `deterministic: true`, turns it on: without it DDP's order of summation depends on
            how many steps a process has made, and a resumed run would differ by rounding.
        bucket_cap_mb: size of DDP's gradient buckets in MiB.
        process_group_backend: ``gloo`` or ``nccl``; None means the device's usual one.
        timeout: how long a collective may wait for the slowest rank.
        start_method: how Lightning starts the processes when torchrun did not.
        accelerator: set by Lightning.
        parallel_devices: set by Lightning.
        cluster_environment: set by Lightning.
        checkpoint_io: not used; the strategy writes checkpoint directories itself.
        precision_plugin: set by Lightning.

    Raises:
        MisconfigurationException: a setting that cannot be honoured, by name.
        ImportError: torchrec is missing or does not fit torch; the message says how to get it.
    """

    strategy_name = "sequence_balanced"

    def __init__(
        self,
        *,
        sharding: Sharding = "row_wise",
        sparse_optimizer: SparseOptimizer = "rowwise_adagrad",
        sparse_lr: float = 0.05,
        static_dedup: bool = True,
        balancing: Balancing | None = None,
        pipeline_depth: int = 2,
        schedule: Schedule = "lookup_ahead",
        sparse_update: SparseUpdate = "sync",
        sync_steps: int = 100,
        table_groups: int = 1,
        find_unused_parameters: bool = False,
        bucket_cap_mb: int = 25,
        process_group_backend: Literal["gloo", "nccl"] | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        if checkpoint_io is not None:
            raise MisconfigurationException(
                f"checkpoint_io={checkpoint_io!r}: {type(self).__name__} writes sharded checkpoint directories itself; "
                "leave it out"
            )
        if sparse_lr < 0:
            raise MisconfigurationException(f"sparse_lr={sparse_lr}: expected a rate >= 0")
        if pipeline_depth < 0:
            raise MisconfigurationException(f"pipeline_depth={pipeline_depth}: expected at least 0")
        check_communication(
            pipeline_depth=pipeline_depth,
            schedule=schedule,
            sparse_update=sparse_update,
            sync_steps=sync_steps,
            table_groups=table_groups,
        )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.sharding = sharding
        self.sparse_optimizer = sparse_optimizer
        self.sparse_lr = sparse_lr
        self.static_dedup = static_dedup
        self.balancing = balancing or Balancing()
        self.pipeline_depth, self.schedule = pipeline_depth, schedule
        self.sparse_update, self.sync_steps, self.table_groups = sparse_update, sync_steps, table_groups
        self.collective_timeout = timeout
        self.find_unused_parameters = find_unused_parameters
        self.bucket_cap_mb = bucket_cap_mb
        self._dmp: DistributedModelParallel | None = None
        self._sparse_base_lrs: list[float] = []
        self._dynamic: DynamicTraining | None = None
        self._checkpoints: Checkpoints | None = None
        # What `ckpt_path: last` may choose from, the newest first.
        self.checkpoint_fallbacks: list[str] = []
        self._pipeline: TrainingPipeline | None = None
        self._watch: RankWatch | None = None
        self._said_mean_of_means = self._is_stepping = False

    @property
    @override
    def is_distributed(self) -> bool:
        """True on any number of processes; without it Lightning drops ``sync_dist`` silently."""
        return True

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    # ---- set-up ------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        require_torchrec()
        super().setup_environment()

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        with deferred_tables():
            yield

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        # Dense layers are built on the host and moved by DDP's wrap; the base class would build tables unsharded.
        meta = torch.device("meta") if empty_init else nullcontext()
        with meta, self.precision_plugin.tensor_init_context():
            yield

    @override
    def model_to_device(self) -> None:
        """Nothing: the wrap moves the dense part, and shards are built on their device."""

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._watch = RankWatch(
            store=default_store(),
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self.collective_timeout,
            interval=0.5,  # quicker than Lightning's launcher, which kills all processes once one has ended
        )
        self._watch.start()
        give_ranks_time_to_explain(_SECONDS_TO_EXPLAIN)
        self._check_precision()
        check_table_groups(self.table_groups, self.world_size)
        # Before the wrap: the shards of tables have a type of their own.
        self.precision_plugin.convert_module(self.lightning_module)
        self._dmp, self._sparse_base_lrs, used = wrap_module(
            self.lightning_module,
            sharding=self.sharding,
            sparse_optimizer=self.sparse_optimizer,
            sparse_lr=self.sparse_lr,
            static_dedup=self.static_dedup,
            find_unused_parameters=self.find_unused_parameters or self._repeats_to_the_bit(),
            bucket_cap_mb=self.bucket_cap_mb,
            device=self.root_device,
            num_local=self.num_processes,
            seed=self.broadcast(torch.initial_seed()),
            timeout=self.collective_timeout,
            table_groups=self.table_groups,
        )
        table_groups = used["table_groups"]  # an earlier strategy may have cut the tables
        self._check_precision()
        self.model = self._dmp
        self._dynamic = DynamicTraining(self.lightning_module)
        self._checkpoints = Checkpoints(
            module=self.lightning_module,
            dmp=self._dmp,
            dynamic=self._dynamic,
            trainer=trainer,
            group=group_named("checkpoints", timeout=self.collective_timeout, backend="gloo"),
        )
        if table_groups > 1 and not self._dynamic.engines:
            rank_zero_warn(f"table_groups={table_groups}: not used, since the module has no dynamic tables")
        if table_groups > 1:
            check_group_memory(
                table_budgets(self._dynamic.engines.values()),
                world_size=self.world_size,
                table_groups=table_groups,
                device_bytes=device_memory(self.root_device),
                host_bytes=host_memory() // self.num_processes,
            )
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_settings(trainer)
            # Before the optimisers: a schedule may ask the Trainer for the length of the loader, which is made then.
            self._pipeline = TrainingPipeline(
                balancing=self.balancing,
                depth=self.pipeline_depth,
                module=self.lightning_module,
                dynamic=self._dynamic,
                device=self.root_device,
                timeout=self.collective_timeout,
                prepare=super().batch_to_device,
                watch=self._watch,
                check_settings=self._check_settings,
                sparse_update=self.sparse_update,
                sync_steps=self.sync_steps,
                schedule=self.schedule,
                table_groups=table_groups,
            )
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if self._dynamic.engines:
            clipping_with(self._dynamic, self.precision_plugin)

    def _repeats_to_the_bit(self) -> bool:
        """Whether a resumed run's sums over ranks have to be made in the order of the uninterrupted one's.

        DDP lays out its buckets anew after the first backward, unless it looks for unused parameters; of three ranks
        and more the order of a sum depends on the place in the bucket.
        """
        exact = self.root_device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        return exact and self.world_size > 2

    def _check_precision(self) -> None:
        """Refuses what tables cannot honour; whether there are static ones is known once the module is wrapped."""
        honoured = ["32-true", "bf16-mixed", "64-true"]
        if self._dmp is None or not self._dmp.fused_optimizer.params:
            honoured.append("16-mixed")  # dynamic tables step after the scaler has spoken
        precision = self.precision_plugin.precision
        if precision == "64-true" and self._has_tables():
            raise MisconfigurationException(
                "precision='64-true': the rows of sharded tables are float32; use 32-true, or a module without tables"
            )
        if precision not in honoured:
            raise MisconfigurationException(
                f"precision={precision!r}: sharded tables update their rows inside backward, before Lightning could "
                "unscale or convert; use 32-true or bf16-mixed"
            )

    def _has_tables(self) -> bool:
        """Whether the module has embedding collections, wrapped or not yet."""
        from lightning_gr.plugins.dynamic_sharding import dynamic_collections, sharded_dynamic_collections

        assert self.lightning_module is not None
        kinds = (static_collections, dynamic_collections, sharded_dynamic_collections)
        wrapped = self._dmp is not None and bool(self._dmp.fused_optimizer.params)
        return wrapped or any(kind(self.lightning_module) for kind in kinds)

    def _check_settings(self, trainer: pl.Trainer) -> None:
        """Refuses what dynamic tables cannot honour, and warns of what static ones ignore."""
        assert self._dmp is not None
        assert self._dynamic is not None
        self._dynamic.check(trainer)
        if self.sparse_update != "sync":
            run_in_background(
                self._dynamic, self.sparse_update, trainer, has_static=bool(self._dmp.fused_optimizer.params)
            )
        if not self._dmp.fused_optimizer.params:
            return
        if trainer.accumulate_grad_batches > 1:
            rank_zero_warn(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: sharded static tables step on every "
                "micro-batch, so the result is not that of one large batch"
            )
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"gradient_clip_val={trainer.gradient_clip_val}: dense gradients are clipped, those of sharded static "
                "tables are not"
            )

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._reset_optimizers_and_schedulers()
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self._drop_table_parameters(optimizer)

    def _drop_table_parameters(self, optimizer: Optimizer) -> None:
        dropped = 0
        for group in optimizer.param_groups:
            dense = [p for p in group["params"] if not hasattr(p, "_in_backward_optimizers")]
            dropped += len(group["params"]) - len(dense)
            group["params"] = dense
        if dropped:
            rank_zero_warn(
                f"{type(optimizer).__name__} was given {dropped} sharded table shard(s); {type(self).__name__} updates "
                f"them in backward with {self.sparse_optimizer} (sparse_lr={self.sparse_lr}) instead"
            )

    # ---- batches -----------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        if self._pipeline is None or self.lightning_module.trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        return self._pipeline.wrap(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, StagedBatch):
            assert self._pipeline is not None
            return self._pipeline.unwrap(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    @property
    def stage_log(self) -> StageLog | None:
        """When each stage of the training pipeline worked on which batch; None before the first fit."""
        return None if self._pipeline is None else self._pipeline.log

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.checkpoints.begin_batch()
        if self._watch is not None:
            self._watch.at("training step", batch_idx)

    @override
    def on_validation_start(self) -> None:
        if self._watch is not None:
            self._watch.at("validation after step", self.lightning_module.trainer.global_step)  # type: ignore[union-attr]
        if self._pipeline is not None:
            self._pipeline.flush()

    @override
    def on_train_start(self) -> None:
        if self._pipeline is not None:
            self._pipeline.resume_progress()
        self.checkpoints.begin_training()

    @override
    def on_train_end(self) -> None:
        if self._pipeline is not None:
            self._pipeline.end(wait=True)
        self.checkpoints.close(wait=True)

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._pipeline is not None:
            self._pipeline.end(wait=False)
        if self._checkpoints is not None:
            self._checkpoints.close(wait=False)
        if self._watch is not None and (failure := self._watch.explain(exception)) is not None:
            log.error("%s", failure)
        assert self.lightning_module is not None
        end_children(self.lightning_module.trainer, seconds=_SECONDS_TO_EXPLAIN / 2)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with self._watch.guard() if self._watch is not None else nullcontext():
            yield

    # Wherever ranks wait for each other.
    backward = _guarded(DDPStrategy.backward)
    validation_step = _guarded(DDPStrategy.validation_step)
    test_step = _guarded(DDPStrategy.test_step)
    predict_step = _guarded(DDPStrategy.predict_step)
    barrier = _guarded(DDPStrategy.barrier)
    broadcast = _guarded(DDPStrategy.broadcast)
    reduce = _guarded(DDPStrategy.reduce)
    all_gather = _guarded(DDPStrategy.all_gather)

    # ---- a step ------------------------------------------------------------------------------------------------

    @_guarded
    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._dynamic is not None
        self._set_sparse_learning_rates()
        self._dynamic.begin_step((*args, *kwargs.values()), lr_factor=self._lr_factor())
        assert self._pipeline is not None
        with self._pipeline.step(step_ends=self._is_stepping):
            output = super().training_step(*args, **kwargs)
        self._log_collisions()
        self.checkpoints.after_batch()
        if any(isinstance(x, SequenceBatch) for x in (*args, *kwargs.values())):
            return output
        if isinstance(output, Mapping) and "loss_sums" in output:
            return {**output, "loss": self._mean_over_ranks(output["loss_sums"])}
        if self.world_size > 1 and output is not None and not self._said_mean_of_means:
            self._said_mean_of_means = True
            rank_zero_warn(
                f"{type(self.lightning_module).__name__}.training_step: the loss is averaged rank by rank, which "
                "weighs samples unequally where ranks hold different numbers of them; return "
                '{"loss": ..., "loss_sums": {task: (sum, count)}} to make it exact'
            )
        return output

    def _log_collisions(self) -> None:
        """TurboGR's alpha: the share of a batch's keys that the step before touched too, of this rank's keys.

        Keys are dealt out by their hash, so one rank's are a fair sample.
        """
        assert self._dynamic is not None
        if not self._dynamic.in_background:
            return
        counts = [engine.collisions for engine in self._dynamic.engines.values()]
        collided, keys = (sum(column) for column in zip(*counts, strict=True))
        assert self.lightning_module is not None
        if keys and self.lightning_module.trainer.training:
            self.lightning_module.log("gr/collision_rate", collided / keys, batch_size=1)

    def _mean_over_ranks(self, loss_sums: Mapping[str, tuple[Tensor, Tensor | float]]) -> Tensor:
        """Local sums over counts of all ranks, scaled by what DDP and TorchRec divide gradients by."""
        counts = torch.tensor(
            [float(count) for _, count in loss_sums.values()], dtype=torch.float64, device=self.root_device
        )
        dist.all_reduce(counts)
        terms = [
            loss_sum * (self.world_size / count if count > 0 else 0.0)
            for (loss_sum, _), count in zip(loss_sums.values(), counts.tolist(), strict=True)
        ]
        return torch.stack(terms).sum()

    def _lr_factor(self) -> float:
        """The schedule's share of the first dense parameter group's rate, which the sparse rates follow."""
        if not self.optimizers:
            return 1.0
        dense = self.optimizers[0].param_groups[0]
        return float(dense["lr"] / dense["initial_lr"]) if dense.get("initial_lr") else 1.0

    def _set_sparse_learning_rates(self) -> None:
        """Before forward: FBGEMM captures the rate there and updates the rows in backward."""
        assert self._dmp is not None
        fused = self._dmp.fused_optimizer
        factor = self._lr_factor()
        changed = False
        for group, base_lr in zip(fused.param_groups, self._sparse_base_lrs, strict=True):
            changed |= group["lr"] != base_lr * factor
            group["lr"] = base_lr * factor
        if changed:
            fused.step()

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Refuses a backward inside training_step, of which DDP makes an error that names nothing of the user's."""
        module = self.lightning_module
        if module is not None and not module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(module).__name__}.automatic_optimization=False: manual_backward runs inside the forward that "
                f"{type(self).__name__} wraps; return the loss from training_step instead, or train with strategy ddp"
            )

    @_guarded
    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Completes the gradients of dynamic tables; the base class looks for a bare DDP model."""
        assert self._dynamic is not None
        self._dynamic.end_backward()
        assert self._pipeline is not None
        self._pipeline.stepped()

    @_guarded
    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """The dense step, with the dynamic tables' gradients complete before clipping and their rows updated after."""
        dynamic = self._dynamic
        assert dynamic is not None
        leave_out = False

        def closure_then_flush() -> Any:
            nonlocal leave_out
            result = closure()
            dense = [p for group in optimizer.param_groups for p in group["params"]]
            leave_out = dynamic.flush(dense, getattr(self.precision_plugin, "scaler", None))
            return result

        self._is_stepping = True
        try:
            output = super().optimizer_step(optimizer, closure_then_flush, model, **kwargs)
        finally:
            self._is_stepping = False
        if dynamic.in_background:
            assert self._pipeline is not None
            self._pipeline.tables.end_step()
        else:
            dynamic.step(leave_out=leave_out)
        if self._pipeline is not None:
            self._pipeline.stepped()
        return output

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        assert self._dmp is not None
        wrapped = self._dmp._dmp_wrapped_module
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext():
            yield

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self._dmp is not None
        return self._dmp.state_dict()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `Checkpoints` has read the weights in place."""

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: `Checkpoints` takes the state itself, by parameter name."""
        return {}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `Checkpoints` has read the optimisers in place."""

    @property
    def checkpoints(self) -> Checkpoints:
        """What is saved and loaded; there once the strategy is set up."""
        assert self._checkpoints is not None
        return self._checkpoints

    @_guarded
    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        options = SaveOptions() if storage_options is None else storage_options
        if not isinstance(options, SaveOptions):
            raise TypeError(
                f"storage_options={storage_options!r}: {type(self).__name__} writes a checkpoint directory itself and "
                "takes SaveOptions or none"
            )
        if self._pipeline is not None:
            self._pipeline.flush()
        self.checkpoints.save(checkpoint, self.broadcast(str(filepath)), options)

    @_guarded
    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        path, fallbacks = self.broadcast((str(checkpoint_path), self.checkpoint_fallbacks))
        self.checkpoint_fallbacks = []
        chosen = fitting and bool(fallbacks) and path.startswith(fallbacks[0])
        return self.checkpoints.load(path, fitting=fitting, fallbacks=fallbacks if chosen else ())

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove_checkpoint(Storage(filepath))

    # ---- end ---------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        # Not the base class: it would move the shards and the optimisers to the host.
        if self._pipeline is not None:
            self._pipeline.end(wait=True)
        if self._watch is not None:
            self._watch.stop()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @property
    def dynamic(self) -> DynamicTraining | None:
        """The dynamic tables of the module, with all updates done; None before the strategy is set up."""
        if self._dynamic is not None:
            for engine in self._dynamic.engines.values():
                engine.join()
        return self._dynamic

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(
            cls.strategy_name,
            cls,
            description="sequence-balanced data parallelism with sharded TorchRec embeddings",
        )
