"""Raw cells to typed columns: ids, times and numbers, and which rows cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

_LARGEST = {"s": 10**11, "ms": 10**14, "us": 10**17}
"""Above this a time of 'auto' unit counts in the next finer one; 10**11 s is the year 5138, 10**11 ms is 1973."""
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DATE_FORMS = (
    "%Y-%m-%dT%H:%M:%S%.f%z",
    "%Y-%m-%d %H:%M:%S%.f%z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d",
)
_REPLACED = "\ufffd"


class NotWhole(Exception):
    """A column taken for whole numbers has something else; it is to be read as text from the start."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


@dataclass
class BadRows:
    """Rows of a batch that cannot be used.

    Args:
        usable: bool, by row.
        reasons: by reason, how many.
        first: row, column and what is wrong with the first one.
    """

    usable: np.ndarray[tuple[int], np.dtype[np.bool_]]
    reasons: dict[str, int] = field(default_factory=dict)
    first: tuple[int, str, str] | None = None

    def add(self, wrong: pl.Series, column: str, reason: str, cells: pl.Series) -> None:
        """Marks rows; a row counts once, for the first reason."""
        rows = np.flatnonzero(wrong.fill_null(True).to_numpy() & self.usable)
        if not len(rows):
            return
        self.usable[rows] = False
        self.reasons[f"{column}: {reason}"] = self.reasons.get(f"{column}: {reason}", 0) + len(rows)
        row = int(rows[0])
        if self.first is None or row < self.first[0]:
            value = cells[row]
            self.first = (row, column, reason if value is None else f"{value!r} is {reason}")


def text_of(cells: pl.Series) -> pl.Series:
    """Stripped text with empty cells missing."""
    import polars as pl

    text = cells.str.strip_chars()
    return text.set(text == "", None) if (text == "").any() else text.cast(pl.String)


def ids(cells: pl.Series, column: str, bad: BadRows, *, as_text: bool, required: bool) -> pl.Series:
    """Ids as int64, or as text where `as_text`.

    Raises:
        NotWhole: a cell is no canonical whole number of 64 bits ("007" and "7" are two ids) and `as_text` is False.
        ValueError: the column has a type that ids cannot have.
    """
    import polars as pl

    if cells.dtype.is_integer():
        number = cells.cast(pl.Int64, strict=False)
        if (number.is_null() & cells.is_not_null()).any() and not as_text:
            raise NotWhole(column)
        found = cells.cast(pl.String) if as_text else number
    elif cells.dtype in (pl.String, pl.Categorical, pl.Boolean, pl.Null):
        text = text_of(cells.cast(pl.String))
        bad.add(text.str.contains(_REPLACED, literal=True).fill_null(False), column, "not valid UTF-8", text)
        found = text
        if not as_text:
            number = text.cast(pl.Int64, strict=False)
            wrong = text.is_not_null() & (number.is_null() | (number.cast(pl.String) != text))
            if wrong.fill_null(True).any():
                raise NotWhole(column)
            found = number
    else:
        raise ValueError(f"column {column} has type {cells.dtype}; expected whole numbers or text")
    if required:
        bad.add(found.is_null(), column, "missing", found)
    return found


def numbers(cells: pl.Series, column: str, bad: BadRows) -> tuple[pl.Series, int]:
    """Float32 numbers with NaN where there is none, and how many those are.

    Raises:
        ValueError: the column has a type that numbers cannot have.
    """
    import polars as pl

    if cells.dtype == pl.String:
        text = text_of(cells)
        found = text.cast(pl.Float64, strict=False)
        bad.add(text.is_not_null() & found.is_null(), column, "no number", text)
    elif cells.dtype.is_numeric() or cells.dtype in (pl.Boolean, pl.Null):
        found = cells.cast(pl.Float64)
    else:
        raise ValueError(f"column {column} has type {cells.dtype}; expected numbers")
    found = found.cast(pl.Float32)
    bad.add(found.is_infinite().fill_null(False), column, "not finite", found)
    found = found.fill_null(float("nan"))
    return found, int(found.is_nan().sum())


def times(cells: pl.Series, column: str, unit: str, bad: BadRows) -> tuple[pl.Series, dict[str, int]]:
    """Times in microseconds, int64, and how many stood in which unit.

    Raises:
        ValueError: the column has a type that times cannot have.
    """
    import polars as pl

    if isinstance(cells.dtype, pl.Datetime) or cells.dtype == pl.Date:
        found = cells.cast(pl.Datetime("us")).to_physical().cast(pl.Int64)
        bad.add(found.is_null(), column, "missing", found)
        return found.fill_null(0), {}
    text = text_of(cells) if cells.dtype == pl.String else cells
    if not (text.dtype == pl.String or text.dtype.is_numeric() or text.dtype == pl.Null):
        raise ValueError(f"column {column} has type {cells.dtype}; expected whole numbers, dates or text")
    bad.add(text.is_null(), column, "missing", text)
    fraction: pl.Series | None = None
    micros_of_fraction: pl.Series | None = None
    dates: pl.Series | None = None
    whole = text.cast(pl.Int64, strict=False) if not text.dtype.is_float() else None
    if whole is None or (whole.is_null() & text.is_not_null()).any():
        # Float-looking times lose nothing below 2**53, and what does not parse as one may be a date.
        real = text.cast(pl.Float64, strict=False)
        rounded = real.floor().cast(pl.Int64, strict=False)
        fraction = real.is_not_null() & (real != real.floor()) & (real.abs() < _LARGEST["s"])
        whole = rounded if whole is None else whole.fill_null(rounded)
        micros_of_fraction = (real * 1e6).floor().cast(pl.Int64, strict=False)
        dates = _dates(text)
    bad.add(
        whole.is_null() & text.is_not_null() & (dates.is_null() if dates is not None else True),
        column,
        "no time",
        text,
    )
    micros, units = _micros(whole.fill_null(0).to_numpy(), unit, column, bad, text)
    result = pl.Series(column, micros)
    if fraction is not None and fraction.fill_null(False).any() and unit in ("auto", "s"):
        assert micros_of_fraction is not None
        result = pl.select(pl.when(fraction.fill_null(False)).then(micros_of_fraction).otherwise(result)).to_series()
    if dates is not None and (used := whole.is_null() & dates.is_not_null()).any():
        result = pl.select(pl.when(used).then(dates).otherwise(result)).to_series()
    return result.alias(column), units


def _dates(text: pl.Series) -> pl.Series:
    import polars as pl

    if text.dtype == pl.String:
        # Not inferred from the first cells: a column may hold more than one of these.
        parsed = [
            text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC" if "%z" not in form else None)
            for form in _DATE_FORMS
        ]
        return pl.select(pl.coalesce(x.to_physical().cast(pl.Int64) for x in parsed)).to_series()
    return pl.Series([None] * len(text), dtype=pl.Int64)


def _micros(
    whole: np.ndarray[tuple[int], np.dtype[np.int64]], unit: str, column: str, bad: BadRows, text: pl.Series
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], dict[str, int]]:
    import polars as pl

    size = np.abs(np.maximum(whole, -(2**63) + 1))
    if unit != "auto":
        masks = {unit: np.ones(len(whole), dtype=bool)}
    else:
        below = {name: size < limit for name, limit in _LARGEST.items()}
        masks = {"s": below["s"], "ms": below["ms"] & ~below["s"], "us": below["us"] & ~below["ms"], "ns": ~below["us"]}
    micros = np.zeros_like(whole)
    units = {}
    for name, mask in masks.items():
        if not mask.any():
            continue
        units[name] = int(mask.sum())
        per_second = _PER_SECOND[name]
        if per_second <= 10**6:
            factor = 10**6 // per_second
            bad.add(pl.Series(mask & (size > (2**63 - 1) // factor)), column, f"no time in {name}", text)
            with np.errstate(over="ignore"):
                micros[mask] = whole[mask] * factor
        else:
            micros[mask] = whole[mask] // (per_second // 10**6)
    return micros, units
