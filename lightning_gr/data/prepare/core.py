"""The filter of small users and items, taken from each other until none is left (k-core)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_gr.data.prepare.spill import ITEM, USER

if TYPE_CHECKING:
    import polars as pl


class Core:
    """Which items are kept, and through them which users.

    Args:
        min_user_events: users with fewer events are left out.
        min_item_events: items with fewer events are left out.
    """

    def __init__(self, *, min_user_events: int, min_item_events: int) -> None:
        self._min_user, self._min_item = min_user_events, min_item_events
        self._items: pl.DataFrame | None = None

    def settle(self, buckets: int, read: Callable[[int], pl.DataFrame]) -> None:
        """Goes over the log until nothing more is left out.

        Args:
            buckets: parts of the log, each with whole users.
            read: a part's events.
        """
        import polars as pl

        if self._min_item == 1:
            return  # Users are left out part by part; no item falls away because of it.
        while True:
            counts = []
            for bucket in range(buckets):
                events = self.keep(read(bucket))
                if not events.is_empty():
                    counts.append(events.group_by(ITEM).len())
            if not counts:
                return
            total = pl.concat(counts).group_by(ITEM).agg(pl.col("len").sum())
            kept = total.filter(pl.col("len") >= self._min_item).select(ITEM)
            settled = len(kept) == len(total)
            self._items = kept
            if settled:
                return

    def keep(self, events: pl.DataFrame) -> pl.DataFrame:
        """The events of a part that are kept, in their order."""
        import polars as pl

        if events.is_empty():
            return events
        if self._items is not None:
            events = events.join(self._items, on=ITEM, how="semi", maintain_order="left")
        if self._min_user > 1:
            events = events.filter(pl.len().over(USER) >= self._min_user)
        return events
