"""The plan of an epoch: global batches by token budget, a pure function of (seed, epoch), dealt out over ranks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lightning_gr.balancing.cost import TOKENS, SequenceCost
from lightning_gr.balancing.partition import Method, check_method, micro_batches, micro_step_count

Array = np.ndarray[Any, Any]
_ORDERS_IN_MEMORY = 2


class SampleIndex(Protocol):
    """What a plan asks of samples: their ids, lengths and label counts, by rows of the log."""

    num_rows: int
    group_bounds: Array
    """int64 first row of each group that is read as one, and the number of rows."""
    tasks: tuple[str, ...]

    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        """Ids and tokens, at least one, of the samples of rows ``first_row ... last_row - 1``, both int64."""
        ...

    def token_counts(self, sample_ids: Array) -> Array:
        """int64 tokens of each sample."""
        ...

    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        """By task, the labelled tokens of each sample."""
        ...


class ArraySamples(SampleIndex):
    """Samples whose lengths and label counts lie in memory; sample i is row i.

    Args:
        token_counts: tokens of each sample, at least 1.
        label_counts: by task, labels of each sample.
        group_bounds: first sample of each group that is read as one, and their number; None means one group.
    """

    def __init__(
        self, token_counts: Array, label_counts: dict[str, Array], *, group_bounds: Array | None = None
    ) -> None:
        self._tokens, self._labels = token_counts.astype(np.int64), label_counts
        self.num_rows, self.tasks = len(token_counts), tuple(label_counts)
        self.group_bounds = np.array([0, self.num_rows]) if group_bounds is None else group_bounds

    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        """See `SampleIndex.samples`."""
        return np.arange(first_row, last_row), self._tokens[first_row:last_row]

    def token_counts(self, sample_ids: Array) -> Array:
        """See `SampleIndex.token_counts`."""
        counts: Array = self._tokens[sample_ids]
        return counts

    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        """See `SampleIndex.label_counts`."""
        return {task: counts[sample_ids] for task, counts in self._labels.items()}


@dataclass(frozen=True)
class Deal:
    """How global batches are dealt out over ranks; which samples a batch has does not depend on it.

    Args:
        cost: what is balanced.
        method: the partitioner.
        micro_steps: steps in which a global batch is computed, one after the other.
        tokens_per_rank: most tokens of a rank in a micro-step, or None for no limit.

    Raises:
        ValueError: there is no such method.
    """

    cost: SequenceCost = TOKENS
    method: Method = "lpt"
    micro_steps: int = 1
    tokens_per_rank: int | None = None

    def __post_init__(self) -> None:
        check_method(self.method)


PLAIN_DEAL = Deal()
"""By tokens, in one step."""


class GlobalBatchPlan:
    """Cuts shuffled samples into global batches of at most `global_tokens` tokens.

    The shuffle has two levels, so that reading stays sequential: the groups of rows, then the samples within a window
    of groups. Only one window is in memory at a time, however many samples there are.

    The number of ranks does not enter, so the sequence of global batches is the same on any number, and every rank
    has the same number of batches. Every epoch has the same number too (Lightning asks for it once): the cuts lie
    where equal shares of all tokens end, and as many shares are made as keep the fullest batch within the budget.

    Args:
        index: the samples.
        global_tokens: budget of a global batch, on all ranks together.
        seed: seed of the shuffle.
        shuffle: whether each epoch has an order of its own.
        window_rows: rows that are shuffled together; whole groups are taken until there are as many.
        budget_name: how messages call the budget.

    Attributes:
        num_samples: samples of an epoch.
        num_tokens: tokens of an epoch.
        longest: tokens of the longest sample.

    Raises:
        ValueError: the budget is below twice the longest sample.
    """

    def __init__(
        self,
        index: SampleIndex,
        *,
        global_tokens: int,
        seed: int = 0,
        shuffle: bool = True,
        window_rows: int = 1 << 16,
        budget_name: str = "global_tokens",
    ) -> None:
        if window_rows < 1:
            raise ValueError(f"window_rows={window_rows}: expected at least 1")
        self.index, self.global_tokens, self.seed, self.shuffle = index, global_tokens, seed, shuffle
        self.window_rows = window_rows
        self.num_samples = self.num_tokens = self.longest = 0
        for first in range(0, index.num_rows, 1 << 20):
            _, tokens = index.samples(first, min(first + (1 << 20), index.num_rows))
            self.num_samples += len(tokens)
            self.num_tokens += int(tokens.sum())
            self.longest = max(self.longest, int(tokens.max(initial=0)))
        longest = self.longest
        if global_tokens < 2 * max(longest, 1):
            raise ValueError(
                f"{budget_name}={global_tokens}: the longest sample has {longest} tokens, and a batch must have room "
                f"for two of it; raise the budget to at least {2 * max(longest, 1)}, or lower max_length"
            )
        # A batch of an equal share, cut at whole samples, has fewer than ``share + longest`` tokens.
        share = global_tokens - longest + 1
        self.num_batches = min(-(-self.num_tokens // share), self.num_samples)

    def micro_steps(self, *, world_size: int, tokens_per_rank: int) -> int:
        """Micro-steps with which no rank gets more tokens at once in any epoch; see `micro_step_count`.

        Args:
            world_size: ranks.
            tokens_per_rank: most tokens of a rank in a micro-step.

        Raises:
            ValueError: `tokens_per_rank` is below the longest sample.
        """
        share = -(-self.num_tokens // max(self.num_batches, 1))
        return micro_step_count(
            min(self.global_tokens, share + self.longest - 1),
            self.longest,
            world_size=world_size,
            tokens_per_rank=tokens_per_rank,
        )

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, a pure function of (seed, epoch)."""
        return EpochPlan(self, epoch)


class EpochPlan:
    """Global batches of one epoch; made by `GlobalBatchPlan.epoch`.

    Args:
        plan: what is cut.
        epoch: number of the epoch.
    """

    def __init__(self, plan: GlobalBatchPlan, epoch: int) -> None:
        self._plan, self._epoch = plan, epoch
        bounds = plan.index.group_bounds
        groups = np.arange(len(bounds) - 1)
        if plan.shuffle:
            groups = self._generator(0).permutation(groups)
        before = np.cumsum(np.diff(bounds)[groups]) - np.diff(bounds)[groups]
        firsts = np.flatnonzero(np.diff(before // plan.window_rows, prepend=-1))
        self._groups = [tuple(part.tolist()) for part in np.split(groups, firsts[1:])] if len(groups) else []
        self._orders: OrderedDict[int, Array] = OrderedDict()
        # Of the last batch and window of batches that were asked for: micro-steps ask one after the other.
        self._dealt: tuple[tuple[int, int, Deal], list[list[Array]]] | None = None
        self._counted: tuple[tuple[int, int], dict[str, float]] | None = None
        self._cut()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": OrderedDict(), "_dealt": None, "_counted": None}

    def _generator(self, stream: int) -> np.random.Generator:
        """Random numbers of (seed, epoch) alone; each stream is apart from the others."""
        key = [self._plan.seed % (1 << 64), self._epoch]
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))

    def _window(self, window: int) -> tuple[Array, Array]:
        """Ids and tokens of a window's samples, in the order in which the epoch takes them."""
        bounds = self._plan.index.group_bounds
        # Runs of groups that follow each other are asked for as one.
        groups = np.array(sorted(self._groups[window]) if self._plan.shuffle else self._groups[window])
        runs = np.split(groups, np.flatnonzero(np.diff(groups) != 1) + 1)
        parts = [self._plan.index.samples(int(bounds[run[0]]), int(bounds[run[-1] + 1])) for run in runs]
        ids, tokens = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        if self._plan.shuffle:
            order = self._generator(window + 1).permutation(len(ids))
            ids, tokens = ids[order], tokens[order]
        return ids, tokens

    def _cut(self) -> None:
        """Finds where each batch begins, one window in memory at a time."""
        plan = self._plan
        batch = np.arange(plan.num_batches + 1)
        ends = batch * plan.num_tokens // max(plan.num_batches, 1)
        cuts = np.zeros(plan.num_batches + 1, dtype=np.int64)
        starts = [0]
        tokens_before, next_cut = 0, 1
        for window in range(len(self._groups)):
            _, tokens = self._window(window)
            sums = np.cumsum(tokens)
            upto = tokens_before + (int(sums[-1]) if len(sums) else 0)
            last_cut = int(np.searchsorted(ends, upto, side="left"))
            here = ends[next_cut:last_cut] - tokens_before
            cuts[next_cut:last_cut] = starts[-1] + np.searchsorted(sums, here, side="right")
            next_cut = max(next_cut, last_cut)
            starts.append(starts[-1] + len(tokens))
            tokens_before = upto
        cuts[next_cut:] = plan.num_samples
        # No batch is empty: each cut at least one sample after the one before, and leaving one for each that follows.
        cuts = np.maximum.accumulate(cuts - batch) + batch
        self._bounds = np.minimum(cuts, plan.num_samples - (plan.num_batches - batch))
        self._starts = np.array(starts)

    def _order(self, window: int) -> Array:
        if window not in self._orders:
            while len(self._orders) >= _ORDERS_IN_MEMORY:
                self._orders.popitem(last=False)
            self._orders[window] = self._window(window)[0]
        self._orders.move_to_end(window)
        return self._orders[window]

    def __len__(self) -> int:
        return self._plan.num_batches

    def _windows(self, first: int, last: int) -> range:
        """The windows that hold the samples ``first ... last - 1`` of the epoch."""
        return range(
            int(np.searchsorted(self._starts, first, side="right")) - 1,
            int(np.searchsorted(self._starts, last, side="left")),
        )

    def samples(self, batch: int) -> Array:
        """Ids of the samples of a global batch, in the order in which the epoch takes them."""
        return self._samples(int(self._bounds[batch]), int(self._bounds[batch + 1]))

    def _samples(self, first: int, last: int) -> Array:
        parts = []
        for window in self._windows(first, last):
            start = int(self._starts[window])
            parts.append(self._order(window)[max(first - start, 0) : last - start])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def windows(self, batch: int) -> list[tuple[int, ...]]:
        """Groups of the windows that hold a global batch; a reader keeps each window in memory."""
        first, last = self._bounds[batch : batch + 2].tolist()
        return [self._groups[window] for window in self._windows(first, last)]

    def rank_samples(
        self, batch: int, *, rank: int, world_size: int, deal: Deal = PLAIN_DEAL, micro_step: int = 0
    ) -> Array:
        """The samples of a global batch that a rank gets in a micro-step; every rank computes the same deal.

        They are in the order of `samples`.
        """
        if self._dealt is None or self._dealt[0] != (batch, world_size, deal):
            samples = self.samples(batch)
            tokens = self._plan.index.token_counts(samples)
            parts = micro_batches(
                deal.cost(tokens),
                world_size=world_size,
                steps=deal.micro_steps,
                method=deal.method,
                sizes=None if deal.tokens_per_rank is None else tokens,
                capacity=deal.tokens_per_rank,
            )
            self._dealt = (batch, world_size, deal), [[samples[part] for part in step] for step in parts]
        return self._dealt[1][micro_step][rank]

    def denominators(self, batch: int, *, accumulate: int = 1) -> dict[str, float]:
        """By task, the labels of all global batches that make one optimizer step with this one."""
        first = batch - batch % accumulate
        last = min(first + accumulate, len(self))
        if self._counted is None or self._counted[0] != (first, last):
            samples = self._samples(int(self._bounds[first]), int(self._bounds[last]))
            counts = self._plan.index.label_counts(samples)
            self._counted = (first, last), {task: float(count.sum()) for task, count in counts.items()}
        return dict(self._counted[1])
