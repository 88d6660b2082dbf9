"""Figures of a paper beside simulated ones, and how a number is calibrated so that one of them agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["calibrated", "fitted", "predicted"]
"""What a simulation was made to agree with; with one number for many figures; with nothing."""


@dataclass(frozen=True)
class Figure:
    """A published number and the simulated one.

    Args:
        table: where it stands.
        name: of the figure.
        published: the paper's, in the table's unit.
        simulated: ours.
        kind: whether it is a prediction.
    """

    table: str
    name: str
    published: float
    simulated: float
    kind: Kind = "predicted"

    @property
    def error(self) -> float:
        """Relative; of what is published as 0 the difference."""
        return (self.simulated - self.published) / (abs(self.published) or 1.0)


def mean_error(figures: Iterable[Figure], *, table: str, name: str = "", kind: Kind = "predicted") -> float:
    """Mean of the absolute relative errors of a table's figures whose names begin so."""
    errors = [abs(x.error) for x in figures if x.table == table and x.name.startswith(name) and x.kind == kind]
    return sum(errors) / len(errors)


def solve(of: Callable[[float], float], wanted: float, low: float, high: float, *, steps: int = 20) -> float:
    """Where a function that rises has a value, by the secant's rule kept inside a bracket.

    Raises:
        ValueError: the value is not between those at the ends.
    """
    below, above = of(low) - wanted, of(high) - wanted
    if below > 0 or above < 0:
        raise ValueError(f"{wanted}: of({low})={below + wanted}, of({high})={above + wanted}: expected one a side")
    for number in range(steps):
        share = -below / (above - below) if above > below else 0.5
        share = share if number % 3 < 2 else 0.5
        middle = low + (high - low) * share
        error = of(middle) - wanted
        if abs(error) <= 1e-4 * abs(wanted):
            return middle
        if error < 0:
            low, below = middle, error
        else:
            high, above = middle, error
    return (low + high) / 2
