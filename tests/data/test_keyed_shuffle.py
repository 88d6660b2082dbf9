"""Keyed shuffles: every list in an order of its own, to and fro, and no order more likely than another."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data.keyed_shuffle import shuffled


def order_of(size: int, *, key: int = 0, seed: int = 0) -> list[int]:
    places = np.arange(size)
    return shuffled(places, np.full(size, size), np.full(size, key), seed=seed).tolist()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2**40)), min_size=1, max_size=5), st.integers(0, 9))
def test_each_list_is_a_permutation_whatever_stands_beside_it_and_there_is_a_way_back(
    lists: list[tuple[int, int]], seed: int
) -> None:
    places = np.concatenate([np.arange(size) for size, _ in lists])
    sizes = np.concatenate([np.full(size, size) for size, _ in lists])
    keys = np.concatenate([np.full(size, key) for size, key in lists])
    records = shuffled(places, sizes, keys, seed=seed)
    assert shuffled(records, sizes, keys, seed=seed, inverse=True).tolist() == places.tolist()
    first = 0
    for size, key in lists:
        own = records[first : first + size].tolist()
        assert sorted(own) == list(range(size))
        assert own == order_of(size, key=key, seed=seed)
        first += size


def test_all_orders_of_a_short_list_are_as_likely() -> None:
    keys = np.repeat(np.arange(12_000), 4)
    orders = shuffled(np.tile(np.arange(4), 12_000), np.full(48_000, 4), keys, seed=3).reshape(-1, 4)
    counts = Counter(map(tuple, orders.tolist()))
    assert set(counts) == set(permutations(range(4)))
    # Chi-squared of 23 degrees of freedom is above 50 once in a thousand times.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 50


def test_orders_differ_by_seed_key_and_size() -> None:
    orders = [order_of(50), order_of(50, seed=1), order_of(50, key=1), [x for x in order_of(51) if x < 50]]
    assert len({tuple(order) for order in orders}) == 4
    assert abs(np.corrcoef(np.arange(5000), order_of(5000))[0, 1]) < 0.05


def test_a_record_of_a_very_long_list_costs_no_more() -> None:
    places, size = np.arange(1000) * 1_000_003, 2**40
    records = shuffled(places, np.full(1000, size), np.zeros(1000, dtype=np.int64), seed=0)
    assert len(set(records.tolist())) == 1000
    assert 0 <= records.min() <= records.max() < size
    assert (shuffled(records, np.full(1000, size), np.zeros(1000), seed=0, inverse=True) == places).all()
