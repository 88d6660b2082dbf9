"""Public forms: generated as their owners publish them, recognised, prepared, and read back event by event."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from lightning_gr.data import EventStore, check_store
from lightning_gr.data.event_log import EventLog
from lightning_gr.data.formats import FORMS, Columns, open_log
from lightning_gr.data.prepare import PrepareSettings, prepare
from lightning_gr.data.synthetic_formats import (
    WRITERS,
    Event,
    amazon_ids,
    genres_of,
    kuairand_signals,
    make_events,
    tags_of,
    write_like,
)

TABLES = ("csv", "parquet", "jsonl")


def open_like(form: str, folder: Path) -> tuple[EventLog, list[Event]]:
    path, events = write_like(form, folder, seed=3)
    columns = Columns(labels=("rating",)) if form in TABLES else None
    return open_log(path, columns=columns), events


def read_back(store: EventStore, label: str | None) -> dict[Any, list[tuple[Any, int | None, float | None]]]:
    """Every user's events: raw item, time and label, in the order of the store."""
    users: dict[Any, list[tuple[Any, int | None, float | None]]] = {}
    row = 0
    for group in range(len(store.group_bounds) - 1):
        rows = store.read_group(group, [label] if label else [])
        for i in range(len(rows.offsets) - 1):
            events = slice(rows.offsets[i], rows.offsets[i + 1])
            items = store.item_ids[rows.items[events]].tolist()
            times = [None] * len(items) if rows.timestamps is None else rows.timestamps[events].tolist()
            labels = rows.event_fields[label][events].tolist() if label else [None] * len(items)
            users[store.users[row]] = list(zip(items, times, labels, strict=True))
            row += 1
    return users


def expected(form: str, events: list[Event]) -> dict[Any, list[tuple[Any, int | None, float | None]]]:
    users: dict[Any, list[tuple[Any, int | None, float | None]]] = {}
    for event in events:  # in the order of time
        user, item = amazon_ids(event) if form.startswith("amazon") else (event.user, event.item)
        time = None if form == "s3rec" else event.time
        label = None if form == "s3rec" else float(event.rating)
        if form == "kuairand":
            label = float(kuairand_signals(event)["is_click"])
        users.setdefault(user, []).append((item, time, label))
    return users


@pytest.mark.parametrize("form", WRITERS)
def test_what_is_published_is_what_is_stored(form: str, tmp_path: Path) -> None:
    log, events = open_like(form, tmp_path / "published")
    assert log.form == form.partition("-")[0]
    store = prepare(log, tmp_path / "store")
    assert check_store(store.path) == []
    label = {"s3rec": None, "kuairand": "is_click"}.get(form, "rating")
    assert read_back(store, label) == expected(form, events)
    assert store.num_events == len(events) == store.summary["events_kept"] == store.summary["rows_read"]
    assert store.summary["dropped"] == {}


def item_feature(store: EventStore, name: str) -> dict[Any, Any]:
    values = store.vocabulary(name)
    rows = store.items()
    decoded = [
        sorted(values[code] for code in cell) if isinstance(cell, list) else values[cell]
        for cell in rows[name].to_list()
    ]
    return dict(zip(rows["item_id"].to_list(), decoded, strict=True))


@pytest.mark.parametrize("form", ["movielens-100k", "movielens-1m", "movielens-20m"])
def test_movies_have_their_genres(form: str, tmp_path: Path) -> None:
    log, events = open_like(form, tmp_path / "published")
    store = prepare(log, tmp_path / "store")
    assert item_feature(store, "genres") == {i: sorted(genres_of(i)) for i in {event.item for event in events}}
    if form != "movielens-20m":
        rows = store.read_group(0, ["gender", "age"])
        genders = store.vocabulary("gender")[rows.user_fields["gender"][0]].tolist()
        assert genders == ["MF"[user % 2] for user in store.users.tolist()]


def test_kuairand_has_its_features_and_signals(tmp_path: Path) -> None:
    log, events = open_like("kuairand", tmp_path / "published")
    store = prepare(log, tmp_path / "store")
    assert item_feature(store, "tag") == {i: sorted(tags_of(i)) for i in {e.item for e in events}}
    durations = dict(zip(store.items()["item_id"], store.items()["video_duration"], strict=True))
    assert all(np.isnan(x) if i % 4 == 0 else x == 9000 + i for i, x in durations.items())
    rows = store.read_group(0, ["user_active_degree", "onehot_feat4", "fans_user_num"])
    degrees = store.vocabulary("user_active_degree")[rows.user_fields["user_active_degree"][0]].tolist()
    assert degrees == ["full_active" if user % 2 else "UNKNOWN" for user in store.users.tolist()]
    missing = store.vocabulary("onehot_feat4")[rows.user_fields["onehot_feat4"][0]].tolist()
    assert [x is None or x != x for x in missing] == [user % 3 == 0 for user in store.users.tolist()]
    assert rows.user_fields["fans_user_num"][0].tolist() == store.users.tolist()


def test_turbogrs_filter_leaves_positive_events_that_are_not_hated(tmp_path: Path) -> None:
    path, events = write_like("kuairand", tmp_path / "published", seed=3)
    store = prepare(open_log(path, filter="turbogr"), tmp_path / "store")
    kept = [e for e in events if e.rating >= 3]
    assert read_back(store, "is_click") == expected("kuairand", kept)
    both = prepare(open_log(path, include_random=True), tmp_path / "both")
    assert both.num_events == len(events) + 1
    with pytest.raises(ValueError, match="filter='other': expected none or turbogr"):
        open_log(path, filter="other")


def test_sequences_have_their_attributes(tmp_path: Path) -> None:
    log, events = open_like("s3rec", tmp_path / "published")
    store = prepare(log, tmp_path / "store")
    assert not store.has_timestamps
    assert item_feature(store, "attributes") == {i: sorted(tags_of(i)) for i in {event.item for event in events}}


def test_atomic_files_have_their_features(tmp_path: Path) -> None:
    log, events = open_like("recbole", tmp_path / "published")
    store = prepare(log, tmp_path / "store")
    assert item_feature(store, "class") == {i: sorted(genres_of(i)) for i in {event.item for event in events}}
    assert item_feature(store, "movie_title")[3] == 'The "Best" 3'
    ages, _ = store.read_group(0, ["age"]).user_fields["age"]
    assert ages.tolist() == [20.0 + user for user in store.users.tolist()]


def test_five_core_and_leave_one_out_as_turbogr_has_them(tmp_path: Path) -> None:
    path, events = write_like("kuairand", tmp_path / "published", seed=3, num_users=60, num_items=25)
    settings = PrepareSettings(min_user_events=5, min_item_events=5)
    store = prepare(open_log(path, filter="turbogr"), tmp_path / "store", settings=settings)
    kept = [e for e in events if e.rating >= 3]
    while True:
        users, items = Counter(e.user for e in kept), Counter(e.item for e in kept)
        left = [e for e in kept if users[e.user] >= 5 and items[e.item] >= 5]
        if len(left) == len(kept):
            break
        kept = left
    assert 0 < len(kept) < len(events)
    assert read_back(store, "is_click") == expected("kuairand", kept)


@pytest.mark.parametrize("form", WRITERS)
def test_generated_logs_are_functions_of_their_seed(form: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_like(form, tmp_path / name, seed=seed)

    def content(name: str) -> dict[str, bytes]:
        files = (p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}

    assert content("a") == content("b") != content("c")


def test_generated_lengths_have_a_tail_and_items_are_popular() -> None:
    events = make_events(num_users=400, num_items=50)
    lengths = np.array(list(Counter(event.user for event in events).values()))
    assert len(lengths) == 400
    assert lengths.mean() > 1.1 * np.median(lengths)
    counts = Counter(event.item for event in events)
    assert counts[1] > 5 * counts[50]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent.csv", r"absent\.csv: no such file or folder"),
        (lambda d: _file(d / "x.csv", b""), r"x\.csv: the file is empty"),
        (lambda d: _file(d / "x.bin", b"\x00\x01 nothing known"), r"x\.bin: no log that is known here; give the form"),
        (lambda d: _file(d / "x.csv", b"uid,sku\n1,2\n"), r"x\.csv: has no column user_id .*it has uid, sku"),
        (
            lambda d: _file(d / "x.csv", b"user_ids,item_id\n1,2\n"),
            r"has no column user_id .*it has user_ids, item_id; did you mean user_ids\?",
        ),
        (lambda d: _file(d / "x.inter", b"user_id:int\titem_id:token\n"), r"line 1 has the field 'user_id:int'"),
        (lambda d: _file(d / "x.inter", b"user_id:token\trating:float\n"), r"the header has 1 token\(s\)"),
        (lambda d: _file(d / "x.jsonl", b'{"user_id": 1}\n'), r"x\.jsonl: has no column item_id"),
    ],
)
def test_what_cannot_be_opened_is_named(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_log(make(tmp_path))


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("form", ["amazon-2014", "jsonl"])
def test_a_compressed_file_that_was_cut_off_is_named(form: str, tmp_path: Path) -> None:
    path, _ = write_like(form, tmp_path, seed=3, num_users=3000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{path.name}: .*(unexpected end|cannot be read)"):
        prepare(open_log(path, columns=Columns(labels=("rating",)) if form == "jsonl" else None), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_parquet_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {name: np.random.default_rng(0).integers(0, 999, 10**4) for name in ("user_id", "item_id")}
    ).write_parquet(path)
    whole = path.read_bytes()
    third = len(whole) // 3
    path.write_bytes(whole[:third] if damage == "cut off" else whole[:third] + b"\xff" * third + whole[2 * third :])
    with pytest.raises(ValueError, match=r"log\.parquet: (no Parquet file that can be read|cannot be read)"):
        prepare(open_log(path), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    path, _ = write_like("kuairand", tmp_path, seed=3)
    (path / "data" / "user_features_1k.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no user_features_\*\.csv is there"):
        open_log(path)
    with pytest.raises(FileNotFoundError, match=r"none of u\.data"):
        open_log(path, "movielens")


def test_forms_and_columns_that_contradict_each_other(tmp_path: Path) -> None:
    path, _ = write_like("movielens-1m", tmp_path / "ml", seed=3)
    with pytest.raises(ValueError, match=r"form='ml': expected auto or one of kuairand"):
        open_log(path, "ml")
    with pytest.raises(ValueError, match=r"columns: a log of form movielens has its own"):
        open_log(path, "movielens", columns=Columns(user_id="uid"))
    with pytest.raises(ValueError, match=r"form='x': expected one of"):
        write_like("x", tmp_path)
    assert set(FORMS) == {form.partition("-")[0] for form in WRITERS}


def test_columns_of_any_name_and_separator(tmp_path: Path) -> None:
    path = _file(tmp_path / "log.txt", b"who;what;when;shop;price\nu1;a;2024-05-01 10:00:00;x;1.5\nu1;b;2024-05-02;;\n")
    columns = Columns(user_id="who", item_id="what", timestamp="when", sparse=("shop",), dense=("price",))
    store = prepare(open_log(path, columns=columns), tmp_path / "store")
    rows = store.read_group(0, ["shop", "price"])
    assert rows.timestamps is not None
    assert rows.timestamps.tolist() == [1714557600, 1714608000]
    assert store.vocabulary("shop")[rows.event_fields["shop"]].tolist() == ["x", None]
    assert rows.event_fields["price"][0] == 1.5
    assert np.isnan(rows.event_fields["price"][1])
    assert store.users.tolist() == ["u1"]


def test_a_parquet_of_dates_and_categories(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "user_id": pl.Series(["b", "a"], dtype=pl.Categorical),
            "item_id": [2**63 - 1, -5],
            "timestamp": pl.Series([1_700_000_000_000, 1_600_000_000_000]).cast(pl.Datetime("ms")),
        }
    )
    frame.write_parquet(tmp_path / "log.parquet")
    store = prepare(open_log(tmp_path / "log.parquet"), tmp_path / "store")
    assert read_back(store, None) == {"a": [(-5, 1_600_000_000, None)], "b": [(2**63 - 1, 1_700_000_000, None)]}
