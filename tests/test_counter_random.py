"""Counter-based random numbers: independent of order and batch, and random enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.counter_random import counter_bits, counter_integers, counter_uniform, mix64, name_key


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 40), st.integers(0, 40))
def test_a_value_does_not_depend_on_what_is_drawn_with_it(seed: int, row: int, column: int) -> None:
    together = counter_bits(seed, torch.arange(41)[:, None], torch.arange(41))
    assert together[row, column] == counter_bits(seed, row, column)


def test_the_finaliser_is_murmurhash3s() -> None:
    # Known answers of fmix64, computed here with Python's unbounded integers.
    def fmix64(value: int) -> int:
        mask = (1 << 64) - 1
        value ^= value >> 33
        value = value * 0xFF51AFD7ED558CCD & mask
        value ^= value >> 33
        value = value * 0xC4CEB9FE1A85EC53 & mask
        return value ^ value >> 33

    values = [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567]
    mixed = mix64(torch.tensor(values))
    assert [value % 2**64 for value in mixed.tolist()] == [fmix64(value % 2**64) for value in values]


def test_uniform_numbers_fill_the_interval_evenly_and_without_correlation() -> None:
    x = counter_uniform(3, name_key("t"), torch.arange(2000)[:, None], torch.arange(50))
    assert x.min() > 0
    assert x.max() < 1
    counts = torch.histc(x.float(), bins=20, min=0, max=1)
    expected = x.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    for neighbours in (x[:, :-1] * x[:, 1:], x[:-1] * x[1:]):
        assert neighbours.mean().item() == pytest.approx(0.25, abs=0.004)


def test_names_seeds_and_parts_give_other_numbers() -> None:
    draws = [counter_bits(*parts).item() for parts in ((0, 1), (1, 0), (0, 2), (name_key("a"), 1), (name_key("b"), 1))]
    assert len(set(draws)) == len(draws)


def test_integers_stay_below_their_bound() -> None:
    assert set(counter_integers(3, 0, torch.arange(1000)).tolist()) == {0, 1, 2}
    assert counter_integers(1, 0, torch.arange(10)).max() == 0
    with pytest.raises(ValueError, match="high"):
        counter_integers(0, 1)
