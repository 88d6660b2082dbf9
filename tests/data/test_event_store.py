"""The event store: what is written is what is read, and whoever wrote it, what is wrong is said."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data.event_store import EventStore, Field, StoreWriter, check_store, complete_store, writer

FIELDS = (
    Field("tab", "sparse", "event", 4),
    Field("watched", "dense", "event"),
    Field("click", "label", "event"),
    Field("age", "sparse", "user", 3),
    Field("tags", "sparse", "user", 5),
    Field("income", "dense", "user"),
)


def user(number: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng([number, length])
    return {
        "user_id": number * 10,
        "item_id": rng.integers(0, 9, length).tolist(),
        "timestamp": np.sort(rng.integers(-5, 1 << 40, length)).tolist(),
        "tab": rng.integers(0, 4, length).tolist(),
        "watched": rng.random(length).tolist(),
        "click": np.where(rng.random(length) < 0.5, np.nan, 1.0).tolist(),
        "age": int(rng.integers(0, 3)),
        "tags": rng.integers(0, 5, int(rng.integers(0, 4))).tolist(),
        "income": float(rng.random()),
    }


SCHEMA = {
    "user_id": pl.Int64,
    "item_id": pl.List(pl.Int64),
    "timestamp": pl.List(pl.Int64),
    "tab": pl.List(pl.Int32),
    "watched": pl.List(pl.Float32),
    "click": pl.List(pl.Float32),
    "age": pl.Int32,
    "tags": pl.List(pl.Int64),
    "income": pl.Float32,
}


def write(folder: Path, parts: list[list[dict[str, Any]]], **settings: Any) -> EventStore:
    store = StoreWriter(path=folder / "store", fields=FIELDS, has_timestamps=True, work=folder / "work", **settings)
    for part in parts:
        store.write_users(pl.DataFrame(part, schema=SCHEMA))
    store.write_vocabulary("item_id", pl.Series([100 + i for i in range(9)]))
    store.finish(summary={"events": 1})
    return EventStore(folder / "store")


def make_parts(lengths: list[list[int]]) -> list[list[dict[str, Any]]]:
    number, parts = 0, []
    for part in lengths:
        parts.append([user(number + i, length) for i, length in enumerate(part)])
        number += len(part)
    return parts


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1, max_size=3))
def test_what_is_written_is_what_is_read(lengths: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(writer, "_GROUP_USERS", 3)
    patch.setattr(writer, "_GROUP_EVENTS", 8)
    parts = make_parts(lengths)
    users = [user for part in parts for user in part]
    store = write(tmp_path_factory.mktemp("store"), parts)
    patch.undo()
    assert check_store(store.path) == []
    assert (store.num_users, store.num_events) == (len(users), sum(map(sum, lengths)))
    assert store.lengths.tolist() == [len(user["item_id"]) for user in users]
    assert store.label_counts("click").tolist() == [int(np.sum(~np.isnan(user["click"]))) for user in users]
    assert store.item_ids.tolist() == list(range(100, 109))
    assert store.users.tolist() == [user["user_id"] for user in users]
    bounds = store.group_bounds
    assert bounds[0] == 0 or len(users) == 0
    names = [field.name for field in FIELDS]
    for group in range(len(bounds) - 1):
        own = users[bounds[group] : bounds[group + 1]]
        assert 1 <= len(own) <= 3
        rows = store.read_group(group, names)
        for i, user_ in enumerate(own):
            events = slice(rows.offsets[i], rows.offsets[i + 1])
            assert rows.items[events].tolist() == user_["item_id"]
            assert rows.timestamps is not None
            assert rows.timestamps[events].tolist() == user_["timestamp"]
            for name in ("tab", "watched", "click"):
                assert np.array_equal(rows.event_fields[name][events], np.float32(user_[name]), equal_nan=True)
            for name in ("age", "tags", "income"):
                values, ends = rows.user_fields[name]
                assert np.array_equal(values[ends[i] : ends[i + 1]], np.atleast_1d(np.float32(user_[name])))


def test_it_holds_the_index_in_maps_and_pickles_as_a_path(tmp_path: Path) -> None:
    store = write(tmp_path, make_parts([[3, 4]]))
    assert isinstance(store.lengths, np.memmap)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read_group(0).items.tolist() == store.read_group(0).items.tolist()
    assert len(pickle.dumps(store)) < 1000


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    prints = set()
    for i, parts in enumerate([[[3, 4]], [[4, 3]], [[3], [4]]]):
        (tmp_path / str(i)).mkdir()
        prints.add(write(tmp_path / str(i), make_parts(parts)).fingerprint)
    assert len(prints) == 2 or len(prints) == 3
    (tmp_path / "again").mkdir()
    assert write(tmp_path / "again", make_parts([[3, 4]])).fingerprint in prints


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    write(tmp_path, make_parts([[3]]))
    with pytest.raises(FileExistsError, match=r"store: an event store is there already.*--overwrite"):
        write(tmp_path, make_parts([[4]]))
    assert EventStore(tmp_path / "store").lengths.tolist() == [3]
    assert write(tmp_path, make_parts([[4]]), overwrite=True).lengths.tolist() == [4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "work"]
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").mkdir()
    with pytest.raises(FileExistsError, match=r"store: exists and is no event store"):
        write(tmp_path, make_parts([[4]]), overwrite=True)


def test_a_store_that_is_not_finished_is_none(tmp_path: Path) -> None:
    store = StoreWriter(path=tmp_path / "store", fields=FIELDS, has_timestamps=True, work=tmp_path / "work")
    store.write_users(pl.DataFrame(make_parts([[3]])[0], schema=SCHEMA))
    assert not (tmp_path / "store").exists()
    with pytest.raises(FileNotFoundError, match="no event store"):
        EventStore(tmp_path / "work" / "store")
    again = StoreWriter(path=tmp_path / "store", fields=FIELDS, has_timestamps=True, work=tmp_path / "work")
    assert again.has_part(0)
    assert not again.has_part(1)


def damage(store: Path, what: str) -> None:
    manifest = json.loads((store / "store.json").read_text())
    part = store / "events" / "part-00000.parquet"
    if what == "version":
        manifest["version"] = 99
    elif what == "format":
        manifest["format"] = "something else"
    elif what == "index":
        shutil.rmtree(store / "index")
    elif what == "no index":
        del manifest["fingerprint"]
    elif what == "users":
        manifest["num_users"] = 7
    if what == "json":
        (store / "store.json").write_text('{"format": ')
    elif what == "part":
        part.write_bytes(part.read_bytes()[:-30])
    elif what == "absent part":
        part.unlink()
    else:
        (store / "store.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("version", r"store\.json: the store has version 99, this lightning-gr reads 1; prepare it again"),
        ("format", r"store\.json: not the manifest of an event store"),
        ("json", r"store\.json: damaged"),
        ("index", r"lengths\.npy: missing; run `lightning-gr store index"),
        ("no index", r"the store has no index yet; run `lightning-gr store index"),
        ("users", r"the index has 2 users, the manifest 7"),
        ("part", r"part-00000\.parquet"),
        ("absent part", r"part-00000\.parquet"),
    ],
)
def test_a_damaged_store_is_refused_by_name(what: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, make_parts([[3, 2]])).path
    damage(path, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        EventStore(path).read_group(0)
    (problem, *_) = check_store(path)
    assert "\n" not in str(problem)


def foreign(folder: Path, columns: dict[str, Any], *, manifest: dict[str, Any] | None = None) -> Path:
    """A store as a job in another system writes it: Parquet alone, or with a manifest of its fields."""
    (folder / "events").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "events" / "a.parquet")
    if manifest is not None:
        (folder / "store.json").write_text(json.dumps(manifest))
    return folder


GOOD: dict[str, Any] = {
    "user_id": ["x", "y"],
    "item_id": [[0, 1], [2]],
    "timestamp": [[5, 6], [7]],
    "stars": [[1.0, float("nan")], [3.0]],
    "shop": [[0, 2], [1]],
    "country": [1, 0],
}


def test_a_foreign_store_is_indexed_and_read(tmp_path: Path) -> None:
    path = foreign(tmp_path / "store", GOOD)
    complete_store(path, labels=["stars"])
    assert check_store(path) == []
    store = EventStore(path)
    assert {(f.name, f.kind, f.per, f.cardinality) for f in store.fields} == {
        ("stars", "label", "event", None),
        ("shop", "sparse", "event", 3),
        ("country", "sparse", "user", 2),
    }
    assert store.num_items == 3
    assert store.item_ids.tolist() == [0, 1, 2]
    assert store.users.tolist() == ["x", "y"]
    assert store.label_counts("stars").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": [1, 2]}, r"a\.parquet: column item_id has type int64; expected lists of whole numbers"),
        ({"user_id": None}, r"a\.parquet: has no column user_id; it has item_id"),
        ({"item_id": [[0, -1], [2]]}, r"a\.parquet: column item_id has the code -1"),
        ({"country": [1, None]}, r"a\.parquet: row 1, column country: a value is missing"),
        ({"shop": [[1, 2], [None]]}, r"a\.parquet: row 1, column shop: a value is missing"),
        ({"item_id": [[0, 1], None]}, r"a\.parquet: row 1, column item_id: a value is missing"),
        ({"shop": [["a", "b"], ["c"]]}, r"a\.parquet: column shop has type .*string"),
    ],
)
def test_a_foreign_store_that_cannot_be_indexed(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    columns = {name: values for name, values in (GOOD | changes).items() if values is not None}
    path = foreign(tmp_path / "store", columns)
    with pytest.raises(ValueError, match=message):
        complete_store(path)
    assert not (path / "store.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamp": [[6, 5], [7]]}, "events/a.parquet, row 0, column timestamp: 5 comes after 6; sort by time"),
        ({"timestamp": [[5, 6], [7, 8]]}, "events/a.parquet, row 1, column timestamp: has 2 values for 1 events"),
        ({"user_id": ["x", "x"]}, "events/a.parquet, row 1, column user_id: 'x' occurs twice"),
        ({"stars": [[1.0, float("inf")], [3.0]]}, "events/a.parquet, row 0, column stars: an infinite label"),
    ],
)
def test_the_check_names_file_row_and_column(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = foreign(tmp_path / "store", GOOD | changes)
    complete_store(path, labels=["stars"])
    assert any(str(problem).startswith(message) for problem in check_store(path)), check_store(path)


def test_a_time_that_falls_between_two_users_is_no_problem(tmp_path: Path) -> None:
    path = foreign(tmp_path / "store", GOOD | {"timestamp": [[50, 60], [7]]})
    complete_store(path, labels=["stars"])
    assert check_store(path) == []


def test_codes_beyond_the_vocabulary_are_found(tmp_path: Path) -> None:
    path = foreign(tmp_path / "store", GOOD)
    (path / "vocabulary").mkdir()
    pl.DataFrame({"value": ["a", "b"]}).write_parquet(path / "vocabulary" / "item_id.parquet")
    complete_store(path)
    assert str(check_store(path)[0]) == "events/a.parquet, row 1, column item_id: code 2: expected 0 ... 1"


def test_an_index_of_other_files_is_found(tmp_path: Path) -> None:
    path = foreign(tmp_path / "store", GOOD)
    complete_store(path, labels=["stars"])
    pq.write_table(
        pa.table(
            GOOD
            | {"item_id": [[0], [2, 1]]}
            | {
                name: [[values[0][0]], values[1] * 2]
                for name, values in GOOD.items()
                if name in ("timestamp", "stars", "shop")
            }
        ),
        path / "events" / "a.parquet",
    )
    assert any("the index has other lengths" in str(problem) for problem in check_store(path))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"name": "item_id", "kind": "dense", "per": "event"}, "field item_id: the name is the store's own"),
        ({"name": "a", "kind": "label", "per": "user"}, "field a: labels belong to events"),
        ({"name": "a", "kind": "sparse", "per": "user"}, "field a: cardinality=None"),
        ({"name": "a", "kind": "odd", "per": "user"}, "field a: kind='odd'"),
    ],
)
def test_a_field_that_contradicts_itself(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Field(**settings_)
