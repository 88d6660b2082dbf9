"""What a sequence costs: a term for its tokens and one for its pairs of tokens.

Shape suffixes: N sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SequenceCost:
    """Cost of a sequence of L tokens: ``linear * L + quadratic * L**2``, in any unit, forward FLOPs for instance.

    Args:
        linear: cost of a token: projections and feed-forward layers.
        quadratic: cost of a pair of tokens: attention.

    Raises:
        ValueError: a coefficient is negative or not finite, or both are 0.
    """

    linear: float
    quadratic: float

    def __post_init__(self) -> None:
        for name in ("linear", "quadratic"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"SequenceCost.{name}={value}: expected a number >= 0")
        if self.linear == self.quadratic == 0:
            raise ValueError(
                "SequenceCost.linear=0 and quadratic=0: every sequence would be free; make one of them > 0"
            )

    def __call__(self, tokens: Array) -> Array:
        """Cost of each sequence, float64, from its tokens."""
        tokens_N = np.asarray(tokens, dtype=np.float64)
        costs_N: Array = (self.linear + self.quadratic * tokens_N) * tokens_N
        return costs_N


TOKENS = SequenceCost(1.0, 0.0)
"""A sequence costs its tokens, as in MTGenRec (arXiv 2505.12663) and TurboGR (arXiv 2605.13433)."""


def fit_cost(tokens: Sequence[Array], seconds: Array) -> SequenceCost:
    """The cost that explains measured step times best, by least squares with coefficients >= 0.

    A step also has a constant part (launches, communication). It is fitted and dropped, since it is the same however
    sequences are dealt out.

    Args:
        tokens: for each step, the tokens of its sequences.
        seconds: for each step, how long it took.

    Returns:
        The cost in seconds.

    Raises:
        ValueError: too few steps, their lengths do not differ, or their times do not grow with length.
    """
    seconds = np.asarray(seconds, dtype=np.float64)
    if len(tokens) != len(seconds) or len(tokens) < 3:
        raise ValueError(f"seconds: expected one for each step, at least 3, got {len(seconds)} for {len(tokens)} steps")
    sums = np.array([[np.sum(x, dtype=np.float64), np.sum(np.square(x, dtype=np.float64))] for x in tokens])
    sums -= sums.mean(0)  # in place of a column of ones
    scale = np.abs(sums).max(0)
    if not scale.any():
        raise ValueError(f"tokens: all {len(tokens)} steps have the same lengths; measure steps that differ")
    target = seconds - seconds.mean()
    # With two coefficients the best one >= 0 is the least squares over one of three subsets of them.
    best, best_error = np.zeros(2), float(target @ target)
    for chosen in itertools.chain([[0], [1]], [[0, 1]]):
        columns = sums[:, chosen] / np.where(scale > 0, scale, 1)[chosen]
        found, *_ = np.linalg.lstsq(columns, target, rcond=None)
        error = float(np.square(columns @ found - target).sum())
        if found.min() >= 0 and error < best_error:
            best, best_error = np.zeros(2), error
            best[chosen] = found / np.where(scale > 0, scale, 1)[chosen]
    if not best.any():
        raise ValueError("seconds: they do not grow with the steps' tokens; measure longer, after the first steps")
    return SequenceCost(float(best[0]), float(best[1]))


def cost_of(module: object) -> SequenceCost:
    """What ``module.sequence_cost()`` says, or `TOKENS` where a module has no such method.

    Args:
        module: a LightningModule or any other object.

    Raises:
        ValueError: the method returns something else.
    """
    ask = getattr(module, "sequence_cost", None)
    if not callable(ask):
        return TOKENS
    cost = ask()
    if not isinstance(cost, SequenceCost):
        raise ValueError(
            f"{type(module).__name__}.sequence_cost(): expected a lightning_gr.balancing.SequenceCost, got {cost!r}"
        )
    return cost
