"""StartedLookups: the table lookups of one batch that run ahead of its training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class StartedLookups:
    """The table lookups of one batch that run ahead.

    Args:
        phases: what is left to do, in order; each waits for the one before and starts the next exchange.
        undo: forgets what the batch's step did not take up.
    """

    phases: list[Callable[[], None]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def advance(self) -> None:
        """Does the next phase, if one is left."""
        if self.phases:
            self.phases.pop(0)()

    def finish(self) -> None:
        """Does all phases that are left."""
        while self.phases:
            self.advance()

    def drop(self) -> None:
        """Forgets what was not taken up."""
        while self.undo:
            self.undo.pop()()
