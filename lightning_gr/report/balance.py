"""What each rank has to do in the steps of a plan, however a global batch is dealt out over them.

Shape suffixes: S steps, R ranks.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.partition import Method
from lightning_gr.data.plan import Deal, GlobalBatchPlan

AS_THEY_COME: Method = "contiguous"
"""Equal counts of samples in their order: not balanced."""


def work(
    plan: GlobalBatchPlan,
    *,
    steps: int,
    ranks: int,
    cost: SequenceCost,
    method: Method,
    most_seconds: float = math.inf,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens, int64, and cost, float64, of each rank in each of the first steps, both of shape (S, R).

    Args:
        plan: of the global batches, one a step.
        steps: how many; fewer are returned, at least one, where the time is up.
        ranks: over which a batch is dealt out.
        cost: what is balanced.
        method: the partitioner.
        most_seconds: time after which no further step is begun.
    """
    until = time.monotonic() + most_seconds
    tokens_SR, costs_SR = np.zeros((steps, ranks), dtype=np.int64), np.zeros((steps, ranks))
    deal = Deal(cost=cost, method=method)
    for step in range(steps):
        if step and time.monotonic() > until:
            return tokens_SR[:step], costs_SR[:step]
        batch = step % plan.num_batches
        if batch == 0:
            epoch = plan.epoch(step // plan.num_batches)
        for rank in range(ranks):
            own = plan.index.token_counts(epoch.rank_samples(batch, rank=rank, world_size=ranks, deal=deal))
            tokens_SR[step, rank], costs_SR[step, rank] = own.sum(), cost(own).sum()
    return tokens_SR, costs_SR


def by_rank(tokens_SR: np.ndarray[Any, Any], costs_SR: np.ndarray[Any, Any]) -> list[dict[str, float]]:
    """Means and maxima over the steps, for each rank; it waits for what it has less than the rank with most."""
    most_S1 = costs_SR.max(1, keepdims=True)
    waits_SR = 1 - np.divide(costs_SR, most_S1, out=np.ones_like(costs_SR), where=most_S1 > 0)
    columns = {"tokens": tokens_SR, "flops": costs_SR, "waits": waits_SR}
    return [
        {f"{name}_{kind}": float(found) for name, x_SR in columns.items() for kind, found in _of(x_SR[:, rank])}
        for rank in range(tokens_SR.shape[1])
    ]


def _of(x_S: np.ndarray[Any, Any]) -> list[tuple[str, float]]:
    return [("mean", x_S.mean()), ("most", x_S.max())]
