"""Dealing samples out over ranks by cost."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np


def longest_processing_time(costs: np.ndarray[Any, Any], num_parts: int) -> list[np.ndarray[Any, Any]]:
    """Gives each sample, costliest first, to the part with the least so far (Graham's LPT rule).

    Ties go to the earlier sample and the lower part, so every rank computes the same. The largest and the smallest
    part differ by at most the costliest sample.

    Args:
        costs: cost of each sample, >= 0.
        num_parts: parts to make.

    Returns:
        For each part the positions of its samples, ascending.
    """
    if num_parts == 1:
        return [np.arange(len(costs), dtype=np.int64)]
    order = np.argsort(-costs, kind="stable")
    loads: list[tuple[float, int]] = [(0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for position, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        load, part = loads[0]
        parts[part].append(position)
        heapq.heapreplace(loads, (load + cost, part))
    return [np.array(sorted(part), dtype=np.int64) for part in parts]
