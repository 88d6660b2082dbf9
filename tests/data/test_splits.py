"""Splits by time and by user, and histories cut in pieces, against plain Python lists; nothing leaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import (
    ByTime,
    ByUser,
    EventStore,
    Field,
    GlobalBatchPlan,
    Interactions,
    LastShare,
    LeaveOneOut,
    PlannedLoader,
    RetrievalSource,
    StoreWriter,
)
from lightning_gr.data.splits import part_events

TIMES = st.lists(st.lists(st.integers(0, 30), max_size=10), min_size=1, max_size=8)


def make_log(times: list[list[int]]) -> Interactions:
    """Every event is an item of its own."""
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in times])]).astype(np.int64)
    events = np.arange(offsets[-1])
    stamps = np.array([t for user in times for t in sorted(user)], dtype=np.int64)
    return Interactions(np.arange(len(times)), offsets, events, stamps, events)


def pairs(log: Any, part: Any, split: Any, max_length: int = 100, **changes: Any) -> list[tuple[int, tuple[int, ...]]]:
    """Every target with the history that it is predicted from."""
    source = RetrievalSource(log, part=part, max_length=max_length, split=split, **changes)
    ids, counts = source.samples(0, source.num_rows)
    windows = [tuple(range(len(log.group_bounds) - 1))]
    found = []
    for sample, count in zip(ids.tolist(), counts.tolist(), strict=True):
        one = np.array([sample])
        batch = source.collate(one, windows=windows, epoch=0, denominators={"next_item": 1.0}, gradient_divisor=1.0)
        assert batch.num_tokens == count == int(source.token_counts(one)[0])
        labels = batch.labels["next_item"]
        assert labels.num_labels == int(source.label_counts(one)["next_item"][0])
        items = batch.features["item_id"].values().tolist()
        for token, target in zip(labels.tokens_N.tolist(), labels.values_N.tolist(), strict=True):
            found.append((target, tuple(items[: token + 1])))
    return found


@settings(deadline=None, max_examples=60)
@given(TIMES, st.integers(0, 30), st.integers(0, 30))
def test_by_time(times: list[list[int]], a: int, b: int) -> None:
    val_from, test_from = min(a, b), max(a, b)
    log, split = make_log(times), ByTime(val_from=val_from, test_from=test_from)
    wanted: dict[str, list[tuple[int, tuple[int, ...]]]] = {"train": [], "val": [], "test": []}
    for user in range(len(times)):
        events = range(int(log.offsets[user]), int(log.offsets[user + 1]))
        for place, event in enumerate(events):
            time = int(log.timestamps[event])  # type: ignore[index]
            part = "train" if time < val_from else "val" if time < test_from else "test"
            if place:
                wanted[part].append((event, tuple(events[:place])))
    for part, expected in wanted.items():
        assert pairs(log, part, split) == expected
    # By construction nothing of the future: neither targets nor histories of training reach validation.
    assert all(log.timestamps[e] < val_from for target, seen in pairs(log, "train", split) for e in (target, *seen))  # type: ignore[index]


def test_times_can_be_dates() -> None:
    split = ByTime(val_from="2022-05-01", test_from="2022-05-02T00:00:00+02:00")
    assert (split.val_from, split.test_from) == (1651363200, 1651442400)
    with pytest.raises(ValueError, match=r"val_from='yesterday': expected an ISO date"):
        ByTime(val_from="yesterday", test_from=3)
    with pytest.raises(ValueError, match=r"val_from=5: expected a time up to test_from=3"):
        ByTime(val_from=5, test_from=3)
    log = Interactions(np.arange(1), np.array([0, 3]), np.arange(3), None, np.arange(3))
    with pytest.raises(ValueError, match=r"split=ByTime: the log has no times"):
        pairs(log, "train", ByTime(val_from=0, test_from=1))


def test_by_user_holds_out_whole_users() -> None:
    rng = np.random.default_rng(0)
    log = make_log([sorted(rng.integers(0, 99, int(n)).tolist()) for n in rng.integers(1, 9, 2000)])
    split = ByUser(val=0.1, test=0.2, seed=3)
    user_of = np.repeat(np.arange(2000), np.diff(log.offsets))
    users = {part: {int(user_of[target]) for target, _ in pairs(log, part, split)} for part in ("train", "val", "test")}
    assert not users["train"] & (users["val"] | users["test"])
    assert not users["val"] & users["test"]
    long_enough = {user for user in range(2000) if log.lengths[user] >= 2}
    assert users["train"] | users["val"] | users["test"] == long_enough
    for part, share in (("val", 0.1), ("test", 0.2)):
        assert abs(len(users[part]) / len(long_enough) - share) < 4 * np.sqrt(share / len(long_enough))
        for target, seen in pairs(log, part, split):
            last = int(log.offsets[user_of[target] + 1]) - 1
            assert target == last
            assert seen == tuple(range(int(log.offsets[user_of[target]]), last))
    assert pairs(log, "val", ByUser(val=0.1, test=0.2, seed=4)) != pairs(log, "val", split)
    with pytest.raises(ValueError, match=r"val=0.5, test=0.5: expected shares"):
        ByUser(val=0.5, test=0.5)


@settings(deadline=None, max_examples=60)
@given(TIMES, st.integers(1, 4))
def test_long_histories_in_pieces_lose_no_target(times: list[list[int]], max_length: int) -> None:
    log = make_log(times)
    whole = {target for target, _ in pairs(log, "train", LeaveOneOut())}
    cut = pairs(log, "train", LeaveOneOut(), max_length, long_histories="split")
    assert Counter(target for target, _ in cut) == Counter(whole)
    assert all(1 <= len(seen) <= max_length and seen[-1] + 1 == target for target, seen in cut)
    # The most recent piece is what truncating keeps.
    assert set(pairs(log, "train", LeaveOneOut(), max_length)) <= set(cut)


def test_pieces_have_ids_of_their_own() -> None:
    source = RetrievalSource(
        make_log([list(range(30)), [1, 2, 3, 4, 5]]), part="train", max_length=4, long_histories="split"
    )
    ids, counts = source.samples(0, 2)
    assert len(set(ids.tolist())) == len(ids) == 8
    assert (counts <= 4).all()
    assert set((ids % 2).tolist()) == {0, 1}
    with pytest.raises(ValueError, match="long_histories='fold': expected truncate or split"):
        RetrievalSource(make_log([[1]]), part="train", max_length=4, long_histories="fold")  # type: ignore[arg-type]


FIELDS = (Field("tab", "sparse", "event", 50), Field("watched", "dense", "event"), Field("tags", "sparse", "user", 9))
FIELDS += (Field("income", "dense", "user"),)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    """Forty users in groups of a few; an event's fields are functions of its item."""
    folder = tmp_path_factory.mktemp("store")
    patch = pytest.MonkeyPatch()
    patch.setattr("lightning_gr.data.event_store.writer._GROUP_USERS", 3)
    writer = StoreWriter(path=folder / "store", fields=FIELDS, has_timestamps=True, work=folder / "work")
    event = 0
    for part in range(2):
        rows = []
        for user in range(part * 20, part * 20 + 20):
            items = list(range(event, event + 4 + user % 5))
            event += len(items)
            rows.append(
                {
                    "user_id": user,
                    "item_id": items,
                    "timestamp": [i * 10 for i in items],
                    "tab": [i % 50 for i in items],
                    "watched": [i / 2 for i in items],
                    "tags": list(range(user % 4)),
                    "income": user / 4,
                }
            )
        types = {"watched": pl.List(pl.Float32), "income": pl.Float32, "tags": pl.List(pl.Int64)}
        writer.write_users(pl.DataFrame(rows, schema_overrides=types))
    writer.finish(summary={})
    patch.undo()
    return EventStore(folder / "store")


def in_memory(store: EventStore) -> Interactions:
    rows = [store.read_group(group) for group in range(len(store.group_bounds) - 1)]
    items = np.concatenate([part.items for part in rows])
    offsets = np.concatenate([[0], np.cumsum(store.lengths)])
    stamps = np.concatenate([part.timestamps for part in rows if part.timestamps is not None])
    return Interactions(store.users, offsets, items, stamps, store.item_ids)


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("split", [LeaveOneOut(), ByTime(val_from=1000, test_from=1500), ByUser(val=0.2, test=0.2)])
def test_a_store_gives_the_samples_of_the_log_in_memory(store: EventStore, part: Any, split: Any) -> None:
    assert pairs(store, part, split, 5) == pairs(in_memory(store), part, split, 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_on_the_seams_of_windows_hold_their_own_users(store: EventStore, num_workers: int) -> None:
    names = [field.name for field in FIELDS]
    source = RetrievalSource(store, part="train", max_length=6, features=names)
    plan = GlobalBatchPlan(source, global_tokens=30, window_rows=7, seed=5)
    log = in_memory(store)
    seams = 0
    batches = []
    for rank in range(2):
        loader = PlannedLoader(source, plan, rank=rank, world_size=2, num_workers=num_workers)
        batches += list(loader)
    epoch = plan.epoch(0)
    seams = sum(len(epoch.windows(i)) > 1 for i in range(len(epoch)))
    assert seams >= 3
    seen: Counter[int] = Counter()
    for batch in batches:
        ids = batch.sample_ids_B.tolist()
        features = {name: batch.features[name] for name in batch.features.keys()}  # noqa: SIM118
        items = features["item_id"].values()
        lengths = features["item_id"].lengths().tolist()
        if ids == [-1]:
            assert lengths == [0]
            continue
        wanted = []
        for user in ids:
            events = log.items[log.offsets[user] : log.offsets[user + 1]][:-3][-6:].tolist()
            wanted += events
            seen[user] += 1
        assert items.tolist() == wanted
        assert batch.timestamps_T is not None
        assert batch.timestamps_T.tolist() == [i * 10 for i in wanted]
        assert features["tab"].values().tolist() == [i % 50 for i in wanted]
        assert features["tab"].lengths().tolist() == lengths
        assert batch.dense["watched"].tolist() == [i / 2 for i in wanted]
        assert features["tags"].lengths().tolist() == [user % 4 for user in ids]
        assert features["tags"].values().tolist() == [tag for user in ids for tag in range(user % 4)]
        assert batch.dense["income"].tolist() == [user / 4 for user in ids]
    assert seen == Counter(range(40))


def test_a_rank_without_samples_has_every_feature(store: EventStore) -> None:
    source = RetrievalSource(store, part="val", max_length=6, features=["tab", "tags", "income", "watched"])
    batch = source.collate(
        np.zeros(0, dtype=np.int64), windows=[(0, 1)], epoch=0, denominators={"next_item": 3.0}, gradient_divisor=2.0
    )
    assert batch.sample_ids_B.tolist() == [-1]
    assert batch.features.keys() == ["item_id", "tab", "tags"]
    assert batch.features.lengths().tolist() == [0, 0, 0]
    assert batch.dense["income"].shape == (1,)
    assert batch.dense["watched"].shape == (0,)


def test_a_feature_that_is_not_there_is_named(store: EventStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no field 'tabs' of events or users; it has \['tab'"):
        RetrievalSource(store, part="train", max_length=6, features=["tabs"])
    with pytest.raises(ValueError, match=r"features=\['tab'\]: a log read directly has none"):
        RetrievalSource(in_memory(store), part="train", max_length=6, features=["tab"])


def test_evaluation_reads_in_the_order_of_the_store(store: EventStore) -> None:
    source = RetrievalSource(store, part="test", max_length=6)
    plan = GlobalBatchPlan(source, global_tokens=30, shuffle=False, window_rows=7)
    assert torch.cat([batch.sample_ids_B for batch in PlannedLoader(source, plan)]).tolist() == list(range(40))


@settings(deadline=None, max_examples=40)
@given(TIMES)
def test_events_of_a_part_are_what_spans_ask_for_and_a_users_first(times: list[list[int]]) -> None:
    log = make_log(times)
    rows = np.arange(len(times))
    splits = [
        LeaveOneOut(),
        LastShare(val=0.3, test=0.2),
        ByUser(val=0.3, test=0.3, seed=4),
        ByTime(val_from=10, test_from=20),
    ]

    class Foreign:
        """Somebody's split, with the two methods that splits had at first."""

        spans, identity = splits[1].spans, splits[1].identity

    for split in [*splits, Foreign()]:
        seen: list[Counter[int]] = [Counter() for _ in times]
        for part in ("train", "val", "test"):
            begin, end = part_events(split, log, part, rows)  # type: ignore[arg-type]
            last, asking = split.spans(log, part, rows)  # type: ignore[arg-type]
            for user in range(len(times)):
                asked = set(range(int(asking[user]) + 1, int(last[user]) + 2)) if last[user] >= asking[user] else set()
                events = set(range(int(begin[user]), int(end[user])))
                assert events - {0} == asked
                seen[user].update(events)
        assert all(count == 1 for user in seen for count in user.values())
        if not isinstance(split, ByUser | Foreign):
            assert [len(user) for user in seen] == [len(user) for user in times]
