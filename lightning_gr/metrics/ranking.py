"""Ranks of target items, and metrics over ranks as sums that add up over uneven batches and processes.

Shape suffixes: N ranked targets, I items of the corpus.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

_CHUNK_ELEMENTS = 1 << 26  # comparisons held at a time


def ranks_of_targets(scores_NI: Tensor, targets_N: Tensor) -> Tensor:
    """The rank of each row's target among all items, 1 being the best.

    Ties count against the model: an item with the target's score ranks before it, so a model that gives every item
    the same score gains nothing. NaN scores rank last, and a target whose own score is NaN has the last rank.

    Args:
        scores_NI: score of every item.
        targets_N: int64 row of the target item, in 0 ... I - 1.

    Returns:
        int64 ranks of shape (N,).

    Raises:
        ValueError: the shapes do not fit together.
    """
    if scores_NI.dim() != 2 or targets_N.shape != scores_NI.shape[:1]:
        raise ValueError(
            f"ranks_of_targets: expected scores (N, I) and targets (N,), got {tuple(scores_NI.shape)} and "
            f"{tuple(targets_N.shape)}"
        )
    num_rows, num_items = scores_NI.shape
    of_target_N1 = scores_NI.gather(1, targets_N[:, None])
    ranks_N = torch.empty(num_rows, dtype=torch.int64, device=scores_NI.device)
    rows = max(_CHUNK_ELEMENTS // max(num_items, 1), 1)
    for start in range(0, num_rows, rows):
        chunk = slice(start, start + rows)
        ranks_N[chunk] = (scores_NI[chunk] >= of_target_N1[chunk]).sum(1)
    return ranks_N.masked_fill_(of_target_N1[:, 0].isnan(), num_items)


class _WeightedSums(Metric):
    """A quotient of two float64 sums; float32 would stop counting at 2**24."""

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, weights: Tensor | None) -> None:
        # Out of place: states made under inference mode cannot be changed in place outside it.
        values = values.detach().double()
        if weights is None:
            self.total = self.total + values.sum()
            self.count = self.count + values.numel()
        else:
            weights = weights.detach().double().expand_as(values)
            # The mean over nothing is NaN, and NaN * 0 is NaN: what has no weight must not count.
            self.total = self.total + torch.where(weights == 0, 0.0, values * weights).sum()
            self.count = self.count + weights.sum()

    @override
    def compute(self) -> Tensor:
        """The weighted mean, a 0-D float64 tensor; 0 where nothing was seen."""
        return torch.where(self.count == 0, 0.0, self.total / self.count)


class _MeanOverRanks(_WeightedSums):
    higher_is_better = True

    @override
    def update(self, ranks_N: Tensor, weights_N: Tensor | None = None) -> None:
        """Adds ranked targets; without a host synchronisation.

        Args:
            ranks_N: ranks as `ranks_of_targets` gives them, 1 being the best.
            weights_N: weight of each; None means 1.
        """
        self._add(self._gains(ranks_N), weights_N)

    @abstractmethod
    def _gains(self, ranks_N: Tensor) -> Tensor:
        """What each target counts, float (N,)."""


class _MeanOverTopK(_MeanOverRanks):
    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"{type(self).__name__}: k={k}: expected at least 1")
        self.k = k


class HitRate(_MeanOverTopK):
    """HR@k, with one target a row also Recall@k: the share of targets among the first `k`.

    Args:
        k: cut-off, at least 1.
    """

    @override
    def _gains(self, ranks_N: Tensor) -> Tensor:
        return ranks_N <= self.k


class NDCG(_MeanOverTopK):
    """NDCG@k with one target a row: ``1 / log2(1 + rank)`` for ranks up to `k`, else 0.

    Args:
        k: cut-off, at least 1.
    """

    @override
    def _gains(self, ranks_N: Tensor) -> Tensor:
        return torch.where(ranks_N <= self.k, 1 / torch.log2(ranks_N.double() + 1), 0.0)


class MeanReciprocalRank(_MeanOverRanks):
    """MRR: the mean of ``1 / rank``, without a cut-off."""

    @override
    def _gains(self, ranks_N: Tensor) -> Tensor:
        return 1 / ranks_N.double()


class WeightedMean(_WeightedSums):
    """A mean, such as a loss per label, whose batches and processes weigh as much as they counted.

    Lightning's own ``sync_dist`` means are wrong for uneven batch sizes (Lightning issue 21859).
    """

    @override
    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Adds means; without a host synchronisation where tensors are on the metric's device.

        Args:
            value: a mean over `weight` things, or a tensor of values.
            weight: how much of it there is; broadcast to `value`. What has weight 0 does not count, NaN included.
        """
        self._add(self._tensor(value), self._tensor(weight))

    def _tensor(self, number: Any) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(self.total.device)
        # A fill does not wait for the device; a copy from the host would.
        return torch.full((), float(number), dtype=torch.float64, device=self.total.device)
