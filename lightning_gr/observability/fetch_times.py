"""FetchTimes: when the training loop waited for its next batch, whatever the loader is."""

from __future__ import annotations

import time
from collections import deque

import lightning.pytorch as pl

from lightning_gr.observability.time_shares import Span

_HOOKS = ("_on_before_fetch", "_on_after_fetch")


class FetchTimes:
    """Times the training loop's calls of its loader, from now on until `detach`.

    Lightning 2.6 has no hook there but those of its profiler, which the epoch's loop hands to what fetches. They are
    looked up when an epoch begins, so this is made in ``on_train_start``.

    Args:
        trainer: whose training loop.
        capacity: how many spans are kept.

    Attributes:
        spans: the latest calls.
    """

    def __init__(self, trainer: pl.Trainer, *, capacity: int = 10_000) -> None:
        self.spans: deque[Span] = deque(maxlen=capacity)
        self._loop = trainer.fit_loop.epoch_loop
        self._before, self._after = (getattr(self._loop, name) for name in _HOOKS)
        self._began = 0.0
        for name, hook in zip(_HOOKS, (self._begin, self._end), strict=True):
            setattr(self._loop, name, hook)

    def take(self) -> list[Span]:
        """The spans since the call before; they are forgotten."""
        found = list(self.spans)
        self.spans.clear()
        return found

    def detach(self) -> None:
        """The loop gets its own hooks back; others that time it are detached too."""
        for name in _HOOKS:
            vars(self._loop).pop(name, None)

    def _begin(self) -> None:
        self._before()
        self._began = time.perf_counter()

    def _end(self) -> None:
        self.spans.append((self._began, time.perf_counter()))
        self._after()
