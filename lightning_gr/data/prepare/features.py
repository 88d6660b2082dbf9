"""Features of users and items: checked, coded through vocabularies, and joined by id."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data.event_log import Features
from lightning_gr.data.event_store import Field
from lightning_gr.data.prepare import cells
from lightning_gr.data.prepare.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl

KEY = "__key"


class FeatureTable:
    """Features of users or items, ready to be joined to ids.

    Args:
        features: the raw features.
        per: `user` or `item`.
        ids: type of the ids in the log.

    Raises:
        ValueError: a column is missing or has a type that it cannot have; the message names it.
    """

    def __init__(self, features: Features, *, per: Any, ids: pl.DataType) -> None:
        import polars as pl

        raw = features.frame()
        names = [features.key, *features.sparse, *features.dense]
        if missing := [name for name in names if name not in raw.columns]:
            raise ValueError(f"{per} features: no column {missing[0]}; there are {', '.join(raw.columns)[:200]}")
        bad = cells.BadRows(np.ones(len(raw), dtype=bool))
        key = raw[features.key]
        key = cells.text_of(key) if key.dtype == pl.String else key
        columns = [key.cast(ids, strict=False).alias(KEY)]
        self.vocabularies: dict[str, Vocabulary] = {}
        self.fields: list[Field] = []
        self.ambiguous = self.useless = 0
        for name in features.sparse:
            columns.append(_categories(raw[name], name, bad).alias(name))
        for name in features.dense:
            columns.append(cells.numbers(raw[name], name, bad)[0].alias(name))
        frame = pl.DataFrame(columns)
        frame = frame.filter(pl.col(KEY).is_not_null())
        self.useless = len(raw) - len(frame)
        self._frame = frame.unique(KEY, keep="first", maintain_order=True)
        self.ambiguous = len(frame) - len(self._frame)
        self._sparse, self._dense, self._per = features.sparse, features.dense, per

    def digest(self) -> str:
        """Changes with the features, on one version of the libraries."""
        import polars as pl

        names = repr([(name, str(dtype)) for name, dtype in self._frame.schema.items()])
        lists = [name for name, dtype in self._frame.schema.items() if isinstance(dtype, pl.List)]
        flat = self._frame.with_columns(pl.col(name).hash() for name in lists)
        return hashlib.blake2b(names.encode() + flat.hash_rows().to_numpy().tobytes(), digest_size=16).hexdigest()

    def join(self, ids: pl.Series) -> pl.DataFrame:
        """The raw features of ids, in their order; missing, or empty lists, where an id has none."""
        import polars as pl

        found = ids.alias(KEY).to_frame().join(self._frame, on=KEY, how="left", maintain_order="left").drop(KEY)
        return found.with_columns(pl.col(name).fill_null(float("nan")) for name in self._dense)

    def learn(self, frame: pl.DataFrame) -> None:
        """Adds the categories of joined features to the vocabularies."""
        import polars as pl

        for name in self._sparse:
            column = frame[name]
            is_list = isinstance(column.dtype, pl.List)
            values = pl.Series(_flat(column)) if is_list else column
            self.vocabularies.setdefault(name, Vocabulary(name)).add(values)

    def encode(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Joined features with their categories coded."""
        import polars as pl

        columns = []
        for name in frame.columns:
            column = frame[name]
            if name in self.vocabularies:
                vocabulary = self.vocabularies[name]
                is_list = isinstance(column.dtype, pl.List)
                column = (vocabulary.encode_lists(column) if is_list else vocabulary.encode(column)).alias(name)
            columns.append(column)
        return pl.DataFrame(columns)

    def all_fields(self) -> list[Field]:
        """The fields, once every category has been learnt."""
        fields = [Field(name, "sparse", self._per, max(len(self.vocabularies[name]), 1)) for name in self._sparse]
        return fields + [Field(name, "dense", self._per) for name in self._dense]


def _flat(column: pl.Series) -> Any:
    import polars as pl
    import pyarrow as pa

    lists = column.drop_nulls().to_arrow(compat_level=pl.CompatLevel.oldest())
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    return lists.flatten()


def _categories(column: pl.Series, name: str, bad: cells.BadRows) -> pl.Series:
    """Whole numbers where all are, else text; lists stay lists."""
    import polars as pl

    if isinstance(column.dtype, pl.List):
        return column.cast(pl.List(pl.Int64)) if column.dtype.inner.is_integer() else column.cast(pl.List(pl.String))
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        column = whole if (whole.cast(column.dtype) == column).fill_null(True).all() else column.cast(pl.String)
    try:
        return cells.ids(column, name, bad, as_text=False, required=False)
    except cells.NotWhole:
        return cells.ids(column, name, bad, as_text=True, required=False)
