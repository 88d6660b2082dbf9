"""How evenly a plan's global batches can be dealt out over any number of ranks, from the samples' lengths alone.

Shape suffixes: N samples, L lengths from 0 to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.partition import Method, imbalance, micro_batches

if TYPE_CHECKING:
    from lightning_gr.data.plan import GlobalBatchPlan, SampleIndex

Array = np.ndarray[Any, Any]
_ROWS_AT_ONCE = 1 << 20
_MOST_BATCHES, _MOST_SAMPLES = 32, 200_000


@dataclass(frozen=True)
class Lengths:
    """How many samples have each number of tokens.

    Args:
        samples_L: int64; entry i counts the samples of i tokens.
    """

    samples_L: Array

    @classmethod
    def of(cls, index: SampleIndex) -> Lengths:
        """Those of all samples, some at a time."""
        samples_L = np.zeros(1, dtype=np.int64)
        for first in range(0, index.num_rows, _ROWS_AT_ONCE):
            _, tokens_N = index.samples(first, min(first + _ROWS_AT_ONCE, index.num_rows))
            more_L = np.bincount(tokens_N, minlength=len(samples_L))
            more_L[: len(samples_L)] += samples_L
            samples_L = more_L
        return cls(samples_L)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.flatnonzero(self.samples_L).max(initial=0))

    @property
    def mean(self) -> float:
        """Tokens of the mean sample."""
        return float(self.samples_L @ np.arange(len(self.samples_L)) / max(self.samples_L.sum(), 1))

    def quantile(self, share: float) -> int:
        """The length that this share of the samples does not exceed."""
        return int(np.searchsorted(self.samples_L.cumsum(), share * self.samples_L.sum()))

    def total(self, cost: SequenceCost) -> float:
        """Cost of all samples."""
        return float(cost(np.arange(len(self.samples_L))) @ self.samples_L)

    def even_tokens(self, cost: SequenceCost) -> int:
        """Mean tokens of a rank from which on the longest sample costs no more than what the mean rank has."""
        per_token = self.total(cost) / float(self.samples_L @ np.arange(len(self.samples_L)))
        longest = float(cost(np.array([self.longest]))[0])
        return int(np.ceil(longest / per_token - 1e-9))


@dataclass(frozen=True)
class Deal:
    """Global batches of one size, dealt out over some ranks; shares are ``(max - mean) / max`` of the ranks' costs.

    Args:
        ranks: processes.
        batch_tokens: tokens of the mean global batch.
        batches: global batches of an epoch.
        micro_steps: parts that each rank computes one after the other.
        most_tokens: tokens that the fullest rank computes at once.
        unbalanced: share of a step that the mean rank waits when samples are dealt out in their order.
        balanced: the same by the partitioner.
        bound: what of it no partitioner can help, since a sample is not cut: the longest of a batch is on some rank.
        repeats: whether the log is smaller than the batches looked at, so that its samples are used again.
    """

    ranks: int
    batch_tokens: float
    batches: int
    micro_steps: int
    most_tokens: int
    unbalanced: float
    balanced: float
    bound: float
    repeats: bool


def in_order(plan: GlobalBatchPlan) -> Iterator[Array]:
    """Tokens of the samples in the order of the first epoch, batch by batch, then the same shuffled, and so on."""
    epoch = plan.epoch(0)
    seen: list[Array] = []
    for batch in range(len(epoch)):
        tokens_N = plan.index.token_counts(epoch.samples(batch))
        seen.append(tokens_N)
        yield tokens_N
    whole_N, random = np.concatenate(seen), np.random.default_rng(0)
    while True:
        yield random.permutation(whole_N)


def deal(
    plan: GlobalBatchPlan,
    *,
    ranks: int,
    batch_tokens: float,
    cost: SequenceCost,
    method: Method,
    micro_steps: int = 1,
    tokens_per_rank: int | None = None,
) -> Deal:
    """Deals out the first global batches of an epoch, cut where equal shares of the tokens end.

    Args:
        plan: the recipe's, whose order of samples is taken.
        ranks: processes.
        batch_tokens: tokens of a global batch.
        cost: of a sequence.
        method: of the partitioner.
        micro_steps: parts of a rank's share.
        tokens_per_rank: most tokens that a rank computes at once; None sets no limit.
    """
    per_batch = batch_tokens * plan.num_samples / plan.num_tokens
    of_an_epoch = max(int(plan.num_tokens / batch_tokens + 1e-6), 1)
    num_batches = int(np.clip(_MOST_SAMPLES / per_batch, 1, min(_MOST_BATCHES, of_an_epoch)))
    parts, tokens = [], 0
    for tokens_N in in_order(plan):
        parts.append(tokens_N)
        tokens += int(tokens_N.sum())
        if tokens >= num_batches * batch_tokens:
            break
    tokens_N = np.concatenate(parts)
    cuts = np.searchsorted(tokens_N.cumsum(), np.arange(num_batches + 1) * batch_tokens, side="right")
    found: dict[str, list[float]] = {name: [] for name in ("tokens", "unbalanced", "balanced", "bound")}
    most_tokens = 0
    for first, last in zip(cuts, cuts[1:], strict=False):
        if last == first:
            continue
        sizes_N = tokens_N[first:last]
        costs_N = cost(sizes_N)
        capacity: dict[str, Any] = {} if tokens_per_rank is None else {"sizes": sizes_N, "capacity": tokens_per_rank}
        dealt = micro_batches(costs_N, world_size=ranks, steps=micro_steps, method=method, **capacity)
        control = micro_batches(costs_N, world_size=ranks, steps=micro_steps, method="contiguous")
        found["tokens"].append(float(sizes_N.sum()))
        found["balanced"].append(_mean(imbalance(costs_N, step) for step in dealt))
        found["unbalanced"].append(_mean(imbalance(costs_N, step) for step in control))
        found["bound"].append(max(0.0, 1 - float(costs_N.sum()) / (ranks * micro_steps) / float(costs_N.max())))
        most_tokens = max(most_tokens, *(int(sizes_N[part].sum()) for step in dealt for part in step))
    return Deal(
        ranks=ranks,
        batch_tokens=_mean(found["tokens"]),
        batches=max(round(plan.num_tokens / batch_tokens), 1),
        micro_steps=micro_steps,
        most_tokens=most_tokens,
        unbalanced=_mean(found["unbalanced"]),
        balanced=_mean(found["balanced"]),
        bound=_mean(found["bound"]),
        repeats=tokens > plan.num_tokens,
    )


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
