"""Vocabularies: the raw values of a field in ascending order, which number its codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl


class Vocabulary:
    """Collects distinct values; a missing one is numbered last.

    Args:
        name: the field.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._values: pl.Series | None = None
        self._codes: pl.DataFrame | None = None

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

        if self._codes is None:
            known = self.values
            self._codes = pl.DataFrame({"value": known, "code": pl.Series(range(len(known)), dtype=pl.Int64)})
        frame = values.alias("value").to_frame()
        if frame["value"].dtype != self._codes["value"].dtype:
            frame = frame.with_columns(pl.col("value").cast(self._codes["value"].dtype, strict=False))
        return frame.join(self._codes, on="value", how="left", maintain_order="left", nulls_equal=True)["code"]

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
