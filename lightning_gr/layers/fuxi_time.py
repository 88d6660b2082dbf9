"""The time map of a FuXi block: which function of the gap between two events it is, with its learned numbers.

Shape suffixes: H heads, K numbers of a head: buckets, or parameters of a formula.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_gr.ops.fuxi_bias import TimeFunction

TimeFunctionName = Literal["buckets", "power_law", "exponential_power"]

_INIT_STD = 0.02
# A decay of exp(-15) or of 1 - exp(-15) is none or all of it; beyond, float32 has 0 and 1, whose logarithms have no
# gradient.
_LARGEST_RAW = 15.0


class FuXiTimeFunction(nn.Module):
    """``f(gap)`` of each head with parameters that any real number can be, so that an optimiser may step them freely.

    Beyond +-15, where float32 has no more to tell, powers and decays stay as they are and have no gradient.

    Strengths begin as small random numbers, like the entries of a table. Powers of ``power_law`` begin at 1, of
    ``exponential_power`` at 1/2, whose decays begin at ``h / (H + 1)``: with a unit of a day some heads forget within
    hours, some remember for months.

    Args:
        kind: ``buckets`` is FuXi-alpha's table (arXiv 2502.03036), ``power_law`` FuXi-beta's ``a (1 + gap)^(-b)``
            (2508.10615), ``exponential_power`` FuXi-gamma's ``alpha gamma^(gap^beta)`` (2512.12740).
        num_heads: heads.
        num_buckets: rows of ``buckets``; not used by the formulas.
        unit: seconds of one unit of the gap in a formula; not used by ``buckets``.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self, *, kind: TimeFunctionName, num_heads: int, num_buckets: int = 128, unit: float = 86400.0
    ) -> None:
        super().__init__()
        if kind not in get_args(TimeFunctionName):
            raise ValueError(f"time_function={kind!r}: expected one of {', '.join(get_args(TimeFunctionName))}")
        for name, size in (("num_heads", num_heads), ("time_buckets", num_buckets)):
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        if not 0 < unit < math.inf:
            raise ValueError(f"time_unit={unit}: expected seconds above 0")
        self.kind: TimeFunctionName = kind
        self.unit = unit
        if kind == "buckets":
            first_KH = torch.randn(num_buckets, num_heads) * _INIT_STD
        else:
            strength_H = torch.randn(num_heads) * _INIT_STD
            decay_H = torch.arange(1, num_heads + 1) / (num_heads + 1)
            rows = [strength_H, torch.zeros(num_heads)]
            if kind == "exponential_power":
                rows = [strength_H, torch.full((num_heads,), 0.5).log(), decay_H.logit()]
            first_KH = torch.stack(rows)
        self.parameters_KH = nn.Parameter(first_KH)

    def function(self) -> TimeFunction:
        """The function with its present numbers, as `lightning_gr.ops.fuxi_bias.fuxi_bias` takes it."""
        if self.kind == "buckets":
            return TimeFunction.buckets(self.parameters_KH)
        strength_H, *raw = self.parameters_KH
        log_power_H, *logits = (row_H.clamp(-_LARGEST_RAW, _LARGEST_RAW) for row_H in raw)
        if self.kind == "power_law":
            return TimeFunction.power_law(strength_H, log_power_H.exp(), unit=self.unit)
        return TimeFunction.exponential_power(strength_H, log_power_H.exp(), logits[0].sigmoid(), unit=self.unit)

    def unused(self) -> Tensor:
        """Zero, with a gradient of zero for every parameter: DDP waits for all of them."""
        return 0.0 * self.parameters_KH.sum()
