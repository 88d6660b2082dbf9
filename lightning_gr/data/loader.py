"""PlannedLoader: a rank's batches of a plan, with a cursor that counts the batches handed to training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.partition import Method
from lightning_gr.batch import SequenceBatch
from lightning_gr.data.plan import PLAIN_DEAL, Deal, EpochPlan, GlobalBatchPlan
from lightning_gr.data.source import SequenceSource


class PlannedLoader:
    """Iterates like a ``DataLoader`` and is none, so Lightning neither re-samples nor re-builds it.

    The position in the data is two integers, epoch and global batches done, and holds on any number of ranks.

    Args:
        source: the samples.
        plan: how they are cut into global batches.
        rank: this process.
        world_size: how many processes share each global batch.
        accumulate: global batches that make one optimizer step, where Lightning divides the loss by them.
        num_workers: background processes that collate; 0 collates in the training process.
        name: the split, for messages.

    Raises:
        ValueError: there are no samples.
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
        if plan.num_samples == 0:
            raise ValueError(
                f"{name} split: no samples; evaluation takes users with at least 3 events, training histories of 2"
            )
        self._source, self._plan, self._num_workers = source, plan, num_workers
        self._rank, self._world_size, self._accumulate = rank, world_size, accumulate
        self._deal = PLAIN_DEAL
        self._epoch = 0
        self._cursor = (0, 0)
        self._resume_from: tuple[int, int] | None = None
        self._epoch_plan: tuple[int, EpochPlan] | None = None

    def balance(
        self, *, cost: SequenceCost, method: Method, tokens_per_rank: int | None, accumulate: int | None = None
    ) -> int:
        """Sets how the next iterations deal global batches out; which samples a global batch has stays the same.

        Args:
            cost: what a sequence costs.
            method: the partitioner.
            tokens_per_rank: most tokens that this rank gets at once; None for no limit.
            accumulate: global batches that make one optimizer step; None leaves it as it was.

        Returns:
            The micro-steps that a global batch is cut into. Each is a batch of its own here, and the gradients of
            all, times `accumulate`, make one optimizer step.

        Raises:
            ValueError: there is no such method, or `tokens_per_rank` is below the longest sample.
        """
        steps = 1
        if tokens_per_rank is not None:
            steps = self._plan.micro_steps(world_size=self._world_size, tokens_per_rank=tokens_per_rank)
        self._accumulate = self._accumulate if accumulate is None else accumulate
        self._deal = Deal(cost=cost, method=method, micro_steps=steps, tokens_per_rank=tokens_per_rank)
        return steps

    @property
    def plan(self) -> GlobalBatchPlan:
        """How samples are cut into global batches."""
        return self._plan

    def _plan_of(self, epoch: int) -> EpochPlan:
        if self._epoch_plan is None or self._epoch_plan[0] != epoch:
            self._epoch_plan = (epoch, self._plan.epoch(epoch))
        return self._epoch_plan[1]

    def __len__(self) -> int:
        return len(self._plan_of(self._epoch)) * self._deal.micro_steps

    @property
    def sampler(self) -> PlannedLoader:
        """Itself: Lightning calls ``sampler.set_epoch`` before each epoch."""
        return self

    @property
    def batch_sampler(self) -> None:
        """None; Lightning reads it of everything that has a `sampler`."""
        return None

    def tokens_before(self, batches: int) -> int:
        """Tokens of an epoch's first batches, micro-batches counted, on all ranks; to within the longest sample."""
        return self._plan.num_tokens * batches // (self._plan.num_batches * self._deal.micro_steps)

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
        steps = self._deal.micro_steps
        collated = _PlannedBatches(
            self._source, plan, epoch, self._rank, self._world_size, self._accumulate, self._deal
        )
        batches = torch.utils.data.DataLoader(
            collated,
            batch_size=None,
            sampler=range(first * steps, len(plan) * steps),
            num_workers=self._num_workers,
            # Its own, or every iteration would take a number out of the one that dropout draws from.
            generator=torch.Generator(),
        )
        for done, batch in enumerate(batches, start=first * steps + 1):
            self._cursor = (epoch, done // steps)
            yield batch

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._plan.seed,
            "global_tokens": self._plan.global_tokens,
            "shuffle_window": self._plan.window_rows,
            "data": self._source.fingerprint,
        }

    def state_dict(self) -> dict[str, Any]:
        """The cursor, global batches *handed out* whole counted, and what the plan was made from."""
        epoch, done = self._cursor
        return {"epoch": epoch, "batches_done": done, **self._identity()}

    @property
    def resumes_after(self) -> int | None:
        """Batches of the epoch, micro-batches counted, that a loaded state has done; None once iteration has begun."""
        return None if self._resume_from is None else self._resume_from[1] * self._deal.micro_steps

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a saved cursor stood, at the first micro-batch of a global batch that was not finished.

        Args:
            state: of `state_dict`; with ``on_other_plan: restart_epoch`` in it, another plan's epoch begins anew.

        Raises:
            ValueError: the plan was made from another seed, budget or log, so the cursor means nothing here.
        """
        epoch, done = int(state["epoch"]), int(state["batches_done"])
        if (other := difference(state, self._identity())) is not None:
            if state.get("on_other_plan") != "restart_epoch":
                raise ValueError(
                    f"{other}; resume with the same, let the epoch begin anew (ResumeCheckpoint's on_other_plan: "
                    "restart_epoch), or start from the weights alone (init_from)"
                )
            rank_zero_warn(f"{other}; epoch {epoch} begins anew with this run's plan")
            done = 0
        self._resume_from = self._cursor = (epoch, done)


def difference(state: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """The first setting of a data plan in which a saved state differs from the present one, in words."""
    for name, present in identity.items():
        if state.get(name) != present:
            return f"{name}: the checkpoint's data plan has {state.get(name)!r}, this run has {present!r}"
    return None


class _PlannedBatches(torch.utils.data.Dataset[SequenceBatch]):
    """A rank's micro-batches of one epoch by number, as what a DataLoader's workers can collate."""

    def __init__(
        self,
        source: SequenceSource,
        plan: EpochPlan,
        epoch: int,
        rank: int,
        world_size: int,
        accumulate: int,
        deal: Deal,
    ) -> None:
        self._source, self._plan, self._epoch = source, plan, epoch
        self._rank, self._world_size, self._accumulate, self._deal = rank, world_size, accumulate, deal

    def __getitem__(self, number: int) -> SequenceBatch:
        batch, micro_step = divmod(number, self._deal.micro_steps)
        return self._source.collate(
            self._plan.rank_samples(
                batch, rank=self._rank, world_size=self._world_size, deal=self._deal, micro_step=micro_step
            ),
            windows=self._plan.windows(batch),
            epoch=self._epoch,
            denominators=self._plan.denominators(batch, accumulate=self._accumulate),
            gradient_divisor=float(self._world_size * self._accumulate * self._deal.micro_steps),
        )
