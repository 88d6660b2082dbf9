"""Raw cells to typed columns: ids, times and numbers, and which rows cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl

_LARGEST = {"s": 10**11, "ms": 10**14, "us": 10**17}
"""Above this a time of 'auto' unit counts in the next finer one; 10**11 s is the year 5138, 10**11 ms is 1973."""
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DATE_FORMS = (
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d",
)
_REPLACED = "\ufffd"
_POWERS = 10 ** np.arange(1, 19)
_MOST = 2**63 - 1
Integers = np.ndarray[Any, np.dtype[np.int64]]


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
    elif cells.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null):
        plain = cells.cast(pl.String)
        fast = None if as_text else _canonical(plain)
        found = _text_ids(plain, column, bad, as_text=as_text) if fast is None else fast
    else:
        raise ValueError(f"column {column} has type {cells.dtype}; expected whole numbers or text")
    if required and found.null_count():
        bad.add(found.is_null(), column, "missing", found)
    return found


def _canonical(text: pl.Series) -> pl.Series | None:
    """The numbers of text that spells each in the one way that a number prints; None where some cell does not."""
    import polars as pl

    number = text.cast(pl.Int64, strict=False)
    if number.null_count() != text.null_count():
        return None
    # Text of a number's value and of its printed length is what the number prints: signs, zeros and blanks are longer.
    value = number.fill_null(0).to_numpy()
    printed = np.searchsorted(_POWERS, np.abs(value), side="right") + 1 + (value < 0)
    return number if bool((text.str.len_bytes().fill_null(1).to_numpy() == printed).all()) else None


def _text_ids(plain: pl.Series, column: str, bad: BadRows, *, as_text: bool) -> pl.Series:
    import polars as pl

    text = text_of(plain)
    bad.add(text.str.contains(_REPLACED, literal=True).fill_null(False), column, "not valid UTF-8", text)
    if as_text:
        return text
    number = text.cast(pl.Int64, strict=False)
    wrong = text.is_not_null() & (number.is_null() | (number.cast(pl.String) != text))
    if wrong.fill_null(True).any():
        raise NotWhole(column)
    return number


def numbers(cells: pl.Series, column: str, bad: BadRows) -> tuple[pl.Series, int]:
    """Float32 numbers with NaN where there is none, and how many those are.

    Raises:
        ValueError: the column has a type that numbers cannot have.
    """
    import polars as pl

    if cells.dtype == pl.String:
        found = cells.cast(pl.Float64, strict=False)
        if found.null_count() != cells.null_count():
            text = text_of(cells)
            found = text.cast(pl.Float64, strict=False)
            bad.add(text.is_not_null() & found.is_null(), column, "no number", text)
    elif cells.dtype.is_numeric() or cells.dtype in (pl.Boolean, pl.Null):
        found = cells.cast(pl.Float64)
    else:
        raise ValueError(f"column {column} has type {cells.dtype}; expected numbers")
    found = found.cast(pl.Float32).fill_null(float("nan"))
    values = found.to_numpy()
    if (infinite := np.isinf(values)).any():
        bad.add(pl.Series(infinite), column, "not finite", found)
    return found, int(np.isnan(values).sum())


def times(cells: pl.Series, column: str, unit: str, bad: BadRows) -> tuple[pl.Series, pl.Series, dict[str, int]]:
    """Times in whole microseconds, int64; the nanoseconds beyond them, int16; and how many stood in which unit.

    Raises:
        ValueError: the column has a type that times cannot have.
    """
    import polars as pl

    if isinstance(cells.dtype, pl.Datetime) or cells.dtype == pl.Date:
        exact = cells.cast(pl.Datetime(getattr(cells.dtype, "time_unit", "us"))).to_physical().cast(pl.Int64)
        nanoseconds = getattr(cells.dtype, "time_unit", "us") == "ns"
        micros = cells.cast(pl.Datetime("us")).to_physical().cast(pl.Int64) if not nanoseconds else exact // 1000
        bad.add(micros.is_null(), column, "missing", micros)
        beyond = (exact % 1000 if nanoseconds else exact * 0).fill_null(0)
        return micros.fill_null(0).alias(column), beyond.cast(pl.Int16), {}
    if not (cells.dtype == pl.String or cells.dtype.is_numeric() or cells.dtype == pl.Null):
        raise ValueError(f"column {column} has type {cells.dtype}; expected whole numbers, dates or text")
    whole = cells.cast(pl.Int64, strict=False) if not cells.dtype.is_float() else None
    if whole is not None and not whole.null_count():
        found, fine, units = _micros(whole.to_numpy(), unit, column, bad, cells)
        return pl.Series(column, found), pl.Series(fine), units
    text = text_of(cells) if cells.dtype == pl.String else cells
    bad.add(text.is_null(), column, "missing", text)
    # Float-looking times lose nothing below 2**53, and what does not parse as one may be a date.
    real = text.cast(pl.Float64, strict=False)
    whole = text.cast(pl.Int64, strict=False) if not text.dtype.is_float() else real.clear(len(real)).cast(pl.Int64)
    whole = whole.fill_null(real.floor().cast(pl.Int64, strict=False))
    dates = _dates(text)
    bad.add(whole.is_null() & text.is_not_null() & dates.is_null(), column, "no time", text)
    is_date = (whole.is_null() & dates.is_not_null()).to_numpy()
    found, fine, units = _micros(whole.fill_null(0).to_numpy(), unit, column, bad, text, real=real, skip=is_date)
    found[is_date] = dates.fill_null(0).to_numpy()[is_date]
    return pl.Series(column, found), pl.Series(fine), units


def _dates(text: pl.Series) -> pl.Series:
    import polars as pl

    if text.dtype == pl.String:
        # Not inferred from the first cells: a column may hold more than one of these.
        parsed = [
            text.str.to_datetime(form, strict=False, time_unit="us", time_zone=None if form.endswith("z") else "UTC")
            for form in _DATE_FORMS
        ]
        return pl.select(pl.coalesce(x.to_physical().cast(pl.Int64) for x in parsed)).to_series()
    return pl.Series([None] * len(text), dtype=pl.Int64)


def _micros(
    whole: Integers,
    unit: str,
    column: str,
    bad: BadRows,
    text: pl.Series,
    *,
    real: pl.Series | None = None,
    skip: np.ndarray[Any, Any] | None = None,
) -> tuple[Integers, np.ndarray[Any, np.dtype[np.int16]], dict[str, int]]:
    """Microseconds, nanoseconds beyond them, and counts by unit; `real` has the parts that `whole` leaves off."""
    import polars as pl

    fine = np.zeros(len(whole), dtype=np.int16)
    micros = np.zeros_like(whole)
    units = {}
    reals = None if real is None else real.fill_null(0.0).fill_nan(0.0).to_numpy()
    for name, mask in _by_unit(whole, unit).items():
        mask = mask if skip is None else mask & ~skip
        count = int(np.count_nonzero(mask))
        if not count:
            continue
        units[name] = count
        rows: Any = slice(None) if count == len(whole) else mask
        values = whole[rows]
        per_second = _PER_SECOND[name]
        if per_second > 10**6:
            micros[rows] = values // (per_second // 10**6)
            fine[rows] = values % (per_second // 10**6)
            continue
        factor = 10**6 // per_second
        if len(values) and (values.max() > _MOST // factor or values.min() < -_MOST // factor):
            far = np.zeros(len(whole), dtype=bool)
            far[rows] = (values > _MOST // factor) | (values < -_MOST // factor)
            bad.add(pl.Series(far), column, f"no time in {name}", text)
        with np.errstate(over="ignore"):
            micros[rows] = values * factor
        if reals is not None:
            parted = np.flatnonzero(mask & (reals != np.floor(reals)))
            with np.errstate(invalid="ignore"):
                micros[parted] = np.floor(reals[parted] * factor).astype(np.int64)
    return micros, fine, units


def _by_unit(whole: Integers, unit: str) -> dict[str, np.ndarray[Any, Any]]:
    if unit != "auto":
        return {unit: np.ones(len(whole), dtype=bool)}
    size = np.abs(np.maximum(whole, -_MOST))
    bounds = (0, *_LARGEST.values(), None)
    return {
        name: (size >= low) & (True if high is None else size < high)
        for name, low, high in zip(_PER_SECOND, bounds[:-1], bounds[1:], strict=True)
    }
