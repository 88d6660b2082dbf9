"""prepare with a log of history beside the exposures: nothing is lost, and each event says which log it is of."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import Aggregation, EventStore, LastShare, Task, check_store
from lightning_gr.data.formats import Columns, open_log, with_history
from lightning_gr.data.prepare import PrepareSettings, prepare
from lightning_gr.data.window_cuts import WindowCuts

COLUMNS = Columns(sparse=("shop",), dense=("price",), labels=("click",))
IDS = st.one_of(st.integers(0, 4), st.sampled_from(["a", "007"]))
EXPOSURES = st.lists(
    st.tuples(
        IDS,
        IDS,
        st.integers(0, 9),
        st.sampled_from(["x", "y", ""]),
        st.sampled_from(["0.5", ""]),
        st.sampled_from("01"),
    ),
    min_size=1,
    max_size=15,
)
PAST = st.lists(st.tuples(IDS, IDS, st.integers(0, 9)), min_size=1, max_size=15)


def write(path: Path, header: str, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def exposures(path: Path, rows: list[Any]) -> Path:
    return write(path, "user_id,item_id,timestamp,shop,price,click", rows)


def past(path: Path, rows: list[Any]) -> Path:
    return write(path, "user_id,item_id,timestamp", rows)


def events_of(store: EventStore) -> list[tuple[Any, ...]]:
    """(user, item, time, exposed, shop, price, click) of every event, in the order of the store."""
    found, row = [], 0
    shops, items, codes = (
        store.vocabulary("shop").tolist(),
        store.item_ids.tolist(),
        store.vocabulary("exposed").tolist(),
    )
    for group in range(len(store.group_bounds) - 1):
        part = store.read_group(group, ["shop", "price", "click", "exposed"])
        assert part.timestamps is not None
        for user, first, last in zip(
            range(row, 10**9), part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=False
        ):
            for e in range(first, last):
                numbers = [part.event_fields[name][e] for name in ("price", "click")]
                shop = shops[part.event_fields["shop"][e]]
                found.append(
                    (str(store.users[user]), str(items[part.items[e]]), int(part.timestamps[e]),
                     codes[part.event_fields["exposed"][e]], None if shop is None or shop != shop else shop,
                     *(None if math.isnan(x) else float(x) for x in numbers))
                )  # fmt: skip
        row += len(part.offsets) - 1
    return found


@settings(deadline=None, max_examples=25)
@given(EXPOSURES, PAST, st.sampled_from([4.0, 1e-7]))
def test_a_store_holds_both_logs_user_by_user_in_order_of_time(
    tmp_path_factory: pytest.TempPathFactory, shown: list[Any], done: list[Any], memory_gb: float
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    log = with_history(
        open_log(exposures(folder / "shown.csv", shown), columns=COLUMNS), past(folder / "past.csv", done)
    )
    store = prepare(log, folder / "store", settings=PrepareSettings(memory_gb=memory_gb))
    assert check_store(store.path) == []
    wanted = [
        (str(u), str(i), t, 1, shop or None, float(price) if price else None, float(click))
        for u, i, t, shop, price, click in shown
    ] + [(str(u), str(i), t, 0, None, None, None) for u, i, t in done]
    found = events_of(store)
    assert sorted(found, key=repr) == sorted(wanted, key=repr)
    for user in {event[0] for event in wanted}:
        # By time; of one time exposures come first, and each log keeps its order.
        of_user = sorted((event for event in wanted if event[0] == user), key=lambda event: event[2])
        assert [event for event in found if event[0] == user] == of_user
    field = next(field for field in store.fields if field.name == "exposed")
    assert (field.kind, field.per, field.cardinality) == ("sparse", "event", 2)
    assert store.vocabulary("exposed").tolist() == [0, 1]
    summary = store.summary
    assert (summary["rows_read"], summary["history_rows_read"]) == (len(wanted), len(done))
    assert summary["history_events_kept"] == len(done)
    assert summary["missing"].get("click", 0) == 0, "history has no labels to be missed"


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet", "jsonl", "folder"])
def test_history_may_be_any_table(tmp_path: Path, form: str) -> None:
    log = open_log(exposures(tmp_path / "shown.csv", [(1, 1, 10, "x", 1, 0)]), columns=COLUMNS)
    rows = [{"user_id": 1, "item_id": 5, "timestamp": 7}, {"user_id": 2, "item_id": 1, "timestamp": 9}]
    path = tmp_path / f"past.{form}"
    if form == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif form == "csv.gz":
        path.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n1,5,7\n2,1,9\n"))
    elif form == "csv":
        past(path, [(1, 5, 7), (2, 1, 9)])
    else:
        past(path / "a.csv", [(1, 5, 7)])
        past(path / "b.csv", [(2, 1, 9)])
    store = prepare(with_history(log, path), tmp_path / "store")
    assert sorted(event[:4] for event in events_of(store)) == [("1", "1", 10, 1), ("1", "5", 7, 0), ("2", "1", 9, 0)]


def test_units_of_time_are_told_apart_between_the_logs_and_counted(tmp_path: Path) -> None:
    log = open_log(exposures(tmp_path / "shown.csv", [(1, 1, 1_650_000_010, "", "", 1)]), columns=COLUMNS)
    done = past(tmp_path / "past.csv", [(1, 2, 1_650_000_005_000), (1, 3, "2022-04-15T05:20:12Z")])
    store = prepare(with_history(log, done), tmp_path / "store")
    assert [event[1:4] for event in events_of(store)] == [
        ("2", 1_650_000_005, 0), ("1", 1_650_000_010, 1), ("3", 1_650_000_012, 0),
    ]  # fmt: skip
    assert store.summary["time_units"] == {"s": 1, "ms": 1}


def test_small_users_and_repeats_go_as_ever_and_order_is_counted_by_log(tmp_path: Path) -> None:
    shown = [(1, 1, 10, "", "", 1), (1, 1, 10, "", "", 1), (2, 1, 5, "", "", 0)]
    done = past(tmp_path / "past.csv", [(1, 1, 10), (1, 1, 10), (1, 2, 8), (3, 1, 1)])
    log = with_history(open_log(exposures(tmp_path / "shown.csv", shown), columns=COLUMNS), done)
    store = prepare(log, tmp_path / "store", settings=PrepareSettings(duplicates="drop", min_user_events=2))
    # The same event in both logs stays in both: shown, and later, by time, history.
    assert [event[:4] for event in events_of(store)] == [("1", "2", 8, 0), ("1", "1", 10, 1), ("1", "1", 10, 0)]
    assert store.summary["duplicates"] == 2
    # Beside the exposures all of history would be late; in its own file one event is.
    assert store.summary["out_of_order"] == 1
    assert store.summary["history_events_kept"] == 2


def test_what_was_prepared_is_aggregated(tmp_path: Path) -> None:
    shown = [(u, i, t, "x", 1, i % 2) for u in (1, 2) for i, t in enumerate((5, 15, 15, 25))]
    done = past(tmp_path / "past.csv", [(1, 9, 3), (1, 9, 12), (1, 9, 15), (1, 9, 40), (7, 9, 1)])
    log = with_history(open_log(exposures(tmp_path / "shown.csv", shown), columns=COLUMNS), done)
    store = prepare(log, tmp_path / "store")
    row = store.users.tolist().index(1)
    cuts = WindowCuts(
        store, part="train", split=LastShare(val=0, test=0), tasks={"click": Task("click")},
        aggregation=Aggregation(window=10, history=Task("click")),
    )  # fmt: skip
    ids, _ = cuts.samples(row, row + 1)
    counts = cuts.index.counts_S3[cuts.index.starts_U1[row] : cuts.index.starts_U1[row + 1]].tolist()
    # Windows of 5, of 15 (after 12; that of its own time is not seen) and of 25 (after clicks at 15 and all history).
    assert counts == [[0, 1, 1], [1, 1, 2], [4, 0, 1]]
    assert ids.tolist() == [row + piece * store.num_users for piece in range(3)]


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    shown = exposures(tmp_path / "shown.csv", [(1, 1, 10, "", "", 1)])
    log = open_log(shown, columns=COLUMNS)
    write(tmp_path / "bare.csv", "user_id,item_id", [(1, 2)])
    write(tmp_path / "other.csv", "uid,item_id,timestamp", [(1, 2, 3)])
    for path, said in (
        (tmp_path / "bare.csv", r"bare\.csv: has no column timestamp; a history needs the time of each event"),
        (tmp_path / "other.csv", r"other\.csv: has no column user_id"),
        (shown, r"shown\.csv is a file of the exposures too"),
    ):
        with pytest.raises(ValueError, match=said):
            with_history(log, path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such file"):
        with_history(log, tmp_path / "nowhere.csv")
    timeless = open_log(write(tmp_path / "timeless.csv", "user_id,item_id", [(1, 1)]))
    with pytest.raises(ValueError, match=r"history=.*: .*timeless\.csv has no times"):
        with_history(timeless, past(tmp_path / "past.csv", [(1, 2, 3)]))
    named = write(tmp_path / "named.csv", "user_id,item_id,timestamp,exposed", [(1, 1, 1, 1)])
    with pytest.raises(ValueError, match="columns: exposed is what history is told from exposures by"):
        with_history(open_log(named, columns=Columns(sparse=("exposed",))), tmp_path / "past.csv")
    with pytest.raises(ValueError, match=r"past2\.csv: row 3, column timestamp: 'soon' is no time"):
        prepare(with_history(log, past(tmp_path / "past2.csv", [(1, 2, 3), (1, 2, "soon")])), tmp_path / "store")


def test_a_run_of_other_history_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gr.data.event_store import StoreWriter

    log = open_log(exposures(tmp_path / "shown.csv", [(1, 1, 10, "", "", 1)]), columns=COLUMNS)
    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "write_users", lambda *_: (_ for _ in ()).throw(OSError("the power is gone")))
        with pytest.raises(OSError, match="the power is gone"):
            prepare(log, tmp_path / "store")
    done = past(tmp_path / "past.csv", [(1, 2, 3)])
    store = prepare(with_history(log, done), tmp_path / "store")
    assert [event[:4] for event in events_of(store)] == [("1", "2", 3, 0), ("1", "1", 10, 1)]
