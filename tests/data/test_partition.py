"""Longest-processing-time partition: whole, balanced, deterministic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data.partition import longest_processing_time

COSTS = st.lists(st.integers(0, 50), max_size=30)


@settings(deadline=None)
@given(COSTS, st.integers(1, 6))
def test_each_sample_once_and_balanced(costs: list[int], num_parts: int) -> None:
    parts = longest_processing_time(np.array(costs, dtype=np.int64), num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    for part in parts:
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs, default=0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_within_grahams_bound_of_the_optimum(costs: list[int], num_parts: int) -> None:
    best = min(
        max(sum(c for c, p in zip(costs, deal, strict=True) if p == part) for part in range(num_parts))
        for deal in itertools.product(range(num_parts), repeat=len(costs))
    )
    parts = longest_processing_time(np.array(costs), num_parts)
    assert max(sum(costs[i] for i in part) for part in parts) <= best * (4 / 3 - 1 / (3 * num_parts)) + 1e-9


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_ties_go_to_the_earlier_sample_and_the_lower_part(dtype: type) -> None:
    parts = longest_processing_time(np.array([2, 3, 2, 3, 2, 2, 2], dtype=dtype), 3)
    assert [part.tolist() for part in parts] == [[1, 4], [3, 5], [0, 2, 6]]
