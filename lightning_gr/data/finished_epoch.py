"""Leaving an epoch that a resumed run has already finished; corrects what Lightning 2.6 makes of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop


def leave_finished_epoch(trainer: pl.Trainer, *, unsized: bool = False) -> None:
    """Lets a run resumed from the end of an epoch begin the next one; called before the fit loop resets itself.

    Lightning 2.6 does so by itself only without ``max_steps``: with it, every load counts as a restart within an epoch,
    and the run trains one batch too many in the finished epoch and then skips the epoch that is due.

    A run that was told to stop within an epoch (``max_steps``, ``max_time``, an early stop) counts that epoch, too, as
    finished. Where the training loader knows its position, the resumed run goes on with the epoch's other batches.

    Args:
        trainer: the run.
        unsized: whether the training loader has no length. From a checkpoint of an epoch's last batch Lightning then
            counts that epoch twice, once when it resets and once when the loader gives nothing more. Its validation,
            which had not run yet, is left out. From a checkpoint that was saved by the hooks at an epoch's end it asks
            for the first batch before it counts the epoch, and so trains on that epoch's data again.
    """
    loop = getattr(trainer, "fit_loop", None)
    if loop is None:
        return
    current = loop.epoch_progress.current
    if current.ready == current.started == current.processed and _was_cut_short(loop):
        for progress in (current, loop.epoch_progress.total):
            progress.processed = progress.completed = progress.started - 1
        _Loop.restarting.fset(loop, True)  # type: ignore[attr-defined]
        return
    if unsized and current.ready == current.started == current.processed == current.completed + 1:
        loop.epoch_progress.increment_completed()
    elif not loop.restarting:
        return
    finished = current.ready == current.started == current.processed
    if unsized and loop.epoch_loop.batch_progress.is_last_batch and current.ready == current.processed + 1:
        loop.epoch_progress.increment_processed()
        loop.epoch_progress.increment_completed()
        finished = True
    if finished:
        # The loop's own setter would keep the restart; this one is that of every other loop, and reaches its children.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]


def _was_cut_short(loop: Any) -> bool:
    """Whether an epoch has batches left which its loader, by the position in the checkpoint, will give."""
    batches = loop.epoch_loop.batch_progress
    return bool(loop._combined_loader_states_to_load) and batches.current.ready > 0 and not batches.is_last_batch
