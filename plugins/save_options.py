"""SaveOptions: how a checkpoint is saved, given to ``Trainer.save_checkpoint`` as ``storage_options``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a checkpoint is saved.

    Args:
        background: whether training goes on while files are written. What belongs to the step is copied before; rows
            of dynamic tables are copied only where training is about to change one that is not written yet.
        full_every: every so many checkpoints hold all rows of dynamic tables, those between only what has changed
            since the one before; 1 makes all of them full.
        max_copied_bytes: of rows kept aside on each process; beyond that training waits for the writer.
        attempt: how many runs have begun to save into the folder, this one included; checkpoints of a later one count
            as newer.
        still_ours: called before anything is written and before the checkpoint becomes one; raises where another run
            has taken over the folder.
    """

    background: bool = False
    full_every: int = 1
    max_copied_bytes: int = 1 << 30
    attempt: int = 0
    still_ours: Callable[[], None] | None = None
