"""Full-corpus ranking metrics as sums over counts, so that uneven ranks and batches give the exact mean.

Shape suffixes: N targets, I items of the corpus.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


def ranks_of_targets(scores_NI: Tensor, targets_N: Tensor) -> Tensor:
    """Rank of each target among all items, 1 the best; ties count against the model.

    A target whose score is not a number ranks last, and another item's NaN counts as above the target.

    Args:
        scores_NI: score of every item of the corpus.
        targets_N: int64 column of each row's target.

    Returns:
        int64 ranks (N,).
    """
    target_N1 = scores_NI.gather(1, targets_N[:, None])
    # `not below` rather than `at least`: a comparison with NaN is False, and NaN must not help the model.
    return (~(scores_NI < target_N1)).sum(1)


class WeightedMean(Metric):
    """``sum(value * weight) / sum(weight)`` over batches and ranks; 0 before anything was seen."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Adds values (any shape) with weights that broadcast to them."""
        value = torch.as_tensor(value, device=self.total.device).detach().double()
        weight = torch.as_tensor(weight, device=self.total.device).detach().double().expand_as(value)
        self.total += (value * weight).sum()
        self.weight += weight.sum()

    @override
    def compute(self) -> Tensor:
        """The mean, a float32 scalar."""
        return (self.total / self.weight.clamp(min=1e-300)).float()


class HitRate(WeightedMean):
    """HR@K: the share of targets ranked among the first `k`; with one target a user it equals Recall@K.

    Args:
        k: the cut-off.

    Raises:
        ValueError: `k` is below 1.
    """

    def __init__(self, *, k: int) -> None:
        super().__init__()
        self.k = _checked(k)

    @override
    def update(self, ranks_N: Tensor, weights_N: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """Adds targets by their ranks, 1 the best."""
        super().update(ranks_N <= self.k, weights_N)


class NDCG(WeightedMean):
    """NDCG@K with one relevant item: ``1 / log2(1 + rank)`` within the first `k`, else 0.

    Args:
        k: the cut-off.

    Raises:
        ValueError: `k` is below 1.
    """

    def __init__(self, *, k: int) -> None:
        super().__init__()
        self.k = _checked(k)

    @override
    def update(self, ranks_N: Tensor, weights_N: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """Adds targets by their ranks, 1 the best."""
        super().update((ranks_N <= self.k) / torch.log2(1.0 + ranks_N.double()), weights_N)


class MeanReciprocalRank(WeightedMean):
    """MRR: the mean of ``1 / rank`` over all targets."""

    @override
    def update(self, ranks_N: Tensor, weights_N: Tensor | float = 1.0) -> None:  # type: ignore[override]
        """Adds targets by their ranks, 1 the best."""
        super().update(1.0 / ranks_N.double(), weights_N)


def _checked(k: int) -> int:
    if k < 1:
        raise ValueError(f"k={k}: expected a cut-off of at least 1")
    return k
