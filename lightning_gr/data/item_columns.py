"""ItemColumns: fields of items, read once, as batches of ranking samples take them.

Shape suffixes: I items, W columns of numeric features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gr.data.declared_features import DeclaredFeature
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.shared_tables import TableCodes
from lightning_gr.ranking_features import EVENT_GROUPS

Array = np.ndarray[Any, Any]
_ONE_HOT_MOST = 512
"""Categories of a multi-valued item field, which is given to models as one column a category."""


@dataclass(frozen=True)
class ItemColumns:
    """Fields of items as batches take them.

    Args:
        codes: by sparse field with one value, its code (I,).
        lists: by sparse field with several, offsets (I + 1,) and codes.
        numbers: by group, numeric columns (I, W).
        one_hot: fields with several categories that are columns of `numbers`, which share 1.
    """

    codes: dict[str, Array]
    lists: dict[str, tuple[Array, Array]]
    numbers: dict[str, Array]
    one_hot: frozenset[str]


def item_columns(
    store: EventStore, features: Sequence[DeclaredFeature], codes_of: TableCodes, *, one_hot: bool
) -> ItemColumns:
    """Reads fields of items.

    Args:
        store: whose items they are.
        features: the fields.
        codes_of: how their codes look up tables.
        one_hot: whether fields with several values are numeric columns, and missing numbers 0.

    Raises:
        ValueError: a field with several values has too many categories for columns.
    """
    codes: dict[str, Array] = {}
    lists: dict[str, tuple[Array, Array]] = {}
    hot_names: set[str] = set()
    columns = {group: [np.zeros((store.num_items, 0), dtype=np.float32)] for group in EVENT_GROUPS}
    frame = store.items() if features else None
    for feature in features:
        assert frame is not None
        name, values = feature.name, frame[feature.name]
        if feature.kind == "dense":
            numbers = values.to_numpy().astype(np.float32)
            columns[feature.group].append((np.nan_to_num(numbers) if one_hot else numbers)[:, None])
        elif not feature.several:
            codes[name] = codes_of(name, values.to_numpy().astype(np.int64))
        elif not one_hot:
            offsets, flat = item_categories(store, name)
            lists[name] = (offsets, codes_of(name, flat))
        else:
            if feature.cardinality > _ONE_HOT_MOST:
                raise ValueError(
                    f"features: {name} has {feature.cardinality:,} categories and several an item; by name ranking "
                    f"models take at most {_ONE_HOT_MOST}, so declare it with a FeatureConfig, leave it out or group "
                    "them"
                )
            offsets, flat = item_categories(store, name)
            hot = np.zeros((store.num_items, feature.cardinality), dtype=np.float32)
            hot[np.repeat(np.arange(store.num_items), np.diff(offsets)), flat] = 1.0
            columns[feature.group].append(hot / np.maximum(hot.sum(1, keepdims=True), 1.0))
            hot_names.add(name)
    numbers_of: dict[str, Array] = {group: np.concatenate(parts, 1) for group, parts in columns.items()}
    return ItemColumns(codes, lists, numbers_of, frozenset(hot_names))


def item_categories(store: EventStore, name: str) -> tuple[Array, Array]:
    """Offsets (I + 1,) and codes of an item field's categories."""
    values = store.items()[name]
    if not values.dtype.is_nested():
        return np.arange(store.num_items + 1), values.to_numpy().astype(np.int64)
    sizes = values.list.len().fill_null(0).to_numpy().astype(np.int64)
    return np.concatenate([[0], np.cumsum(sizes)]), values.list.explode().drop_nulls().to_numpy().astype(np.int64)
