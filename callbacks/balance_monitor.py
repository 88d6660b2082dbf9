"""BalanceMonitor: how evenly work lies on the ranks, and what share of training goes to waiting."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.observability.batch_work import work_of
from lightning_gr.observability.by_rank import by_rank, is_log_step, log_values
from lightning_gr.observability.fetch_times import FetchTimes
from lightning_gr.observability.time_shares import exposed_exchanges, spans_of, total
from lightning_gr.plugins.stage_log import StageLog

_MOST_STEPS = 1_000
_FEWEST_JUDGED = 10
_WORK = ("tokens", "flops", "busy")
_TIMES = ("wall", "data", "exchange")
_STRATEGY = "trainer.strategy.init_args"


class BalanceMonitor(pl.Callback):
    """Logs how even the ranks' work is, and how much of the time ranks wait for each other, for data, for exchanges.

    Written to every logger whenever Lightning logs, of the steps since the log before (of the latest 1,000):

    - ``gr/imbalance_tokens``, ``gr/imbalance_flops``: a step's largest work of a rank over the ranks' mean; the mean
      over steps. FLOPs are those of the module's ``flops(batch)``; without it they are left out.
    - ``gr/wait_share``, ``gr/wait_share_max``: of the time for which each step's busiest rank is busy, what a rank is
      not; the mean over ranks, and of the rank that waits most. ``gr/slowest_rank``: the rank that is busy longest.
    - ``gr/data_wait_share``: of the time of training, what the training thread waits for batches to be fetched; the
      mean over ranks. Evaluations, checkpoints and other callbacks do not count as training.
    - ``gr/exposed_exchange_share``: likewise what it waits for ids and rows that ranks exchange, as far as the stage
      log of `SequenceBalancedStrategy` knows it; with other strategies, and without its pipeline, it is left out.

    On the CPU a rank is busy for the CPU time of its training thread: waiting for others takes none. On a GPU it is the
    time between device events around the forward, which has little waiting in it but that for exchanged rows; they are
    read at log steps only. Waits for data and exchanges are the host's. The first step of a fit starts loaders and
    devices, and is not timed.

    A share above its limit is warned of once, with the setting to change.

    Args:
        max_wait_share: limit of ``gr/wait_share_max``.
        max_data_wait_share: limit of the data wait's share on the rank that has most of it.
        max_exchange_share: limit of ``gr/exposed_exchange_share``.

    Raises:
        MisconfigurationException: a limit is not between 0 and 1.
    """

    def __init__(
        self, *, max_wait_share: float = 0.15, max_data_wait_share: float = 0.1, max_exchange_share: float = 0.1
    ) -> None:
        self.max_wait_share = max_wait_share
        self.max_data_wait_share = max_data_wait_share
        self.max_exchange_share = max_exchange_share
        for name in ("max_wait_share", "max_data_wait_share", "max_exchange_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise MisconfigurationException(f"{name}={getattr(self, name)}: expected a share, from 0 to 1")
        self._fetches: FetchTimes | None = None
        self._steps: deque[_Step] = deque(maxlen=_MOST_STEPS)
        self._times = dict.fromkeys(_TIMES, 0.0)
        self._position = 0  # in the stage log
        self._is_timed = False
        self._began: float | torch.cuda.Event = 0.0
        self._forward_ended: torch.cuda.Event | None = None
        self._batch_began = 0.0
        self._judged = _Judged()
        self._warned: set[str] = set()

    # ---- hooks -------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fetches = FetchTimes(trainer)
        self._steps.clear()
        self._times = dict.fromkeys(_TIMES, 0.0)
        self._judged, self._is_timed = _Judged(), False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_began, self._forward_ended = time.perf_counter(), None
        self._began = _event() if pl_module.device.type == "cuda" else time.thread_time()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if isinstance(self._began, torch.cuda.Event) and self._forward_ended is None:
            self._forward_ended = _event()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Counted as Lightning decides on log steps, so that all ranks have as many of them.
        number = trainer.fit_loop.epoch_loop._batches_that_stepped
        if not self._steps or self._steps[-1].number != number:
            self._steps.append(_Step(number, is_timed=self._is_timed))
        step = self._steps[-1]
        if isinstance(self._began, float):
            step.seconds += time.thread_time() - self._began
        else:
            step.forwards.append((self._began, self._forward_ended or _event()))
        counts, flops = work_of(pl_module, batch)
        step.tokens += math.nan if counts.tokens is None else counts.tokens
        step.flops += _number(flops)
        assert self._fetches is not None
        self._add_times(self._fetches.take())
        if is_log_step(trainer):
            self._log(trainer)
        if not self._is_timed and not trainer.fit_loop._should_accumulate():
            self._is_timed = True
            log = _stage_log(trainer)
            self._position = 0 if log is None else log.position

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._fetches is not None:
            self._fetches.detach()
        self._fetches = None
        self._steps.clear()

    # ---- windows -----------------------------------------------------------------------------------------------

    def _add_times(self, fetches: list[tuple[float, float]]) -> None:
        """Of a batch, from the moment at which it was asked for to its end."""
        if self._is_timed:
            # A training step that takes an iterator fetches inside; a loader without a length, one batch more at first.
            began = min([self._batch_began, *(start for start, _ in fetches[-1:])])
            self._times["wall"] += time.perf_counter() - began + total(x for x in fetches if x[1] <= began)
            self._times["data"] += total(fetches)

    def _log(self, trainer: pl.Trainer) -> None:
        own = dict(self._times) | self._of_stages(trainer)
        own["has steps"] = float(len(self._steps))
        for name, values in zip(_WORK, self._work(), strict=True):
            own |= {f"{name} {number}": value for number, value in enumerate(values)}
        ranks = by_rank(own)
        work = {name: [ranks[f"{name} {number}"] for number in range(len(self._steps))] for name in _WORK}
        timed = [busy for busy, step in zip(work["busy"], self._steps, strict=True) if step.is_timed]
        window = _Judged(
            steps=len(timed),
            busy=[math.fsum(x) for x in zip(*timed, strict=True)],
            busiest=math.fsum(max(x) for x in timed),
            **{name: ranks[name] for name in _TIMES},
        )
        imbalances = {f"imbalance_{name}": _imbalance(work[name]) for name in ("tokens", "flops")}
        found = imbalances | window.shares()
        log_values(trainer, {f"gr/{name}": value for name, value in found.items() if not math.isnan(value)})
        self._judged = window if not self._judged.steps else self._judged + window
        if self._judged.steps >= _FEWEST_JUDGED:
            self._warn(trainer, self._judged, imbalances)
            self._judged = _Judged()
        self._steps.clear()
        self._times = dict.fromkeys(_TIMES, 0.0)

    def _of_stages(self, trainer: pl.Trainer) -> dict[str, float]:
        """What the pipeline's own log tells of this window, in place of the loop's calls of the loader."""
        log = _stage_log(trainer)
        events = [] if log is None or not self._is_timed else log.since(self._position)
        if log is not None:
            self._position = log.position
        if not any(event.stage == "await_lookup" for event in events):
            return {"exchange": math.nan}
        return {"data": total(spans_of(events, "await_fetch")), "exchange": total(exposed_exchanges(events))}

    def _work(self) -> tuple[list[float], list[float], list[float]]:
        """Tokens, FLOPs and busy seconds of this rank's steps; here the host waits for the device."""
        flops: list[Any] = [step.flops for step in self._steps]
        there = [number for number, value in enumerate(flops) if isinstance(value, Tensor)]
        if there:
            for number, value in zip(there, torch.stack([flops[x] for x in there]).tolist(), strict=True):
                flops[number] = value
        return [step.tokens for step in self._steps], flops, [step.busy() for step in self._steps]

    # ---- warnings ----------------------------------------------------------------------------------------------

    def _warn(self, trainer: pl.Trainer, judged: _Judged, imbalances: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        ours = hasattr(trainer.strategy, "stage_log")
        shares = judged.shares()
        if shares["wait_share_max"] > self.max_wait_share:
            slow, fast = (judged.busy.index(extreme(judged.busy)) for extreme in (max, min))
            uneven = max([1.0, *(x for x in imbalances.values() if not math.isnan(x))])
            work = f"largest work over mean {uneven:.2f}"
            if uneven < 1 + self.max_wait_share / 2:
                remedy = f"its work is even ({work}), so look at what else its machine does"
            elif ours:
                remedy = f"{work}; set {_STRATEGY}.balancing, see docs/strategy.md"
            else:
                remedy = f"{work}; use lightning_gr.plugins.SequenceBalancedStrategy"
            said = (
                f"rank {slow} is the slowest, and rank {fast} waits for {shares['wait_share_max']:.0%} of the time for "
                f"which each step's slowest is busy; {remedy}"
            )
            self._say("wait_share_max", said)
        data = judged.share_of(judged.data)
        if max(data, default=0.0) > self.max_data_wait_share:
            more = f"raise data.init_args.num_workers{f' or {_STRATEGY}.pipeline_depth' if ours else ''}"
            self._say(
                "data_wait_share",
                f"rank {data.index(max(data))} waits for data for {max(data):.0%} of its training time; {more}, or "
                "read from an event store (lightning-gr prepare)",
            )
        if (exposed := shares["exposed_exchange_share"]) > self.max_exchange_share:
            self._say(
                "exposed_exchange_share",
                f"ranks wait for ids and rows of tables for {exposed:.0%} of their training time; set {_STRATEGY}."
                "sparse_update to semi_async or exact_async, schedule to six_stage, or table_groups to the number of "
                "machines, see docs/communication.md",
            )

    def _say(self, name: str, said: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(f"BalanceMonitor: gr/{name}: {said}. This is said once")


@dataclass
class _Step:
    """What one optimizer step was on this rank.

    Args:
        number: of the step.
        is_timed: whether its times count.
        tokens: of its batches; NaN where they do not tell.
        flops: of its batches, on a device where masks are.
        seconds: CPU time.
        forwards: device events around forwards.
    """

    number: int
    is_timed: bool
    tokens: float = 0.0
    flops: float | Tensor = 0.0
    seconds: float = 0.0
    forwards: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def busy(self) -> float:
        """Seconds; waits for the device."""
        for _, end in self.forwards[-1:]:
            end.synchronize()
        return self.seconds + sum(start.elapsed_time(end) for start, end in self.forwards) / 1e3


@dataclass
class _Judged:
    """Times of some steps, by rank.

    Args:
        steps: how many.
        busy: seconds.
        busiest: seconds of each step's busiest rank.
        wall: seconds of training.
        data: of these, waiting for data.
        exchange: of these, waiting for exchanges; NaN where nobody knows.
    """

    steps: int = 0
    busy: list[float] = field(default_factory=list)
    busiest: float = 0.0
    wall: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    exchange: list[float] = field(default_factory=list)

    def __add__(self, other: _Judged) -> _Judged:
        lists = {
            name: [x + y for x, y in zip(getattr(self, name), getattr(other, name), strict=True)]
            for name in ("busy", *_TIMES)
        }
        return _Judged(steps=self.steps + other.steps, busiest=self.busiest + other.busiest, **lists)

    def share_of(self, seconds: list[float]) -> list[float]:
        """Of the time of training, by rank."""
        return [x / wall if wall else math.nan for x, wall in zip(seconds, self.wall, strict=True)]

    def shares(self) -> dict[str, float]:
        """What is logged; NaN where nothing was timed."""
        waits = [1 - busy / self.busiest if self.busiest else math.nan for busy in self.busy]
        return {
            "wait_share": _mean(waits),
            "wait_share_max": max(waits, default=math.nan),
            "slowest_rank": float(self.busy.index(max(self.busy))) if self.busiest else math.nan,
            "data_wait_share": _mean(self.share_of(self.data)),
            "exposed_exchange_share": _mean(self.share_of(self.exchange)),
        }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _imbalance(steps: list[list[float]]) -> float:
    """The mean over steps that have work of the largest rank's over the mean; NaN where a rank does not know."""
    return _mean([max(ranks) * len(ranks) / sum(ranks) for ranks in steps if sum(ranks) != 0])


def _number(flops: Any) -> Any:
    """What a module's ``flops(batch)`` comes to; NaN where it does not say."""
    if flops is None:
        return math.nan
    return flops.model if isinstance(flops, ForwardFlops) else flops


def _stage_log(trainer: pl.Trainer) -> StageLog | None:
    """Of `SequenceBalancedStrategy`; other strategies have none."""
    return getattr(trainer.strategy, "stage_log", None)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
