"""StartedLookups: the table lookups of one batch that run ahead of its training step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.dynamic_lookup import DynamicLookup


@dataclass
class StartedLookups:
    """The table lookups of one batch that run ahead.

    Args:
        phases: what is left to do, in order; each waits for the one before and starts the next exchange.
        undo: forgets what the batch's step did not take up.
        dynamic: by path of its collection, a batch's lookups of dynamic tables, once the first phase is done.
        is_empty: whether there is nothing to look up ahead.
        arrival: done when the ids have arrived; None where no thread does the phases.
    """

    phases: list[Callable[[], None]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    dynamic: dict[str, list[DynamicLookup]] = field(default_factory=dict)
    is_empty: bool = True
    arrival: Future[None] | None = None

    def advance(self) -> None:
        """Does the next phase, if one is left."""
        if self.phases:
            self.phases.pop(0)()

    def finish(self, *, leave: int = 0) -> None:
        """Does all phases but so many of the last."""
        while len(self.phases) > leave:
            self.advance()

    def wait(self) -> None:
        """Waits until the ids have arrived, or sees to it."""
        if self.arrival is None:
            self.finish()
        else:
            self.arrival.result()

    def drop(self) -> None:
        """Forgets what was not taken up."""
        while self.undo:
            self.undo.pop()()
