"""A synthetic exposure log whose clicks and orders have a planted probability, so that the best possible AUC is known.

Sessions of a user over some weeks show items at close times. An item's category follows those of the user's last two
clicks, which needs their order and the last minutes; a logged affinity and a logged distance of user and item are cross
features that ids cannot tell; the rest is of the user's segment and spending, and of the item and its price. Nothing
that moves a probability is hidden, so the planted probability is the best prediction there is.

Shape suffixes: U users of a block, L exposures of a user (the longest of the block), C categories.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gr.data.planted_exposures import (
    NUM_CATEGORIES,
    NUM_DISTANCES,
    NUM_SEGMENTS,
    PARTS,
    PlantedExposures,
    oracle,
    sigmoid,
)

Array = np.ndarray[Any, Any]
DAY = 86_400
FIRST_TIME = 1_699_920_000
"""Midnight (UTC) of the log's first day."""
_BLOCK_USERS = 4_096
_SESSION = (4, 12)
_SESSION_GAP = 300
_EVENT_GAP = (3, 30)
_FOLLOWERS = 3


@dataclass(frozen=True)
class ExposureLog:
    """What `write_exposure_log` wrote.

    Args:
        num_users: users.
        num_items: items that can occur.
        num_exposures: labelled exposures.
        val_from: first second of the validation days.
        test_from: first second of the test days.
        best: by name, as ``click GAUC``, what ranking the test exposures by the planted probability reaches on the
            labels as they were drawn.
    """

    num_users: int
    num_items: int
    num_exposures: int
    val_from: int
    test_from: int
    best: dict[str, float]

    def __str__(self) -> str:
        best = ", ".join(f"{name} {value:.4f}" for name, value in self.best.items())
        return (
            f"{self.num_users:,} users, {self.num_items:,} items, {self.num_exposures:,} exposures; validation from "
            f"{self.val_from}, test from {self.test_from}; the best possible on the test labels as drawn: {best}"
        )


def write_exposure_log(
    path: str | Path,
    *,
    num_users: int = 5_000,
    num_items: int = 1_000,
    mean_exposures: float = 200.0,
    days: int = 16,
    val_days: int = 1,
    test_days: int = 2,
    request_size: int = 0,
    sequence: float = 1.0,
    cross: float = 1.0,
    seed: int = 0,
) -> ExposureLog:
    """Writes a CSV log ``user_id,item_id,timestamp,click,order,affinity,distance`` and what belongs to it.

    Beside ``<name>.csv`` stand ``<name>.users.csv`` (``user_id,segment,spend``), ``<name>.items.csv``
    (``item_id,category,price``), ``<name>.prepare.yaml`` for ``lightning-gr prepare --config``, and
    ``<name>.oracle.json``: by part (`val`, `test`), AUC and GAUC of ranking by the planted probability, as expected and
    as drawn, and with a part of the signal left out. An order is labelled of every exposure, and is 1 only of clicked
    ones. Users are written by blocks, so that memory does not depend on their number. The log appears whole and last.

    Args:
        path: the CSV file.
        num_users: users.
        num_items: items that can occur.
        mean_exposures: about the mean exposures of a user in the whole log.
        days: days of the log.
        val_days: days before the test days that are for validation.
        test_days: last days of the log.
        request_size: candidates of a request at the end of each user's log, at one time and without labels; 0 makes
            none.
        sequence: factor of the signal in the last two clicks.
        cross: factor of the signal in the cross features.
        seed: everything is a function of it.

    Raises:
        ValueError: a setting that cannot work, by name.
    """
    if num_users < 1:
        raise ValueError(f"num_users={num_users}: expected at least 1")
    if num_items < NUM_CATEGORIES:
        raise ValueError(f"num_items={num_items}: expected at least {NUM_CATEGORIES}, one of each category")
    if min(val_days, test_days) < 1 or val_days + test_days >= days:
        raise ValueError(
            f"days={days}, val_days={val_days}, test_days={test_days}: expected at least one day each for training, "
            f"validation and test"
        )
    most = days * 100
    if not _SESSION[1] <= mean_exposures <= most:
        raise ValueError(f"mean_exposures={mean_exposures}: expected {_SESSION[1]} ... {most}, 100 times days={days}")
    if request_size < 0:
        raise ValueError(f"request_size={request_size}: expected at least 0")
    for name, factor in (("sequence", sequence), ("cross", cross)):
        if not np.isfinite(factor):
            raise ValueError(f"{name}={factor}: expected a finite number")
    path = Path(path)
    planted = PlantedExposures(num_items=num_items, sequence=sequence, cross=cross, seed=seed)
    raw_ids = np.sort(np.random.default_rng([seed, 3]).choice(num_items * 20, num_items, replace=False)) + 100_000
    test_from = FIRST_TIME + (days - test_days) * DAY
    val_from = test_from - val_days * DAY
    held_out: list[dict[str, Array]] = []
    num_exposures = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = {name: path.with_suffix(f".{name}") for name in ("users.csv", "items.csv", "prepare.yaml", "oracle.json")}
    targets["csv"] = path
    temporary = {name: target.with_name(f".{target.name}.{os.getpid()}.tmp") for name, target in targets.items()}
    try:
        with temporary["csv"].open("wb") as log, temporary["users.csv"].open("wb") as users:
            for block, begin in enumerate(range(0, num_users, _BLOCK_USERS)):
                rng = np.random.default_rng([seed, 2, block])
                count = min(_BLOCK_USERS, num_users - begin)
                drawn = _Block(planted, count, mean_exposures, days, rng)
                num_exposures += len(drawn.exposures["user"])
                held_out.append(drawn.labelled_from(val_from, first_user=begin))
                drawn.write(log, users, begin, raw_ids, request_size, FIRST_TIME + days * DAY)
        _write_items(temporary["items.csv"], planted, raw_ids)
        temporary["prepare.yaml"].write_text(_prepare_settings(targets))
        rows = {name: np.concatenate([each[name] for each in held_out]) for name in held_out[0]}
        in_test = rows["time"] >= test_from
        best = {
            part: oracle({name: values[chosen] for name, values in rows.items()})
            for part, chosen in (("val", ~in_test), ("test", in_test))
        }
        settings = {
            "num_users": num_users,
            "num_items": num_items,
            "mean_exposures": mean_exposures,
            "days": days,
            "val_days": val_days,
            "test_days": test_days,
            "request_size": request_size,
            "sequence": sequence,
            "cross": cross,
            "seed": seed,
        }
        split = {"val_from": val_from, "test_from": test_from}
        text = json.dumps({"settings": settings, "split": split, **best}, indent=2) + "\n"
        temporary["oracle.json"].write_text(text)
        for name, target in targets.items():
            os.replace(temporary[name], target)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    names = [f"{task} {metric}" for task in ("click", "ctcvr") for metric in ("AUC", "GAUC")]
    reached = {name: best["test"][f"{name} as drawn"] for name in names}
    return ExposureLog(num_users, num_items, num_exposures, val_from, test_from, reached)


class _Block:
    """Users and their exposures, flat, user by user in the order of time."""

    def __init__(
        self, planted: PlantedExposures, num_users: int, mean_exposures: float, days: int, rng: np.random.Generator
    ) -> None:
        self._planted, self._rng = planted, rng
        self.segments = rng.integers(0, NUM_SEGMENTS, num_users)
        self.spends = np.round(rng.normal(size=num_users), 3)
        self._tastes_UC = rng.normal(size=(num_users, NUM_CATEGORIES))
        self._places_U2 = rng.random((num_users, 2))
        lengths, times = _sessions(num_users, mean_exposures, days, rng)
        self.exposures = self._expose(lengths, times)

    def logged(self, users: Array, items: Array) -> tuple[Array, Array]:
        """Affinity and distance of users and items as a feature store would log them, noise included."""
        noise = self._rng.normal(size=(2, len(users)))
        taste = self._tastes_UC[users, self._planted.category[items]]
        affinities = np.round(0.7 * taste + 0.7 * noise[0], 3)
        away = np.sqrt(((self._places_U2[users] - self._planted.places[items]) ** 2).sum(-1))
        away = away * np.exp(0.4 * noise[1])
        return affinities, np.minimum((away * NUM_DISTANCES / 1.2).astype(np.int64), NUM_DISTANCES - 1)

    def _expose(self, lengths: Array, times_UL: Array) -> dict[str, Array]:
        planted, rng, num_users = self._planted, self._rng, len(lengths)
        shown = _Shown(planted, self._tastes_UC)
        last, before = np.full(num_users, -1), np.full(num_users, -1)
        clicked_at = np.zeros(num_users, dtype=np.int64)
        users = np.arange(num_users)
        columns: dict[str, list[Array]] = {}
        for step in range(times_UL.shape[1]):
            active = users[lengths > step]
            items = shown.draw(active, last[active], rng)
            affinities, distances = self.logged(active, items)
            known = {"items": items, "spends": self.spends[active], "affinities": affinities, "distances": distances}
            times, before_now = times_UL[active, step], before[active]
            logits = planted.click_logits(
                **known,
                segments=self.segments[active],
                last=last[active],
                before=before_now,
                ages=times - clicked_at[active],
            )
            chances, orders = sigmoid(logits), sigmoid(planted.order_logits(**known, before=before_now))
            draws = rng.random((2, len(active)))
            clicked = draws[0] < chances
            ordered = clicked & (draws[1] < orders)
            row = {
                "user": active,
                "item": items,
                "time": times,
                "click": clicked,
                "order": ordered,
                "affinity": affinities,
                "distance": distances,
                "last": last[active],
                "before": before_now,
                "age": times - clicked_at[active],
            }
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
            hit = active[clicked]
            before[hit], last[hit] = last[hit], planted.category[items[clicked]]
            clicked_at[hit] = times[clicked]
        exposures = {name: np.concatenate(values) for name, values in columns.items()}
        by_user = np.argsort(exposures["user"], kind="stable")
        return {name: values[by_user] for name, values in exposures.items()}

    def labelled_from(self, time: int, *, first_user: int) -> dict[str, Array]:
        """The exposures from a time on with their probabilities, whole and without parts."""
        planted, chosen = self._planted, self.exposures["time"] >= time
        rows = {name: values[chosen] for name, values in self.exposures.items()}
        found = {"user": rows["user"] + first_user, "time": rows["time"], "click": rows["click"]}
        found["ctcvr"] = rows["order"]
        known = {"items": rows["item"], "spends": self.spends[rows["user"]], "affinities": rows["affinity"]}
        known |= {"distances": rows["distance"], "before": rows["before"]}
        segments = self.segments[rows["user"]]
        models = {"": planted} | {f" without {part}": planted.without(part) for part in PARTS}
        for name, model in models.items():
            logits = model.click_logits(**known, segments=segments, last=rows["last"], ages=rows["age"])
            found[f"click chance{name}"] = sigmoid(logits)
            found[f"ctcvr chance{name}"] = sigmoid(logits) * sigmoid(model.order_logits(**known))
        return found

    def write(self, log: Any, users: Any, first_user: int, raw_ids: Array, request_size: int, end: int) -> None:
        """Appends the users and their events, each user's request last."""
        import polars as pl

        names = pl.Series(np.arange(first_user, first_user + len(self.segments))).cast(pl.String).str.zfill(7)
        features = {"segment": pl.Series(self.segments), "spend": pl.Series(self.spends)}
        header = first_user == 0
        pl.DataFrame({"user_id": "u" + names, **features}).write_csv(users, include_header=header)
        of = self.exposures
        events = {"user": of["user"], "item": of["item"], "timestamp": of["time"], "click": of["click"]}
        events |= {"order": of["order"], "affinity": of["affinity"], "distance": of["distance"]}
        frame = pl.DataFrame(events).with_columns(pl.col("click", "order").cast(pl.Int8))
        if request_size:
            asked = np.repeat(np.arange(len(self.segments)), request_size)
            items = self._rng.choice(self._planted.num_items, len(asked), p=self._planted.popularity)
            affinities, distances = self.logged(asked, items)
            nothing = pl.Series([None] * len(asked), dtype=pl.Int8)
            latest = np.maximum.reduceat(of["time"], np.flatnonzero(np.r_[True, np.diff(of["user"]) > 0]))
            times = np.repeat(np.maximum(latest + _SESSION_GAP, end), request_size)
            request = {"user": asked, "item": items, "timestamp": times, "click": nothing}
            request |= {"order": nothing, "affinity": affinities, "distance": distances}
            frame = pl.concat([frame, pl.DataFrame(request)]).sort("user", maintain_order=True)
        user_id, item_id = ("u" + names)[frame["user"]], pl.Series(raw_ids[frame["item"].to_numpy()])
        rest = frame.drop("user", "item")
        frame = rest.select(user_id.alias("user_id"), item_id.alias("item_id"), pl.all())
        frame.write_csv(log, include_header=header)


class _Shown:
    """Which items are shown: some follow the last click, some are to the user's taste, the rest are popular.

    Args:
        planted: the planted tables.
        tastes_UC: taste of each user for each category.
    """

    def __init__(self, planted: PlantedExposures, tastes_UC: Array) -> None:
        self._by_category = np.argsort(planted.category, kind="stable")
        weights = planted.popularity[self._by_category]
        self._ends = np.cumsum(weights)
        last_of = np.cumsum(np.bincount(planted.category, minlength=NUM_CATEGORIES)) - 1
        self._high = self._ends[last_of]
        self._low = np.r_[0.0, self._high[:-1]]
        self._followers = np.argsort(-planted.after_last, axis=1)[:, :_FOLLOWERS]
        shares = np.exp(tastes_UC)
        self._tastes = np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)

    def draw(self, users: Array, last: Array, rng: np.random.Generator) -> Array:
        """An item for each of some users, given the category of its last click."""
        kind, place = rng.random(len(users)), rng.random(len(users))
        follower = self._followers[last, rng.integers(0, _FOLLOWERS, len(users))]
        to_taste = (self._tastes[users] < rng.random((len(users), 1))).sum(1).clip(max=NUM_CATEGORIES - 1)
        popular = np.searchsorted(self._high, rng.random(len(users)) * self._high[-1]).clip(max=NUM_CATEGORIES - 1)
        category = np.where((kind < 0.25) & (last >= 0), follower, np.where(kind < 0.5, to_taste, popular))
        low, high = self._low[category], self._high[category]
        at = np.searchsorted(self._ends, low + place * (high - low), side="right")
        items: Array = self._by_category[at.clip(max=len(self._by_category) - 1)]
        return items


def _sessions(num_users: int, mean_exposures: float, days: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Exposures (U,) of each user and their times (U, L), strictly ascending within a user's length."""
    mean_session = sum(_SESSION) / 2
    sigma = 0.5
    counts = rng.lognormal(np.log(mean_exposures / mean_session) - sigma**2 / 2, sigma, num_users)
    counts = np.clip(np.rint(counts), 2, 4 * mean_exposures / mean_session).astype(np.int64)
    most = int(counts.max())
    day = rng.integers(0, days, (num_users, most))
    starts = day * DAY + rng.integers(8 * 3600, 23 * 3600, day.shape)
    starts[np.arange(most) >= counts[:, None]] = days * DAY
    starts.sort(1)
    sizes = rng.integers(_SESSION[0], _SESSION[1] + 1, starts.shape)
    sizes[np.arange(most) >= counts[:, None]] = 0
    lengths = sizes.sum(1)
    longest = int(lengths.max())
    gaps = rng.integers(_EVENT_GAP[0], _EVENT_GAP[1] + 1, (num_users, longest))
    # Each session begins at its start, or a pause after the one before it where that is later.
    first = np.cumsum(sizes, 1) - sizes
    within = np.concatenate([np.zeros((num_users, 1), dtype=np.int64), np.cumsum(gaps, 1)], 1)
    users = np.arange(num_users)
    times = np.zeros((num_users, longest), dtype=np.int64)
    free = np.zeros(num_users, dtype=np.int64)
    for session in range(most):
        begin = np.maximum(starts[:, session], free)
        for place in range(_SESSION[1]):
            here = users[place < sizes[:, session]]
            at = first[here, session] + place
            times[here, at] = begin[here] + within[here, at] - within[here, first[here, session]]
            free[here] = times[here, at] + _SESSION_GAP
    return lengths, times + FIRST_TIME


def _write_items(path: Path, planted: PlantedExposures, raw_ids: Array) -> None:
    import polars as pl

    pl.DataFrame({"item_id": raw_ids, "category": planted.category, "price": planted.price}).write_csv(path)


def _prepare_settings(files: Mapping[str, Path]) -> str:
    """What `lightning-gr prepare` is told of the log; JSON is YAML too, and quotes any path."""
    users = {"path": str(files["users.csv"]), "sparse": ["segment"], "dense": ["spend"]}
    items = {"path": str(files["items.csv"]), "sparse": ["category"], "dense": ["price"]}
    columns = {"sparse": ["distance"], "dense": ["affinity"], "labels": ["click", "order"]}
    settings = {"path": str(files["csv"]), "columns": columns, "options": {"users": users, "items": items}}
    return json.dumps(settings, indent=2) + "\n"
