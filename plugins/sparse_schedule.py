"""SparseSchedule: when rows of dynamic tables are read, sent and updated, relative to the dense forward and backward.

Semi-asynchronous training and hierarchical sparse parallelism of TurboGR (arXiv 2605.13433, sections 4.2.1 and 4.2.2).
What changes a table, and what is exchanged between ranks for it, is done in one order on all ranks, by one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from lightning_gr.plugins.process_groups import peers_named
from lightning_gr.plugins.stage_thread import StageThread, done

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.dynamic_lookup import DynamicLookup
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine
    from lightning_gr.plugins.communication_settings import SparseUpdate
    from lightning_gr.plugins.stage_log import StageLog
    from lightning_gr.plugins.staged_batch import StagedBatch


class SparseSchedule:
    """Runs the exchanges and changes of dynamic tables beside the dense forward and backward.

    In a step of `semi_async` the tables do, in this order: carry out the present batch's lookup, read and send the rows
    of the next batch, take up the present batch's gradients, update. So a row that is looked up lacks the update of the
    step before and no other. `exact_async` sends a row that the present batch has touched too after it is updated.

    Args:
        mode: what may run ahead.
        sync_steps: optimizer steps that are trained synchronously first.
        engines: by path, the dynamic tables; all ranks have them in one order.
        log: gets the stages `embed` and `embed_backward`.
        device: of the tables.
        timeout: how long a collective may wait for the slowest rank.
        num_groups: groups with a full set of tables each.
        clips_by_norm: whether a step needs all gradients before the first update.
    """

    def __init__(
        self,
        *,
        mode: SparseUpdate,
        sync_steps: int,
        engines: dict[str, DynamicEngine],
        log: StageLog,
        device: torch.device,
        timeout: timedelta,
        num_groups: int,
        clips_by_norm: bool,
    ) -> None:
        self.mode, self._sync_steps, self._log = mode, sync_steps, log
        self._engines = {path: engines[path] for path in sorted(engines)}
        self._splits = mode == "exact_async" and not clips_by_norm
        self._number = -1
        self._ahead: dict[str, tuple[StagedBatch, list[Future[Any]]]] = {}
        self._jobs: StageThread | _OnStream | None = None
        self._closed = False
        for engine in self._engines.values():
            engine.begin_fit()
        if engines and (self.runs_ahead or num_groups > 1):
            self._jobs = StageThread("tables") if device.type == "cpu" else _OnStream(device)
            for path, engine in self._engines.items():
                # Beside those of the main thread, which ranks a corpus or adds up a loss at the same time.
                engine.peers = peers_named(f"rows of {path}", num_groups=num_groups, timeout=timeout)
                engine.jobs = self

    @property
    def runs_ahead(self) -> bool:
        """Whether rows of the next batch may be read before the present step has ended."""
        return self.mode != "sync"

    # ---- jobs of the engines -----------------------------------------------------------------------------------

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Hands in what an engine does with gradients."""
        return self._submit("embed_backward" if self.runs_ahead else None, call)

    def _submit(self, stage: str | None, call: Callable[[], Any]) -> Future[Any]:
        assert self._jobs is not None
        number = self._number

        def logged() -> None:
            with nullcontext() if stage is None else self._log.record(stage, number):
                call()

        return self._jobs.submit(logged)

    def join(self) -> None:
        """Waits for all that was handed in."""
        if self._jobs is not None:
            self._jobs.join()

    def settle(self) -> None:
        """As `join`; rows that were sent ahead are forgotten, and their lookups done anew."""
        if self._closed:
            return  # after a failure the thread may still be in a call
        for engine in self._engines.values():
            engine.settle()

    def close(self, *, abandon: bool) -> None:
        """Ends the thread; engines go on without.

        Args:
            abandon: whether what is under way is forgotten, since other ranks may never answer.
        """
        self._closed = True
        if isinstance(self._jobs, StageThread):
            self._jobs.close(abandon=abandon)
        self._jobs = None
        for engine in self._engines.values():
            engine.jobs = engine.before_find = None
            if abandon:
                engine.abandon()

    # ---- a step ------------------------------------------------------------------------------------------------

    def begin_batch(
        self, present: StagedBatch, following: StagedBatch | None, *, made: set[str], step: int, step_ends: bool
    ) -> None:
        """Before a forward: the tables change, and the next batch's rows are read, where it looks up the present ones.

        Args:
            present: the batch that trains.
            following: the one behind it; None where there is none.
            made: collections of which the training step looks up features that it makes itself.
            step: number of the optimizer's step.
            step_ends: whether the batch is the last of its step.
        """
        self._number = present.number
        self._ahead = {path: ahead for path, ahead in self._ahead.items() if ahead[0] is present}
        for path, engine in self._engines.items():
            lookups = present.lookups.dynamic.get(path, [])
            if not self.runs_ahead or path in made or not lookups:
                engine.before_find = None
                continue

            def before_find(lookup: DynamicLookup, path: str = path, lookups: list[DynamicLookup] = lookups) -> None:
                if lookup not in lookups:
                    return
                self._carry_out(path, lookup, present, is_first=lookup is lookups[0])
                if lookup is lookups[-1]:
                    self._look_ahead(path, lookups, following, step=step, step_ends=step_ends)

            engine.before_find = before_find

    def after_batch(self, following: StagedBatch | None, *, made: set[str], step: int, step_ends: bool) -> None:
        """After a forward whose lookups were not known before it: the next batch's rows are read."""
        for path, engine in self._engines.items():
            if path not in made:
                self._look_ahead(path, engine.open_lookups, following, step=step, step_ends=step_ends)

    def _carry_out(self, path: str, lookup: DynamicLookup, present: StagedBatch, *, is_first: bool) -> None:
        """Hands in what a lookup does to the tables; rows that are not on their way yet are sent."""
        _, jobs = self._ahead.pop(path, (None, [])) if is_first else (None, [])
        job = self._submit(None, functools.partial(self._look_up, self._engines[path], lookup, present.number))
        # What was read ahead does not wait for the update of the step before.
        lookup.jobs += jobs if jobs and not lookup.forgotten else [job]

    def _look_up(self, engine: DynamicEngine, lookup: DynamicLookup, number: int) -> None:
        if lookup.plans:
            engine.carry_out(lookup)
            return
        with self._log.record("embed", number):
            engine.look_up(lookup)

    def _look_ahead(
        self,
        path: str,
        present: list[DynamicLookup],
        following: StagedBatch | None,
        *,
        step: int,
        step_ends: bool,
    ) -> None:
        """Hands in the reading and sending of the next batch's rows.

        Only the first lookup of a collection goes ahead, since a second one depends on what the first changes.
        """
        if not self.runs_ahead or following is None or following.lookups.is_empty:
            return
        if step + step_ends >= self._sync_steps:
            call = functools.partial(
                self._look_up_ahead, self._engines[path], path, list(present), following, step_ends
            )
            self._ahead[path] = (following, [self._submit(None, call)])

    def _look_up_ahead(
        self,
        engine: DynamicEngine,
        path: str,
        present: list[DynamicLookup],
        following: StagedBatch,
        step_ends: bool,
    ) -> None:
        following.lookups.wait()
        lookups = following.lookups.dynamic.get(path, [])
        if lookups:
            with self._log.record("embed", following.number):
                engine.look_ahead(
                    lookups[0],
                    present,
                    step_ends=step_ends,
                    exact=self.mode == "exact_async",
                    split_gradients=self._splits,
                )

    def end_step(self) -> None:
        """After the dense optimizer's step: rows are updated, in the background."""
        for path, engine in self._engines.items():
            late = engine.step_later()
            # Rows of `semi_async` are on their way already and wait for no gradient.
            if self.mode == "exact_async" and path in self._ahead:
                self._ahead[path][1].append(late)


class _OnStream:
    """Does calls where they are handed in, on a stream of a GPU beside the one that computes; they give an event."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return done(lambda: (call(), self._stream.record_event())[1])

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
