"""Reading event logs in their owners' forms."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lightning_gr.data import read_events

CSV = "user_id,item_id,timestamp\nb,20,7\na,10,5\nb,21,3\na,11,5\na,9,1\n"
SORTED = [("a", 9, 1), ("a", 10, 5), ("a", 11, 5), ("b", 21, 3), ("b", 20, 7)]

FILES = {
    "csv": CSV,
    "csv-columns": "x,timestamp,item_id,user_id\n,7,20,b\n,5,10,a\n,3,21,b\n,5,11,a\n,1,9,a\n",
    "csv-quoted": '"user_id","item_id","timestamp"\n"b",20,7\n"a",10,5\n"b",21,3\n"a",11,5\n"a",9,1\n',
    "movielens-dat": "b::20::4.5::7\na::10::3::5\nb::21::1::3\na::11::5::5\na::9::2::1\n",
    "movielens-csv": "userId,movieId,rating,timestamp\nb,20,4.5,7\na,10,3,5\nb,21,1,3\na,11,5,5\na,9,2,1\n",
    "s3rec": "b 21 20\na 9 10 11\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("explicit", [False, True])
def test_every_text_form_gives_the_same_table(tmp_path: Path, name: str, explicit: bool) -> None:
    path = tmp_path / "log"
    path.write_text(FILES[name])
    format_: Any = name.split("-")[0] if explicit else "auto"
    events = read_events(path, format_)
    assert events.schema == {"user_id": pl.String, "item_id": pl.Int64, "timestamp": pl.Int64}
    times = name != "s3rec"
    assert events.rows() == [(user, item, time if times else None) for user, item, time in SORTED]


def test_tab_separated_movielens(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    path.write_text("196\t242\t3\t881250949\n22\t377\t1\t878887116\n22\t1\t5\t878887000\n")
    expected = [(22, 1, 878887000), (22, 377, 878887116), (196, 242, 881250949)]
    assert read_events(path).rows() == read_events(path, "movielens").rows() == expected


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "log"
    table = pl.read_csv(CSV.encode())
    table.write_parquet(path)
    assert read_events(path).rows() == read_events(path, "parquet").rows() == SORTED
    table.drop("timestamp").write_parquet(path)
    assert read_events(path).rows() == [("a", i, None) for i in (10, 11, 9)] + [("b", i, None) for i in (20, 21)]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Asia/Tokyo"])
def test_dates_become_seconds(tmp_path: Path, unit: Any, zone: str | None) -> None:
    begin = datetime(2020, 1, 1, tzinfo=timezone.utc)
    times = pl.Series("timestamp", [begin, begin + timedelta(minutes=1)]).cast(pl.Datetime(unit, "UTC"))
    times = times.dt.convert_time_zone(zone) if zone else times.dt.replace_time_zone(None)
    pl.DataFrame({"user_id": [1, 1], "item_id": [2, 3]}).with_columns(times).write_parquet(tmp_path / "log")
    assert read_events(tmp_path / "log")["timestamp"].to_list() == [1577836800, 1577836860]


def test_log_without_times_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n" + "".join(f"{i % 3},{97 * i % 101}\n" for i in range(100)))
    for user in range(3):
        items = read_events(path).filter(pl.col("user_id") == user)["item_id"].to_list()
        assert items == [97 * i % 101 for i in range(100) if i % 3 == user]


def test_ids_that_differ_as_text_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n007,1\n7,2\n")
    assert read_events(path).rows() == [("007", 1, None), ("7", 2, None)]
    path.write_text("user_id,item_id\n10,1\n9,2\n")
    assert read_events(path)["user_id"].to_list() == [9, 10]


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("\n1  5\t6 \n\n2 7\n", encoding="utf-8-sig")
    assert read_events(path, "s3rec").rows() == read_events(path).rows() == [(1, 5, None), (1, 6, None), (2, 7, None)]


@pytest.mark.parametrize(
    ("content", "format_", "said"),
    [
        ("", "auto", ["empty"]),
        ("\n\n", "s3rec", ["no events"]),
        ("user_id,item_id\n", "auto", ["no events"]),
        ("user_id,movie\n1,2\n", "auto", ["no column item_id", "user_id, movie"]),
        ("user,item_id\n1,2\n", "csv", ["no column user_id"]),
        ("user_id,item_id,timestamp\n1,2,3\n1,2,noon\n", "auto", ["row 2", "timestamp", "noon"]),
        ("user_id,item_id\n1,2\n1,\n", "auto", ["row 2", "item_id"]),
        ("user_id,item_id\n1,2\n1,2,3\n", "auto", ["cannot be read"]),
        ("1 2 3\n4\n", "auto", ["line 2", "user item item"]),
        ("1::2::3::4\n1::2::3\n", "auto", ["line 2", "3 field", "user::movie::rating::seconds"]),
        ("1\t2\t3\t4\n1\t2\n", "movielens", ["line 2", "user<tab>movie<tab>rating<tab>seconds"]),
        ("1::2::3::noon\n", "auto", ["row 1", "timestamp", "noon"]),
        ("hello, world\n", "auto", ["line 1", "hello, world", "CSV"]),
        ("1 2 3\n", "csv", ["no column user_id"]),
        ("1 2 3\n", "parquet", ["no Parquet file"]),
        (b"PAR1 torn", "auto", ["no Parquet file"]),
        (b"\x28\xb5\x2f\xfd", "csv", ["cannot be read"]),
        (b"1 2\n\xff\xfe 3\n", "auto", ["UTF-8"]),
    ],
)
def test_a_file_that_is_no_log_is_refused_in_one_line(
    tmp_path: Path, content: str | bytes, format_: Any, said: list[str]
) -> None:
    path = tmp_path / "culprit.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"culprit\.txt") as error:
        read_events(path, format_)
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_absent_files_directories_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.csv.*data\.path.*lightning-gr demo"):
        read_events(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=f"{tmp_path}.*directory"):
        read_events(tmp_path)
    wrong: Any = "excel"
    with pytest.raises(ValueError, match="'excel'.*auto, csv, parquet, s3rec, movielens"):
        read_events(tmp_path, wrong)
