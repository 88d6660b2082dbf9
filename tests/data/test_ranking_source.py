"""Ranking samples and cross features against plain loops: every event a candidate once, and nothing of the future."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.batch import SequenceBatch, TokenKind
from lightning_gr.data import (
    CrossStatistics,
    EventStore,
    Field,
    LastShare,
    LeaveOneOut,
    RankingDataModule,
    RankingSource,
    StoreWriter,
    Task,
)
from lightning_gr.models.ranking_tokens import num_earlier

Event = tuple[int, float]  # time, rating (NaN: none)
USERS = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1.0, 3.0, 5.0, math.nan])), min_size=1, max_size=9),
    min_size=1,
    max_size=5,
)
NUM_ITEMS, GENRES = 6, [[0, 2], [1], [], [2], [0, 1, 2], [1, 2]]


def make_store(folder: Path, users: list[list[Event]]) -> tuple[EventStore, list[list[dict[str, Any]]]]:
    """A store of sorted events with every kind of field, and the same as lists; every second group has 2 users."""
    rng = np.random.default_rng(5)
    rows = []
    for user in users:
        events = [
            {
                "item": int(rng.integers(NUM_ITEMS)),
                "time": t,
                "rating": r,
                "shop": int(rng.integers(3)),
                "price": float(t),
            }
            for t, r in sorted(user, key=lambda e: e[0])
        ]
        rows.append(events)
    fields = (
        Field("rating", "label", "event"),
        Field("shop", "sparse", "event", 3),
        Field("price", "dense", "event"),
        Field("city", "sparse", "user", 4),
        Field("age", "dense", "user"),
        Field("genres", "sparse", "item", 3),
        Field("year", "dense", "item"),
        Field("maker", "sparse", "item", 2),
    )
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=True, work=folder / "work")
    columns = {"item_id": "item", "timestamp": "time", "rating": "rating", "shop": "shop", "price": "price"}
    frame = pl.DataFrame(
        {"user_id": range(len(rows))}
        | {name: [[e[key] for e in user] for user in rows] for name, key in columns.items()}
        | {"city": [i % 4 for i in range(len(rows))], "age": [float(i) for i in range(len(rows))]}
    )
    writer.write_users(frame)
    writer.write_vocabulary("item_id", pl.Series("value", range(NUM_ITEMS)))
    items = {
        "genres": GENRES,
        "year": [float(i) / 2 for i in range(NUM_ITEMS)],
        "maker": [i % 2 for i in range(NUM_ITEMS)],
    }
    writer.write_items(pl.DataFrame({"item_id": range(NUM_ITEMS)} | items))
    writer.finish(summary={})
    return EventStore(folder / "store"), rows


TASKS = {"like": Task("rating", at_least=3), "rated": Task("rating", at_least=0)}


def collate(source: RankingSource, ids: list[int]) -> SequenceBatch:
    windows = [tuple(range(len(source.group_bounds) - 1))]
    return source.collate(
        np.array(ids, dtype=np.int64),
        windows=windows,
        epoch=0,
        denominators=dict.fromkeys(TASKS, 1.0),
        gradient_divisor=1.0,
    )


def targets_of(user: list[Any], part: Any, split: LastShare) -> range:
    n = len(user)
    test = n - math.floor(n * split.test + 1e-9)
    val = test - math.floor(n * split.val + 1e-9)
    first, last = {"train": (1, val), "val": (val, test), "test": (test, n)}[part]
    return range(max(first, 1), max(last, max(first, 1)))


@settings(deadline=None, max_examples=25)
@given(USERS, st.sampled_from(["train", "val", "test"]), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_samples_are_what_loops_say(
    tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]], part: Any, block: int, history: int, cross: bool
) -> None:
    store, rows = make_store(tmp_path_factory.mktemp("store"), users)
    split = LastShare(val=0.25, test=0.3)
    labels = TASKS["like"].labels(np.array([e["rating"] for user in rows for e in user]))
    statistics = CrossStatistics(store, labels) if cross else None
    source = RankingSource(
        store, part=part, split=split, tasks=TASKS, max_history=history, block=block, cross=statistics
    )
    ids, tokens = source.samples(0, source.num_rows)
    batch = collate(source, ids.tolist())
    layout = batch.layout
    assert layout.lengths_B.tolist() == tokens.tolist() or not len(ids)
    counts = {task: numbers.sum() for task, numbers in source.label_counts(ids).items()}
    assert counts == {task: labels.num_labels for task, labels in batch.labels.items()}
    kinds, earlier, found = batch.kind_T.tolist(), num_earlier(batch).tolist(), []
    width = source.ranking_features.num_contextual
    labelled = {
        task: dict(zip(x.tokens_N.tolist(), x.values_N.tolist(), strict=True)) for task, x in batch.labels.items()
    }
    items = batch.features["item_id"].values().tolist()
    place = 0
    for b, sample in enumerate(ids.tolist()):
        user, piece = sample % len(rows), sample // len(rows)
        wanted = targets_of(rows[user], part, split)
        block_events = list(wanted)[piece * block : (piece + 1) * block]
        start = int(layout.offsets_B1[b])
        n, s, r, c = batch.token_counts_B4[b].tolist()
        assert n == width == 3
        assert kinds[start : start + n + s + r + c] == [0] * n + [1] * s + [2] * r + [3] * c
        shown = rows[user][max(block_events[0] - history, 0) : block_events[-1]] + [rows[user][i] for i in block_events]
        assert len(shown) == s + r + c
        window_start = rows[user][block_events[0]]["time"]
        for i, event in enumerate(shown):
            token = start + n + i
            assert items[place + i] == event["item"]
            assert int(batch.timestamps_T[token]) == event["time"]  # type: ignore[index]
            assert batch.features["shop"].values()[place + i] == event["shop"]
            assert batch.features["maker"].values()[place + i] == event["item"] % 2
            hot = [1 / len(GENRES[event["item"]]) if g in GENRES[event["item"]] else 0.0 for g in range(3)]
            numbers = [*hot, event["item"] / 2, event["price"]]
            assert batch.dense["numbers"][token].tolist() == pytest.approx(numbers)
            known = not math.isnan(event["rating"])
            like, rating = float(event["rating"] >= 3), event["rating"] if known else 0.0
            if i < s + r:
                assert batch.dense["actions"][token].tolist() == [like * known, known, 1.0 * known, known, rating]
                assert (event["time"] < window_start) == (i < s)
            else:
                assert batch.dense["actions"][token].tolist() == [0.0] * 5
                assert labelled["like"].get(token) == (like if known else None)
                assert labelled["rated"].get(token) == (1.0 if known else None)
                # The mask shows it what is static and these real-time tokens: nothing of its time or later.
                visible = shown[: s + earlier[token]]
                assert all(other["time"] < event["time"] for other in visible)
                assert len(visible) == sum(other["time"] < event["time"] for other in shown[: s + r])
                found.append((user, block_events[i - s - r]))
        place += s + r + c
    assert sorted(found) == [(u, i) for u, user in enumerate(rows) for i in targets_of(user, part, split)]
    users_seen = [i % len(rows) for i in ids.tolist()]
    assert batch.features["user_id"].values().tolist() == users_seen
    assert batch.features["city"].values().tolist() == [u % 4 for u in users_seen]


@settings(deadline=None, max_examples=25)
@given(USERS)
def test_cross_features_count_what_came_before(
    tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]]
) -> None:
    store, rows = make_store(tmp_path_factory.mktemp("store"), users)
    events = [{"user": u, **e} for u, user in enumerate(rows) for e in user]
    like = TASKS["like"].labels(np.array([e["rating"] for e in events]))
    offsets = np.cumsum([0, *(len(g) for g in GENRES)])
    categories = (offsets, np.array([g for genres in GENRES for g in genres]))
    found = CrossStatistics(store, like, categories=categories, previous=True)
    kinds = ("user", "item", "previous_item", "user_category")
    assert found.names == (*(f"{kind}_{what}" for kind in kinds for what in ("count", "mean")), "user_gap")
    for i, event in enumerate(events):
        earlier = [e for e in events[:i] if e["user"] == event["user"] and e["time"] < event["time"]]
        event["pair"] = (earlier[-1]["item"] if earlier else None, event["item"])
    for i, event in enumerate(events):
        before = [(e, x) for e, x in zip(events, like, strict=True) if e["time"] < event["time"] and not math.isnan(x)]

        def scaled(chosen: list[float], everybody: list[float] = [x for _, x in before]) -> tuple[float, float]:  # noqa: B006
            overall = (sum(everybody) + 0.5) / (len(everybody) + 1)
            mean = (sum(chosen) + 5 * overall) / (len(chosen) + 5)
            return math.log1p(len(chosen)) / 8, 2 * (mean - overall)

        of_user = scaled([x for e, x in before if e["user"] == event["user"]])
        of_item = scaled([x for e, x in before if e["item"] == event["item"]])
        of_previous = scaled([x for e, x in before if e["pair"] == event["pair"]])
        pairs = [
            scaled([x for e, x in before if e["user"] == event["user"] and g in GENRES[e["item"]]])
            for g in GENRES[event["item"]]
        ]
        of_pairs = tuple(sum(p[k] for p in pairs) / max(len(pairs), 1) for k in (0, 1))
        wanted = [*of_user, *of_item, *of_previous, *of_pairs]
        assert found.values_EW[i, :8].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_rank_without_samples_has_every_feature(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [[(t, 3.0) for t in range(6)]])
    source = RankingSource(store, part="train", split=LeaveOneOut(), tasks=TASKS)
    full, empty = collate(source, [0]), collate(source, [])
    assert empty.features.keys() == full.features.keys()
    assert empty.num_sequences == 1
    assert empty.num_tokens == 0
    assert {name: x.shape[1:] for name, x in empty.dense.items()} == {n: x.shape[1:] for n, x in full.dense.items()}
    assert TokenKind.CANDIDATE == 3


def test_chosen_features_and_what_cannot_work(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [[(t, 3.0) for t in range(6)]])
    source = RankingSource(store, part="train", split=LeaveOneOut(), tasks=TASKS, features=["shop", "year"])
    assert source.ranking_features.tokens == {"item_id": NUM_ITEMS, "shop": 3}
    assert (source.ranking_features.width, source.ranking_features.num_contextual) == (1, 1)
    for settings_, message in (
        ({"tasks": {"x": Task("price")}}, r"tasks\.x: the store has no label price; it has rating"),
        ({"tasks": {}}, "tasks: expected at least one"),
        ({"features": ["rating"]}, "features: the store has no field rating"),
        ({"block": 0}, "block=0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RankingSource(store, **({"part": "train", "split": LeaveOneOut(), "tasks": TASKS} | settings_))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cross_task=click: no such task; choose from like"):
        RankingDataModule(path="x", tasks={"like": Task("rating")}, cross_task="click")
    with pytest.raises(ValueError, match="cross_categories=genres: counted only with cross_task"):
        RankingDataModule(path="x", tasks={"like": Task("rating")}, cross_categories="genres")
    with pytest.raises(ValueError, match="cross_previous=True: counted only with cross_task"):
        RankingDataModule(path="x", tasks={"like": Task("rating")}, cross_previous=True)
    with pytest.raises(ValueError, match=r"val=0\.5, test=0\.5: expected shares"):
        LastShare(val=0.5, test=0.5)
