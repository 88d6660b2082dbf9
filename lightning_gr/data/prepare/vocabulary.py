"""Vocabularies: the raw values of a field in ascending order, which number its codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl


_SPARSEST, _SMALL_TABLE = 8, 1 << 20
"""Whole numbers are looked up in an array of up to so many places a value, and so many more."""


class Vocabulary:
    """Collects distinct values; a missing one is numbered last.

    Args:
        name: the field.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._values: pl.Series | None = None
        self._codes: pl.DataFrame | None = None
        self._table: tuple[int, np.ndarray[Any, Any]] | None = None

    def add(self, values: pl.Series) -> None:
        """Takes the values of a part of the log."""
        import polars as pl

        distinct = values.unique()
        if self._values is None:
            self._values = distinct
            return
        if self._values.dtype != distinct.dtype:
            # Events may spell an id as text where a table of features has a number.
            self._values, distinct = self._values.cast(pl.String), distinct.cast(pl.String)
        self._values = pl.concat([self._values.rename("v"), distinct.rename("v")]).unique()

    @property
    def values(self) -> pl.Series:
        """The values in the order of their codes."""
        import polars as pl

        values = pl.Series([], dtype=pl.Int64) if self._values is None else self._values
        return values.sort(nulls_last=True).alias("value")

    @property
    def dtype(self) -> pl.DataType:
        """Type of the values."""
        return self.values.dtype

    def __len__(self) -> int:
        return 0 if self._values is None else len(self._values)

    def encode(self, values: pl.Series) -> pl.Series:
        """The code of each value, int64; missing where the value is unknown."""
        import polars as pl

        if (found := self._looked_up(values)) is not None:
            return found
        if self._codes is None:
            known = self.values
            self._codes = pl.DataFrame({"value": known, "code": pl.Series(range(len(known)), dtype=pl.Int64)})
        frame = values.alias("value").to_frame()
        if frame["value"].dtype != self._codes["value"].dtype:
            frame = frame.with_columns(pl.col("value").cast(self._codes["value"].dtype, strict=False))
        return frame.join(self._codes, on="value", how="left", maintain_order="left", nulls_equal=True)["code"]

    def _looked_up(self, values: pl.Series) -> pl.Series | None:
        """Codes of whole numbers that lie close together, from an array; None where they do not, or one is unknown."""
        import polars as pl

        if self._table is None:
            self._table = self._lookup_table()
        least, table = self._table
        if not len(table) or values.dtype != pl.Int64 or values.null_count() or not len(values):
            return None
        numbers = values.to_numpy()
        if numbers.min() < least or numbers.max() >= least + len(table):
            return None
        codes = table[numbers - least]
        return pl.Series(values.name, codes) if codes.min() >= 0 else None

    def _lookup_table(self) -> tuple[int, np.ndarray[Any, Any]]:
        known, empty = self.values, np.zeros(0, dtype=np.int64)
        numbers = known.drop_nulls()
        if not known.dtype.is_integer() or not len(numbers):
            return 0, empty
        least, span = int(numbers[0]), int(numbers[-1]) - int(numbers[0]) + 1
        if span > _SPARSEST * len(numbers) + _SMALL_TABLE:
            return 0, empty
        table = np.full(span, -1, dtype=np.int64)
        table[numbers.to_numpy() - least] = np.arange(len(numbers))
        return least, table

    def encode_lists(self, values: pl.Series) -> pl.Series:
        """The codes of lists of values; a missing list is empty."""
        import polars as pl
        import pyarrow as pa

        whole = values.fill_null(pl.Series([[]], dtype=values.dtype)) if values.null_count() else values
        lists = whole.to_arrow(compat_level=pl.CompatLevel.oldest())
        lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
        codes = self.encode(pl.Series(lists.flatten()))
        ends = np.concatenate([[0], np.cumsum(whole.list.len().to_numpy().astype(np.int64))])
        coded = pa.LargeListArray.from_arrays(pa.array(ends), codes.to_arrow())
        return pl.Series(values.name, coded)
