"""Means over seeds with intervals of confidence by Student's t, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and the half width of its interval of confidence; None of fewer than two values."""

    mean: float
    half_width: float | None

    @property
    def lower(self) -> float | None:
        """The interval's lower end."""
        return None if self.half_width is None else self.mean - self.half_width

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval by Student's t.

    Args:
        values: one a seed, at least one.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    if not all(map(math.isfinite, values)):
        return Interval(mean, math.nan)
    return Interval(mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """The differences to the base of the seeds that both have.

    Args:
        values: a metric by seed.
        base: the same of the recipe that is compared with.
    """
    return {seed: value - base[seed] for seed, value in values.items() if seed in base}


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t within which Student's distribution has this probability on both sides of 0.

    Args:
        freedom: degrees of freedom, a whole number of at least 1.
        confidence: the probability, between 0 and 1.
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), the finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
