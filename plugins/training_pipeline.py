"""TrainingPipeline: makes a training loader balanced and pipelined, and follows its batches through the step."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gr._compat import skip_hook_of_staged_batches
from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of
from lightning_gr.balancing.settings import Balancing
from lightning_gr.data.finished_epoch import leave_finished_epoch
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.data.stream_loader import StreamLoader
from lightning_gr.plugins.pipelined_loader import PipelinedLoader
from lightning_gr.plugins.process_groups import forget_groups, group_named, peers_named
from lightning_gr.plugins.rank_watch import RankWatch
from lightning_gr.plugins.rebatched_loader import RebatchedLoader
from lightning_gr.plugins.sparse_schedule import SparseSchedule
from lightning_gr.plugins.stage_log import StageLog
from lightning_gr.plugins.staged_batch import StagedBatch
from lightning_gr.plugins.trained_state_loader import TrainedStateLoader

if TYPE_CHECKING:
    from datetime import timedelta

    import lightning.pytorch as pl

    from lightning_gr.plugins.communication_settings import Schedule, SparseUpdate
    from lightning_gr.plugins.dynamic_training import DynamicTraining


class TrainingPipeline:
    """What a strategy does to the training loader.

    Args:
        balancing: how samples are dealt out over the ranks.
        depth: batches prepared ahead; 0 leaves batches as they come.
        module: wrapped, with sharded collections.
        dynamic: its dynamic tables.
        device: where batches go.
        timeout: how long a collective may wait for the slowest rank.
        prepare: moves a batch to the device, with the hooks that belong to it.
        watch: explains failures by the rank that caused them.
        check_settings: refuses or warns of what tables cannot honour; asked again when accumulation begins here.
        sparse_update: what of the dynamic tables may run beside the dense step.
        sync_steps: optimizer steps before it does.
        schedule: `six_stage` sends and receives the ids of lookups in a stage each.
        table_groups: groups of ranks with a full set of dynamic tables each.

    Attributes:
        log: when each stage worked on which batch.
    """

    def __init__(
        self,
        *,
        balancing: Balancing,
        depth: int,
        module: pl.LightningModule,
        dynamic: DynamicTraining,
        device: torch.device,
        timeout: timedelta,
        prepare: Callable[[Any], Any],
        watch: RankWatch,
        check_settings: Callable[[pl.Trainer], None],
        sparse_update: SparseUpdate,
        sync_steps: int,
        schedule: Schedule,
        table_groups: int,
    ) -> None:
        from lightning_gr.plugins.lookup_prefetch import LookupPrefetch

        self._schedule = schedule
        self._balancing, self._depth = balancing, depth
        self._module, self._device, self._prepare = module, device, prepare
        self.log, self._watch = StageLog(), watch
        # Every rank makes the groups in this order, whichever it will use.
        self._batch_group = group_named("batches", timeout=timeout, backend="gloo")
        lookup_group = group_named("lookups", timeout=timeout)
        key_peers = peers_named("lookups", num_groups=table_groups, timeout=timeout)
        self._lookups = (
            LookupPrefetch(module, group=lookup_group, key_peers=key_peers, device=device, time_of=dynamic.time_of)
            if depth
            else None
        )
        self.tables = SparseSchedule(
            mode=sparse_update,
            sync_steps=sync_steps,
            engines=dynamic.engines,
            log=self.log,
            device=device,
            timeout=timeout,
            num_groups=table_groups,
            clips_by_norm=bool(module.trainer.gradient_clip_val),
        )
        self._check_settings, self._micro_steps = check_settings, 1
        self._planned: PlannedLoader | None = None
        self._counts: dict[str, Any] = {}
        self._loader: PipelinedLoader | None = None
        self._present: StagedBatch | None = None
        self._began = 0.0

    # ---- loaders -----------------------------------------------------------------------------------------------

    def wrap(self, loader: Any) -> Any:
        """The training loader, balanced and pipelined.

        Raises:
            MisconfigurationException: the loader cannot be balanced as asked.
        """
        trainer = self._module.trainer
        if not isinstance(loader, PlannedLoader | StreamLoader):  # whose data modules do so
            leave_finished_epoch(trainer, unsized=sized_len(loader) is None)
        loader = self._balanced(loader, trainer)
        by_iterator = "dataloader_iter" in inspect.signature(self._module.training_step).parameters
        if by_iterator and self.tables.runs_ahead:
            rank_zero_warn(
                f"sparse_update={self.tables.mode}: training_step takes dataloader_iter, so no batch is known ahead of "
                "its step, and all of them stay synchronous; take the batch instead"
            )
        if self._depth == 0 or by_iterator:
            return TrainedStateLoader(loader) if _is_ahead_of_training(loader) else loader
        skip_hook_of_staged_batches(self._module, StagedBatch)
        self.stop(wait=True)
        self._loader = PipelinedLoader(
            loader,
            prepare=self._prepare_fully,
            look_up=None if self._lookups is None else self._lookups.start,
            depth=self._depth,
            device=self._device,
            log=self.log,
            enabled=self._is_only_loader,
            fetch_apart=_leaves_generator_alone(loader),
            waits_apart=self._schedule == "six_stage",
            watch=self._watch,
        )
        return self._loader

    def _is_only_loader(self) -> bool:
        """Whether a batch is that of one loader; of several, Lightning puts batches together behind this."""
        if isinstance(self._module.trainer.train_dataloader, PipelinedLoader):
            return True
        ahead = f", nor is sparse_update={self.tables.mode}" if self.tables.runs_ahead else ""
        rank_zero_warn(f"pipeline_depth={self._depth}: not used{ahead}, since there are several training loaders")
        return False

    def cost(self) -> SequenceCost:
        """What a sequence costs: by the settings, or by the module."""
        if isinstance(self._balancing.cost, SequenceCost):
            return self._balancing.cost
        return cost_of(self._module) if self._balancing.cost == "model" else TOKENS

    def _balanced(self, loader: Any, trainer: pl.Trainer) -> Any:
        settings, name = self._balancing, type(loader).__name__
        if isinstance(loader, PlannedLoader) or settings.mode in ("local", "exchange"):
            _refuse_changing_accumulation(trainer)
        if isinstance(loader, PlannedLoader):
            if settings.mode in ("local", "exchange"):
                raise MisconfigurationException(
                    f"balancing.mode={settings.mode}: the training data has an index, from which planned mode deals "
                    "out whole batches without a message; leave mode out, or train from a StreamDataModule"
                )
            self._cut_into_micro_steps(loader, trainer)
            return loader
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, DistributedSampler):
            self._warn_of_repeated_samples(loader)
        if settings.mode == "local" or settings.mode == "exchange":
            return RebatchedLoader(
                loader,
                mode=settings.mode,
                group=self._batch_group,
                accumulate=lambda: trainer.accumulate_grad_batches,
                tokens_per_rank=settings.tokens_per_rank,
                cost=self.cost(),
                method=settings.partitioner,
            )
        if settings.mode == "planned" and not isinstance(loader, StreamLoader):
            unsized = "has no length and " if sized_len(loader) is None else ""
            raise MisconfigurationException(
                f"balancing.mode=planned: {name} {unsized}has no plan, since nothing tells the lengths of its samples "
                "ahead; use SequenceDataModule or RankingDataModule, or mode exchange"
            )
        if isinstance(loader, StreamLoader):
            loader.balance(cost=self.cost(), method=settings.partitioner)
        if settings.tokens_per_rank is not None:
            rank_zero_warn(
                f"balancing.tokens_per_rank={settings.tokens_per_rank}: not used, since {name} makes its own batches; "
                "set mode to local or exchange"
            )
        return loader

    def _cut_into_micro_steps(self, loader: PlannedLoader, trainer: pl.Trainer) -> None:
        """Tells the loader how batches are dealt out, and the Trainer how many of them make a step."""
        settings, batches = self._balancing, trainer.accumulate_grad_batches // self._micro_steps
        self._micro_steps = loader.balance(
            cost=self.cost(),
            method=settings.partitioner,
            tokens_per_rank=settings.tokens_per_rank,
            accumulate=batches,
        )
        trainer.accumulate_grad_batches = batches * self._micro_steps
        self._planned = loader
        self._count_micro_steps(trainer)
        if self._micro_steps > 1:
            rank_zero_info(
                f"tokens_per_rank={settings.tokens_per_rank}: each global batch is computed in {self._micro_steps} "
                "micro-steps"
            )
            self._check_settings(trainer)

    def _count_micro_steps(self, trainer: pl.Trainer) -> None:
        """Numbers of batches among the Trainer's settings mean global ones, of which it sees the parts."""
        for name in ("limit_train_batches", "val_check_interval"):
            value = self._counts.setdefault(name, getattr(trainer, name))
            if isinstance(value, int):
                setattr(trainer, name, value * self._micro_steps)

    def resume_progress(self) -> None:
        """Brings loaders to where the checkpoint stood, and counts what Lightning has restored anew.

        A checkpoint may have been cut into other micro-steps.
        """
        fit_loop = self._module.trainer.fit_loop
        if fit_loop.restarting and fit_loop._combined_loader_states_to_load:
            # A schedule that asks for the number of steps has the loader made too early for Lightning 2.6, which then
            # forgets its state (its issue 20550).
            fit_loop._load_combined_loader_states()
            assert fit_loop._data_fetcher is not None
            iter(fit_loop._data_fetcher)
        done = None if self._planned is None else self._planned.resumes_after
        if done is None or not fit_loop.restarting:
            return
        progress: Any = fit_loop.epoch_loop.batch_progress
        # A checkpoint of on_train_batch_end has the last batch processed and not completed; Lightning adds it.
        pending = progress.total.processed - progress.total.completed
        current = progress.current
        current.ready = current.started = current.processed = done
        current.completed = done - pending

    @staticmethod
    def _warn_of_repeated_samples(loader: DataLoader[Any]) -> None:
        sampler = loader.sampler
        assert isinstance(sampler, DistributedSampler)
        size = len(sampler.dataset)  # type: ignore[arg-type]
        if not sampler.drop_last and size % sampler.num_replicas:
            rank_zero_warn(
                f"DistributedSampler: {size} samples do not divide by {sampler.num_replicas} processes, so it repeats "
                f"{-size % sampler.num_replicas} of them in each epoch and the result depends on the number of "
                "processes; use SequenceDataModule, or Trainer(use_distributed_sampler=False) with a loader of your own"
            )

    def _prepare_fully(self, batch: Any) -> Any:
        """What Lightning does to a batch before the training step."""
        trainer, module = self._module.trainer, self._module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = type(module)._on_before_batch_transfer(module, batch, dataloader_idx=0)
        return self._prepare(batch)

    # ---- a step ------------------------------------------------------------------------------------------------

    def unwrap(self, batch: Any) -> Any:
        """The batch that Lightning is about to train, out of what the loader handed over."""
        self._present = batch
        if self._loader is not None:
            self._loader.begin(batch)
        return batch.batch

    @contextmanager
    def step(self, *, step_ends: bool) -> Iterator[None]:
        """Encloses the forward of a training step; learns from the first what is looked up.

        Args:
            step_ends: whether the optimizer steps after this batch.
        """
        self._began = time.perf_counter()
        lookups, present = self._lookups, self._present
        if lookups is None or present is None:
            yield
            return
        assert self._loader is not None
        step = self._module.trainer.global_step
        if lookups.knows:
            following = self._loader.following()
            self.tables.begin_batch(present, following, made=lookups.made, step=step, step_ends=step_ends)
            yield
            return
        self.tables.begin_batch(present, None, made=lookups.made, step=step, step_ends=step_ends)
        with lookups.learning(present.batch):
            yield
        if self.tables.runs_ahead:
            self._loader.look_up_rest()
            self.tables.after_batch(self._loader.following(), made=lookups.made, step=step, step_ends=step_ends)

    def stepped(self) -> None:
        """Records the compute of the present batch up to here: its backward, or the optimiser's step."""
        if self._present is not None:
            began, self._began = self._began, time.perf_counter()
            self.log.add("train", self._present.number, began, self._began)

    def flush(self) -> None:
        """Waits until no stage is at work, as before an evaluation or a checkpoint."""
        if self._loader is not None:
            self._loader.flush()
        self.tables.join()

    def end(self, *, wait: bool) -> None:
        """Ends a fit, as `stop`; the Trainer gets back the settings that it came with."""
        self.stop(wait=wait)
        if wait:
            self.tables.settle()
        else:
            forget_groups()
        self.tables.close(abandon=not wait)
        trainer = self._module.trainer
        trainer.accumulate_grad_batches //= self._micro_steps
        for name, value in self._counts.items():
            setattr(trainer, name, value)
        self._counts.clear()
        self._micro_steps, self._planned = 1, None

    def stop(self, *, wait: bool) -> None:
        """Ends what is in flight; without waiting after a failure."""
        if self._loader is not None:
            self._loader.stop(wait=wait)
        self._loader = self._present = None


def _refuse_changing_accumulation(trainer: pl.Trainer) -> None:
    if any(isinstance(x, GradientAccumulationScheduler) for x in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "GradientAccumulationScheduler: a balanced batch carries the label counts of its whole optimizer step, so "
            "the number of batches in one cannot change; use Trainer(accumulate_grad_batches=...)"
        )


def _is_ahead_of_training(loader: Any) -> bool:
    """Whether a loader's own state is that of the batch behind the one that trains."""
    has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return has_state and sized_len(loader) is None and not getattr(loader, "lookahead", 0)


def _leaves_generator_alone(loader: Any) -> bool:
    """Whether a loader's batches are made without torch's global generator of this process, as far as can be known."""
    if isinstance(loader, RebatchedLoader):
        return _leaves_generator_alone(loader.loader)
    return isinstance(loader, (PlannedLoader, StreamLoader)) or (
        isinstance(loader, DataLoader) and loader.num_workers > 0
    )
