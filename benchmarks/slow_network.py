"""A network between processes of one machine: exchanges of rows take a latency and their bytes' time, and queue."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Link:
    """A wire of a process.

    Args:
        latency: seconds.
        bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float


class LateWork(dist.Work):
    """A collective that arrives at a time of `time.perf_counter`, or when it does, whichever is later."""

    def __init__(self, inner: dist.Work, arrives: float) -> None:
        super().__init__()
        self._inner, self._arrives = inner, arrives

    def wait(self, *timeout: Any) -> bool:
        """Waits for both."""
        done = self._inner.wait(*timeout)
        time.sleep(max(self._arrives - time.perf_counter(), 0.0))
        return done


class Waits:
    """Seconds during which the main thread has waited."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts where the main thread calls it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() or self._inside:
                return function(*args, **kwargs)
            began, self._inside = time.perf_counter(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self._inside = False

        return call


class Network:
    """A process's links; messages of one process group are handed to gloo in their order, when they would arrive.

    Args:
        node: ranks of a node.
        links: to the ranks of its node, and to others; without them nothing takes time.
    """

    def __init__(self, node: int, links: Sequence[Link]) -> None:
        self._node, self._links = node, links
        self._free_at = [0.0] * len(links)
        self._lock = threading.Lock()
        self._queues: dict[dist.ProcessGroup, queue.SimpleQueue[Any]] = {}

    def send(self, group: dist.ProcessGroup, bytes_R: list[int], collective: Callable[[], Any]) -> Future[Any]:
        """Starts a collective once the bytes for each rank of the group would have arrived."""
        future: Future[Any] = Future()
        rank, ranks = dist.get_rank(), dist.get_process_group_ranks(group)
        with self._lock:
            now = arrives = time.perf_counter()
            for place, link in enumerate(self._links):
                is_far = [to // self._node != rank // self._node for to in ranks]
                uses = [
                    size for to, size, far in zip(ranks, bytes_R, is_far, strict=True) if to != rank and far == place
                ]
                if uses:
                    self._free_at[place] = max(now, self._free_at[place]) + sum(uses) / link.bandwidth
                    arrives = max(arrives, self._free_at[place] + link.latency)
            if group not in self._queues:
                self._queues[group] = queue.SimpleQueue()
                threading.Thread(target=self._work, args=(self._queues[group],), daemon=True).start()
            self._queues[group].put((arrives, collective, future))
        return future

    @staticmethod
    def _work(messages: queue.SimpleQueue[Any]) -> None:
        while True:
            arrives, collective, future = messages.get()
            time.sleep(max(arrives - time.perf_counter(), 0.0))
            try:
                future.set_result(collective())
            except BaseException as error:  # for who waits
                future.set_exception(error)


@contextmanager
def slowed(network: Network, waits: Waits) -> Iterator[None]:
    """Inside, exchanges go over the network, and what the main thread waits for is counted."""
    original, result, exception = dist.all_to_all_single, Future.result, Future.exception

    def all_to_all(output: Tensor, pieces: Tensor, received: Any, sent: Any, *, group: Any, async_op: bool) -> Any:
        assert async_op
        row = pieces[0].numel() * pieces.element_size() if len(pieces) else 0
        collective = functools.partial(original, output, pieces, received, sent, group=group, async_op=True)
        handed = network.send(group, [length * row for length in sent], collective)
        return type("Work", (), {"wait": staticmethod(waits.watched(lambda: handed.result().wait()))})

    dist.all_to_all_single = all_to_all  # type: ignore[assignment]
    Future.result, Future.exception = waits.watched(result), waits.watched(exception)  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.all_to_all_single = original
        Future.result, Future.exception = result, exception  # type: ignore[method-assign]
