"""SequenceCost: its values, its fit to measured times, and where a module's comes from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.balancing import TOKENS, SequenceCost, cost_of, fit_cost


def test_costs_of_lengths() -> None:
    costs = SequenceCost(3.0, 0.5)(np.array([0, 1, 2, 3_000_000_000]))
    assert costs.dtype == np.float64
    assert costs.tolist() == [0, 3.5, 8, 3 * 3e9 + 0.5 * 9e18]
    assert TOKENS(np.array([7, 1], dtype=np.int32)).tolist() == [7, 1]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_bad_coefficients_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^SequenceCost.{name}={value}: expected a number >= 0"):
        SequenceCost(**({"linear": 1.0, "quadratic": 1.0} | {name: value}))


def test_a_cost_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^SequenceCost.linear=0 and quadratic=0: "):
        SequenceCost(0.0, 0.0)


def steps_of(seed: int, count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 2000, rng.integers(0, 12)) for _ in range(count)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1e-2), st.floats(0, 1e4))
def test_exact_times_give_the_cost_back(seed: int, linear: float, quadratic: float, constant: float) -> None:
    if linear + quadratic < 1e-3:
        linear = 1.0
    tokens = steps_of(seed)
    found = fit_cost(
        tokens, np.array([constant + (linear * x + quadratic * x.astype(float) ** 2).sum() for x in tokens])
    )
    # What matters is what sequences cost.
    lengths = np.array([10, 500, 2000])
    np.testing.assert_allclose(found(lengths), linear * lengths + quadratic * lengths**2.0, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(-1, 1), st.floats(-1e-3, 1e-3))
def test_noisy_times_give_the_non_negative_least_squares(seed: int, linear: float, quadratic: float) -> None:
    tokens = steps_of(seed)
    columns = np.array([[x.sum(), np.square(x).sum()] for x in tokens], dtype=np.float64)
    seconds = columns @ [linear, quadratic] + np.random.default_rng(seed).normal(5, 200, len(tokens))
    columns -= columns.mean(0)  # the best constant for any coefficients
    norms = np.linalg.norm(columns, axis=0)
    columns /= norms
    seconds -= seconds.mean()
    if (columns.T @ seconds <= 0).all():
        with pytest.raises(ValueError, match=r"^seconds: they do not grow"):
            fit_cost(tokens, seconds)
        return
    # The optimum of a convex problem: no coefficient above 0 can be bettered, none at 0 should be raised.
    found = fit_cost(tokens, seconds)
    slopes = columns.T @ (seconds - columns @ (np.array([found.linear, found.quadratic]) * norms))
    for slope, coefficient in zip(slopes, (found.linear, found.quadratic), strict=True):
        assert coefficient >= 0
        assert abs(slope) < 1e-6 * np.linalg.norm(seconds) if coefficient else slope <= 0


def test_one_length_alone_gives_a_cost() -> None:
    """Sums of tokens and of squares are then proportional, and either explains the times."""
    found = fit_cost([np.full(count, 100) for count in range(1, 6)], np.arange(1, 6) * 2.0 + 7)
    np.testing.assert_allclose(found(np.array([100])), [2.0])


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ([np.array([1])] * 2, [1.0, 2.0], r"^seconds: .*at least 3, got 2 for 2 steps"),
        ([np.array([1])] * 4, [1.0, 2.0, 3.0], r"^seconds: .*got 3 for 4 steps"),
        ([np.array([1, 5])] * 4, [1.0, 2.0, 3.0, 4.0], r"^tokens: all 4 steps have the same lengths"),
        ([np.array([i]) for i in range(4)], [4.0, 3.0, 2.0, 1.0], r"^seconds: they do not grow"),
    ],
)
def test_measurements_that_say_nothing_are_refused(tokens: list, seconds: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_cost(tokens, np.array(seconds))


def test_a_modules_cost() -> None:
    class Priced:
        def sequence_cost(self) -> SequenceCost:
            return SequenceCost(2.0, 1.0)

    class Wrong:
        def sequence_cost(self) -> float:
            return 2.0

    assert cost_of(Priced()) == SequenceCost(2.0, 1.0)
    assert cost_of(object()) is TOKENS
    with pytest.raises(ValueError, match=r"^Wrong.sequence_cost\(\): expected .*SequenceCost, got 2.0"):
        cost_of(Wrong())
