"""The partitioners in plain Python: the specification of partition.cpp, and what runs where there is no compiler.

Shape suffixes: N samples, P parts.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_COST_BITS = 40
# Parts with which the costliest may swap, and the fraction of the mean within which it is left alone.
_CHEAPEST, _ENOUGH = 8, 1024


def check_costs(costs_N: Array) -> None:
    """Refuses costs that cannot be summed.

    Raises:
        ValueError: a cost is negative or not finite.
    """
    if len(costs_N) and not (costs_N.min() >= 0 and costs_N.max() < np.inf):
        raise ValueError(f"costs: expected finite numbers >= 0, got {costs_N.min()} ... {costs_N.max()}")


def _whole(costs_N: Array) -> list[int]:
    """Costs as integers up to 2**40, by a power of two, so that whole costs keep their ties.

    One more for each, so that among parts of equal cost the one with fewer samples is the cheaper.
    """
    shift = _COST_BITS - int(np.frexp(costs_N.max(initial=0))[1])
    whole: list[int] = (np.rint(np.ldexp(costs_N, shift)).astype(np.int64) + 1).tolist()
    return whole


class _Parts:
    """Parts as they grow: their samples, cost and size."""

    def __init__(self, costs: list[int], sizes: list[int] | None, num_parts: int, capacity: int) -> None:
        self.costs, self.sizes, self.capacity = costs, sizes or [0] * len(costs), capacity
        self.samples: list[list[int]] = [[] for _ in range(num_parts)]
        self.loads, self.filled = [0] * num_parts, [0] * num_parts

    def add(self, part: int, sample: int) -> None:
        self.samples[part].append(sample)
        self.loads[part] += self.costs[sample]
        self.filled[part] += self.sizes[sample]

    def swap(self, giver: int, given: int, taker: int, returned: int | None) -> None:
        """Moves the sample at place `given` of a part to another, in exchange for the one at `returned`, if any."""
        sample = self.samples[giver].pop(given)
        back = None if returned is None else self.samples[taker].pop(returned)
        for part, sign in ((giver, -1), (taker, 1)):
            self.loads[part] += sign * (self.costs[sample] - (0 if back is None else self.costs[back]))
            self.filled[part] += sign * (self.sizes[sample] - (0 if back is None else self.sizes[back]))
        self.samples[taker].append(sample)
        if back is not None:
            self.samples[giver].append(back)


def deal(costs_N: Array, num_parts: int, *, method: str, sizes_N: Array | None, capacity: int) -> list[Array]:
    """Parts by one of the rules, as `partition` explains them.

    Args:
        costs_N: cost of each sample, finite and >= 0.
        num_parts: parts to make.
        method: lpt, karmarkar_karp or zigzag.
        sizes_N: int64 size of each sample; with `lpt` only.
        capacity: most summed sizes of a part that has room.

    Returns:
        For each part the int64 positions of its samples, ascending.

    Raises:
        ValueError: see `check_costs`.
    """
    costs_N = np.asarray(costs_N, dtype=np.float64)
    check_costs(costs_N)
    costs = _whole(costs_N)
    parts = _Parts(costs, None if sizes_N is None else sizes_N.tolist(), num_parts, capacity)
    order = sorted(range(len(costs)), key=lambda x: (-costs[x], x))
    {"lpt": _lpt, "karmarkar_karp": _karmarkar_karp, "zigzag": _zigzag}[method](parts, order)
    _swap(parts, moves=method != "zigzag")
    return [np.array(sorted(samples), dtype=np.int64) for samples in parts.samples]


def _lpt(parts: _Parts, order: list[int]) -> None:
    loads = [(0, part) for part in range(len(parts.loads))]
    for sample in order:
        full = []
        while loads and parts.filled[loads[0][1]] + parts.sizes[sample] > parts.capacity:
            full.append(heapq.heappop(loads))
        if loads:
            part = heapq.heappop(loads)[1]
        else:
            part = min(range(len(parts.filled)), key=lambda x: (parts.filled[x], x))
            full = [x for x in full if x[1] != part]
        parts.add(part, sample)
        for entry in (*full, (parts.loads[part], part)):
            heapq.heappush(loads, entry)


def _zigzag(parts: _Parts, order: list[int]) -> None:
    num_parts = len(parts.loads)
    for first in range(0, len(order), num_parts):
        cheapest = sorted(range(num_parts), key=lambda x: (parts.loads[x], x))
        for sample, part in zip(order[first : first + num_parts], cheapest, strict=False):
            parts.add(part, sample)


@dataclass
class _Bundle:
    """Samples that will share a part, and their cost above the cheapest bundle beside them."""

    cost: int
    samples: list[int]

    @property
    def place(self) -> tuple[int, int]:
        return -self.cost, min(self.samples)


def _karmarkar_karp(parts: _Parts, order: list[int]) -> None:
    """Largest differencing: joins partial partitions, bundles in descending order of cost, empty ones left out."""
    num_parts = len(parts.loads)
    partials = {i: [_Bundle(parts.costs[sample], [sample])] for i, sample in enumerate(order)}
    heap = [(-bundles[0].cost, i) for i, bundles in partials.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, one), (_, other) = heapq.heappop(heap), heapq.heappop(heap)
        bundles, cheap = partials[one], partials.pop(other)[::-1]
        # The last bundle of the other's meets the first of this one, where there are as many as parts.
        for i, bundle in enumerate(cheap, start=num_parts - len(cheap)):
            if i < len(bundles):
                bundles[i] = _Bundle(bundles[i].cost + bundle.cost, bundles[i].samples + bundle.samples)
            else:
                bundles.append(bundle)
        bundles.sort(key=lambda x: x.place)
        lowest = bundles[-1].cost if len(bundles) == num_parts else 0
        for bundle in bundles:
            bundle.cost -= lowest
        heapq.heappush(heap, (-bundles[0].cost, one))
    for _, i in heap:
        for part, bundle in enumerate(partials[i]):
            for sample in sorted(bundle.samples):
                parts.add(part, sample)


def _swap(parts: _Parts, *, moves: bool) -> None:
    """Swaps samples of the costliest part with those of the cheapest, as long as that lowers the costliest."""
    num_parts = len(parts.loads)
    mean = sum(parts.loads) // num_parts
    for _ in range(2 * num_parts):
        ranked = sorted(range(num_parts), key=lambda x: (parts.loads[x], x))
        costliest = ranked[-1]
        enough = mean + mean // _ENOUGH
        if parts.loads[costliest] <= enough:
            return
        found = _best_swap(parts, costliest, ranked[: min(_CHEAPEST, num_parts - 1)], moves=moves, enough=enough)
        if found is None:
            return
        given, taker, returned = found
        parts.swap(costliest, given, taker, returned)


def _best_swap(
    parts: _Parts, costliest: int, takers: list[int], *, moves: bool, enough: int
) -> tuple[int, int, int | None] | None:
    """The first swap after which both parts cost little enough, else the first of those that come closest to it."""
    best, lowest = None, parts.loads[costliest]
    for taker in takers:
        offers: list[int | None] = [None] if moves else []
        for given, sample in enumerate(parts.samples[costliest]):
            for returned in [*offers, *range(len(parts.samples[taker]))]:
                back = None if returned is None else parts.samples[taker][returned]
                cost = parts.costs[sample] - (0 if back is None else parts.costs[back])
                size = parts.sizes[sample] - (0 if back is None else parts.sizes[back])
                peak = max(parts.loads[costliest] - cost, parts.loads[taker] + cost)
                room = parts.capacity - max(parts.filled[costliest] - size, parts.filled[taker] + size)
                if peak < lowest and room >= 0:
                    best, lowest = (given, taker, returned), peak
                if lowest <= enough:
                    return best
    return best
