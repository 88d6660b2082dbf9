"""The best candidates of each sample, out of jagged scores.

Shape suffixes: B samples, N candidates of all samples together, K best ones of a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_candidates(scores_N: Tensor, items_N: Tensor, counts_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Items and scores, (B, K), of the K candidates of each sample that score highest, best first.

    Equal scores are in the order of item rows. Where a sample has fewer candidates, items are -1 and scores -inf.

    Args:
        scores_N: score of each candidate, sample by sample.
        items_N: item row of each candidate.
        counts_B: candidates of each sample, int64.
        k: how many are taken.
    """
    sample_N = torch.repeat_interleave(counts_B)
    order_N = items_N.argsort(stable=True)
    order_N = order_N[scores_N[order_N].argsort(stable=True, descending=True)]
    order_N = order_N[sample_N[order_N].argsort(stable=True)]
    place_N = torch.arange(len(sample_N)) - (counts_B.cumsum(0) - counts_B)[sample_N]
    best_N = place_N < k
    items_BK = items_N.new_full((len(counts_B), k), -1)
    scores_BK = scores_N.new_full((len(counts_B), k), -torch.inf)
    items_BK[sample_N[best_N], place_N[best_N]] = items_N[order_N[best_N]]
    scores_BK[sample_N[best_N], place_N[best_N]] = scores_N[order_N[best_N]]
    return items_BK, scores_BK
