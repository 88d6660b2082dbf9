"""The soak's verdict on memory: constant, noisy, growing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("soak")


def test_the_slope_is_that_of_the_line_and_its_interval_covers_it(soak: Any) -> None:
    hours = np.linspace(0.2, 1.0, 2400)
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = soak.slope(list(hours), list(600e6 + 20e6 * hours + draw.normal(0, 3e6, len(hours))))
        covered += abs(found.per_hour - 20e6) <= found.half_width
    assert 180 <= covered <= 199  # 190 are expected


def test_constant_is_what_does_not_grow_by_a_share_that_can_be_told_from_noise(soak: Any) -> None:
    hours = np.linspace(0.2, 1.0, 2400)
    noise = np.random.default_rng(1).normal(0, 3e6, len(hours))

    def is_constant(per_hour: float) -> bool:
        return soak.slope(list(hours), list(600e6 + per_hour * hours + noise)).is_constant

    assert is_constant(0.0)
    assert is_constant(-20e6)
    assert is_constant(3e6)  # half a percent
    assert not is_constant(20e6)


def test_growth_of_counts_is_a_new_most_at_the_end(soak: Any) -> None:
    assert not soak._grows([9, 9, 5, 5, 7, 5, 5, 7], 2)
    assert soak._grows([9, 9, 5, 5, 5, 5, 5, 6], 2)


def test_too_few_samples_are_refused(soak: Any) -> None:
    with pytest.raises(ValueError, match="do not fill"):
        soak.slope([0.0, 1.0], [1.0, 1.0])
