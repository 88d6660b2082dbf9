"""Features of users and items in files beside a table log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lightning_gr.data import EventStore
from lightning_gr.data.formats import Columns, open_log
from lightning_gr.data.prepare import prepare

USERS = {"user_id": ["u1", "u2", "u9"], "city": ["rome", "oslo", "bonn"], "age": [31.5, 42.0, 7.0]}
ITEMS = {"item_id": [5, 7, 3], "genres": ["a|b", "", "b"], "price": [1.0, 2.0, 3.0]}


def write(folder: Path, suffix: str) -> Path:
    log = {"user_id": ["u1", "u1", "u2", "u2"], "item_id": [5, 7, 7, 5], "timestamp": [1, 2, 3, 4]}
    for name, rows in (("log", log), ("users", USERS), ("items", ITEMS)):
        frame, path = pl.DataFrame(rows), folder / f"{name}{suffix}"
        if suffix == ".csv":
            frame.write_csv(path)
        elif suffix == ".parquet":
            frame.write_parquet(path)
        else:
            frame.write_ndjson(path)
    return folder / f"log{suffix}"


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_table_log_takes_features_of_users_and_items(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path, suffix)
    options: dict[str, Any] = {
        "users": {"path": str(tmp_path / f"users{suffix}"), "sparse": ["city"], "dense": ["age"]},
        "items": {"path": str(tmp_path / f"items{suffix}"), "sparse": ["genres"], "dense": ["price"]},
    }
    store = prepare(open_log(path, columns=Columns(), **options), tmp_path / "store")
    store = EventStore(store.path)
    rows = store.read_group(0, ["city", "age"])
    cities = store.vocabulary("city").tolist()
    assert [cities[code] for code in rows.user_fields["city"][0]] == ["rome", "oslo"]
    assert rows.user_fields["age"][0].tolist() == [31.5, 42.0]
    items = store.items()
    genres = store.vocabulary("genres").tolist()
    assert store.vocabulary("item_id").tolist() == [5, 7]
    assert [[genres[code] for code in row] for row in items["genres"].to_list()] == [["a", "b"], []]
    assert items["price"].to_list() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparse": ["city"]}, ["options.users", "path"]),
        ({"path": "users.csv"}, ["options.users", "sparse", "dense"]),
        ({"path": "users.csv", "sparse": "city"}, ["options.users.sparse=city", "[city]"]),
        ({"path": "users.csv", "sparse": ["city"], "labels": ["x"]}, ["options.users", "labels"]),
        ({"path": "nowhere.csv", "sparse": ["city"]}, ["nowhere.csv", "options.users.path"]),
        ({"path": "users.csv", "sparse": ["town"]}, ["users.csv", "town", "city", "options.users"]),
        ({"path": "users.csv", "dense": ["city"]}, ["users.csv", "row 1", "city", "rome"]),
    ],
)
def test_what_cannot_be_used_is_named(
    settings: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, ".csv")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(open_log(path, columns=Columns(), users=settings), tmp_path / "store")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
