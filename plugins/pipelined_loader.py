"""PipelinedLoader: a loader whose next batches are fetched, copied and looked up while the present one trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lightning_gr.plugins.rank_watch import RankWatch
from lightning_gr.plugins.stage_log import StageLog
from lightning_gr.plugins.stage_thread import StageThread, done
from lightning_gr.plugins.staged_batch import StagedBatch
from lightning_gr.plugins.started_lookups import StartedLookups

_END = object()


class PipelinedLoader:
    """Iterates like the loader inside; every batch that it has is trained, in the same order.

    Stages of a batch: *fetch* reads and collates (and pins) it, *copy* calls the batch hooks and moves it to the
    device, *lookup* exchanges the ids of its table lookups; with `waits_apart` that is *exchange*, which makes ids
    distinct and sends them, and *wait*, which takes up what arrives, so that ids of several batches are under way. On
    the CPU fetch (if `fetch_apart`) and those that look up have a thread each; hooks run where they run without a
    pipeline, in the training process's main thread. On a GPU copy and lookup are issued from the main thread on a
    stream each, since collectives of several threads could reach the device in different orders on different ranks.
    The log has two more: what the main thread waited for, *await_fetch* and *await_lookup*.

    Every rank has the same batches in flight at the same step, so that the collectives of a stage that are under way
    when iteration stops find their partners.

    Args:
        loader: what to iterate over.
        prepare: the batch hooks and the move to the device.
        look_up: the lookups of a batch, nothing of which has begun; None leaves them to the training step.
        depth: batches in flight behind the present one, at least 1.
        device: where batches go.
        log: gets an event for each stage of each batch.
        watch: told of failures, which it explains by the rank that caused them; None leaves them as they are.
        enabled: asked when an iteration begins; where it says no, batches pass through untouched.
        fetch_apart: whether the loader may be asked for batches in another thread: whether it and its dataset leave
            torch's global generator alone, whose numbers would otherwise go to one thread or the other by chance.
        waits_apart: whether ids are sent and received in a stage each.
        threads: whether stages run in threads; None means: on the CPU.
    """

    def __init__(
        self,
        loader: Any,
        *,
        prepare: Callable[[Any], Any],
        look_up: Callable[[Any], StartedLookups] | None,
        depth: int,
        device: torch.device,
        log: StageLog,
        watch: RankWatch | None = None,
        enabled: Callable[[], bool] = lambda: True,
        fetch_apart: bool = False,
        waits_apart: bool = False,
        threads: bool | None = None,
    ) -> None:
        assert depth >= 1
        self.loader, self.prepare, self.look_up = loader, prepare, look_up
        self.depth, self.device, self.log, self._enabled = depth, device, log, enabled
        self.threads = device.type == "cpu" if threads is None else threads
        self._watch, self.fetch_apart, self.waits_apart = watch, fetch_apart, waits_apart
        self._run: _Run | None = None
        self._numbers = 0
        self._state: dict[str, Any] | None = None
        self._handed: deque[tuple[StagedBatch, dict[str, Any]]] = deque()
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            self.__class__ = _StatefulPipelinedLoader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # before __init__, as copy and pickle look for it
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # Here and now, as without a pipeline: a DataLoader takes a number out of torch's generator for each iterator.
        return self._batches(iter(self.loader))

    def _batches(self, inner: Iterator[Any]) -> Iterator[Any]:
        # A generator, so no batch is fetched before one is asked for: Lightning makes idle iterators.
        self.stop()
        if not self._enabled():
            yield from inner
            return
        run = self._run = _Run(self, inner)
        batches, handed_over = iter(run), 0
        try:
            while True:
                if self._watch is not None:
                    self._watch.at("loading batch", handed_over)
                with nullcontext() if self._watch is None else self._watch.guard():
                    found = next(batches, None)
                if found is None:
                    self._state = run.final_state
                    return
                staged, self._state = found
                self._handed.append((staged, self._state))
                handed_over += 1
                yield staged
        except GeneratorExit:
            run.close()
            raise
        except BaseException:
            run.close(wait=False)  # other ranks may not come by any more
            raise
        finally:
            run.close()

    def next_number(self) -> int:
        """Counts batches."""
        self._numbers += 1
        return self._numbers - 1

    @property
    def _iterator(self) -> Any:
        """Of a DataLoader inside; Lightning sets it to None where it has ended persistent workers."""
        return getattr(self.loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    def begin(self, staged: StagedBatch) -> None:
        """Forgets what batches before the one that now trains have left of their lookups.

        Lightning asks a loader without a length for one batch more before it trains the one at hand.
        """
        while self._handed and self._handed[0][0] is not staged:
            self._handed.popleft()[0].lookups.drop()

    def following(self) -> StagedBatch | None:
        """The batch behind the one that now trains; None where it is not known yet."""
        if len(self._handed) > 1:
            return self._handed[1][0]
        return None if self._run is None else self._run.first()

    def look_up_rest(self) -> None:
        """Starts the lookups of batches that came into flight before it was known what is looked up."""
        if self._run is not None:
            self._run.look_up_rest()

    def flush(self) -> None:
        """Waits until no stage is at work; what is in flight stays there."""
        if self._run is not None:
            self._run.flush()

    def stop(self, *, wait: bool = True) -> None:
        """Ends an iteration that somebody left, with what is in flight.

        Args:
            wait: whether to let stages finish. After a failure other ranks may never answer.
        """
        if self._run is not None:
            self._run.close(wait=wait)
            self._run = None
        while self._handed:
            self._handed.popleft()[0].lookups.drop()


class _StatefulPipelinedLoader(PipelinedLoader):
    """Of a loader that knows its position."""

    def state_dict(self) -> dict[str, Any]:
        """That of the loader inside, as it was when the present batch had been fetched, whatever is in flight.

        Of a loader without a length Lightning holds one batch more than it trains.
        """
        if len(self._handed) > 1 and not getattr(self.loader, "lookahead", 0):
            return self._handed[0][1]
        return self._state if self._state is not None else state_of(self.loader)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Passes the state on to the loader inside."""
        self._state = None
        self.loader.load_state_dict(state)


@dataclass
class _InFlight:
    """A batch on its way.

    Args:
        staged: the batch.
        state: of the loader after it was fetched.
        copied: done when the batch is on its device; None on the CPU.
        error: what fetching it ended with, in place of a batch.
    """

    staged: StagedBatch
    state: dict[str, Any]
    copied: Any
    error: BaseException | None = None


class _Run:
    """One iteration: its threads, and what is in flight."""

    def __init__(self, of: PipelinedLoader, iterator: Iterator[Any]) -> None:
        self._of = of
        self._fetching = StageThread("fetch") if of.threads and of.fetch_apart else None
        looks_up = of.threads and of.look_up is not None
        self._looking_up = StageThread("lookup") if looks_up else None
        self._waiting = StageThread("wait") if looks_up and of.waits_apart else None
        cuda = of.device.type == "cuda"
        self._copy_stream = torch.cuda.Stream(of.device) if cuda else None
        self._lookup_stream = torch.cuda.Stream(of.device) if cuda else None
        self._fetched: deque[Future[Any]] = deque()
        self._flight: deque[_InFlight] = deque()
        self._iterator: Iterator[Any] | None = iterator
        self._closed = False
        self.final_state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[StagedBatch, dict[str, Any]]]:
        of = self._of
        # In this thread, so that a DataLoader starts its workers and their signal handlers from here.
        self._fetched.append(self._fetch_here())
        while True:
            while self._fetched and len(self._flight) <= of.depth:
                self._admit()
            if not self._flight:
                return
            if self._looking_up is None:
                for flying in self._flight:
                    self._advance(flying)
            flying = self._flight.popleft()
            if flying.error is not None:
                raise flying.error
            with of.log.record("await_lookup", flying.staged.number):
                self._finish(flying.staged)
            self._hand_over(flying)
            yield flying.staged, flying.state

    def _finish(self, staged: StagedBatch) -> None:
        """Waits until the ids of a batch have arrived, or sees to it."""
        if (arrival := staged.lookups.arrival) is not None:
            arrival.result()
            return
        stage = "wait" if self._of.waits_apart else "lookup"
        with self._on(self._lookup_stream), self._of.log.record(stage, staged.number):
            staged.lookups.finish()

    # ---- stages ------------------------------------------------------------------------------------------------

    def _fetch(self) -> Any:
        assert self._iterator is not None
        began = time.perf_counter()
        batch = next(self._iterator, _END)
        if batch is _END:
            return _END
        if self._of.device.type == "cuda" and hasattr(batch, "pin_memory"):
            batch = batch.pin_memory()
        number = self._of.next_number()
        self._of.log.add("fetch", number, began, time.perf_counter())
        return number, batch, state_of(self._of.loader)

    def _fetch_here(self) -> Future[Any]:
        """Fetches in this thread, which waits for it."""
        began = time.perf_counter()
        future = done(self._fetch)
        self._await_fetch(future, began)
        return future

    def _await_fetch(self, future: Future[Any], began: float) -> None:
        if future.exception() is None and (fetched := future.result()) is not _END:
            self._of.log.add("await_fetch", fetched[0], began, time.perf_counter())

    def _admit(self) -> None:
        """Takes the next fetched batch into flight, and has the one after it fetched."""
        of = self._of
        future, began = self._fetched.popleft(), time.perf_counter()
        self._await_fetch(future, began)
        if (error := future.exception()) is not None:
            # Its turn comes after the batches before it.
            self._flight.append(_InFlight(StagedBatch(None, -1, StartedLookups()), {}, None, error))
            return
        fetched = future.result()
        if fetched is _END:
            self.final_state = state_of(of.loader)
            return
        number, batch, state = fetched
        # One fetch is under way beyond what is in flight, on every rank alike.
        self._fetched.append(self._fetch_here() if self._fetching is None else self._fetching.submit(self._fetch))
        with of.log.record("copy", number), self._on(self._copy_stream):
            batch = of.prepare(batch)
        copied = None if self._copy_stream is None else self._copy_stream.record_event()
        flying = _InFlight(StagedBatch(batch, number, StartedLookups()), state, copied)
        self._look_up(flying)
        self._flight.append(flying)

    def _look_up(self, flying: _InFlight) -> None:
        """Starts the lookups of a batch, which go on in threads where there are some."""
        of, staged = self._of, flying.staged
        if of.look_up is not None:
            staged.lookups = of.look_up(staged.batch)
        if self._looking_up is None:
            return
        lookups, log = staged.lookups, of.log
        if self._waiting is None:

            def look_up() -> None:
                with log.record("lookup", staged.number):
                    lookups.finish()

            lookups.arrival = self._looking_up.submit(look_up)
            return

        def exchange() -> None:
            with log.record("exchange", staged.number):
                lookups.finish(leave=1)

        def wait() -> None:
            sent.result()
            with log.record("wait", staged.number):
                lookups.finish()

        sent = self._looking_up.submit(exchange)
        lookups.arrival = self._waiting.submit(wait)

    def look_up_rest(self) -> None:
        for flying in self._flight:
            if flying.error is None and flying.staged.lookups.is_empty:
                self._look_up(flying)

    def first(self) -> StagedBatch | None:
        return self._flight[0].staged if self._flight and self._flight[0].error is None else None

    def _advance(self, flying: _InFlight) -> None:
        """Without threads a lookup goes on by one phase with every batch that is asked for."""
        with self._on(self._lookup_stream):
            if self._lookup_stream is not None and flying.copied is not None:
                self._lookup_stream.wait_event(flying.copied)
            flying.staged.lookups.advance()

    def _hand_over(self, flying: _InFlight) -> None:
        """Makes the stream that computes wait for those that prepared the batch."""
        if self._copy_stream is None or self._lookup_stream is None:
            return
        compute = torch.cuda.current_stream(self._of.device)
        compute.wait_event(flying.copied)
        compute.wait_stream(self._lookup_stream)
        batch = flying.staged.batch
        if hasattr(batch, "record_stream"):
            batch.record_stream(compute)
        elif isinstance(batch, (list, tuple, dict)):
            for part in batch.values() if isinstance(batch, dict) else batch:
                if hasattr(part, "record_stream"):
                    part.record_stream(compute)

    @staticmethod
    def _on(stream: Any) -> Any:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    # ---- end ---------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if self._copy_stream is not None:
            torch.cuda.current_stream(self._of.device).wait_stream(self._copy_stream)
        for flying in self._flight:
            if (arrival := flying.staged.lookups.arrival) is not None:
                arrival.result()
        for fetched in self._fetched:
            fetched.exception()  # it is raised where the batch is asked for

    def close(self, *, wait: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        if wait:
            for flying in self._flight:
                if (arrival := flying.staged.lookups.arrival) is not None:
                    arrival.exception()
            for fetched in self._fetched:
                fetched.exception()
        for thread in (self._fetching, self._looking_up, self._waiting):
            if thread is not None:
                thread.close()
        for flying in self._flight:
            flying.staged.lookups.drop()
        self._flight.clear()
        self._fetched.clear()
        if wait and hasattr(self._iterator, "close"):
            self._iterator.close()  # type: ignore[union-attr]
        self._iterator = None


def state_of(loader: Any) -> dict[str, Any]:
    """The position of a loader that has one; empty otherwise."""
    state: dict[str, Any] = loader.state_dict() if hasattr(loader, "state_dict") else {}
    return state
