"""FeatureConfigs against a store: what batches hold, by plain loops; statistics by numpy; bad input by its words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr import FeatureConfig
from lightning_gr.batch import SequenceBatch
from lightning_gr.data import (
    ByTime,
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
from lightning_gr.data.raw_ids import raw_key

TASKS = {"click": Task("click")}
NUM_ITEMS = 5
GENRES = [["b", "d"], ["a"], [], ["d"], ["a", "b", "d"]]
GENRE_VOCABULARY = ["a", "b", "d"]
LIKED_VOCABULARY = ["b", "c", "d", None]  # of users; c is no genre of any item
MAKER_VOCABULARY = ["x", "y"]
NAN = math.nan

Event = tuple[int, int, float, float]  # item, bucket, affinity, price (NaN: none)
EVENTS = st.tuples(
    st.integers(0, NUM_ITEMS - 1),
    st.integers(0, 3),
    st.sampled_from([0.0, 1.5, -2.0, NAN]),
    st.sampled_from([3.0, 9.5, NAN]),
)
USERS = st.lists(st.lists(EVENTS, min_size=1, max_size=7), min_size=1, max_size=4)
SOME: list[list[Event]] = [[(i % 5, i % 4, float(i), 2.0 * i) for i in range(6)], [(0, 1, NAN, 1.0), (1, 2, 0.5, NAN)]]
LIKED = [[0, 2], [1], [], [3, 0]]
LIKED_VALUES = [["b", "d"], ["c"], [], [None, "b"]]


def make_store(folder: Path, users: list[list[Event]] = SOME, **columns: Any) -> EventStore:
    """Users with the given events, a second apart; groups of rows are small."""
    fields = [
        Field("click", "label", "event"),
        Field("bucket", "sparse", "event", 4),
        Field("affinity", "dense", "event"),
        Field("price", "dense", "event"),
        Field("liked", "sparse", "user", 4),
        Field("age", "dense", "user"),
        Field("last", "sparse", "user", 3),
        Field("genres", "sparse", "item", 3),
        Field("maker", "sparse", "item", 2),
        Field("weight", "dense", "item"),
    ]
    frame = pl.DataFrame(
        {
            "user_id": range(len(users)),
            "item_id": [[e[0] for e in user] for user in users],
            "timestamp": [list(range(len(user))) for user in users],
            "click": [[float(i % 2) for i in range(len(user))] for user in users],
            "bucket": [[e[1] for e in user] for user in users],
            "affinity": [[e[2] for e in user] for user in users],
            "price": [[e[3] for e in user] for user in users],
            "liked": pl.Series([LIKED[u % 4] for u in range(len(users))], dtype=pl.List(pl.Int64)),
            "age": [None if u % 3 == 2 else 20.0 + u for u in range(len(users))],
            "last": [u % 3 for u in range(len(users))],
        },
        strict=False,
    )
    for name, (field, values) in columns.items():
        fields.append(field)
        frame = frame.with_columns(pl.Series(name, values))
    writer = StoreWriter(path=folder / "store", fields=tuple(fields), has_timestamps=True, work=folder / "work")
    for row in range(len(users)):
        writer.write_users(frame[row : row + 1])
    writer.write_vocabulary("item_id", pl.Series("value", [10 * i for i in range(NUM_ITEMS)]))
    writer.write_vocabulary("genres", pl.Series("value", GENRE_VOCABULARY))
    writer.write_vocabulary("liked", pl.Series("value", LIKED_VOCABULARY))
    writer.write_vocabulary("maker", pl.Series("value", MAKER_VOCABULARY))
    writer.write_vocabulary("last", pl.Series("value", [40, 7, 10]))
    items = {
        "genres": [[GENRE_VOCABULARY.index(g) for g in genres] for genres in GENRES],
        "maker": [i % 2 for i in range(NUM_ITEMS)],
        "weight": [None if i == 3 else 0.5 * i for i in range(NUM_ITEMS)],
    }
    writer.write_items(pl.DataFrame({"item_id": range(NUM_ITEMS)} | items))
    writer.finish(summary={})
    return EventStore(folder / "store")


def source_of(store: EventStore, features: Any, **changes: Any) -> RankingSource:
    given: dict[str, Any] = {"part": "train", "split": LastShare(val=0.0, test=0.0), "max_history": 4, "block": 3}
    return RankingSource(store, tasks=TASKS, features=features, **(given | changes))


def collate(source: RankingSource, ids: Any) -> SequenceBatch:
    return source.collate(
        np.array(ids, dtype=np.int64),
        windows=[tuple(range(len(source.group_bounds) - 1))],
        epoch=0,
        denominators=dict.fromkeys(TASKS, 1.0),
        gradient_divisor=1.0,
    )


ALL = [
    FeatureConfig("bucket", group="history", dim=3),
    FeatureConfig("affinity", group="candidate"),
    FeatureConfig("price"),
    FeatureConfig("genres", pooling="sum"),
    FeatureConfig("maker", group="candidate"),
    FeatureConfig("weight", group="history"),
    FeatureConfig("liked", table="genres"),
    FeatureConfig("age", mean=20.0, std=2.0),
]


@settings(deadline=None, max_examples=10)
@given(USERS, st.sampled_from(["history", "candidate", "event"]), st.booleans())
def test_batches_hold_each_feature_at_the_tokens_of_its_group(
    tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]], group: Any, cross: bool
) -> None:
    store = make_store(tmp_path_factory.mktemp("store"), users)
    num_events = sum(len(user) for user in users)
    features = [dataclasses.replace(x, group=group) if x.name == "genres" else x for x in ALL]
    counted = CrossStatistics(store, np.zeros(num_events)) if cross else None
    source = source_of(store, features, cross=counted)
    ids = source.samples(0, len(users))[0]
    batch = collate(source, ids)
    extra = counted.values_EW.shape[1] if counted is not None else 0
    found = source.ranking_features
    assert (found.width, found.history_width, found.candidate_width) == (1, 3 + 1, extra + 1)
    assert list(found.contextual) == ["user_id", "liked"]
    wanted: dict[str, list[int]] = {name: [] for name in ("item_id", "bucket", "genres", "maker")}
    lengths: dict[str, list[int]] = {name: [] for name in wanted}
    counts, price, weight, affinity = [], [], [], []
    clock = batch.timestamps_T.tolist()  # type: ignore[union-attr]  # an event's time is its place
    for b, sample in enumerate(ids.tolist()):
        user = users[sample % len(users)]
        start, end = batch.layout.offsets_B1[b : b + 2].tolist()
        contextual, static, realtime, candidates = batch.token_counts_B4[b].tolist()
        assert contextual == 3  # user_id, liked, and the numbers
        before = {name: len(values) for name, values in wanted.items()}
        counts += [0] * contextual
        price += [0.0] * contextual
        weight += [0.0] * contextual
        affinity += [0.0] * contextual
        for token in range(start + contextual, end):
            item, bucket, near, cost = user[clock[token]]
            is_candidate = token >= end - candidates
            wanted["item_id"].append(item)
            if is_candidate:
                wanted["maker"].append(item % 2)
            else:
                wanted["bucket"].append(bucket)
            has_genres = group == "event" or (group == "candidate") == is_candidate
            counts.append(len(GENRES[item]) if has_genres else 0)
            wanted["genres"] += [GENRE_VOCABULARY.index(g) for g in GENRES[item]] if has_genres else []
            price.append(cost)
            weight.append(0.0 if is_candidate else NAN if item == 3 else 0.5 * item)
            affinity.append(near if is_candidate else 0.0)
        assert end - start == contextual + static + realtime + candidates
        for name in wanted:
            lengths[name].append(len(wanted[name]) - before[name])
    for name, values in wanted.items():
        # liked shares the table of genres: its values a, b, d keep their rows, since ids of genres are fewer.
        table = {"a": 4, "b": 0, "d": 2}
        rows = [table[GENRE_VOCABULARY[x]] for x in values] if name == "genres" else values
        assert batch.features[name].values().tolist() == rows, name
        assert batch.features[name].lengths().tolist() == (lengths[name] or [0]), name
    assert batch.dense["genres.count"].tolist() == counts
    np.testing.assert_array_equal(batch.dense["numbers"][:, 0], price)
    np.testing.assert_array_equal(batch.dense["actions"][:, -1], np.float32(weight))
    np.testing.assert_array_equal(batch.dense["cross"][:, -1], affinity)
    of_samples = [sample % len(users) for sample in ids.tolist()]
    ages = [[NAN if u % 3 == 2 else 20.0 + u] for u in of_samples]
    if of_samples:
        np.testing.assert_array_equal(batch.dense["contextual"], np.array(ages))
        assert batch.features["liked"].values().tolist() == [code for u in of_samples for code in LIKED[u % 4]]


def test_a_batch_without_samples_has_every_feature(tmp_path: Path) -> None:
    source = source_of(make_store(tmp_path), ALL)
    full, empty = collate(source, source.samples(0, 2)[0]), collate(source, [])
    assert (empty.num_sequences, empty.num_tokens) == (1, 0)
    assert empty.features.keys() == full.features.keys()
    assert empty.features.values().numel() == 0
    assert {name: x.shape[1:] for name, x in empty.dense.items()} == {n: x.shape[1:] for n, x in full.dense.items()}


def test_what_a_feature_declares_is_what_models_are_told(tmp_path: Path) -> None:
    found = source_of(make_store(tmp_path), ALL).ranking_features
    assert found.tokens == {"item_id": NUM_ITEMS, "genres": 5}  # a, b, d; c and the missing one of liked
    assert found.history_tokens == {"bucket": 4}
    assert found.candidate_tokens == {"maker": 2}
    assert found.contextual == {"user_id": 2, "liked": 5}
    assert found.tables == {"liked": "genres"}
    assert found.pooling == {"genres": "sum"}
    shapes = {shape.name: (shape.rows, shape.dim, shape.features) for shape in found.shapes(8)}
    assert shapes == {
        "user_id": (2, 8, ("user_id",)),
        "genres": (5, 8, ("liked", "genres")),
        "item_id": (5, 8, ("item_id",)),
        "bucket": (4, 3, ("bucket",)),
        "maker": (2, 8, ("maker",)),
    }


# ---- shared tables -------------------------------------------------------------------------------------------------


def test_equal_values_of_features_that_share_a_table_have_one_row(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    features = [FeatureConfig("genres"), FeatureConfig("liked", table="genres"), FeatureConfig("last", table="item_id")]
    source = source_of(store, features)
    batch = collate(source, source.samples(0, 2)[0][:1])
    row_of = {}
    items = batch.features["item_id"].values().tolist()
    genres = batch.features["genres"].values().tolist()
    for value, row in zip([g for item in items for g in GENRES[item]], genres, strict=True):
        assert row_of.setdefault(value, row) == row
    liked = batch.features["liked"].values().tolist()
    for value, row in zip(LIKED_VALUES[0], liked, strict=True):
        assert row_of.setdefault(value, row) == row  # type: ignore[arg-type]
    assert len(set(row_of.values())) == len(row_of)
    # Raw item ids are 0, 10, 20, 30, 40; those of `last` 40, 7, 10: the items keep their rows and 7 gets a new one.
    assert source.ranking_features.tokens["item_id"] == NUM_ITEMS + 1
    both = collate(source, source.samples(0, 2)[0])
    rows = dict(zip([40, 7, 10], [4, 5, 1], strict=True))
    of_samples = source.samples(0, 2)[0] % 2
    assert both.features["last"].values().tolist() == [rows[[40, 7, 10][u]] for u in of_samples]


def test_raw_ids_are_shared_as_raw_ids(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    keys = {"item_keys": raw_key(store.item_ids), "user_keys": raw_key(store.users)}
    source = source_of(store, [FeatureConfig("last", table="item_id")], **keys)
    ids = source.samples(0, 2)[0]
    batch = collate(source, ids)
    assert batch.features["last"].values().tolist() == [[40, 7, 10][u] for u in ids % 2]
    assert set(batch.features["item_id"].values().tolist()) <= {0, 10, 20, 30, 40}


def test_vocabularies_of_different_meaning_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shares = "shares table genres with genres, but"
    for features, message in (
        ([FeatureConfig("genres"), FeatureConfig("maker", table="genres")], f"maker: {shares} no value occurs in both"),
        ([FeatureConfig("genres"), FeatureConfig("last", table="genres")], f"last: {shares} holds Int64 and the other"),
        ([FeatureConfig("user_id", table="item_id")], "shares table item_id with item_id, and ids of users are none"),
    ):
        with pytest.raises(ValueError, match=message):
            source_of(store, features)


# ---- statistics ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(USERS, st.sampled_from([LastShare(val=0.25, test=0.25), LeaveOneOut(), ByTime(val_from=2, test_from=4)]))
def test_statistics_are_those_of_the_training_part(
    tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]], split: Any
) -> None:
    store = make_store(tmp_path_factory.mktemp("store"), users)
    features = [
        FeatureConfig("price"),
        FeatureConfig("affinity", normalisation="log"),
        FeatureConfig("age", normalisation="log"),
        FeatureConfig("weight"),
    ]
    found = source_of(store, features, split=split).ranking_features.normalisation

    def trained(user: list[Event]) -> list[Event]:
        n = len(user)
        if isinstance(split, LastShare):
            return user[: n - 2 * math.floor(n / 4)]
        return user[:2] if isinstance(split, ByTime) else user[: n - 2 if n >= 3 else n]

    events = [event for user in users for event in trained(user)]
    logs = lambda xs: [math.copysign(math.log1p(abs(x)), x) for x in xs if not math.isnan(x)]  # noqa: E731
    wanted = {
        "price": [x[3] for x in events if not math.isnan(x[3])],
        "affinity": logs([x[2] for x in events]),
        "age": logs([20.0 + u for u, user in enumerate(users) if u % 3 != 2 and trained(user)]),
        "weight": [0.0, 0.5, 1.0, 2.0],
    }
    columns = {"weight": found["numbers"][0], "price": found["numbers"][1], "affinity": found["numbers"][2]}
    columns["age"] = found["contextual"][0]
    for name, values in wanted.items():
        mean, std = (np.mean(values), np.std(values)) if values else (0.0, 0.0)
        assert columns[name].mean == pytest.approx(mean, abs=1e-12), name
        assert columns[name].std == pytest.approx(std if std > 1e-9 else 1.0, abs=1e-12), name
        assert columns[name].log == (name in ("affinity", "age"))


def test_large_numbers_do_not_cancel_and_constants_have_a_deviation_of_one(tmp_path: Path) -> None:
    users: list[list[Event]] = [[(0, 0, 0.1, 1e9 + i % 2) for i in range(40)] for _ in range(5)]
    found = source_of(make_store(tmp_path, users), [FeatureConfig("price"), FeatureConfig("affinity")])
    price, affinity = found.ranking_features.normalisation["numbers"]
    assert (price.mean, price.std) == (1e9 + 0.5, pytest.approx(0.5, rel=1e-9))
    assert (affinity.mean, affinity.std) == (pytest.approx(0.1), 1.0)


def test_given_statistics_are_taken_and_nothing_is_read_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    features = [FeatureConfig("price", mean=1.0, std=4.0), FeatureConfig("affinity", normalisation="none")]
    source = source_of(store, features)
    monkeypatch.setattr(EventStore, "read_group", lambda *a: pytest.fail("was read"))
    first, second = source.ranking_features.normalisation["numbers"]
    assert (first.mean, first.std, second.mean, second.std) == (1.0, 4.0, 0.0, 1.0)


def test_what_was_not_shown_does_not_count_for_features_of_candidates(tmp_path: Path) -> None:
    users: list[list[Event]] = [[(0, 0, 9.0, 9.0), (1, 0, 1.0, 1.0), (2, 0, 3.0, 3.0)]]
    store = make_store(tmp_path, users, exposed=(Field("exposed", "sparse", "event", 2), [[0, 1, 1]]))
    features = [FeatureConfig("affinity", group="candidate"), FeatureConfig("price")]
    found = source_of(store, features).ranking_features.normalisation
    assert (found["cross"][0].mean, found["cross"][0].std) == (2.0, 1.0)
    assert found["numbers"][0].mean == pytest.approx(13 / 3)


def test_infinite_numbers_are_named_at_start(tmp_path: Path) -> None:
    store = make_store(tmp_path, [SOME[0], [(0, 0, 0.0, math.inf), (1, 0, 0.0, 1.0)]])
    with pytest.raises(
        ValueError, match=r"features\.price: a number is infinite, in row group 1 \(users 1 to 1\) of .*store"
    ):
        _ = source_of(store, [FeatureConfig("price")]).ranking_features


def test_a_feature_that_has_no_number_is_said(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[(0, 0, 0.0, NAN), (1, 0, 0.0, NAN)]])
    with pytest.warns(UserWarning, match=r"features\.price: no number in the training part of .*; it stays 0"):
        found = source_of(store, [FeatureConfig("price")]).ranking_features
    assert (found.normalisation["numbers"][0].mean, found.normalisation["numbers"][0].std) == (0.0, 1.0)


# ---- settings ------------------------------------------------------------------------------------------------------


def test_names_are_what_they_were(tmp_path: Path) -> None:
    """Numbers as they are with 0 for missing ones, categories of an item as columns, and nothing pooled."""
    store = make_store(tmp_path)
    source = source_of(store, ["price", "genres", "weight", "maker"])
    found = source.ranking_features
    assert found.tokens == {"item_id": NUM_ITEMS, "maker": 2}
    assert (found.width, found.history_width, found.candidate_width) == (3 + 1 + 1, 3, 0)
    assert (found.normalisation, found.pooling, found.tables, found.dims) == ({}, {}, {}, {})
    batch = collate(source, source.samples(0, 2)[0])
    assert list(batch.dense) == ["numbers", "actions"]
    items, place = batch.features["item_id"].values().tolist(), 0
    clock = batch.timestamps_T.tolist()  # type: ignore[union-attr]
    for b, sample in enumerate(source.samples(0, 2)[0].tolist()):
        start, end = batch.layout.offsets_B1[b : b + 2].tolist()
        for token in range(start + 1, end):
            item, _, _, price = SOME[sample % 2][clock[token]]
            assert items[place] == item
            hot = [1 / len(GENRES[item]) if g in GENRES[item] else 0.0 for g in GENRE_VOCABULARY]
            wanted = [*hot, 0.0 if item == 3 else 0.5 * item, 0.0 if math.isnan(price) else price]
            assert batch.dense["numbers"][token].tolist() == pytest.approx(wanted)
            place += 1
    assert place == len(items)


def test_cross_features_can_be_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    counted = CrossStatistics(store, np.zeros(8))
    whole = source_of(store, ALL, cross=counted)
    without = source_of(store, ALL, cross=counted, cross_features=False)
    kept = [x for x in ALL if x.group != "candidate"]
    same = source_of(store, kept)
    assert without.ranking_features == same.ranking_features
    assert without.ranking_features.candidate_width == 0
    assert len({whole.fingerprint, without.fingerprint, same.fingerprint}) == 3
    batch = collate(without, without.samples(0, 2)[0])
    assert "cross" not in batch.dense
    assert "maker" not in batch.features.keys()  # noqa: SIM118  KeyedJaggedTensor is no mapping


def test_leaving_out_what_is_not_there_is_said() -> None:
    with pytest.warns(UserWarning, match="cross_features=False: there are none to be left out"):
        RankingDataModule(path="x", tasks=TASKS, cross_features=False, features=[FeatureConfig("price")])


def test_the_fingerprint_differs_with_each_setting(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    variants: list[list[FeatureConfig]] = [
        [FeatureConfig("price")],
        [FeatureConfig("price", normalisation="log")],
        [FeatureConfig("price", group="history")],
        [FeatureConfig("price", mean=0.0, std=1.0)],
        [FeatureConfig("genres")],
        [FeatureConfig("genres", dim=4)],
        [FeatureConfig("genres", pooling="sum")],
        [FeatureConfig("genres", table="t")],
    ]
    assert len({source_of(store, features).fingerprint for features in variants}) == len(variants)
    assert (
        source_of(store, [FeatureConfig("genres", pooling="mean")]).fingerprint
        == source_of(store, [FeatureConfig("genres")]).fingerprint
    )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"name": ""}, "name='': expected the name of a column"),
        ({"group": "item"}, "price: group='item': expected one of user, event, history, candidate"),
        ({"pooling": "max"}, "price: pooling='max': expected one of sum, mean"),
        ({"normalisation": "minmax"}, "price: normalisation='minmax': expected one of none, standard, log"),
        ({"dim": 0}, "price: dim=0: expected at least 1"),
        ({"table": "a.b"}, "price: table='a.b': expected a name without"),
        ({"mean": 1.0}, "price: mean=1.0, std=None: give both"),
        ({"mean": 1.0, "std": 0.0}, "price: mean=1.0, std=0.0: expected numbers, std above 0"),
        ({"mean": NAN, "std": 1.0}, "price: mean=nan, std=1.0: expected numbers"),
        ({"mean": 1.0, "std": 1.0, "normalisation": "none"}, "price: .*not used with normalisation=none"),
    ],
)
def test_settings_that_no_column_can_have_are_named(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"features.*{message}"):
        FeatureConfig(**({"name": "price"} | settings_))


PRICE, BUCKET, GENRE = FeatureConfig("price"), FeatureConfig("bucket"), FeatureConfig("genres", dim=4)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            [FeatureConfig("prise")],
            r"prise: the store .*store has no such column; it has item_id.*; did you mean price",
        ),
        ([FeatureConfig("click")], r"click: a label of .*store, which candidates would then see; leave it out"),
        ([FeatureConfig("timestamp")], "timestamp: times are no feature"),
        (
            [FeatureConfig("age", group="candidate")],
            "age: group=candidate: .*store is a column of each user, which can",
        ),
        ([FeatureConfig("price", group="user")], "price: group=user: .*can be of group event or history or candidate"),
        ([FeatureConfig("item_id", group="candidate")], "item_id: group=candidate"),
        ([FeatureConfig("bucket", normalisation="log")], "bucket: normalisation='log': not for sparse .*store is one"),
        ([FeatureConfig("bucket", mean=1.0, std=1.0)], r"bucket: mean=1\.0: not for sparse columns"),
        ([FeatureConfig("price", dim=4)], "price: dim=4: not for dense columns"),
        ([FeatureConfig("price", table="t")], "price: table='t': not for dense columns"),
        ([FeatureConfig("price", pooling="sum")], "price: pooling='sum': not for dense columns"),
        ([PRICE, FeatureConfig("price", group="history")], "price: declared twice"),
        (
            [GENRE, FeatureConfig("liked", table="genres", dim=8)],
            "liked: dim=8, but table genres has 4, by feature gen",
        ),
        (
            [FeatureConfig("bucket", dim=4, table="item_id"), FeatureConfig("item_id", dim=8)],
            "dim=4, .* has 8, by .*item_id",
        ),
        (["price", BUCKET], r"'price' is a name, and others are configs; write \{name: price\}"),
        (["click"], "the store has no field click; it has click, bucket"),
        (["prise"], "the store has no field prise"),
        (["price", "price"], "price: declared twice"),
    ],
)
def test_features_that_the_store_cannot_have_are_named_at_start(tmp_path: Path, features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"features.*{message}"):
        source_of(make_store(tmp_path), features)


def test_the_users_id_is_declared_only_where_it_is_a_token(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    features = [FeatureConfig("user_id", dim=2), FeatureConfig("item_id", table="goods", dim=3)]
    found = source_of(store, features).ranking_features
    assert {x.name: x.dim for x in found.shapes(8)} == {"user_id": 2, "goods": 3}
    with pytest.raises(ValueError, match=r"features\.user_id: declared, but user_token=False leaves its token out"):
        source_of(store, features, user_token=False)
