"""What a process has of a dynamic table and has done there, as numbers that add up over processes; and their meaning.

Shape suffixes: N rows of a sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine

_SLOTS, _ROWS = 1 << 18, 1 << 16
"""Of a process: slots of a key index that are looked through, and rows of a table that are read."""

_DONE = ("looked_up", "collided", "inserted", "evicted", "rejected", "expired", "failed")
_BUCKETS = 160  # of ages and of use counts: numbers below 8 have one each, every power of two above has four
_SPREADS = ("age", "use", "last_use")
_PERCENTILES = (50, 90, 99)
_HOTTEST = 0.01


def done(engine: DynamicEngine, table: int) -> dict[str, float]:
    """What has happened to a table since it was made; processes with the same rows in another group add nothing."""
    p, local = engine.logical[table]
    statistics, dedup = engine.tables[p].statistics[local], engine.dedup_counts[table]
    own = engine.is_first_replica
    counts = {name: float(getattr(statistics, name)) if own else 0.0 for name in _DONE}
    return counts | {"ids": dedup.ids, "sent": dedup.sent, "arrived": dedup.arrived if own else 0.0}


def held(engine: DynamicEngine) -> list[dict[str, float]]:
    """What each of a collection's tables has now, no step being under way.

    Clocks and counters of rows are read from a sample, the same for the same tables, which stands for all rows; of the
    last lookup's keys from all.
    """
    found = []
    for physical, (tables_U, rows_U, counts_U) in zip(engine.tables, engine.last_keys, strict=True):
        last_U = _bucket(physical.storage.read_metadata(rows_U).counts)
        samples = physical.sampled_rows(num_slots=_SLOTS, most=_ROWS) if engine.is_first_replica else []
        for local in range(len(physical.configs)):
            held = dict.fromkeys(("rows", "used_slots", "slots", "last_uses"), 0.0)
            spreads = [[0.0] * _BUCKETS] * len(_SPREADS)
            if samples:
                index, rows = physical.index, physical.num_rows(local)
                own_U = tables_U == local
                held = {"rows": rows, "used_slots": index.load_factor * index.capacity, "slots": index.capacity}
                held["last_uses"] = float(counts_U[own_U].sum())
                own_U &= rows_U >= 0
                metadata = physical.storage.read_metadata(samples[local])
                weight = rows / max(len(samples[local]), 1)
                age_N = _bucket(engine.next_step - 1 - metadata.last_steps)
                use_N = _bucket(metadata.counts)
                counted = [torch.bincount(bucket_N, minlength=_BUCKETS) * weight for bucket_N in (age_N, use_N)]
                counted.append(torch.bincount(last_U[own_U], counts_U[own_U].double(), minlength=_BUCKETS))
                spreads = torch.stack(counted).tolist()
            for name, spread in zip(_SPREADS, spreads, strict=True):
                held |= {f"{name}_{i}": value for i, value in enumerate(spread)}
            found.append(held)
    return found


def ages(sums: Mapping[str, float]) -> list[float]:
    """Rows by the steps since their last use: 0, 1, 2 to 3, 4 to 7 and so on, up to the oldest row's."""
    rows = [0.0] * _first_of(_BUCKETS).bit_length()
    for i, count in enumerate(_spread(sums, "age")):
        rows[_first_of(i).bit_length()] += count
    return rows[: max((i + 1 for i, count in enumerate(rows) if count), default=0)]


def values(sums: Mapping[str, float], *, budget: int | None) -> dict[str, float]:
    """What is logged of a table; nan where there was nothing to measure.

    Args:
        sums: over processes, of `done` since the last time and of `held` now.
        budget: rows that may be there; None without a limit.
    """
    found = {"rows": sums["rows"], "load_factor": _ratio(sums["used_slots"], sums["slots"])}
    if budget is not None:
        found["budget_share"] = sums["rows"] / budget
    found |= {name: sums[name] for name in ("inserted", "evicted", "rejected", "expired", "failed")}
    found["dedup_ratio_1"] = _ratio(sums["ids"], sums["sent"])
    found["dedup_ratio_2"] = _ratio(sums["sent"], sums["arrived"])
    found["collision_rate"] = _ratio(sums["collided"], sums["looked_up"])
    hot = _of_the_hottest(_spread(sums, "use"), _spread(sums, "last_use"))
    found["hot_key_share"] = _ratio(hot, sums["last_uses"])
    age = _spread(sums, "age")
    return found | {f"age_p{percent}": _percentile(age, percent / 100) for percent in _PERCENTILES}


def _bucket(number_N: Tensor) -> Tensor:
    """The bucket of numbers: the first bits of a number and how many there are."""
    number_N = number_N.clamp(min=0)
    mantissa_N, bits_N = torch.frexp(number_N.double())
    bucket_N = 4 * (bits_N.long() - 3) + (mantissa_N * 8).long()
    return torch.where(number_N < 4, number_N, bucket_N).clamp(max=_BUCKETS - 1)


def _first_of(bucket: int) -> int:
    """The least number of a bucket."""
    return bucket if bucket < 4 else (4 + bucket % 4) << (bucket // 4 - 1)


def _spread(sums: Mapping[str, float], name: str) -> list[float]:
    return [sums[f"{name}_{i}"] for i in range(_BUCKETS)]


def _ratio(of: float, to: float) -> float:
    return of / to if to else math.nan


def _percentile(rows: Sequence[float], share: float) -> float:
    """The number at or below which that share of rows is; inside a bucket numbers are taken as evenly spread."""
    left = share * sum(rows)
    if not left:
        return math.nan
    at = next(i for i, upto in enumerate(itertools.accumulate(rows)) if upto >= left or i == _BUCKETS - 1)
    left -= sum(rows[:at])
    first, last = _first_of(at), _first_of(at + 1) - 1
    return first + (last - first) * left / rows[at] if rows[at] else float(last)


def _of_the_hottest(rows_by_use: Sequence[float], last_uses: Sequence[float]) -> float:
    """Last uses of the hundredth of rows with the most uses so far, or of one row where there are fewer."""
    left = max(_HOTTEST * sum(rows_by_use), 1.0)
    hot = 0.0
    for rows, uses in zip(reversed(rows_by_use), reversed(last_uses), strict=True):
        share = min(left / rows, 1.0) if rows else float(left > 0)
        hot, left = hot + share * uses, left - share * rows
    return hot
