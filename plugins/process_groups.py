"""Process groups beside the default one, made once a process and used again by later fits."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from lightning_gr.embeddings.dynamic.peers import Peers

_Key = tuple[str, str | None, timedelta, tuple[int, ...] | None]
_groups: dict[_Key, tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}


def group_named(
    name: str, *, timeout: timedelta, backend: str | None = None, ranks: tuple[int, ...] | None = None
) -> dist.ProcessGroup:
    """Processes in a group of their own; the same one for the same arguments.

    A group has threads and connections that live as long as the process, so that every fit would add to them. All
    processes call this in one order, as they would ``torch.distributed.new_group``.

    Args:
        name: what it is for; two things that may talk at the same time need two names.
        timeout: how long a collective may wait for the slowest process.
        backend: None means that of the default group.
        ranks: who is in it; None means all.
    """
    key = (name, backend, timeout, ranks)
    if key not in _groups or _groups[key][0] is not dist.group.WORLD:
        group = dist.new_group(None if ranks is None else list(ranks), timeout=timeout, backend=backend)
        _groups[key] = (dist.group.WORLD, group)
    return _groups[key][1]


def peers_named(name: str, *, num_groups: int, timeout: timedelta) -> Peers:
    """The processes that this one exchanges with where all are cut into groups of consecutive ranks.

    All processes call this in one order.

    Args:
        name: as of `group_named`.
        num_groups: divides the number of processes.
        timeout: as of `group_named`.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    size = world // num_groups
    assert size * num_groups == world, (world, num_groups)
    own = replicas = None
    for first in range(0, world if size > 1 else 0, size):
        ranks = tuple(range(first, first + size))
        group = group_named(name, timeout=timeout, ranks=None if num_groups == 1 else ranks)
        own = group if rank in ranks else own
    for place in range(size if num_groups > 1 else 0):
        ranks = tuple(range(place, world, size))
        group = group_named(f"{name}, replicas", timeout=timeout, ranks=ranks)
        replicas = group if rank in ranks else replicas
    return Peers(own=own, replicas=replicas)


def forget_groups() -> None:
    """After a failure: collectives may still be under way in them, so that whoever comes next gets others."""
    _groups.clear()
