"""A learning rate that rises over the first steps, then stays or falls: one class that a YAML file can name."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupSchedule(LambdaLR):
    """Linear warm-up, then a constant, cosine, linear or inverse square root rate; step it after every step.

    Step t, counted from 0, of the warm-up has ``(t + 1) / (warmup_steps + 1)`` of the rate, and step `warmup_steps` the
    whole rate. From there `cosine` and `linear` fall to `minimum` at `total_steps` and stay there; `inverse_sqrt` falls
    as ``sqrt((warmup_steps + 1) / (t + 1))``. Every parameter group keeps its ratio to the others. A resumed run goes
    on at its step, with the settings of its configuration.

    Args:
        optimizer: whose rates are set.
        warmup_steps: optimiser steps below the whole rate.
        total_steps: the step at which `cosine` and `linear` end, usually the Trainer's ``max_steps``.
        shape: what follows the warm-up.
        minimum: lower bound after the warm-up, as a fraction of the whole rate.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        total_steps: int | None = None,
        shape: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant",
        minimum: float = 0.0,
    ) -> None:
        if shape not in ("constant", "cosine", "linear", "inverse_sqrt"):
            raise MisconfigurationException(f"shape={shape!r}: expected constant, cosine, linear or inverse_sqrt")
        if warmup_steps < 0:
            raise MisconfigurationException(f"warmup_steps={warmup_steps}: expected at least 0")
        if not 0 <= minimum <= 1:
            raise MisconfigurationException(f"minimum={minimum}: expected a fraction of the rate from 0 to 1")
        if minimum and shape == "constant":
            raise MisconfigurationException(f"minimum={minimum}: shape='constant' never falls; leave it out")
        if shape in ("cosine", "linear"):
            if total_steps is None:
                raise MisconfigurationException(
                    f"total_steps={total_steps}: shape={shape!r} needs the step at which it ends; give the Trainer's "
                    "max_steps"
                )
            if total_steps <= warmup_steps:
                raise MisconfigurationException(
                    f"total_steps={total_steps}: expected more than warmup_steps={warmup_steps}"
                )
        elif total_steps is not None:
            raise MisconfigurationException(f"total_steps={total_steps}: shape={shape!r} has no end; leave it out")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            if shape == "constant":
                return 1.0
            if shape == "inverse_sqrt":
                return max(minimum, math.sqrt((warmup_steps + 1) / (step + 1)))
            assert total_steps is not None
            progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            remaining = 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
            return minimum + (1 - minimum) * remaining

        # A closure, so that a checkpoint holds the step and not the settings.
        super().__init__(optimizer, factor)
