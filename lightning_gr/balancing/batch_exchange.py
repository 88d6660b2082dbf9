"""Global reallocation: ranks exchange whole sequences until each has as much to compute as the others.

Shape suffixes: S sequences of all ranks, in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.partition import Method, micro_batches
from lightning_gr.batch import SequenceBatch
from lightning_gr.batch_samples import concatenate, from_bytes, take, to_bytes

Array = np.ndarray[Any, Any]
_FAILED = -1


def destinations(
    tokens: Sequence[Array], *, steps: int, cost: SequenceCost, method: Method, capacity: int | None
) -> tuple[Array, Array]:
    """Where each sequence goes (TurboGR, arXiv 2605.13433, 4.1.3); the same on every rank.

    Args:
        tokens: by rank, the int64 tokens of its sequences.
        steps: micro-steps over which they are dealt out.
        cost: what a sequence of so many tokens costs.
        method: the partitioner.
        capacity: most tokens of a rank in a micro-step, as long as any has room; None means any number.

    Returns:
        int64 rank and int64 micro-step of each sequence, ranks' sequences one after the other.
    """
    tokens_S = np.concatenate(tokens)
    parts = micro_batches(
        cost(tokens_S),
        world_size=len(tokens),
        steps=steps,
        method=method,
        sizes=None if capacity is None else tokens_S,
        capacity=capacity,
    )
    rank_S, step_S = np.zeros(len(tokens_S), dtype=np.int64), np.zeros(len(tokens_S), dtype=np.int64)
    for step, ranks in enumerate(parts):
        for rank, places in enumerate(ranks):
            rank_S[places], step_S[places] = rank, step
    return rank_S, step_S


def exchange(
    own: SequenceBatch | None,
    bounds: Sequence[int],
    *,
    rank_S: Array,
    step_S: Array,
    steps: int,
    group: dist.ProcessGroup | None,
) -> list[SequenceBatch | None]:
    """Sends this rank's sequences where they go and receives those that come here; two collectives.

    Args:
        own: this rank's sequences, on the host, without padding; None where it has none.
        bounds: where each rank's sequences begin among all, and the number of all; the same on every rank.
        rank_S: rank that each sequence goes to; the same on every rank.
        step_S: micro-step of each sequence; the same on every rank.
        steps: micro-steps.
        group: process group on the CPU; None means one process.

    Returns:
        This rank's sequences of each micro-step, in the order of the ranks they come from; None where it has none.

    Raises:
        RuntimeError: another rank could not send; the message names it.
    """
    rank = 0 if group is None else dist.get_rank(group)
    goes_to = rank_S[bounds[rank] : bounds[rank + 1]]

    def sequences_for(other: int) -> SequenceBatch | None:
        places = np.flatnonzero(goes_to == other)
        if own is None or not len(places):
            return None
        return own if len(places) == own.num_sequences else take(own, torch.from_numpy(places))

    received = [sequences_for(rank)] if group is None else _all_to_all(sequences_for, rank, group)
    held = [batch for batch in received if batch is not None]
    if not held:
        return [None] * steps
    mine = concatenate(held)
    step_of = step_S[rank_S == rank]
    places = [np.flatnonzero(step_of == step) for step in range(steps)]
    if steps == 1:
        return [mine]
    return [take(mine, torch.from_numpy(x)) if len(x) else None for x in places]


def _all_to_all(
    sequences_for: Callable[[int], SequenceBatch | None], rank: int, group: dist.ProcessGroup
) -> list[SequenceBatch | None]:
    """From each rank what it sends here; what stays here is not written to bytes."""
    world_size = dist.get_world_size(group)
    kept: SequenceBatch | None = None
    parts: list[Tensor] = []
    failure: Exception | None = None
    try:
        kept = sequences_for(rank)
        for other in range(world_size):
            batch = sequences_for(other) if other != rank else None
            parts.append(torch.zeros(0, dtype=torch.uint8) if batch is None else to_bytes(batch))
        sizes = torch.tensor([len(part) for part in parts])
    except Exception as error:  # the others wait: they are told, and it is raised below
        failure = error
        sizes = torch.full((world_size,), _FAILED)
    sizes_in = torch.empty_like(sizes)
    dist.all_to_all_single(sizes_in, sizes, group=group)
    if failure is not None:
        raise failure
    incoming = sizes_in.tolist()
    if _FAILED in incoming:
        raise RuntimeError(
            f"rank {incoming.index(_FAILED)}: could not send its sequences; its own error says why, and without them "
            "no rank can go on"
        )
    data_in = torch.empty(sum(incoming), dtype=torch.uint8)
    dist.all_to_all_single(data_in, torch.cat(parts), incoming, sizes.tolist(), group=group)
    received = [from_bytes(part) if len(part) else None for part in data_in.split(incoming)]
    received[rank] = kept
    return received
