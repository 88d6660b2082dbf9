"""Which keys of a dynamic table get a row, keep it and lose it: what a user writes in YAML, checked.

Every policy acts within groups of keys that are cut by hash bits and do not depend on the number of processes, so no
decision does either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

AdmissionCounter = Literal["exact", "sketch"]
EvictionPolicy = Literal["lru", "lfu", "lfu_lru", "decayed", "score"]
OnMissing = Literal["initial", "default_row", "bucket", "error"]


def _at_least(least: float, **settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name}={value}: expected a number of at least {least}")


def _one_of(choices: Any, **settings: str) -> None:
    for name, value in settings.items():
        if value not in get_args(choices):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class Admission:
    """When a new key gets a row of its own.

    Args:
        min_count: a key gets a row at the first step in which it occurs after having occurred at least `min_count` - 1
            times in earlier steps; 1 admits at once. Occurrences of the step itself do not count, so that the decision
            is the same however the step's samples are cut into micro-batches.
        counter: `exact` counts each key that waits; `sketch` is a count-min sketch of fixed size, which may admit a key
            too early and never too late.
        sketch_width: counters of a row of the sketch, of which each virtual shard has four.
        forget_after_steps: an exactly counted key that has not occurred for so many steps is forgotten.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    min_count: int = 1
    counter: AdmissionCounter = "exact"
    sketch_width: int = 1024
    forget_after_steps: int | None = None

    def __post_init__(self) -> None:
        _at_least(1, min_count=self.min_count, forget_after_steps=self.forget_after_steps)
        _at_least(16, sketch_width=self.sketch_width)
        _one_of(AdmissionCounter, counter=self.counter)


@dataclass(frozen=True)
class Eviction:
    """Whose row goes when a budget is used up. Rows that the step has looked up stay; of equal ones the least id goes.

    Args:
        policy: `lru` takes the least recently used; `lfu` the least often used; `lfu_lru` the least often used and of
            those the least recently; `decayed` the least count when a count halves every `half_life_steps`; `score` the
            least of the scores that the user sets.
        half_life_steps: of `decayed`.
        slack: when a budget is used up, this share of it is freed at once, since finding what goes reads all of a
            group's keys.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    policy: EvictionPolicy = "lru"
    half_life_steps: float = 1000.0
    slack: float = 0.03

    def __post_init__(self) -> None:
        _one_of(EvictionPolicy, policy=self.policy)
        _at_least(1e-6, half_life_steps=self.half_life_steps)
        if not 0 <= self.slack < 1:
            raise ValueError(f"slack={self.slack}: expected a share from 0 to below 1")


@dataclass(frozen=True)
class TablePolicy:
    """Admission, budget, eviction and expiry of one table.

    Args:
        admission: which new keys get a row.
        eviction: which rows go when the budget is used up.
        max_rows: most rows of the table on all processes together, shared rows included; None sets no limit.
        max_bytes: the same in bytes: embedding, optimiser state, counters and the row's share of the key index.
        rows_per_group: a budget is shared out over groups of keys of at least so many rows, which evict each for
            itself. Small groups fill unevenly, so that eviction begins early; a group's rows are on one process.
        ttl_steps: a row that was not used for more steps than this is gone.
        ttl_seconds: the same in seconds of the data's own timestamps.
        on_missing: what a key gets that has no row of its own. `initial`: its own first values, untrained;
            `default_row`: every element is `default_value`; `bucket`: a trained row that it shares with other such
            keys; `error`: a `KeyError`.
        default_value: of `default_row`.
        buckets_per_group: shared rows of each group of `bucket`; a table without budget has one group a virtual shard.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    admission: Admission = field(default_factory=Admission)
    eviction: Eviction = field(default_factory=Eviction)
    max_rows: int | None = None
    max_bytes: int | None = None
    rows_per_group: int = 1024
    ttl_steps: int | None = None
    ttl_seconds: int | None = None
    on_missing: OnMissing = "initial"
    default_value: float = 0.0
    buckets_per_group: int = 1

    def __post_init__(self) -> None:
        _at_least(1, max_rows=self.max_rows, max_bytes=self.max_bytes, rows_per_group=self.rows_per_group)
        _at_least(1, buckets_per_group=self.buckets_per_group)
        _at_least(1, ttl_steps=self.ttl_steps, ttl_seconds=self.ttl_seconds)
        _one_of(OnMissing, on_missing=self.on_missing)

    @property
    def expires(self) -> bool:
        """Whether rows have a time to live."""
        return self.ttl_steps is not None or self.ttl_seconds is not None


def row_budget(policy: TablePolicy, *, bytes_per_row: int, name: str) -> int | None:
    """Most rows of a table.

    Raises:
        ValueError: the budget has no room for a row.
    """
    limits = [policy.max_rows] if policy.max_rows is not None else []
    if policy.max_bytes is not None:
        if policy.max_bytes < bytes_per_row:
            raise ValueError(
                f"table {name}: max_bytes={policy.max_bytes}, but one row takes {bytes_per_row} bytes; raise it"
            )
        limits.append(policy.max_bytes // bytes_per_row)
    return min(limits) if limits else None


def group_bits(budget: int | None, virtual_shards: int, rows_per_group: int) -> int:
    """How many hash bits cut a table into groups: all of the virtual shards', or fewer for a small budget."""
    bits = virtual_shards.bit_length() - 1
    if budget is None:
        return bits
    return max(min(bits, (budget // rows_per_group).bit_length() - 1), 0)
