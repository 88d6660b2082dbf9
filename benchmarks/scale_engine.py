"""A discrete-event simulation of work on streams and of bytes on shared links.

A piece of work begins once all that it needs has ended. A stream does its pieces in the order in which they were
issued, as a CUDA stream does. A link gives each of the transfers that are on it an equal share of its bandwidth.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field


class Work:
    """A piece of work.

    Args:
        name: what it is, for whoever looks at it afterwards.
        seconds: how long it takes where nothing of it is on a link; after its transfers, where there are any.
        sends: bytes on each link that it takes at once.
    """

    __slots__ = ("_missing", "_then", "began", "ended", "name", "seconds", "sends")

    def __init__(self, name: str, seconds: float, sends: Sequence[tuple[Link, float]]) -> None:
        self.name, self.seconds, self.sends = name, seconds, sends
        self.began = self.ended = -1.0
        self._missing, self._then = 0, list[Work]()


class Stream:
    """Does its work in the order in which it is issued."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: Work | None = None


@dataclass(slots=True, eq=False)
class Link:
    """A wire that transfers share equally.

    Args:
        bandwidth: bytes a second.
    """

    bandwidth: float
    sent: float = 0.0
    """Bytes that have passed."""
    _served: float = 0.0
    _at: float = 0.0
    _flows: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _version: int = 0


class Simulation:
    """The clock, and all that waits for it. Work is issued, then `run` does it.

    Raises:
        ValueError: by its methods, of work with negative seconds or bytes.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._ready: list[Work] = []
        self._open = 0

    def issue(
        self,
        name: str,
        after: Iterable[Work | None] = (),
        *,
        seconds: float = 0.0,
        sends: Sequence[tuple[Link, float]] = (),
        stream: Stream | None = None,
    ) -> Work:
        """Work that begins when all before it has ended.

        Args:
            name: what it is.
            after: what it needs; None is needed by nothing.
            seconds: how long it takes, behind its transfers.
            sends: bytes on each link, all at once; it goes on when the last has passed.
            stream: which does it after what was issued to it before.
        """
        if seconds < 0 or (sends and min(size for _, size in sends) < 0):
            raise ValueError(f"{name}: seconds={seconds}, sends={[size for _, size in sends]}: expected none below 0")
        work = Work(name, seconds, sends)
        needed = list(after)
        if stream is not None:
            needed.append(stream.last)
            stream.last = work
        for before in needed:
            if before is not None and before.ended < 0:
                before._then.append(work)
                work._missing += 1
        self._open += 1
        if work._missing == 0:
            self._ready.append(work)
        return work

    def run(self) -> float:
        """Does all work; returns the time at which the last of it ended.

        Raises:
            RuntimeError: some work waits for itself.
        """
        while self._ready or self._events:
            while self._ready:
                self._begin(self._ready.pop())
            if self._events:
                self.now, _, call = heapq.heappop(self._events)
                call()
        if self._open:
            raise RuntimeError(f"{self._open} pieces of work wait for each other")
        return self.now

    def _at(self, time: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, call))

    def _begin(self, work: Work) -> None:
        work.began = self.now
        sends = [(link, size) for link, size in work.sends if size > 0]
        if not sends:
            self._at(self.now + work.seconds, lambda: self._end(work))
            return
        left = len(sends)

        def passed() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._at(self.now + work.seconds, lambda: self._end(work))

        for link, size in sends:
            self._serve(link)
            link.sent += size
            self._count += 1
            heapq.heappush(link._flows, (link._served + size, self._count, passed))
            self._plan(link)

    def _end(self, work: Work) -> None:
        work.ended = self.now
        self._open -= 1
        for after in work._then:
            after._missing -= 1
            if after._missing == 0:
                self._ready.append(after)
        work._then = []

    def _serve(self, link: Link) -> None:
        """Brings what each transfer on the link has got up to now."""
        if link._flows:
            link._served += (self.now - link._at) * link.bandwidth / len(link._flows)
        link._at = self.now

    def _plan(self, link: Link) -> None:
        """When the next transfer has passed, unless another joins before."""
        link._version += 1
        if not link._flows:
            return
        version = link._version
        left = max(link._flows[0][0] - link._served, 0.0) * len(link._flows)

        def check() -> None:
            if link._version != version:
                return
            first = link._flows[0][0]
            link._served, link._at = first, self.now
            while link._flows and link._flows[0][0] <= first * (1 + 1e-12):
                heapq.heappop(link._flows)[2]()
            self._plan(link)

        self._at(self.now + left / link.bandwidth, check)
