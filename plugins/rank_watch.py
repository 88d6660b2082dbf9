"""RankWatch: when a rank dies, raises or stalls, the error of the ranks that wait for it names it."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.plugins.rank_failure import RankFailure, is_communication_failure

# In intervals. One beat in this long shows that a rank lives.
_INTERVALS_OF_EVIDENCE = 3
# Rank 0's process holds the store: it stays this long at most, so that the others can read the verdict.
_INTERVALS_FOR_OTHERS = 3
# The watching thread takes no longer than the two together, unless the store has stopped to answer.
_INTERVALS_FOR_AN_ANSWER = _INTERVALS_OF_EVIDENCE + _INTERVALS_FOR_OTHERS + 3
# NCCL ends the process at the time-out without an exception; what there is to say is said before.
_SHARE_OF_TIMEOUT = 0.9
_LONGEST_LINE = 500


class RankWatch:
    """Finds out which rank a run ended by, and says it in the exception of every rank that waited for it.

    A thread on every rank writes a mark into the store each interval: a beat, and where the training thread is. When
    a communication fails inside `guard`, the ranks' marks are compared and the failure becomes a `RankFailure` that
    names the root cause: the rank that raised; the rank whose beats have stopped; the rank that lives, did not fail
    itself, and has come least far. A rank that only lost a connection is never the culprit. The first verdict in the
    store is every rank's.

    The cost is two small messages to the store per rank and interval, from the thread; `at` and `guard` send none.
    Marks are compared by beats, so clocks of machines need not agree; only "for 9 s" of a dead rank rests on them.

    NCCL ends a process at the time-out instead of raising. Shortly before, a rank that has not moved writes to
    standard error which rank it waits for.

    A strategy uses one watch per run (fit, validate, ...):

    - in ``setup``, once the process group is there: make it with ``_compat.default_store()`` and `start` it;
    - ``at("loading batch", i)`` before and ``at("training step", i)`` after the next batch is taken, the same calls in
      the same order on every rank, from the training thread only;
    - ``with watch.guard():`` around the loader's ``__next__``, ``training_step``, ``backward``, ``optimizer_step``,
      ``validation_step`` and its like, ``barrier``, ``broadcast``, ``reduce``, ``all_gather``, and checkpoints; guards
      may be nested;
    - in ``on_exception``, `explain` the exception, for what was raised outside of every guard;
    - in ``teardown``, `stop` it.

    An exception that leaves a guard is taken for the end of the run: one that the caller then handles, to go on,
    would be blamed for a later failure. StopIteration is none.

    Args:
        store: what the ranks share; it is cloned, since the thread needs a connection of its own.
        rank: this process's rank.
        world_size: number of ranks; with 1 the watch does nothing.
        timeout: the process group's time-out.
        interval: seconds between two marks. A rank is named about four of them after its peers have failed.

    Raises:
        MisconfigurationException: an interval or time-out that is not positive, or a rank that does not exist.
    """

    def __init__(
        self, *, store: dist.Store, rank: int, world_size: int, timeout: timedelta, interval: float = 1.0
    ) -> None:
        if not interval > 0:
            raise MisconfigurationException(f"interval={interval}: expected seconds above 0")
        if not timeout > timedelta(0):
            raise MisconfigurationException(f"timeout={timeout}: expected a time-out above 0")
        if not 0 <= rank < world_size:
            raise MisconfigurationException(f"rank={rank}: expected 0 to {world_size - 1}, one of {world_size} ranks")
        self.rank, self.world_size, self.interval = rank, world_size, interval
        self.timeout = timeout.total_seconds()
        self._shared_store = store
        self._thread: threading.Thread | None = None
        # Written by the training thread, whole values only, and read by the watching thread.
        self._place = _Place("setting up", 0, time.monotonic())
        self._report: str | None = None
        self._lost_a_peer = False
        self._stopping = False
        self._wake = threading.Event()
        # Written by the watching thread; the verdict is read once it is settled.
        self._verdict: str | None = None
        self._settled = threading.Event()
        self._beat = 0
        self._known_since: float | None = None
        self._first_look: _Look | None = None
        self._warned_of: _Place | None = None

    # ---- the training thread -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to beat, apart from every earlier watch on the same store."""
        if self.world_size == 1 or self._thread is not None:
            return
        store = self._shared_store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        generation = store.add(f"rank_watch/started/{self.rank}", 1)
        store = dist.PrefixStore(f"rank_watch/{generation}", store)
        self._thread = threading.Thread(target=self._watch, args=(store,), name="rank-watch", daemon=True)
        self._thread.start()
        # A thread inside the store while the interpreter ends would abort the process.
        atexit.register(self.stop)

    def at(self, where: str, step: int) -> None:
        """Notes where the training thread is, for others to read; costs a microsecond or two.

        Args:
            where: reads well before the number: "training step", "loading batch".
            step: number of the step or batch.
        """
        self._place = _Place(f"{where} {step}", self._place.moves + 1, time.monotonic())

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Reports what is raised inside to the other ranks, and explains a failed communication.

        Raises:
            RankFailure: in place of a failed communication, which is its cause. Anything else passes as it is.
        """
        try:
            yield
        except (StopIteration, GeneratorExit):
            raise
        except BaseException as error:
            failure = self.explain(error)
            if failure is None:
                raise
            raise failure from error

    def explain(self, error: BaseException) -> RankFailure | None:
        """Tells the other ranks of an exception, and finds out whose fault it is.

        Returns:
            For a failed communication, the exception that names the culprit; None for any other one, which is told
            to the others as this rank's own failure.
        """
        if self._thread is None or self._stopping or isinstance(error, RankFailure):
            return None
        communication = is_communication_failure(error)
        if communication:
            self._lost_a_peer = True
        elif self._report is None:
            self._report = f"rank {self.rank} failed in {self._place.text}: {type(error).__name__}: {_one_line(error)}"
        self._wake.set()
        settled = self._settled.wait(_INTERVALS_FOR_AN_ANSWER * self.interval)
        if not communication:
            return None
        if settled and self._verdict is not None:
            return RankFailure(self._verdict)
        return RankFailure(self._without_store())

    def stop(self) -> None:
        """Ends the thread; may be called again, and before `start`."""
        atexit.unregister(self.stop)
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            # Not for ever: the store may have stopped to answer.
            self._thread.join(_INTERVALS_OF_EVIDENCE * self.interval)

    # ---- the watching thread: it alone speaks with the store ---------------------------------------------------

    def _watch(self, store: dist.Store) -> None:
        try:
            while not self._stopping:
                self._turn(store)
                self._wake.wait(self.interval)
                self._wake.clear()
            self._write_mark(store)
        except RuntimeError:  # DistError, or what older stores raise when they lose their host
            if self._verdict is None:
                self._verdict = self._without_store()
        finally:
            self._settled.set()

    def _turn(self, store: dist.Store) -> None:
        self._write_mark(store)
        if self._verdict is None:
            self._verdict = self._find_verdict(store)
            if self._verdict is None:
                self._warn_before_the_timeout(store)
                return
        now = time.monotonic()
        if self._known_since is None:
            self._known_since = now
            store.add("know", 1)
        others_know = self.rank != 0 or store.add("know", 0) >= self.world_size
        if others_know or now - self._known_since >= _INTERVALS_FOR_OTHERS * self.interval:
            self._settled.set()

    def _find_verdict(self, store: dist.Store) -> str | None:
        # A get would wait for a key that is not there.
        if store.check(["verdict"]):
            return store.get("verdict").decode()
        mine = self._report
        if mine is None and self._lost_a_peer:
            evidence = self._evidence(store)
            mine = None if evidence is None else _judge(evidence, rank=self.rank)
        return None if mine is None else store.compare_set("verdict", "", mine).decode()

    def _warn_before_the_timeout(self, store: dist.Store) -> None:
        place = self._place
        if time.monotonic() - place.since < _SHARE_OF_TIMEOUT * self.timeout or self._warned_of == place:
            return
        evidence = self._evidence(store)
        if evidence is None:
            return
        self._warned_of = place
        silent = evidence.silent
        live = {x: mark for x, mark in evidence.marks.items() if x not in silent and mark.state != "left"}
        waiting = [x for x, mark in live.items() if mark.moves >= place.moves]
        # Every rank that waits comes here, and one is enough to say it.
        if self.rank == min(waiting) and (silent or len(waiting) < len(live)):
            sys.stderr.write(f"rank {self.rank}: the time-out of {self.timeout:.0f} s is near: ")
            sys.stderr.write(f"{_judge(evidence, rank=self.rank)}\n")

    def _evidence(self, store: dist.Store) -> _Evidence | None:
        """What two looks at the ranks' marks, some intervals apart, show; None after the first."""
        marks, now, why = self._read_marks(store), time.monotonic(), (self._lost_a_peer, self._place)
        first = self._first_look
        if first is None or first.why != why:
            self._first_look = _Look(why, now, marks)
            return None
        if now - first.at < _INTERVALS_OF_EVIDENCE * self.interval:
            return None
        silent: dict[int, float] = {}
        for rank in set(range(self.world_size)) - {self.rank}:
            mark, earlier = marks.get(rank), first.marks.get(rank)
            if mark is None:
                silent[rank] = now - first.at
            elif mark.state != "left" and earlier is not None and earlier.beat == mark.beat:
                silent[rank] = max(now - first.at, time.time() - mark.time)
        # A mark may be an interval old, and a rank that moves is not late.
        late = {x: mark for x, mark in first.marks.items() if mark.state == "runs" and mark.seconds > 2 * self.interval}
        return _Evidence(marks, silent, late)

    def _without_store(self) -> str:
        return (
            f"rank 0, whose process keeps the ranks' store, is gone or does not answer; {_DEAD}; rank {self.rank} "
            f"waits in {self._place.text}"
        )

    def _read_marks(self, store: dist.Store) -> dict[int, _Mark]:
        ranks = [rank for rank in range(self.world_size) if store.check([f"mark/{rank}"])]
        values = store.multi_get([f"mark/{rank}" for rank in ranks])
        return {rank: _Mark(**json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def _write_mark(self, store: dist.Store) -> None:
        self._beat += 1
        place = self._place
        mark = _Mark(
            beat=self._beat,
            time=time.time(),
            pid=os.getpid(),
            host=socket.gethostname(),
            place=place.text,
            moves=place.moves,
            seconds=time.monotonic() - place.since,
            state="left" if self._stopping else "lost a peer" if self._lost_a_peer else "runs",
        )
        store.set(f"mark/{self.rank}", json.dumps(asdict(mark)))


@dataclass(frozen=True)
class _Place:
    """Where a training thread is.

    Attributes:
        text: in words, with the step.
        moves: how often `RankWatch.at` was called: how far this rank has come, compared with the others.
        since: monotonic seconds at the call.
    """

    text: str
    moves: int
    since: float


@dataclass(frozen=True)
class _Mark:
    """What a rank writes into the store.

    Attributes:
        beat: grows with every mark.
        time: seconds since the epoch, by this rank's clock.
        pid: of the process.
        host: name of the machine.
        place: where the training thread is.
        moves: how far it has come.
        seconds: how long it has been there.
        state: runs, has lost a peer, or has stopped its watch.
    """

    beat: int
    time: float
    pid: int
    host: str
    place: str
    moves: int
    seconds: float
    state: Literal["runs", "lost a peer", "left"]


@dataclass(frozen=True)
class _Look:
    """What the ranks' marks were when something seemed wrong: what seemed so, when, and the marks."""

    why: tuple[bool, _Place]
    at: float
    marks: Mapping[int, _Mark]


@dataclass(frozen=True)
class _Evidence:
    """What a verdict rests on.

    Attributes:
        marks: of the ranks that have written one.
        silent: seconds without a beat, of the ranks that had none between the two looks.
        late: marks of the ranks that, at the first look, had neither failed nor moved for a while.
    """

    marks: Mapping[int, _Mark]
    silent: Mapping[int, float]
    late: Mapping[int, _Mark]


_DEAD = "killed, frozen, or its machine is gone"


def _judge(evidence: _Evidence, *, rank: int) -> str:
    """What rank ``rank``, which waits in vain, says: the dead, else the least far of the living, else who left."""
    marks, silent = evidence.marks, evidence.silent
    if silent:
        return "; ".join(_obituary(x, marks.get(x), seconds) for x, seconds in sorted(silent.items()))
    waits = f"while rank {rank} waits in {marks[rank].place}"
    stand = {x: mark for x, mark in marks.items() if x != rank and mark.state == "runs"}
    if not stand:
        # It may have moved on meanwhile, and met the ranks that had given up.
        stand = {x: mark for x, mark in evidence.late.items() if mark.moves < marks[rank].moves}
    if stand:
        least = min(mark.moves for mark in stand.values())
        named = [
            f"rank {x} (pid {mark.pid} on host {mark.host}) has stood in {mark.place} for {mark.seconds:.0f} s"
            for x, mark in sorted(stand.items())
            if mark.moves == least
        ]
        return f"{'; '.join(named)} {waits}"
    left = [f"rank {x} has ended its run in {mark.place}" for x, mark in sorted(marks.items()) if mark.state == "left"]
    if left:
        return f"{'; '.join(left)} {waits}"
    return f"all {len(marks)} ranks live, none has failed by itself, and they have lost touch; is the network at fault?"


def _obituary(rank: int, mark: _Mark | None, seconds: float) -> str:
    if mark is None:
        return f"rank {rank} has given no sign of life since the run began; {_DEAD}"
    return (
        f"rank {rank} (pid {mark.pid} on host {mark.host}) has given no sign of life for {seconds:.0f} s; {_DEAD}; it "
        f"was last seen in {mark.place}"
    )


def _one_line(error: BaseException) -> str:
    """The message's first line; the last one too where a worker's traceback stands between the two."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    line = " ".join([lines[0], lines[-1]] if "Original Traceback" in str(error) else lines[:1])
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
