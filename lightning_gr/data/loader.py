"""PlannedLoader: a rank's batches of a plan, with a cursor that counts the batches handed to training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_gr.batch import SequenceBatch
from lightning_gr.data.plan import EpochPlan, GlobalBatchPlan
from lightning_gr.data.source import SequenceSource


class PlannedLoader:
    """Iterates like a ``DataLoader`` and is none, so Lightning neither re-samples nor re-builds it.

    The position in the data is two integers, epoch and batches done, and holds on any number of ranks.

    Args:
        source: the samples.
        plan: how they are cut into global batches.
        rank: this process.
        world_size: how many processes share each global batch.
        accumulate: batches that make one optimizer step, where Lightning divides the loss by them.
        num_workers: background processes that collate; 0 collates in the training process.
        name: the split, for messages.

    Raises:
        ValueError: there are fewer samples than processes.
    """

    def __init__(
        self,
        source: SequenceSource,
        plan: GlobalBatchPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        num_workers: int = 0,
        name: str = "train",
    ) -> None:
        num_samples = plan.num_samples
        if num_samples == 0:
            raise ValueError(
                f"{name} split: no samples; evaluation takes users with at least 3 events, training histories of 2"
            )
        if num_samples < world_size:
            raise ValueError(
                f"{name} split: {num_samples} sample(s) for {world_size} processes; use more data, or lower "
                f"--trainer.devices to at most {num_samples}"
            )
        self._source, self._plan, self._num_workers = source, plan, num_workers
        self._rank, self._world_size, self._accumulate = rank, world_size, accumulate
        self._epoch = 0
        self._cursor = (0, 0)
        self._resume_from: tuple[int, int] | None = None
        self._epoch_plan: tuple[int, EpochPlan] | None = None

    def _plan_of(self, epoch: int) -> EpochPlan:
        if self._epoch_plan is None or self._epoch_plan[0] != epoch:
            self._epoch_plan = (epoch, self._plan.epoch(epoch))
        return self._epoch_plan[1]

    def __len__(self) -> int:
        return len(self._plan_of(self._epoch))

    @property
    def sampler(self) -> PlannedLoader:
        """Itself: Lightning calls ``sampler.set_epoch`` before each epoch."""
        return self

    @property
    def batch_sampler(self) -> None:
        """None; Lightning reads it of everything that has a `sampler`."""
        return None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[SequenceBatch]:
        # A generator, so nothing happens before the first batch is asked for: Lightning makes idle iterators.
        epoch, plan = self._epoch, self._plan_of(self._epoch)
        first = 0
        if self._resume_from is not None and self._resume_from[0] == epoch:
            first = self._resume_from[1]
        self._resume_from = None
        collated = _PlannedBatches(self._source, plan, epoch, self._rank, self._world_size, self._accumulate)
        batches = torch.utils.data.DataLoader(
            collated,
            batch_size=None,
            sampler=range(first, len(plan)),
            num_workers=self._num_workers,
            # Its own, or every iteration would take a number out of the one that dropout draws from.
            generator=torch.Generator(),
        )
        for index, batch in enumerate(batches, start=first):
            self._cursor = (epoch, index + 1)
            yield batch

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._plan.seed,
            "global_tokens": self._plan.global_tokens,
            "shuffle_window": self._plan.window_rows,
            "data": self._source.fingerprint,
        }

    def state_dict(self) -> dict[str, Any]:
        """The cursor, batches *handed out* counted, and what the plan was made from."""
        epoch, done = self._cursor
        return {"epoch": epoch, "batches_done": done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a saved cursor stood.

        Raises:
            ValueError: the plan was made from another seed, budget or log, so the cursor means nothing here.
        """
        for name, present in self._identity().items():
            if state.get(name) != present:
                raise ValueError(
                    f"{name}: the checkpoint's data plan has {state.get(name)!r}, this run has {present!r}; resume "
                    "with the same, or start from the weights alone"
                )
        self._resume_from = self._cursor = (int(state["epoch"]), int(state["batches_done"]))


class _PlannedBatches(torch.utils.data.Dataset[SequenceBatch]):
    """A rank's batches of one epoch by number, as what a DataLoader's workers can collate."""

    def __init__(
        self, source: SequenceSource, plan: EpochPlan, epoch: int, rank: int, world_size: int, accumulate: int
    ) -> None:
        self._source, self._plan, self._epoch = source, plan, epoch
        self._rank, self._world_size, self._accumulate = rank, world_size, accumulate

    def __getitem__(self, batch: int) -> SequenceBatch:
        return self._source.collate(
            self._plan.rank_samples(batch, rank=self._rank, world_size=self._world_size),
            windows=self._plan.windows(batch),
            epoch=self._epoch,
            denominators=self._plan.denominators(batch, accumulate=self._accumulate),
            gradient_divisor=float(self._world_size * self._accumulate),
        )
