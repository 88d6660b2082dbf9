"""Leaving an epoch that a resumed run has already finished; corrects what Lightning 2.6 makes of it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop


def leave_finished_epoch(trainer: pl.Trainer, *, unsized: bool = False) -> None:
    """Lets a run resumed from the end of an epoch begin the next one; called before the fit loop resets itself.

    Lightning 2.6 does so by itself only without ``max_steps``: with it, every load counts as a restart within an epoch,
    and the run trains one batch too many in the finished epoch and then skips the epoch that is due.

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
