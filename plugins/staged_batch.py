"""StagedBatch: what a pipelined loader hands to Lightning in place of a batch."""

from __future__ import annotations

from typing import Any

from lightning_gr.plugins.started_lookups import StartedLookups


class StagedBatch:
    """A batch that is on its device, with its hooks called; Lightning hands it on without looking inside.

    Args:
        batch: the batch.
        number: of the batch, over all epochs of a fit.
        lookups: that run ahead for it.
    """

    __slots__ = ("batch", "lookups", "number")

    def __init__(self, batch: Any, number: int, lookups: StartedLookups) -> None:
        self.batch, self.number, self.lookups = batch, number, lookups
