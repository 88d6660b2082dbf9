"""The host's memory: how much of it is left to this process, and buffers in it that a device copies to and from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def host_empty(num_rows: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix in host memory, pinned where `device` is a GPU, so that copies need no waiting."""
    return torch.empty(num_rows, dim, dtype=dtype, pin_memory=device.type == "cuda")


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
