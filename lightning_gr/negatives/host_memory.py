"""The host's memory: how much of it is left to this process, and buffers in it that a device copies to and from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

_addresses: ContextVar[set[int] | None] = ContextVar("lightning_gr_host_addresses", default=None)


@contextmanager
def noted_host_memory() -> Iterator[set[int]]:
    """Inside, collects the addresses of what `host_empty` makes; on a CPU nothing else tells it from a device's."""
    addresses: set[int] = set()
    token = _addresses.set(addresses)
    try:
        yield addresses
    finally:
        _addresses.reset(token)


def host_empty(num_rows: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix in host memory, pinned where `device` is a GPU, so that copies need no waiting."""
    made = torch.empty(num_rows, dim, dtype=dtype, pin_memory=device.type == "cuda")
    if (addresses := _addresses.get()) is not None:
        addresses.add(made.untyped_storage().data_ptr())
    return made


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: the system's, or less where a control group (v1, v2) limits it.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return min([_of_the_system(root), *_left_in_groups(root)])


def _of_the_system(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in each control group around this process; page cache that nobody uses counts as left."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            mount, limit, used, unused = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            unused = "total_inactive_file"
        else:
            continue
        top = root / mount
        group = top / own.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
                statistics = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue  # the root group has no limit; a container may not see its parents
            if most != "max":
                yield max(0, int(most) - taken + int(statistics.get(unused, 0)))
