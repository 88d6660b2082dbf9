"""Peers: the processes that a process exchanges keys, rows and gradients with, and how much goes over each wire.

Hierarchical sparse parallelism (TurboGR, arXiv 2605.13433, section 4.2.1): the processes are cut into groups, each of
which holds a full set of tables, spread over its members. Processes with the same place in their groups are replicas.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.ops.huge_pages import empty_in_huge_pages


@dataclass
class Traffic:
    """What went over one kind of wire.

    Args:
        calls: collectives.
        bytes: sent to other processes.
    """

    calls: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # lookups of batches ahead travel in a thread of their own

    def add(self, num_bytes: int) -> None:
        """Counts one more collective."""
        with self._lock:
            self.calls += 1
            self.bytes += num_bytes


@dataclass(frozen=True)
class Peers:
    """Who a process exchanges with.

    Args:
        own: the processes of its group; None where it is alone.
        replicas: the processes with the same place in all groups, in the order of groups; None of one group.
    """

    own: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Processes in the group."""
        return 1 if self.own is None else self.own.size()

    @property
    def num_groups(self) -> int:
        """Groups."""
        return 1 if self.replicas is None else self.replicas.size()


class Wire:
    """Exchanges of one kind in one process group, which are counted.

    Args:
        group: the processes.
        traffic: to count in.
    """

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.group, self.traffic = group, traffic

    def all_to_all(self, outgoing: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Any]:
        """Sends to every process its piece along the first axis; what arrives, and the work to wait for first.

        Args:
            outgoing: the pieces, in the order of processes.
            sent: length of each.
            received: length of those that arrive.
        """
        incoming = empty((sum(received), *outgoing.shape[1:]), outgoing.dtype, outgoing.device)
        elements = sum(sent) - sent[self.group.rank()]
        self.traffic.add(elements * outgoing[:1].numel() * outgoing.element_size() if len(outgoing) else 0)
        work = dist.all_to_all_single(incoming, outgoing, list(received), list(sent), group=self.group, async_op=True)
        return incoming, work

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What every process has, of different lengths; waits.

        Args:
            own: of this process.
            sizes: length of each process's.
        """
        rank, num = self.group.rank(), self.group.size()
        sent = [0 if r == rank else len(own) for r in range(num)]
        received = [0 if r == rank else size for r, size in enumerate(sizes)]
        incoming, work = self.all_to_all(torch.cat([own] * (num - 1)), sent, received)
        work.wait()
        parts = list(incoming.split(received))
        parts[rank] = own
        return parts


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what travels."""
    if device.type == "cpu":
        return empty_in_huge_pages(*shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)
