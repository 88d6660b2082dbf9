"""Metrics of a yes-or-no prediction, such as of a click: AUC, AUC by group, normalized entropy and calibration.

Shape suffixes: N predictions, B bins of scores in rising order, G groups, U pairs of a group and a score.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from typing_extensions import override

_KEYS = 1 << 32


class _BinaryMetric(Metric):
    is_differentiable = False
    full_state_update = False

    def _rows(self, scores_N: Tensor, labels_N: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores as given, and float64 weights of each row as a positive and as a negative."""
        self._check("scores_N", scores_N, (scores_N.numel(),))
        self._check("labels_N", labels_N, scores_N.shape)
        scores_N, labels_N = scores_N.detach(), labels_N.detach().double()
        if weights_N is None:
            return scores_N, labels_N, 1 - labels_N
        self._check("weights_N", weights_N, scores_N.shape)
        weights_N = weights_N.detach().double()
        # NaN * 0 is NaN: what has no weight must not count.
        counts_N = weights_N != 0
        scores_N = torch.where(counts_N, scores_N, 0)
        labels_N = torch.where(counts_N, labels_N, 0.0)
        return scores_N, weights_N * labels_N, weights_N * (1 - labels_N)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise ValueError(f"{type(self).__name__}: {name} has shape {tuple(tensor.shape)}: expected {tuple(shape)}")


class _KeepsRows(_BinaryMetric):
    """Keeps all rows, in lists of tensors that a sync over processes concatenates."""

    _KEPT: ClassVar[dict[str, torch.dtype]] = {
        "scores": torch.float32,
        "positives": torch.float32,
        "negatives": torch.float32,
    }

    def _add_lists(self) -> None:
        for name in self._KEPT:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _keep(self, **rows: Tensor) -> None:
        for name, rows_N in rows.items():
            getattr(self, name).append(rows_N.to(self._KEPT[name]))

    def _kept(self, name: str) -> Tensor:
        state = getattr(self, name)
        if isinstance(state, Tensor):  # after a sync
            return state
        return torch.cat([torch.zeros(0, dtype=self._KEPT[name], device=self.device), *state])

    @override
    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Makes every state whole over all processes; torchmetrics calls it before `compute`.

        Args:
            args: as in `torchmetrics.Metric.sync`.
            kwargs: as in `torchmetrics.Metric.sync`.
        """
        # All processes must gather tensors of one type. Of an empty list, torchmetrics 1.0 gathers nothing and waits
        # forever; newer ones gather float32, whatever the others have.
        for name, dtype in self._KEPT.items():
            state = getattr(self, name, None)
            if isinstance(state, list) and not state:
                state.append(torch.zeros(0, dtype=dtype, device=self.device))
        super().sync(*args, **kwargs)


class AUC(_KeepsRows):
    """Area under the ROC curve: the share of pairs of a positive and a negative where the positive scores higher.

    A pair weighs the product of its two weights, and ties count one half. Scores are compared in float32; a float64
    score is rounded to it. A NaN score counts against the model: that of a positive ranks below all others, that of a
    negative above all others. 0.5 if only one class was seen.

    By default it is exact and keeps all rows, scores and weights in float32, 12 bytes each; a sync gathers them all on
    every process. With `bins` its
    memory is bounded: two float64 histograms, 16 bytes a bin, of which a sync gathers those of all processes. The bins
    are equal parts of the float32 bit patterns in the order of their numbers, so they are as fine, relative to the
    score, near 0 as elsewhere: ``2**20`` bins have a relative width of ``2**-11`` at most, ``2**19`` are exact for
    float16 scores and ``2**16`` for bfloat16. Pairs within a bin count one half, so the result is off by at most half
    of the (weighted) share of pairs that share a bin.

    Args:
        bins: number of bins, 1 to ``2**31``, best a power of two; None means exact.

    Raises:
        ValueError: `bins` is out of range.
    """

    higher_is_better = True

    positives: Tensor  # histograms if there are bins, else lists
    negatives: Tensor

    def __init__(self, bins: int | None = None) -> None:
        super().__init__()
        if bins is not None and not 1 <= bins <= 1 << 31:
            raise ValueError(f"AUC: bins={bins}: expected 1 to 2**31, or None for the exact area")
        self.bins = bins
        if bins is None:
            self._add_lists()
        else:
            for name in ("positives", "negatives"):
                self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, scores_N: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> None:
        """Adds predictions; without a host synchronisation.

        Args:
            scores_N: logits or any other scores that rise with the chance of a positive, of any dtype.
            labels_N: 1 for a positive, 0 for a negative, of any dtype.
            weights_N: weight of each; None means 1. What has weight 0 does not count, NaN included.

        Raises:
            ValueError: a shape is not (N,).
        """
        scores_N, positives_N, negatives_N = self._rows(scores_N, labels_N, weights_N)
        if self.bins is None:
            self._keep(scores=scores_N, positives=positives_N, negatives=negatives_N)
            return
        bins_N = _sort_keys(scores_N, positives_N) * self.bins // _KEYS
        # Out of place: states made under inference mode cannot be changed in place outside it.
        self.positives = self.positives.index_add(0, bins_N, positives_N)
        self.negatives = self.negatives.index_add(0, bins_N, negatives_N)

    @override
    def compute(self) -> Tensor:
        """The area, a 0-D float64 tensor; 0.5 if only one class was seen, or nothing."""
        if self.bins is None:
            positives_N, negatives_N = self._kept("positives"), self._kept("negatives")
            keys_B, bins_N = torch.unique(_sort_keys(self._kept("scores"), positives_N), return_inverse=True)
            positives_B = _sums(positives_N, bins_N, len(keys_B))
            negatives_B = _sums(negatives_N, bins_N, len(keys_B))
        else:
            positives_B, negatives_B = self.positives, self.negatives
        won = (positives_B * (_sums_before(negatives_B) + negatives_B / 2)).sum()
        pairs = positives_B.sum() * negatives_B.sum()
        return torch.where(pairs == 0, 0.5, won / pairs)


class GroupedAUC(_KeepsRows):
    """GAUC: the mean of every group's own `AUC`, a group weighing the sum of its weights (its impressions).

    Groups, most often users, may be spread over batches and processes. Those where only one class was seen are
    skipped; 0.5 if that is all of them. Ties, NaN and float64 scores are as in the exact `AUC`. All rows are kept, 20
    bytes each, and a sync gathers them all on every process.

    Papers: MTGR (arXiv 2505.18654) reports GAUC; weighing by impressions is our reading, as in DIN (arXiv 1706.06978).
    """

    higher_is_better = True

    _KEPT = {**_KeepsRows._KEPT, "groups": torch.int64}

    def __init__(self) -> None:
        super().__init__()
        self._add_lists()

    @override
    def update(self, scores_N: Tensor, labels_N: Tensor, groups_N: Tensor, weights_N: Tensor | None = None) -> None:
        """Adds predictions; without a host synchronisation.

        Args:
            scores_N: logits or any other scores that rise, within a group, with the chance of a positive, of any dtype.
            labels_N: 1 for a positive, 0 for a negative, of any dtype.
            groups_N: int64 id of each one's group.
            weights_N: weight of each; None means 1. What has weight 0 does not count, NaN included.

        Raises:
            ValueError: a shape is not (N,), or the group ids are not integers.
        """
        scores_N, positives_N, negatives_N = self._rows(scores_N, labels_N, weights_N)
        self._check("groups_N", groups_N, scores_N.shape)
        if groups_N.is_floating_point():
            raise ValueError(f"GroupedAUC: groups_N is {groups_N.dtype}: expected int64")
        self._keep(scores=scores_N, positives=positives_N, negatives=negatives_N, groups=groups_N.detach())

    @override
    def compute(self) -> Tensor:
        """The mean area, a 0-D float64 tensor; 0.5 if no group has both classes."""
        positives_N, negatives_N = self._kept("positives"), self._kept("negatives")
        ids_G, group_of_N = torch.unique(self._kept("groups"), return_inverse=True)
        pairs_N = group_of_N * _KEYS + _sort_keys(self._kept("scores"), positives_N)
        pairs_U, pair_of_N = torch.unique(pairs_N, return_inverse=True)
        positives_U = _sums(positives_N, pair_of_N, len(pairs_U))
        negatives_U = _sums(negatives_N, pair_of_N, len(pairs_U))
        group_of_U = pairs_U // _KEYS
        first_G = torch.searchsorted(group_of_U, torch.arange(len(ids_G), device=group_of_U.device))
        before_U = _sums_before(negatives_U)
        before_U = before_U - before_U[first_G][group_of_U]
        won_G = _sums(positives_U * (before_U + negatives_U / 2), group_of_U, len(ids_G))
        positives_G = _sums(positives_U, group_of_U, len(ids_G))
        negatives_G = _sums(negatives_U, group_of_U, len(ids_G))
        both_G = positives_G * negatives_G != 0
        weight_G = torch.where(both_G, positives_G + negatives_G, 0.0)
        area_G = torch.where(both_G, won_G / (positives_G * negatives_G), 0.0)
        weight = weight_G.sum()
        return torch.where(weight == 0, 0.5, (area_G * weight_G).sum() / weight)


class NormalizedEntropy(_BinaryMetric):
    """NE: the mean cross entropy of the predictions over that of always predicting the mean label; lower is better.

    1 is what the mean label gains by itself. 0 where nothing was seen; infinite where only one class was, since
    predicting the mean label is then without error. A NaN logit that counts makes it NaN.

    Paper: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014.
    """

    higher_is_better = False

    cross_entropy: Tensor
    positives: Tensor
    negatives: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("cross_entropy", "positives", "negatives"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, scores_N: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> None:
        """Adds predictions; without a host synchronisation.

        Args:
            scores_N: logits, not probabilities, of any dtype.
            labels_N: 1 for a positive, 0 for a negative, of any dtype.
            weights_N: weight of each; None means 1. What has weight 0 does not count, NaN included.

        Raises:
            ValueError: a shape is not (N,).
        """
        scores_N, positives_N, negatives_N = self._rows(scores_N, labels_N, weights_N)
        logits_N = scores_N.double()
        # The logarithm of an infinite logit's probability may be -inf, and inf * 0 is NaN.
        of_positives_N = torch.where(positives_N == 0, 0.0, positives_N * functional.logsigmoid(logits_N))
        of_negatives_N = torch.where(negatives_N == 0, 0.0, negatives_N * functional.logsigmoid(-logits_N))
        self.cross_entropy = self.cross_entropy - (of_positives_N + of_negatives_N).sum()
        self.positives = self.positives + positives_N.sum()
        self.negatives = self.negatives + negatives_N.sum()

    @override
    def compute(self) -> Tensor:
        """The normalized entropy, a 0-D float64 tensor; 0 where nothing was seen, inf where only one class was."""
        seen = self.positives + self.negatives
        entropy = torch.special.entr(self.positives / seen) + torch.special.entr(self.negatives / seen)
        one_class = (self.positives == 0) | (self.negatives == 0)
        normalized = torch.where(one_class, math.inf, self.cross_entropy / (seen * entropy))
        return torch.where(seen == 0, 0.0, normalized)


class Calibration(_BinaryMetric):
    """The sum of the predicted probabilities over the sum of the labels; best at 1.

    More than 1 is predicting too many positives. 0 where there are none.
    """

    predicted: Tensor
    positives: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("predicted", "positives"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, scores_N: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> None:
        """Adds predictions; without a host synchronisation.

        Args:
            scores_N: logits, not probabilities, of any dtype.
            labels_N: 1 for a positive, 0 for a negative, of any dtype.
            weights_N: weight of each; None means 1. What has weight 0 does not count, NaN included.

        Raises:
            ValueError: a shape is not (N,).
        """
        scores_N, positives_N, negatives_N = self._rows(scores_N, labels_N, weights_N)
        self.predicted = self.predicted + (scores_N.double().sigmoid() * (positives_N + negatives_N)).sum()
        self.positives = self.positives + positives_N.sum()

    @override
    def compute(self) -> Tensor:
        """The quotient, a 0-D float64 tensor; 0 where there are no positives."""
        return torch.where(self.positives == 0, 0.0, self.predicted / self.positives)


def _sort_keys(scores_N: Tensor, positives_N: Tensor) -> Tensor:
    """int64 keys in 0 ... 2**32 - 1 in the order of the float32 scores, equal for equal scores; NaN is at the ends."""
    scores_N = scores_N.float()
    # The bits are a sign and a magnitude that rises with the number's: 0 and -0 both become 2**31.
    bits_N = scores_N.view(torch.int32).long()
    keys_N = torch.where(bits_N < 0, -bits_N, bits_N + _KEYS // 2)
    return torch.where(scores_N.isnan(), torch.where(positives_N != 0, 0, _KEYS - 1), keys_N)


def _sums(values_N: Tensor, index_N: Tensor, size: int) -> Tensor:
    """float64 sums of the values that have the same index."""
    return torch.zeros(size, dtype=torch.float64, device=values_N.device).index_add(0, index_N, values_N.double())


def _sums_before(values_B: Tensor) -> Tensor:
    """Sums of all values before each."""
    # On the host: CUDA's cumsum refuses to run where deterministic algorithms are asked for.
    return functional.pad(values_B.cpu().cumsum(0), (1, 0))[:-1].to(values_B.device)
