"""A synthetic event log with planted structure whose best possible ranking is known.

The next item is, with probability `first`, a successor of the last item; with probability `second`, of the item before
it (by another table); otherwise any item, by Zipf popularity. Each item has a few successors of unequal probability.
So the conditional probability of every item given a history is known, and with it what no model can beat. Clicks have a
known probability too: the user's taste, the item's quality, and whether the item follows the one before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TOP_K = 10
_SUCCESSOR_SHARES = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
_FIRST_TIME = 1_700_000_000
_BLOCK_USERS = 16_384
_TASTE_NODES = 20
_TASTE_STD, _QUALITY_STD, _FOLLOWING_GAIN, _CLICK_INTERCEPT = 0.7, 1.0, 1.5, -1.0


@dataclass(frozen=True)
class SyntheticLog:
    """What `write_synthetic_log` wrote.

    Args:
        num_users: users.
        num_items: items that can occur.
        num_events: events.
        best_hr: expected HR@10 of the best possible ranking of the test items.
        best_ndcg: its expected NDCG@10.
        best_auc: expected AUC of the test items' clicks, ranked by who knows all but the users' tastes, and of those
            what their clicks tell.
    """

    num_users: int
    num_items: int
    num_events: int
    best_hr: float
    best_ndcg: float
    best_auc: float

    def __str__(self) -> str:
        return (
            f"{self.num_users:,} users, {self.num_items:,} items, {self.num_events:,} events; the best possible "
            f"HR@10 is {self.best_hr:.4f}, NDCG@10 {self.best_ndcg:.4f}, click AUC {self.best_auc:.4f}"
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


class Clicks:
    """The planted probability that an event is clicked: taste of the user, quality of the item, and what came before.

    Args:
        chain: whose first-order successors are clicked more after their predecessor.
        seed: seed of tastes and qualities.
    """

    def __init__(self, *, chain: MarkovItems, seed: int) -> None:
        self._successors = chain.successors[0]
        self._quality = np.random.default_rng([seed, 4]).normal(0.0, _QUALITY_STD, chain.num_items)
        self._seed = seed

    def tastes(self, block: int, count: int) -> Array:
        """The taste of each user of a block."""
        return np.random.default_rng([self._seed, 5, block]).normal(0.0, _TASTE_STD, count)

    def probabilities(self, tastes: Array, items: Array, last: Array) -> Array:
        """Of events: the user's taste, the item, and the item before it, -1 where there is none."""
        follows = (self._successors[last] == items[..., None]).any(-1) & (last >= 0)
        logits = _CLICK_INTERCEPT + tastes + self._quality[items] + _FOLLOWING_GAIN * follows
        probabilities: Array = 1 / (1 + np.exp(-logits))
        return probabilities

    def given_history(self, items: Array, last: Array, clicked: Array, places: Sequence[Array]) -> list[Array]:
        """Probability of a click for who knows everything but the user's taste, which the clicks before it tell of.

        Args:
            items: (U, L) items.
            last: (U, L) item before each, -1 where there is none.
            clicked: (U, L) clicks.
            places: for each result, the event of each user (U,).

        Returns:
            Probabilities (U,) by Bayes' rule, the taste integrated by Gauss-Hermite quadrature.
        """
        nodes, weights = np.polynomial.hermite_e.hermegauss(_TASTE_NODES)
        log_posterior = np.repeat(np.log(weights)[None], len(items), axis=0)
        found = [np.zeros(len(items)) for _ in places]
        for step in range(items.shape[1]):
            chances = self.probabilities(_TASTE_STD * nodes, items[:, step, None], last[:, step, None])
            for result, place in zip(found, places, strict=True):
                here = np.flatnonzero(place == step)
                posterior = np.exp(log_posterior[here] - log_posterior[here].max(1, keepdims=True))
                result[here] = (posterior * chances[here]).sum(1) / posterior.sum(1)
            log_posterior += np.log(np.where(clicked[:, step, None], chances, 1 - chances))
        return found


def best_auc(probabilities: Array) -> float:
    """Expected share of (clicked, not clicked) pairs that ranking by the true probabilities puts right."""
    p = np.sort(probabilities)
    values, first, counts = np.unique(p, return_index=True, return_counts=True)
    missed = np.add.reduceat(1 - p, first)
    clicked = np.add.reduceat(p, first)
    below = np.cumsum(missed) - missed
    # Pairs of events of equal probability count half; an event makes no pair with itself.
    same = np.add.reduceat(p * (1 - p), first)
    ties = clicked * missed - same
    pairs = p.sum() * (1 - p).sum() - (p * (1 - p)).sum()
    assert len(values) == len(counts)
    return float((clicked * below + 0.5 * ties).sum() / pairs) if pairs > 0 else 0.5


def auc_as_drawn(probabilities: Array, clicked: Array) -> float:
    """Share of (clicked, not clicked) pairs of these very events that ranking by the true probabilities puts right.

    It differs from `best_auc` by the luck of the draw, which a model on the same events shares.
    """
    _, place, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    num_clicked, num_missed = clicked.sum(), (~clicked).sum()
    if not (num_clicked and num_missed):
        return 0.5
    return float((rank[clicked].sum() - num_clicked * (num_clicked + 1) / 2) / (num_clicked * num_missed))


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
    """Writes a CSV log ``user_id,item_id,timestamp,click`` and ``<name>.oracle.json`` with the best possible beside it.

    Lengths are log-normal with a heavy tail, at least 5. Raw item ids are not 0 ... N - 1. Users are written by blocks,
    so that memory does not depend on their number. Both files appear whole or not at all.

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
    path = Path(path)
    chain = MarkovItems(num_items=num_items, first=first, second=second, seed=seed)
    clicks = Clicks(chain=chain, seed=seed)
    raw_ids = np.sort(np.random.default_rng([seed, 3]).choice(num_items * 20, num_items, replace=False)) + 100_000
    splits = (("test", 2), ("val", 3))
    sums: dict[str, dict[str, float]] = {split: {} for split, _ in splits}
    of_targets: dict[str, list[Array]] = {split: [] for split, _ in splits}
    clicked_targets: dict[str, list[Array]] = {split: [] for split, _ in splits}
    num_events = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for block, begin in enumerate(range(0, num_users, _BLOCK_USERS)):
                count = min(_BLOCK_USERS, num_users - begin)
                rng = np.random.default_rng([seed, 2, block] if block else [seed, 2])
                lengths, items, times = _histories(chain, count, mean_length, max_length, rng)
                tastes = clicks.tastes(block, count)
                before = np.concatenate([np.full((count, 1), -1), items[:, :-1]], axis=1)
                chances = clicks.probabilities(tastes[:, None], items, before)
                clicked = np.random.default_rng([seed, 6, block]).random(chances.shape) < chances
                _write_block(file, begin, lengths, raw_ids[items], times, clicked)
                num_events += int(lengths.sum())
                rows = np.arange(count)
                known = clicks.given_history(items, before, clicked, [lengths - back + 1 for _, back in splits])
                for (split, back), chance in zip(splits, known, strict=True):
                    best = chain.best_possible(items[rows, lengths - back], items[rows, lengths - back - 1])
                    for name, value in best.items():
                        sums[split][name] = sums[split].get(name, 0.0) + value * count
                    of_targets[split].append(chance)
                    clicked_targets[split].append(clicked[rows, lengths - back + 1])
        oracle = {
            split: {name: value / num_users for name, value in sums[split].items()}
            | {
                "click AUC": best_auc(np.concatenate(of_targets[split])),
                "click AUC as drawn": auc_as_drawn(
                    np.concatenate(of_targets[split]), np.concatenate(clicked_targets[split])
                ),
            }
            for split, _ in splits
        }
        settings: dict[str, Any] = {
            "num_users": num_users,
            "num_items": num_items,
            "mean_length": mean_length,
            "max_length": max_length,
        }
        settings |= {"first": first, "second": second, "seed": seed, "zipf": chain.zipf}
        settings["successor_shares"] = _SUCCESSOR_SHARES.tolist()
        text = json.dumps({"settings": settings, **oracle}, indent=2) + "\n"
        _write_whole(path.with_suffix(".oracle.json"), text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    best = oracle["test"]
    return SyntheticLog(num_users, num_items, num_events, best[f"HR@{TOP_K}"], best[f"NDCG@{TOP_K}"], best["click AUC"])


def _histories(
    chain: MarkovItems, num_users: int, mean_length: float, max_length: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Lengths (U,), items and times (U, longest); what lies beyond a user's length is not used."""
    sigma = 0.8
    lengths = rng.lognormal(np.log(mean_length) - sigma**2 / 2, sigma, num_users)
    lengths = np.clip(np.rint(lengths), 5, max_length).astype(np.int64)
    items = np.zeros((num_users, int(lengths.max())), dtype=np.int64)
    for step in range(items.shape[1]):
        if step < 2:
            items[:, step] = rng.choice(chain.num_items, num_users, p=chain.popularity)
        else:
            items[:, step] = chain.draw(items[:, step - 1], items[:, step - 2], rng)
    times = _FIRST_TIME + rng.integers(0, 30 * 86400, (num_users, 1)) + rng.integers(60, 86400, items.shape).cumsum(1)
    return lengths, items, times


def _write_block(file: Any, first_user: int, lengths: Array, items: Array, times: Array, clicked: Array) -> None:
    import polars as pl

    kept = np.arange(items.shape[1]) < lengths[:, None]
    users = np.repeat(np.arange(first_user, first_user + len(lengths)), lengths)
    names = pl.Series("user_id", users).cast(pl.String).str.zfill(6)
    columns = {"item_id": items[kept], "timestamp": times[kept], "click": clicked[kept].astype(np.int8)}
    pl.DataFrame({"user_id": "u" + names, **columns}).write_csv(file, include_header=first_user == 0)


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
