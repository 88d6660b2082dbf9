"""Interactions against a log kept in plain Python."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import Interactions

EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(-50, 50)), min_size=1, max_size=40)


def table(events: list[tuple[Any, Any]], times: list[int] | None = None) -> pl.DataFrame:
    frame = pl.DataFrame(events, schema=["user_id", "item_id"], orient="row")
    column = pl.Series("timestamp", times if times is not None else [None] * len(events), dtype=pl.Int64)
    return frame.with_columns(column).sort("user_id", "timestamp", maintain_order=True)


@settings(deadline=None)
@given(EVENTS, st.booleans())
def test_every_event_is_kept_in_order(events: list[tuple[int, int]], text: bool) -> None:
    named = [(f"u{user}", f"i{item}") for user, item in events] if text else events
    log = Interactions.from_events(table(named))
    expected: dict[Any, list[Any]] = {user: [] for user in sorted({user for user, _ in named})}
    for user, item in named:
        expected[user].append(item)
    assert log.users.tolist() == list(expected)
    assert log.item_ids.tolist() == sorted({item for _, item in named})
    assert log.num_items == len(log.item_ids)
    assert log.offsets.dtype == log.items.dtype == np.int64
    for row, items in enumerate(expected.values()):
        assert log.item_ids[log.items[log.offsets[row] : log.offsets[row + 1]]].tolist() == items
    assert log.offsets[-1] == len(named)
    assert log.timestamps is None


def test_times_follow_their_events() -> None:
    log = Interactions.from_events(table([(1, 5), (0, 6), (1, 7)], [9, 8, 4]))
    assert log.timestamps is not None
    assert log.timestamps.tolist() == [8, 4, 9]
    assert log.item_ids[log.items].tolist() == [6, 7, 5]


def test_fingerprint_is_that_of_the_content() -> None:
    log = Interactions.from_events(table([("a", 5), ("a", 6), ("b", 5)], [1, 2, 3]))
    assert log.fingerprint == FINGERPRINT
    assert log.timestamps is not None
    changes: list[dict[str, Any]] = [
        {"users": np.array(["a", "c"], dtype=object)},
        {"offsets": np.array([0, 1, 3])},
        {"items": np.array([0, 1, 1])},
        {"timestamps": log.timestamps + 1},
        {"timestamps": None},
        {"item_ids": log.item_ids + 1},
    ]
    assert len({replace(log, **change).fingerprint for change in changes} | {log.fingerprint}) == 7


FINGERPRINT = "2d4554b270bad223cdaa38f8655cf5a6"
"""Computed once; another value on another machine or version would refuse every older checkpoint."""
