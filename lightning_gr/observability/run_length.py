"""How much of a training run is left: batches, and tokens where the training loader knows them."""

from __future__ import annotations

import math
from collections.abc import Callable

import lightning.pytorch as pl


def batches_left_of(trainer: pl.Trainer, done: int) -> int | None:
    """Batches until a run ends; None where nobody can know.

    Args:
        trainer: of the run, after a batch.
        done: batches trained, those before a resume included.
    """
    automatic = trainer.lightning_module.automatic_optimization
    max_steps = trainer.max_steps
    if not automatic and max_steps >= 0:
        # A module that steps itself takes any number of steps a batch: count in batches, at the ratio so far.
        max_steps = math.ceil(max_steps * done / trainer.global_step) if trainer.global_step else -1
    return batches_left(
        batches_per_epoch=trainer.num_training_batches,
        batch=trainer.fit_loop.batch_idx + 1,
        epoch=trainer.current_epoch,
        max_epochs=-1 if trainer.max_epochs is None else trainer.max_epochs,
        step=trainer.global_step if automatic else done,
        max_steps=max_steps,
        accumulate=trainer.accumulate_grad_batches if automatic else 1,
    )


def batches_left(
    *,
    batches_per_epoch: int | float,
    batch: int,
    epoch: int,
    max_epochs: int,
    step: int,
    max_steps: int,
    accumulate: int,
) -> int | None:
    """Batches until a run ends; None where nobody can know.

    Args:
        batches_per_epoch: infinite where the loader has no length.
        batch: batches done in this epoch.
        epoch: finished epochs.
        max_epochs: epochs of the run, or -1.
        step: optimiser steps done.
        max_steps: optimiser steps of the run, or -1.
        accumulate: batches a step; an epoch's last step may have fewer.
    """
    left: list[int] = []
    known = math.isfinite(batches_per_epoch)
    in_epoch = max(int(batches_per_epoch) - batch, 0) if known else 0
    if known and max_epochs >= 0:
        left.append(in_epoch + max(max_epochs - epoch - 1, 0) * int(batches_per_epoch))
    if max_steps >= 0:
        steps = max(max_steps - step, 0)
        if not known:
            left.append(max(steps * accumulate - batch % accumulate, 0))
        elif batches_per_epoch > 0:
            steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
            steps_in_epoch = steps_per_epoch - batch // accumulate if in_epoch else 0
            if steps <= steps_in_epoch:
                left.append(max(min(steps * accumulate - batch % accumulate, in_epoch), 0))
            else:
                epochs, rest = divmod(steps - steps_in_epoch, steps_per_epoch)
                rest = min(rest * accumulate, int(batches_per_epoch))
                left.append(in_epoch + epochs * int(batches_per_epoch) + rest)
    return min(left, default=None)


def tokens_of(trainer: pl.Trainer, left: int) -> tuple[float, float] | None:
    """Tokens of the batch just trained and of those left, on all ranks; None where the loader does not know.

    A loader that knows has ``tokens_before(batches)``: the tokens of an epoch's first batches.

    Args:
        trainer: of the run, after a batch.
        left: batches until the run ends.
    """
    before: Callable[[int], float] | None = getattr(trainer.train_dataloader, "tokens_before", None)
    if before is None or not math.isfinite(trainer.num_training_batches):
        return None
    per_epoch, batch = int(trainer.num_training_batches), trainer.fit_loop.batch_idx + 1
    end = min(batch + left, per_epoch)
    epochs, rest = divmod(left - (end - batch), per_epoch)
    return before(batch) - before(batch - 1), before(end) - before(batch) + epochs * before(per_epoch) + before(rest)
