"""What a time map is as a function of the gap between two times: a table of buckets, or a formula of few parameters.

Shape suffixes: H heads, N time buckets, K parameters (or buckets) of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lightning_gr.ops.hstu_attention.cpu import time_thresholds

# The exponent of e in gap^beta; beyond it the decay is 0 for every gamma below 1, and float32 overflows soon after.
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class TimeFunction:
    """``f(gap)`` of each head, ``gap = |t_i - t_j|`` in whole seconds. Use the constructors.

    Args:
        kind: which function.
        parameters_KH: its learned numbers, float: a row a bucket, or a row a parameter in the formula's order.
        unit: seconds of one unit of the gap in a formula; a day (86400) keeps powers of the gap near 1.
        bucket_width: width of a bucket in natural-log seconds.
    """

    kind: Literal["buckets", "power_law", "exponential_power"]
    parameters_KH: Tensor
    unit: float = 1.0
    bucket_width: float = 0.301

    def __post_init__(self) -> None:
        table = self.parameters_KH
        if table.dim() != 2 or table.shape[0] < 1 or not table.is_floating_point():
            raise ValueError(
                f"parameters_KH: expected floats (rows, heads), got {table.dtype} of shape {tuple(table.shape)}"
            )
        rows = {"power_law": 2, "exponential_power": 3}.get(self.kind, table.shape[0])
        if self.kind not in ("buckets", "power_law", "exponential_power"):
            raise ValueError(f"kind: expected 'buckets', 'power_law' or 'exponential_power', got {self.kind!r}")
        if table.shape[0] != rows:
            raise ValueError(f"parameters_KH: expected {rows} rows for kind={self.kind!r}, got {table.shape[0]}")
        for name in ("unit", "bucket_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    @classmethod
    def buckets(cls, table_NH: Tensor, width: float = 0.301) -> TimeFunction:
        """``table[min(floor(ln(max(1, gap)) / width), N - 1)]``: FuXi-alpha (arXiv 2502.03036), as in HSTU."""
        return cls("buckets", table_NH, bucket_width=width)

    @classmethod
    def power_law(cls, a_H: Tensor, b_H: Tensor, unit: float = 1.0) -> TimeFunction:
        """``a (1 + gap)^(-b)``: FuXi-beta's functional relative bias (arXiv 2508.10615)."""
        return cls("power_law", torch.stack([a_H, b_H]), unit=unit)

    @classmethod
    def exponential_power(cls, alpha_H: Tensor, beta_H: Tensor, gamma_H: Tensor, unit: float = 1.0) -> TimeFunction:
        """``alpha gamma^(gap^beta)``: FuXi-gamma's exponential-power temporal encoder (arXiv 2512.12740).

        Args:
            alpha_H: strength.
            beta_H: power of the gap, above 0.
            gamma_H: decay, in (0, 1).
            unit: seconds of one unit of the gap.
        """
        return cls("exponential_power", torch.stack([alpha_H, beta_H, gamma_H]), unit=unit)

    def __call__(self, gap: Tensor) -> Tensor:
        """``f`` of every gap (...), int64 and at least 0: (H, ...), the dtype of the parameters.

        Values and gradients are finite at a gap of 0, where the formulas give ``a`` and ``alpha``.
        """
        parameters = self.parameters_KH
        if self.kind == "buckets":
            return parameters.T[:, torch.searchsorted(self.first_gaps()[1:], gap, right=True)]
        column = (-1, *(1 for _ in gap.shape))
        x = gap.to(parameters.dtype) / self.unit
        if self.kind == "power_law":
            a, b = (row.view(column) for row in parameters)
            return a * torch.exp(-b * torch.log1p(x))
        alpha, beta, gamma = (row.view(column) for row in parameters)
        # ln 0 and its slope are never computed: torch.where passes 0 to the branch that is not taken.
        exponent = (beta * torch.log(torch.where(x == 0, 1.0, x))).clamp(max=LARGEST_EXPONENT)
        power = torch.where(x == 0, 0.0, torch.exp(exponent))
        return alpha * torch.exp(power * torch.log(gamma))

    def first_gaps(self) -> Tensor:
        """The smallest gap of each bucket, int64 (N,), on the parameters' device."""
        return _first_gaps(self.parameters_KH.shape[0], self.bucket_width, self.parameters_KH.device)


@lru_cache(maxsize=16)
def _first_gaps(num_buckets: int, width: float, device: torch.device) -> Tensor:
    return time_thresholds(num_buckets, width).to(device, non_blocking=True)
