"""The plan of an epoch: global batches by token budget, a pure function of (seed, epoch), dealt out over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gr.data.partition import longest_processing_time

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EpochPlan:
    """Global batches of one epoch; batch i holds the samples ``order[bounds[i] : bounds[i + 1]]``.

    Args:
        order: samples in the order in which the epoch takes them.
        bounds: where each global batch begins, and the end.
        token_counts: tokens of each sample, by sample.
        label_counts: by task, labels of each sample.
    """

    order: Array
    bounds: Array
    token_counts: Array
    label_counts: dict[str, Array]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def samples(self, batch: int) -> Array:
        """The samples of a global batch."""
        return self.order[self.bounds[batch] : self.bounds[batch + 1]]

    def rank_samples(self, batch: int, *, rank: int, world_size: int) -> Array:
        """The samples of a global batch that a rank gets; every rank computes the same deal."""
        samples = self.samples(batch)
        mine: Array = samples[longest_processing_time(self.token_counts[samples], world_size)[rank]]
        return mine

    def denominators(self, batch: int, *, accumulate: int = 1) -> dict[str, float]:
        """By task, the labels of all global batches that make one optimizer step with this one."""
        first = batch - batch % accumulate
        samples = self.order[self.bounds[first] : self.bounds[min(first + accumulate, len(self))]]
        return {task: float(counts[samples].sum()) for task, counts in self.label_counts.items()}


class GlobalBatchPlan:
    """Cuts shuffled samples into global batches of at most `global_tokens` tokens.

    The number of ranks does not enter, so the sequence of global batches is the same on any number, and every rank
    has the same number of batches. Every epoch has the same number too (Lightning asks for it once): the cuts lie
    where equal shares of all tokens end, and as many shares are made as keep the fullest batch within the budget.

    Args:
        token_counts: int64 tokens of each sample.
        label_counts: by task, labels of each sample.
        global_tokens: budget of a global batch, on all ranks together.
        seed: seed of the shuffle.
        shuffle: whether each epoch has an order of its own.
        budget_name: how messages call the budget.

    Raises:
        ValueError: the budget is below twice the longest sample.
    """

    def __init__(
        self,
        *,
        token_counts: Array,
        label_counts: dict[str, Array],
        global_tokens: int,
        seed: int = 0,
        shuffle: bool = True,
        budget_name: str = "global_tokens",
    ) -> None:
        longest = int(token_counts.max(initial=0))
        if global_tokens < 2 * max(longest, 1):
            raise ValueError(
                f"{budget_name}={global_tokens}: the longest sample has {longest} tokens, and a batch must have room "
                f"for two of it; raise the budget to at least {2 * max(longest, 1)}, or lower max_length"
            )
        self.token_counts, self.label_counts = token_counts, label_counts
        self.global_tokens, self.seed, self.shuffle = global_tokens, seed, shuffle

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, a pure function of (seed, epoch)."""
        order = np.arange(len(self.token_counts))
        if self.shuffle:
            order = np.random.Generator(np.random.Philox(key=[self.seed % (1 << 64), epoch])).permutation(order)
        return EpochPlan(order, self._cuts(self.token_counts[order]), self.token_counts, self.label_counts)

    def _cuts(self, token_counts: Array) -> Array:
        """Begin of each batch and the end, for samples in the order of an epoch.

        A batch of an equal share, cut at whole samples, has fewer than ``share + longest`` tokens.
        """
        num_samples, total = len(token_counts), int(token_counts.sum())
        share = self.global_tokens - int(token_counts.max(initial=0)) + 1
        num_batches = min(-(-total // share), num_samples)
        batch = np.arange(num_batches + 1)
        cuts = np.searchsorted(np.cumsum(token_counts), batch * total // max(num_batches, 1), side="right")
        cuts[-1] = num_samples
        cuts[0] = 0
        # No batch is empty: each cut at least one sample after the one before, and leaving one for each that follows.
        cuts = np.maximum.accumulate(cuts - batch) + batch
        return np.minimum(cuts, num_samples - (num_batches - batch))
