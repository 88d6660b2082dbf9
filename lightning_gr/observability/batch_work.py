"""The work of the batch that has just been trained, counted once however many monitors ask for it."""

from __future__ import annotations

from typing import Any
from weakref import ref

import lightning.pytorch as pl

from lightning_gr.observability.batch_counts import BatchCounts

_last: tuple[ref[Any], ref[Any], BatchCounts, Any] | None = None


def work_of(module: pl.LightningModule, batch: Any) -> tuple[BatchCounts, Any]:
    """How much a batch holds, and what the module's ``flops(batch)`` says of it; None of a module without.

    Args:
        module: what trains the batch.
        batch: as the loader gives it.
    """
    global _last
    if _last is not None and _last[0]() is batch and _last[1]() is module:
        return _last[2], _last[3]
    count: Any = getattr(module, "flops", None)
    found = BatchCounts.of(batch), None if count is None else count(batch)
    try:
        _last = (ref(batch), ref(module), *found)
    except TypeError:  # lists and dictionaries, which are counted at once
        _last = None
    return found
