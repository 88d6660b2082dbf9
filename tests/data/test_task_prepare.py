"""prepare --tasks: records grouped by any column, against a group-by of dictionaries; what cannot be grouped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.cli import main
from lightning_gr.data import EventStore, Task, TaskDataModule, check_store
from lightning_gr.data.formats import Columns, open_log, with_history, with_tasks
from lightning_gr.data.prepare import PrepareSettings, prepare, run
from lightning_gr.data.synthetic_formats import write_like

COLUMNS = Columns(sparse=("shop",), dense=("price",), labels=("click",))
FLAGS = ["--columns.sparse", "[shop]", "--columns.dense", "[price]", "--columns.labels", "[click]"]
HEADER = "user_id,item_id,timestamp,shop,price,click,page"
IDS = st.one_of(st.integers(0, 4), st.sampled_from(["a", "007"]))
ROWS = st.lists(
    st.tuples(
        IDS, IDS, st.integers(0, 9), st.sampled_from("xyz"), st.integers(0, 3), st.sampled_from("01"), st.integers(0, 2)
    ),
    min_size=1,
    max_size=20,
)
CITIES = {"0": "Rome", "1": "Oslo", "a": "Rome", "007": "Bonn"}


def write(path: Path, rows: list[Any], header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def read(store: EventStore, names: list[str]) -> dict[str, list[tuple[str, ...]]]:
    """By task, its records as text: item, time and the fields, codes as what they stand for; "None" where missing."""
    kinds = {field.name: field for field in store.fields}
    words = {name: store.vocabulary(name).tolist() for name in names if kinds[name].kind == "sparse"}
    items, tasks, row = store.item_ids.tolist(), store.users.tolist(), 0
    found = {}
    for group in range(len(store.group_bounds) - 1):
        part = store.read_group(group, names)
        times = [0] * len(part.items) if part.timestamps is None else part.timestamps.tolist()
        for first, last in zip(part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=True):
            records = []
            for e in range(first, last):
                cells = [items[part.items[e]], times[e]]
                for name in names:
                    value = part.event_fields[name][e]
                    value = words[name][value] if name in words else float(value)
                    cells.append(None if value is None or value != value else value)
                records.append(tuple(map(str, cells)))
            found[str(tasks[row])] = records
            row += 1
    return found


@settings(deadline=None, max_examples=25)
@given(
    rows=ROWS,
    column=st.sampled_from(["user_id", "item_id", "shop", "price", "page", "city"]),
    buckets=st.integers(1, 3),
    with_users=st.booleans(),
)
def test_records_are_grouped_as_a_dictionary_groups_them(
    rows: list[Any], column: str, buckets: int, with_users: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    if column == "city":
        rows = [row for row in rows if str(row[0]) in CITIES] or [(0, 0, 0, "x", 0, "1", 0)]
        with_users = True
    options = {}
    if with_users:
        cities = write(folder / "users.csv", list(CITIES.items()), header="user_id,city")
        options["users"] = {"path": str(cities), "sparse": ["city"]}
    log = with_tasks(open_log(write(folder / "log.csv", rows), columns=COLUMNS, **options), column)
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "num_buckets", lambda *_: buckets)
    store = prepare(log, folder / "store")
    patch.undo()
    expected: dict[str, list[tuple[str, ...]]] = {}
    kept = [name for name in ("user", "shop", "price", "city", "click") if name != column]
    kept = [name for name in kept if (with_users or name != "city") and (column != "user_id" or name != "user")]
    if column == "user_id":
        kept = [name for name in kept if name != "city"]
    for row in sorted(rows, key=lambda row: row[2]):
        city = CITIES.get(str(row[0]))
        cells = dict(zip(HEADER.split(","), row, strict=True)) | {"user": row[0], "city": city}
        cells |= {"price": float(row[4]), "click": float(row[5])}
        task = str(row[4]) if column == "price" else str(cells[column])
        record = (str(row[1]), str(row[2]), *(str(cells[name]) for name in kept))
        expected.setdefault(task, []).append(record)
    assert {f.name for f in store.fields if f.per == "event"} == set(kept)
    assert read(store, kept) == expected
    assert (store.summary["tasks"], store.summary["users"]) == (column, len(expected))
    assert check_store(store.path) == []


def test_tasks_of_movielens_keep_their_items_and_take_features_of_users_along(tmp_path: Path) -> None:
    path, events = write_like("movielens-1m", tmp_path / "log")
    by_item = prepare(with_tasks(open_log(path), "item_id"), tmp_path / "items")
    found = read(by_item, ["user", "gender", "age", "rating"])
    expected = Counter((str(e.item), str(e.item), str(e.user), "MF"[e.user % 2], str(float(e.rating))) for e in events)
    assert expected == Counter((task, r[0], r[2], r[3], r[5]) for task, records in found.items() for r in records)
    assert {(f.name, f.per) for f in by_item.fields} >= {("genres", "item"), ("user", "event"), ("zip", "event")}
    by_age = read(prepare(with_tasks(open_log(path), "age"), tmp_path / "ages"), ["user"])
    assert {int(age): {int(r[2]) % 3 for r in records} for age, records in by_age.items()} == {0: {0}, 10: {1}, 20: {2}}
    by_user = prepare(with_tasks(open_log(path), "user_id"), tmp_path / "users")
    plain = prepare(open_log(path), tmp_path / "plain")
    assert read(by_user, ["rating"]) == read(plain, ["rating"])
    assert by_user.fields == plain.fields
    assert "tasks" not in plain.summary
    with pytest.raises(ValueError, match="tasks=genres: holds lists; a record has one task"):
        with_tasks(open_log(path), "genres")


def test_tasks_of_kuairand_are_authors_of_videos_or_tabs(tmp_path: Path) -> None:
    path, events = write_like("kuairand", tmp_path / "log")
    store = prepare(with_tasks(open_log(path), "author_id"), tmp_path / "store")
    found = read(store, ["user", "is_click", "tab", "onehot_feat3", "register_days"])
    assert {task: len(records) for task, records in found.items()} == Counter(str(e.item % 7) for e in events)
    assert all(int(record[0]) % 7 == int(task) for task, records in found.items() for record in records)
    assert all(float(record[6]) == float(record[2]) for records in found.values() for record in records)
    data = TaskDataModule(
        path=str(store.path),
        tasks={"click": Task("is_click")},
        features=["author_id", "user"],
        support=2,
        query=2,
        shots=[0, 1],
        val_tasks=0.3,
        test_tasks=0.0,
    )
    assert next(iter(data.train_dataloader())).num_samples > 0
    by_video = prepare(with_tasks(open_log(path), "video_id"), tmp_path / "videos")
    assert sorted(read(by_video, ["user"])) == sorted({str(e.item) for e in events})


def test_blank_tasks_are_refused_by_row_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [(1, 2, 3, "x", 1, 1, 0), (1, 2, 4, "", 1, 1, 0), (2, 2, 5, " ", 1, 1, 0), (2, 3, 6, "y", 1, 0, 0)]
    log = with_tasks(open_log(write(tmp_path / "log.csv", rows), columns=COLUMNS), "shop")
    with pytest.raises(ValueError, match="log.csv: row 3, column shop: missing; correct it, or set bad_rows to drop"):
        prepare(log, tmp_path / "store")
    store = prepare(log, tmp_path / "store", settings=PrepareSettings(bad_rows="drop"))
    assert store.summary["dropped"] == {"bad row, shop: missing": 2}
    assert read(store, ["user"]) == {"x": [("2", "3", "1")], "y": [("3", "6", "2")]}


def test_a_record_without_user_is_refused_though_its_task_is_there(tmp_path: Path) -> None:
    rows = [(1, 2, 3, "x", 1, 1, 0), ("", 2, 4, "x", 1, 1, 0)]
    log = with_tasks(open_log(write(tmp_path / "log.csv", rows), columns=COLUMNS), "shop")
    with pytest.raises(ValueError, match="row 3, column user: missing"):
        prepare(log, tmp_path / "store")


def test_a_user_without_the_feature_that_is_the_task_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "users.csv", [(1, "Rome")], header="user_id,city")
    rows = [(1, 2, 3, "x", 1, 1, 0), (2, 2, 4, "x", 1, 1, 0)]
    users = {"path": str(tmp_path / "users.csv"), "sparse": ["city"]}
    log = open_log(write(tmp_path / "log.csv", rows), columns=COLUMNS, users=users)
    with pytest.raises(ValueError, match="row 3, column city: missing"):
        prepare(with_tasks(log, "city"), tmp_path / "store")


def test_a_parquet_table_without_times_is_grouped_in_the_order_of_the_log(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [3, 1, 3], "item_id": ["b", "a", "c"], "scene": [7, 7, 8]})
    frame.write_parquet(tmp_path / "log.parquet")
    store = prepare(with_tasks(open_log(tmp_path / "log.parquet"), "scene"), tmp_path / "store")
    assert read(store, ["user"]) == {"7": [("b", "0", "3"), ("a", "0", "1")], "8": [("c", "0", "3")]}


def test_a_run_that_was_cut_off_is_not_taken_up_with_other_features_of_users(tmp_path: Path) -> None:
    rows = [(1, 2, 3, "x", 1, 1, 0), (2, 2, 4, "x", 1, 1, 0)]
    path, cities = write(tmp_path / "log.csv", rows), tmp_path / "users.csv"

    def prepared(rome: str) -> EventStore:
        write(cities, [(1, rome), (2, "Oslo")], header="user_id,city")
        users = {"path": str(cities), "sparse": ["city"]}
        return prepare(with_tasks(open_log(path, columns=COLUMNS, users=users), "city"), tmp_path / "store")

    patch = pytest.MonkeyPatch()
    patch.setattr(run._Run, "_write", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepared("Rome")
    patch.undo()
    assert set(read(prepared("Bonn"), ["user"])) == {"Bonn", "Oslo"}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("shp", "tasks=shp: the log has no such column; it has user_id, item_id, shop, price, page"),
        ("click", "tasks=click: is a label of the log"),
        ("timestamp", "tasks=timestamp: is the time of the log"),
    ],
)
def test_a_column_that_cannot_be_a_task_is_refused(tmp_path: Path, column: str, message: str) -> None:
    log = open_log(write(tmp_path / "log.csv", [(1, 2, 3, "x", 1, 1, 0)]), columns=COLUMNS)
    with pytest.raises(ValueError, match=message):
        with_tasks(log, column)


def test_a_log_with_a_column_of_the_users_new_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(1, 2, 3)], header="user_id,item_id,user")
    log = open_log(path, columns=Columns(sparse=("user",)))
    with pytest.raises(ValueError, match="columns: user is what the log's user is called where tasks=item_id"):
        with_tasks(log, "item_id")
    assert with_tasks(log, "user_id").sparse == ("user",)


def test_history_beside_the_log_has_users_alone(tmp_path: Path) -> None:
    shown = write(tmp_path / "shown.csv", [(1, 2, 3, "x", 1, 1, 0)])
    past = write(tmp_path / "past.csv", [(1, 4, 1)], header="user_id,item_id,timestamp")
    log = with_history(open_log(shown, columns=COLUMNS), past)
    with pytest.raises(ValueError, match="tasks=shop: the events of .*past.csv have user, item and time alone"):
        with_tasks(log, "shop")
    store = prepare(with_tasks(log, "user_id"), tmp_path / "store")
    assert {task: [r[0] for r in records] for task, records in read(store, ["exposed"]).items()} == {"1": ["4", "2"]}


def test_the_command_says_the_tasks_and_what_can_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(u, u + 1, 3, "xy"[u % 2], 1, 1, 0) for u in range(5)]
    log = write(tmp_path / "log.csv", rows)
    words = ["prepare", str(log), str(tmp_path / "store"), *FLAGS, "--tasks", "shop"]
    assert main([*words, "--min_user_events", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tasks (shop) │ 1" in said
    assert "of a task with fewer than 3 events │ 2" in said
    assert "lightning-gr fit --config gmeta/" in said or "lightning-gr recipes cp gmeta/tiny mine.yaml" in said
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    assert "tasks: shop" in capsys.readouterr().out
    assert json.loads((tmp_path / "store" / "store.json").read_text())["summary"]["tasks"] == "shop"
    assert main([*words[:2], str(tmp_path / "other"), *FLAGS, "--tasks", "shp"]) == 2
    assert "tasks=shp: the log has no such column" in capsys.readouterr().err
