"""TableStatistics: what happened in a table since it was made, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TableStatistics:
    """Counts of keys over all training lookups of a process, after deduplication.

    Args:
        looked_up: keys asked for.
        found: those that had a row.
        collided: those that the step before had looked up too (TurboGR's collision rate is their share).
        inserted: keys that got a row.
        rejected: keys that were not admitted, once a lookup.
        failed: admitted keys that found no room in the budget.
        evicted: rows that went because of the budget.
        expired: rows that went because of their age.
        missing: keys that were answered without a row of their own, in evaluation too.
    """

    looked_up: int = 0
    found: int = 0
    collided: int = 0
    inserted: int = 0
    rejected: int = 0
    failed: int = 0
    evicted: int = 0
    expired: int = 0
    missing: int = 0
