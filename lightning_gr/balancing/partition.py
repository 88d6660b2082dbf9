"""Dealing samples out over parts of equal cost: the same parts on every rank, machine and version.

Shape suffixes: N samples, P parts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lightning_gr.balancing import partition_reference

Array = np.ndarray[Any, Any]
Method = Literal["lpt", "karmarkar_karp", "zigzag", "contiguous"]

_CODES = {"lpt": 0, "karmarkar_karp": 1, "zigzag": 2}
_NO_LIMIT = (1 << 63) - 1


def check_method(method: str, *, name: str = "method") -> None:
    """Refuses a partitioner that does not exist.

    Raises:
        ValueError: the value, and those there are.
    """
    if method not in get_args(Method):
        raise ValueError(f"{name}={method!r}: expected one of {', '.join(get_args(Method))}")


def partition(
    costs: Array,
    num_parts: int,
    *,
    method: Method = "lpt",
    sizes: Array | None = None,
    capacity: int | None = None,
) -> list[Array]:
    """Deals samples out so that the costliest part costs as little as can be.

    - `lpt`, longest processing time (Graham): each sample, costliest first, to the part with the least so far.
    - `karmarkar_karp`: the two partial partitions that differ most within are joined, costly parts to cheap ones.
    - `zigzag`: counts differ by 1 at most; rounds of one sample a part, costliest to the part with the least so far.
    - `contiguous`: consecutive samples, counts differ by 1 at most, costs ignored; the control.

    All but the last then swap samples between the costliest part and the cheapest, until the costliest is within a
    thousandth of the mean or no swap of two samples (or, without equal counts, move of one) lowers it. Costs are
    rounded to integers (2**-40 of the largest), so that sums are exact and the parts the same on every machine.

    Args:
        costs: cost of each sample, >= 0.
        num_parts: parts to make.
        method: the rule.
        sizes: int64 size of each sample, for `capacity`.
        capacity: most summed sizes of a part. Where the rule's parts exceed it, they are made by `lpt` among parts that
            have room, and if that fails too, by size, largest first, to the emptiest part; so a part exceeds it only
            when no part had room.

    Returns:
        For each part the int64 positions of its samples, ascending. Ties go to the earlier sample and the lower part.

    Raises:
        ValueError: a value is not allowed, by name.
    """
    check_method(method)
    if num_parts < 1:
        raise ValueError(f"num_parts={num_parts}: expected at least 1")
    if (sizes is None) is not (capacity is None):
        raise ValueError("sizes and capacity: expected both or neither")
    if method == "contiguous":
        bounds = np.arange(num_parts + 1) * len(costs) // num_parts
        parts = _cut(np.arange(len(costs)), bounds)
    else:
        parts = _deal(costs, num_parts, method, None, _NO_LIMIT)
    if sizes is None or capacity is None or _fits(parts, sizes, capacity):
        return parts
    sizes = np.ascontiguousarray(sizes, dtype=np.int64)
    parts = _deal(costs, num_parts, "lpt", sizes, capacity)
    if _fits(parts, sizes, capacity):
        return parts
    return _deal(sizes, num_parts, "lpt", sizes, capacity)


def micro_batches(
    costs: Array,
    *,
    world_size: int,
    steps: int,
    method: Method = "lpt",
    sizes: Array | None = None,
    capacity: int | None = None,
) -> list[list[Array]]:
    """Deals a global batch out over ranks and micro-steps; ranks wait for each other in every micro-step.

    Args:
        costs: cost of each sample, >= 0.
        world_size: ranks.
        steps: micro-steps.
        method: see `partition`.
        sizes: see `partition`.
        capacity: see `partition`.

    Returns:
        ``[micro step][rank]``: int64 positions, ascending. Parts of like cost share a micro-step, and the order of the
        ranks turns round in every other one.

    Raises:
        ValueError: see `partition`.
    """
    if world_size < 1 or steps < 1:
        raise ValueError(f"world_size={world_size} and steps={steps}: expected at least 1")
    parts = partition(costs, world_size * steps, method=method, sizes=sizes, capacity=capacity)
    if steps == 1:
        return [parts]
    order = np.argsort(-_sums(np.asarray(costs), parts), kind="stable").reshape(steps, world_size)
    order[1::2] = order[1::2, ::-1]
    return [[parts[part] for part in row] for row in order.tolist()]


def micro_step_count(tokens: int, longest: int, *, world_size: int, tokens_per_rank: int) -> int:
    """Micro-steps with which `micro_batches` can keep every part within a capacity, whatever lengths samples have.

    A batch of ``world_size * tokens_per_rank`` tokens takes 2: its samples seldom fill every rank to the last token.
    One step is enough where a rank may take a longest sample more than its share, or twice its share.

    Args:
        tokens: tokens of the largest global batch.
        longest: tokens of the longest sample.
        world_size: ranks.
        tokens_per_rank: most tokens of a rank in a micro-step; the `capacity`.

    Raises:
        ValueError: `tokens_per_rank` is below the longest sample.
    """
    if tokens_per_rank < longest:
        raise ValueError(
            f"tokens_per_rank={tokens_per_rank}: the longest sample has {longest} tokens; raise it to at least "
            f"{longest}, or lower max_length"
        )
    if tokens <= tokens_per_rank:
        return 1
    # Largest first, a sample finds no room only where every part has more than ``tokens_per_rank - sample`` tokens;
    # and a sample of more than half the room, only where every part holds one as large.
    full = max(tokens_per_rank - longest, tokens_per_rank // 2) + 1
    return -(-tokens // (full * world_size))


def imbalance(costs: Array, parts: Sequence[Array]) -> float:
    """``(max - mean) / max`` of the parts' costs: the share of a step for which the mean rank waits.

    Args:
        costs: of each sequence, at least 0, in any unit.
        parts: for each rank, the places of its sequences in `costs`.
    """
    sums_P = _sums(np.asarray(costs, dtype=np.float64), parts)
    largest = float(sums_P.max())
    return 0.0 if largest == 0 else (largest - float(sums_P.mean())) / largest


def _deal(costs_N: Array, num_parts: int, method: str, sizes_N: Array | None, capacity: int) -> list[Array]:
    """Parts by one of the rules, compiled or not; both give the same."""
    library = _library()
    if library is None:
        return partition_reference.deal(costs_N, num_parts, method=method, sizes_N=sizes_N, capacity=capacity)
    costs_N = np.ascontiguousarray(costs_N, dtype=np.float64)
    places = np.empty(len(costs_N) + num_parts + 1, dtype=np.int64)
    sound = library.lightning_gr_deal(
        _CODES[method],
        len(costs_N),
        num_parts,
        costs_N.ctypes.data,
        None if sizes_N is None else sizes_N.ctypes.data,
        capacity,
        places.ctypes.data,
    )
    if not sound:
        partition_reference.check_costs(costs_N)
    return _cut(places, places[len(costs_N) :])


def _cut(order_N: Array, bounds_P1: Array) -> list[Array]:
    bounds = bounds_P1.tolist()
    return [order_N[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


def _sums(values_N: Array, parts: Sequence[Array]) -> Array:
    """Sum of each part's values; one after the other, so that rounding is the same everywhere."""
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    sums_P: Array = np.bincount(part_of, weights=values_N[np.concatenate(parts)], minlength=len(parts))
    return sums_P


def _fits(parts: Sequence[Array], sizes_N: Array, capacity: int) -> bool:
    return float(_sums(np.asarray(sizes_N), parts).max()) <= capacity


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions, or None; imports torch, which the rest of this file does not need."""
    from lightning_gr.ops.native import load_native

    library = load_native(Path(__file__).with_suffix(".cpp"))
    if library is not None:
        int64, pointer = ctypes.c_int64, ctypes.c_void_p
        library.lightning_gr_deal.argtypes = [int64, int64, int64, pointer, pointer, int64, pointer]
        library.lightning_gr_deal.restype = ctypes.c_bool
    return library
