"""Process groups beside the default one, made once a process and used again by later fits."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

_groups: dict[tuple[str, str | None, timedelta], tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}


def group_named(name: str, *, timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """All processes in a group of their own; the same one for the same arguments.

    A group has threads and connections that live as long as the process, so that every fit would add to them. All
    processes call this in one order, as they would ``torch.distributed.new_group``.

    Args:
        name: what it is for; two things that may talk at the same time need two names.
        timeout: how long a collective may wait for the slowest process.
        backend: None means that of the default group.
    """
    key = (name, backend, timeout)
    if key not in _groups or _groups[key][0] is not dist.group.WORLD:
        _groups[key] = (dist.group.WORLD, dist.new_group(timeout=timeout, backend=backend))
    return _groups[key][1]


def forget_groups() -> None:
    """After a failure: collectives may still be under way in them, so that whoever comes next gets others."""
    _groups.clear()
