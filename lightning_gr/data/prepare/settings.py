"""PrepareSettings: what is kept of a log, and how much memory may be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BadRows = Literal["refuse", "drop"]
Duplicates = Literal["keep", "drop"]
TimeUnit = Literal["auto", "s", "ms", "us", "ns"]


@dataclass(frozen=True)
class PrepareSettings:
    """What `prepare` keeps of a log.

    Args:
        bad_rows: `refuse` stops at the first row that cannot be used and names it; `drop` leaves such rows out and
            counts them by reason.
        duplicates: whether rows that repeat another one in every column are kept.
        min_user_events: users with fewer events are left out; with `min_item_events` until none is left (k-core).
        min_item_events: items with fewer events are left out.
        time_unit: unit of the times; `auto` tells it by each value's size, so that seconds may stand beside
            milliseconds.
        memory_gb: about how much memory may be used.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    bad_rows: BadRows = "refuse"
    duplicates: Duplicates = "keep"
    min_user_events: int = 1
    min_item_events: int = 1
    time_unit: TimeUnit = "auto"
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bad_rows", self.bad_rows, get_args(BadRows)),
            ("duplicates", self.duplicates, get_args(Duplicates)),
            ("time_unit", self.time_unit, get_args(TimeUnit)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        for name, count in (("min_user_events", self.min_user_events), ("min_item_events", self.min_item_events)):
            if count < 1:
                raise ValueError(f"{name}={count}: expected at least 1")
        if not self.memory_gb > 0:
            raise ValueError(f"memory_gb={self.memory_gb}: expected a number above 0")
