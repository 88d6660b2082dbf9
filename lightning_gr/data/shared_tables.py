"""Shared tables: codes of features that look up one table, so that equal values have one row.

Shape suffixes: V values of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data import parquet_file
from lightning_gr.data.declared_features import DeclaredFeature
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import ITEM, USER, VOCABULARY
from lightning_gr.data.raw_ids import raw_key

if TYPE_CHECKING:
    import polars as pl

Array = np.ndarray[Any, Any]
_MISSING = "a missing value of a shared table"


@dataclass(frozen=True)
class TableCodes:
    """How features look up their tables.

    Args:
        rows: by sparse feature, the rows of its table.
        of_code: by feature whose codes are not yet those of its table, what each becomes, int64 (V,).
    """

    rows: dict[str, int]
    of_code: dict[str, Array]

    def __call__(self, name: str, codes: Array) -> Array:
        """Codes of a feature as its table's."""
        return self.of_code[name][codes] if name in self.of_code else codes


def table_codes(
    store: EventStore, features: Sequence[DeclaredFeature], keys: Mapping[str, Array | None] | None = None
) -> TableCodes:
    """Puts the vocabularies of features that share a table together, value by value.

    The codes of the feature that names most stay, those of ids in any case; values that it does not have follow.

    Args:
        store: whose vocabularies they are; codes without one stand for themselves.
        features: sparse ones count.
        keys: for `item_id` and `user_id`, the int64 that batches carry in place of rows; None carries rows.

    Raises:
        ValueError: vocabularies that cannot mean the same, with the features and the table.
    """
    members: dict[str, list[DeclaredFeature]] = {}
    for feature in features:
        if feature.kind == "sparse":
            members.setdefault(feature.table, []).append(feature)
    rows: dict[str, int] = {}
    of_code: dict[str, Array] = {}
    for own in members.values():
        if len(own) == 1:
            rows[own[0].name] = own[0].cardinality
            continue
        joint, codes = _joint(store, own)
        base = _base(own)
        raw = (keys or {}).get(base.name) is not None
        for feature in own:
            rows[feature.name] = joint
            if raw:
                if feature is not base:
                    of_code[feature.name] = _keys(_vocabulary(store, feature))
            elif not np.array_equal(codes[feature.name], np.arange(len(codes[feature.name]))):
                of_code[feature.name] = codes[feature.name]
    return TableCodes(rows, of_code)


def _base(features: Sequence[DeclaredFeature]) -> DeclaredFeature:
    return max(features, key=lambda x: (x.name in (ITEM, USER), x.cardinality))


def _joint(store: EventStore, features: Sequence[DeclaredFeature]) -> tuple[int, dict[str, Array]]:
    """How many values all of them have, and by feature the place of each of its values among them."""
    import polars as pl

    base = _base(features)
    values = {feature.name: _vocabulary(store, feature) for feature in features}
    known = values[base.name].alias("value").to_frame().with_row_index("code")
    codes = {base.name: np.arange(len(known), dtype=np.int64)}
    for feature in features:
        if feature is base:
            continue
        own = values[feature.name]
        where = f"features.{feature.name}: shares table {feature.table} with {base.name}"
        if feature.name in (ITEM, USER):
            raise ValueError(f"{where}, and ids of users are none of items; give each a table of its own")
        remedy = f"in {store.path}; give it a table of its own, or prepare the store with the same values in both"
        if own.dtype != known["value"].dtype:
            raise ValueError(f"{where}, but holds {own.dtype} and the other {known['value'].dtype} {remedy}")
        frame = own.alias("value").to_frame()
        new = frame.join(known, on="value", how="anti", nulls_equal=True, maintain_order="left")
        if len(own.drop_nulls()) and not len(frame.drop_nulls().join(known, on="value", how="semi")):
            raise ValueError(f"{where}, but no value occurs in both {remedy}")
        known = pl.concat([known["value"], new["value"]]).to_frame().with_row_index("code")
        joined = frame.join(known, on="value", how="left", nulls_equal=True, maintain_order="left")
        codes[feature.name] = joined["code"].to_numpy().astype(np.int64)
    return len(known), codes


def _vocabulary(store: EventStore, feature: DeclaredFeature) -> pl.Series:
    """Raw value of each code, Int64 or text; missing ones are null."""
    import polars as pl

    file = store.path / VOCABULARY / f"{feature.name}.parquet"
    if feature.name == USER:
        values = pl.Series(store.users)
    elif file.is_file():
        values = parquet_file.read(file)["value"]
    else:
        values = pl.Series(range(feature.cardinality), dtype=pl.Int64)
    whole = values.dtype.is_integer() and values.dtype != pl.UInt64
    return values.cast(pl.Int64) if whole else values


def _keys(values: pl.Series) -> Array:
    """int64 raw key of each value."""
    missing = values.is_null().to_numpy()
    keys = np.full(len(values), raw_key(np.array([_MISSING]))[0])
    keys[~missing] = raw_key(values.drop_nulls().to_numpy())
    return keys
