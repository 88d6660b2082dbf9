"""Cross features of users, items, categories and previous items: what was known before each event, counted causally.

Shape suffixes: E events of all users together, X (event, category) pairs, W statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_gr.data.event_table import EventTable

Array = np.ndarray[Any, Any]
_PRIOR_EVENTS = 5.0
"""Events that the mean of all labels counts for, beside a user's, item's or pair's own."""


class CrossStatistics:
    """For each event, counts and label means of its user and item, alone and with the item's categories and the last.

    Only events of an earlier time count, of the same user or of anyone for items; events of one time do not see each
    other. This is what a feature store logs with an exposure; where a log has such columns already, use those. All
    events are held in memory.

    Args:
        table: the log, with times.
        labels_E: 0 or 1 of each event in the order of the table; NaN counts as an event without a label.
        categories: offsets (I + 1,) and codes of each item's categories; None leaves out the statistics by category.
        previous: whether the pair of the user's previous item and this one is counted too, over all users. Previous is
            the last in the order of the log of those with an earlier time; having none counts as an item.

    Attributes:
        names: what the columns are.
        values_EW: float32, about -1 to 1.

    Raises:
        ValueError: the log has no times.
    """

    def __init__(
        self,
        table: EventTable,
        labels_E: Array,
        *,
        categories: tuple[Array, Array] | None = None,
        previous: bool = False,
    ) -> None:
        if not table.has_timestamps:
            raise ValueError("cross_statistics: the log has no times, so nothing is known to come before; leave it out")
        groups = [table.read_group(group) for group in range(len(table.group_bounds) - 1)]
        items = np.concatenate([group.items for group in groups]).astype(np.int64)
        times = np.concatenate([group.timestamps for group in groups if group.timestamps is not None])
        users = np.repeat(np.arange(len(table.lengths)), table.lengths)
        known = ~np.isnan(labels_E)
        values = np.where(known, labels_E, 0.0)
        count, total = _before(np.zeros_like(users), times, known.astype(np.float64), values)
        overall_E = (total + 0.5) / (count + 1)
        columns: dict[str, Array] = {}
        keys_of = {"user": users, "item": items}
        if previous:
            keys_of["previous_item"] = _previous(users, items, times) * (int(items.max(initial=0)) + 1) + items
        for name, keys in keys_of.items():
            count, total = _before(keys, times, known.astype(np.float64), values)
            columns[f"{name}_count"], columns[f"{name}_mean"] = _scaled(count, total, overall_E)
        if categories is not None:
            offsets, codes = categories
            sizes = np.diff(offsets)[items]
            event_X = np.repeat(np.arange(len(items)), sizes)
            place_X = np.arange(len(event_X)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            code_X = codes[offsets[items[event_X]] + place_X]
            keys_X = users[event_X] * (int(codes.max(initial=0)) + 1) + code_X
            count, total = _before(keys_X, times[event_X], known[event_X].astype(np.float64), values[event_X])
            scaled = _scaled(count, total, overall_E[event_X])
            for name, of_pair in zip(("user_category_count", "user_category_mean"), scaled, strict=True):
                columns[name] = np.bincount(event_X, of_pair, len(items)) / np.maximum(sizes, 1)
        columns["user_gap"] = _gap(users, times)
        self.names = tuple(columns)
        self.values_EW = np.stack(list(columns.values()), 1).astype(np.float32)


def _scaled(count: Array, total: Array, overall: Array) -> tuple[Array, Array]:
    """Logarithm of counts, and means drawn towards that of everybody, against it."""
    mean = (total + _PRIOR_EVENTS * overall) / (count + _PRIOR_EVENTS)
    return np.log1p(count) / 8, 2 * (mean - overall)


def _before(keys: Array, times: Array, *values: Array) -> list[Array]:
    """Sums of values over the events of the same key and an earlier time."""
    order = np.lexsort((times, keys))
    keys, times = keys[order], times[order]
    new_key = np.diff(keys, prepend=keys[:1] - 1) != 0
    new_time = new_key | (np.diff(times, prepend=times[:1]) != 0)
    places = np.arange(len(keys))
    key_start = np.maximum.accumulate(np.where(new_key, places, 0))
    time_start = np.maximum.accumulate(np.where(new_time, places, 0))
    found = []
    for value in values:
        sums = np.concatenate([[0.0], np.cumsum(value[order])])
        of_event = np.empty(len(keys))
        of_event[order] = sums[time_start] - sums[key_start]
        found.append(of_event)
    return found


def _previous(users: Array, items: Array, times: Array) -> Array:
    """The item of the user's last event of an earlier time, -1 where there is none."""
    new_user = np.diff(users, prepend=-1) != 0
    new_time = new_user | (np.diff(times, prepend=times[:1]) != 0)
    places = np.arange(len(users))
    before = np.maximum.accumulate(np.where(new_time, places, 0)) - 1
    user_start = np.maximum.accumulate(np.where(new_user, places, 0))
    return np.where(before >= user_start, items[np.maximum(before, 0)], -1)


def _gap(users: Array, times: Array) -> Array:
    """Logarithm of the seconds since the user's event before, scaled; 1 for the first."""
    gap = np.diff(times, prepend=times[:1])
    first = np.diff(users, prepend=-1) != 0
    return np.where(first, 1.0, np.log1p(np.maximum(gap, 0)) / 20)
