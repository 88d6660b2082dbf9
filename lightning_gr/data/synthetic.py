"""A synthetic event log with planted structure whose best possible ranking is known.

The next item is, with probability `first`, a successor of the last item; with probability `second`, of the item before
it (by another table); otherwise any item, by Zipf popularity. Each item has a few successors of unequal probability.
So the conditional probability of every item given a history is known, and with it what no model can beat.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TOP_K = 10
_SUCCESSOR_SHARES = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
_FIRST_TIME = 1_700_000_000


@dataclass(frozen=True)
class SyntheticLog:
    """What `write_synthetic_log` wrote.

    Args:
        num_users: users.
        num_items: items that can occur.
        num_events: events.
        best_hr: expected HR@10 of the best possible ranking of the test items.
        best_ndcg: its expected NDCG@10.
    """

    num_users: int
    num_items: int
    num_events: int
    best_hr: float
    best_ndcg: float

    def __str__(self) -> str:
        return (
            f"{self.num_users:,} users, {self.num_items:,} items, {self.num_events:,} events; the best possible "
            f"HR@10 is {self.best_hr:.4f}, NDCG@10 {self.best_ndcg:.4f}"
        )


class MarkovItems:
    """The planted distribution of the next item given the last two.

    Args:
        num_items: items.
        first: share that follows the last item.
        second: share that follows the item before it.
        seed: seed of the successor tables.
        zipf: exponent of the popularity.
    """

    def __init__(self, *, num_items: int, first: float, second: float, seed: int, zipf: float = 0.8) -> None:
        rng = np.random.default_rng([seed, 1])
        popularity = rng.permutation(1.0 / np.arange(1, num_items + 1) ** zipf)
        self.popularity = popularity / popularity.sum()
        self.num_items, self.first, self.second, self.zipf = num_items, first, second, zipf
        shape = (num_items, len(_SUCCESSOR_SHARES))
        self.successors = tuple(rng.integers(0, num_items, shape) for _ in range(2))

    def draw(self, last: Array, before: Array, rng: np.random.Generator) -> Array:
        """A next item for each user, given its last two items."""
        count = len(last)
        kind = rng.random(count)
        pick = rng.choice(len(_SUCCESSOR_SHARES), count, p=_SUCCESSOR_SHARES)
        anything = rng.choice(self.num_items, count, p=self.popularity)
        after_last, after_before = self.successors[0][last, pick], self.successors[1][before, pick]
        return np.where(
            kind < self.first, after_last, np.where(kind < self.first + self.second, after_before, anything)
        )

    def probabilities(self, last: Array, before: Array) -> Array:
        """Probability of every item (users, items) given the last two."""
        rows = np.arange(len(last))[:, None]
        table = np.repeat((1 - self.first - self.second) * self.popularity[None], len(last), axis=0)
        # The same item can be a successor twice: its shares add up.
        np.add.at(table, (rows, self.successors[0][last]), self.first * _SUCCESSOR_SHARES)
        np.add.at(table, (rows, self.successors[1][before]), self.second * _SUCCESSOR_SHARES)
        return table

    def best_possible(self, last: Array, before: Array) -> dict[str, float]:
        """Expected HR@10 and NDCG@10 of ranking by the true probabilities, averaged over users."""
        gains = 1 / np.log2(np.arange(TOP_K) + 2)
        hits = ndcg = 0.0
        for start in range(0, len(last), 1024):
            table = self.probabilities(last[start : start + 1024], before[start : start + 1024])
            top = -np.sort(np.partition(-table, TOP_K - 1, axis=1)[:, :TOP_K], axis=1)
            hits += float(top.sum())
            ndcg += float((top * gains).sum())
        return {f"HR@{TOP_K}": hits / len(last), f"NDCG@{TOP_K}": ndcg / len(last)}


def write_synthetic_log(
    path: str | Path,
    *,
    num_users: int = 3000,
    num_items: int = 1000,
    mean_length: float = 30.0,
    max_length: int = 300,
    first: float = 0.6,
    second: float = 0.25,
    seed: int = 0,
) -> SyntheticLog:
    """Writes a CSV log ``user_id,item_id,timestamp`` and, beside it, ``<name>.oracle.json`` with the best possible.

    Lengths are log-normal with a heavy tail, at least 5. Raw item ids are not 0 ... N - 1. Both files appear whole or
    not at all.

    Args:
        path: the CSV file.
        num_users: users.
        num_items: items that can occur.
        mean_length: about the mean events of a user.
        max_length: longest history.
        first: probability that the next item follows the last one.
        second: probability that it follows the item before the last.
        seed: everything is a function of it.

    Raises:
        ValueError: a setting that cannot work, by name.
    """
    if num_items < TOP_K:
        raise ValueError(f"num_items={num_items}: expected at least {TOP_K}")
    if num_users < 1:
        raise ValueError(f"num_users={num_users}: expected at least 1")
    if min(first, second) < 0 or first + second > 1:
        raise ValueError(f"first={first}, second={second}: expected probabilities that add up to at most 1")
    if not 5 <= mean_length <= max_length:
        raise ValueError(f"mean_length={mean_length}: expected 5 ... max_length={max_length}")
    chain = MarkovItems(num_items=num_items, first=first, second=second, seed=seed)
    rng = np.random.default_rng([seed, 2])
    sigma = 0.8
    lengths = rng.lognormal(np.log(mean_length) - sigma**2 / 2, sigma, num_users)
    lengths = np.clip(np.rint(lengths), 5, max_length).astype(np.int64)
    items = np.zeros((num_users, int(lengths.max())), dtype=np.int64)
    for step in range(items.shape[1]):
        if step < 2:
            items[:, step] = rng.choice(num_items, num_users, p=chain.popularity)
        else:
            items[:, step] = chain.draw(items[:, step - 1], items[:, step - 2], rng)
    times = _FIRST_TIME + rng.integers(0, 30 * 86400, (num_users, 1)) + rng.integers(60, 86400, items.shape).cumsum(1)
    raw_ids = np.sort(np.random.default_rng([seed, 3]).choice(num_items * 20, num_items, replace=False)) + 100_000

    user_rows = np.arange(num_users)
    oracle = {
        split: chain.best_possible(items[user_rows, lengths - back], items[user_rows, lengths - back - 1])
        for split, back in (("test", 2), ("val", 3))
    }
    _write_csv(Path(path), lengths, raw_ids[items], times)
    settings: dict[str, Any] = {
        "num_users": num_users,
        "num_items": num_items,
        "mean_length": mean_length,
        "max_length": max_length,
    }
    settings |= {"first": first, "second": second, "seed": seed, "zipf": chain.zipf}
    settings["successor_shares"] = _SUCCESSOR_SHARES.tolist()
    _write_whole(Path(path).with_suffix(".oracle.json"), json.dumps({"settings": settings, **oracle}, indent=2) + "\n")
    best = oracle["test"]
    return SyntheticLog(num_users, num_items, int(lengths.sum()), best[f"HR@{TOP_K}"], best[f"NDCG@{TOP_K}"])


def _write_csv(path: Path, lengths: Array, items: Array, times: Array) -> None:
    import polars as pl

    kept = np.arange(items.shape[1]) < lengths[:, None]
    users = np.repeat(np.arange(len(lengths)), lengths)
    names = pl.Series("user_id", users).cast(pl.String).str.zfill(6)
    frame = pl.DataFrame({"user_id": "u" + names, "item_id": items[kept], "timestamp": times[kept]})
    _write_whole(path, frame.write_csv())


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
