"""prepare: nothing is lost, what is bad is said, and a run that was cut off is taken up."""

from __future__ import annotations

import errno
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import EventStore, check_store
from lightning_gr.data.formats import Columns, open_log
from lightning_gr.data.prepare import PrepareSettings, prepare, run, spill

COLUMNS = Columns(sparse=("shop",), dense=("price",), labels=("bought",))
Row = tuple[Any, Any, int, Any, Any, Any]  # user, item, time, shop, price, bought


def write(path: Path, rows: list[Row]) -> Path:
    def cell(x: Any) -> str:
        return "" if x is None else str(x)

    lines = ["user_id,item_id,timestamp,shop,price,bought", *(",".join(cell(x) for x in row) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def events_of(store: EventStore) -> list[tuple[Any, ...]]:
    """(user, item, time, shop, price, bought) of every event, in the order of the store; None where missing."""
    rows_of, row = [], 0
    shops, items = store.vocabulary("shop").tolist(), store.item_ids.tolist()

    def number(x: float) -> float | None:
        return None if np.isnan(x) else float(x)

    for group in range(len(store.group_bounds) - 1):
        part = store.read_group(group, ["shop", "price", "bought"])
        for i in range(len(part.offsets) - 1):
            for e in range(int(part.offsets[i]), int(part.offsets[i + 1])):
                assert part.timestamps is not None
                shop = shops[part.event_fields["shop"][e]]
                rows_of.append(
                    (
                        store.users[row],
                        items[part.items[e]],
                        int(part.timestamps[e]),
                        None if shop is None or shop != shop else shop,
                        number(part.event_fields["price"][e]),
                        number(part.event_fields["bought"][e]),
                    )
                )
            row += 1
    return rows_of


IDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 6), st.sampled_from(["a", "007", "é x", str(2**63)]))
ROWS = st.lists(
    st.tuples(
        IDS,
        IDS,
        st.integers(-(10**10), 10**10),
        st.one_of(st.none(), st.integers(0, 5), st.sampled_from(["x", "y"])),
        st.one_of(st.none(), st.floats(-1000, 1000, width=32)),
        st.one_of(st.none(), st.sampled_from([0.0, 1.0])),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=20)
@given(rows=ROWS, buckets=st.integers(1, 4), batch=st.integers(1, 8))
def test_every_event_is_kept_with_all_it_has(
    rows: list[Row], buckets: int, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    patch = pytest.MonkeyPatch()
    patch.setattr(spill, "_BATCH_ROWS", batch)
    patch.setattr(run, "num_buckets", lambda *_: buckets)
    store = prepare(open_log(write(folder / "log.csv", rows), columns=COLUMNS), folder / "store")
    patch.undo()
    assert check_store(store.path) == []

    def whole(i: int) -> bool:
        return all(isinstance(row[i], int) for row in rows if row[i] is not None)

    spelt = [tuple(x if x is None or i in (2, 4, 5) or whole(i) else str(x) for i, x in enumerate(row)) for row in rows]
    found = events_of(store)
    assert Counter(found) == Counter(spelt)
    # Within a user in the order of time, ties in the order of the log.
    for user in {row[0] for row in spelt}:
        own = sorted((row for row in spelt if row[0] == user), key=lambda row: row[2])
        assert [row for row in found if row[0] == user] == own
    assert store.item_ids.tolist() == sorted({row[1] for row in spelt})
    summary = store.summary
    assert (summary["rows_read"], summary["events_kept"], summary["users"]) == (
        len(rows),
        len(rows),
        len({row[0] for row in spelt}),
    )
    lengths = Counter(row[0] for row in spelt)
    assert summary["users_with_one_event"] == sum(n == 1 for n in lengths.values())
    assert summary["longest"] == max(lengths.values())
    assert summary["duplicates"] == len(rows) - len(set(spelt))
    assert summary["missing"].get("bought", 0) == sum(row[5] is None for row in rows)
    late = 0
    for user in lengths:
        places = sorted((row[2], i) for i, row in enumerate(spelt) if row[0] == user)
        late += sum(b < a for (_, a), (_, b) in zip(places, places[1:], strict=False))
    assert summary["out_of_order"] == late


@settings(deadline=None, max_examples=15)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40),
    users=st.integers(1, 4),
    items=st.integers(1, 4),
    buckets=st.integers(1, 3),
)
def test_the_core_is_what_a_loop_leaves(
    pairs: list[tuple[int, int]], users: int, items: int, buckets: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = pairs
    while True:
        of_user, of_item = Counter(u for u, _ in kept), Counter(i for _, i in kept)
        left = [(u, i) for u, i in kept if of_user[u] >= users and of_item[i] >= items]
        if len(left) == len(kept):
            break
        kept = left
    folder = tmp_path_factory.mktemp("core")
    rows: list[Row] = [(u, i, t, 0, 0.0, 0.0) for t, (u, i) in enumerate(pairs)]
    log = open_log(write(folder / "log.csv", rows), columns=COLUMNS)
    given_ = PrepareSettings(min_user_events=users, min_item_events=items)
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "num_buckets", lambda *_: buckets)
    try:
        if not kept:
            with pytest.raises(ValueError, match=rf"no event is left of {len(pairs)}"):
                prepare(log, folder / "store", settings=given_)
            assert not (folder / "store").exists()
            return
        store = prepare(log, folder / "store", settings=given_)
    finally:
        patch.undo()
    assert Counter((u, i) for u, i, *_ in events_of(store)) == Counter(kept)
    assert sum(store.summary["dropped"].values()) == len(pairs) - len(kept)


def test_duplicates_are_kept_or_dropped_and_counted(tmp_path: Path) -> None:
    rows: list[Row] = [
        (1, 2, 5, "x", 1.0, 1.0),
        (1, 2, 5, "x", 1.0, 1.0),
        (1, 2, 5, "y", 1.0, 1.0),
        (2, 2, 5, "x", 1.0, 1.0),
    ]
    log = open_log(write(tmp_path / "log.csv", rows), columns=COLUMNS)
    assert prepare(log, tmp_path / "kept").summary["duplicates"] == 1
    dropped = prepare(log, tmp_path / "dropped", settings=PrepareSettings(duplicates="drop"))
    assert Counter(events_of(dropped)) == Counter(set(rows))
    assert dropped.summary["dropped"] == {"duplicate": 1}


BAD = [
    ("u1,,5,,,", "item_id", "missing"),
    (",i1,5,,,", "user_id", "missing"),
    ("u1,i1,,,,", "timestamp", "missing"),
    ("u1,i1,noon,,,", "timestamp", "'noon' is no time"),
    ("u1,i1,5,,dear,", "price", "'dear' is no number"),
    ("u1,i1,5,,,inf", "bought", "inf is not finite"),
    ("u1,i\udcff1,5,,,", "item_id", "not valid UTF-8"),
]


@pytest.mark.parametrize(("line", "column", "what"), BAD)
def test_a_bad_row_is_named_or_dropped_and_counted(line: str, column: str, what: str, tmp_path: Path) -> None:
    header = b"user_id,item_id,timestamp,shop,price,bought\r\n"
    good = b"u1,i1,7,s,1.5,1\r\nu1,i2,9,s,,nan\r\n"
    path = tmp_path / "log.csv"
    path.write_bytes(header + good + line.encode(errors="surrogateescape") + b"\r\n\r\n")
    log = open_log(path, columns=COLUMNS)
    with pytest.raises(ValueError, match=rf"log\.csv: row 4, column {column}: .*{what}; correct it, or set bad_rows"):
        prepare(log, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    store = prepare(log, tmp_path / "store", settings=PrepareSettings(bad_rows="drop"))
    assert events_of(store) == [("u1", "i1", 7, "s", 1.5, 1.0), ("u1", "i2", 9, "s", None, None)]
    ((reason, count),) = store.summary["dropped"].items()
    assert reason.startswith(f"bad row, {column}: ")
    assert count == 1
    assert store.summary["rows_read"] == 3


def test_units_of_time_are_told_apart_and_counted(tmp_path: Path) -> None:
    seconds = 1_650_000_000
    stamps = [
        "1650000000",
        "1650000001000",
        "1650000002000000",
        "1650000003000000000",
        "1650000004.25",
        "1.650000005e9",
    ]
    path = tmp_path / "log.csv"
    path.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"1,{i},{t}\n" for i, t in reversed(list(enumerate(stamps))))
    )
    store = prepare(open_log(path), tmp_path / "store")
    assert store.read_group(0).items.tolist() == [0, 1, 2, 3, 4, 5]
    assert store.read_group(0).timestamps.tolist() == [seconds + i for i in range(6)]  # type: ignore[union-attr]
    assert store.summary["time_units"] == {"s": 3, "ms": 1, "us": 1, "ns": 1}
    forced = prepare(open_log(path), tmp_path / "ms", settings=PrepareSettings(time_unit="us"))
    assert forced.read_group(0).timestamps.tolist()[0] == 1_650  # type: ignore[union-attr]


def test_parts_of_a_second_order_events(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n1,30,1650000000300\n1,10,1650000000100\n1,20,1650000000200\n")
    store = prepare(open_log(path), tmp_path / "store")
    assert store.item_ids[store.read_group(0).items].tolist() == [10, 20, 30]
    assert store.read_group(0).timestamps.tolist() == [1_650_000_000] * 3  # type: ignore[union-attr]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd"))


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_compressed_logs(form: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    rows = [(user, 10 * user + event, event) for user in range(5) for event in range(4)]
    if form == "csv":
        text = "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    else:
        text = "".join(f'{{"user_id": {u}, "item_id": {i}, "timestamp": {t}}}\n' for u, i, t in rows)
    stores = []
    for name, data in ((f"log.{form}", text.encode()), (f"log.{form}.packed", compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        stores.append(prepare(open_log(tmp_path / name, form), tmp_path / f"{name}-store"))
    plain, packed = (store.read_group(0) for store in stores)
    assert np.array_equal(stores[1].item_ids[packed.items], stores[0].item_ids[plain.items])
    assert packed.timestamps is not None
    assert packed.timestamps.tolist() == [t for _, _, t in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user_id,item_id,timestamp\n", r"log\.csv: the log has no events"),
        (b"user_id,item_id\n1,2\n3,4,5\n", r"log\.csv: cannot be read \(found more fields"),
        (gzip.compress(b"user_id,item_id\n" + b"1,2\n" * 10**5)[:200], r"log\.csv: "),
        (b"\x28\xb5\x2f\xfd", r"log\.csv: no zstd file that can be read \(Truncated"),
        (zstd(b"user_id,item_id\n" + b"1,2\n" * 10**5)[:20], r"log\.csv: no zstd file that can be read \(Truncated"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(open_log(tmp_path / "log.csv"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def many(folder: Path) -> Path:
    """A log in three files."""
    rng = np.random.default_rng(2)
    for part in range(3):
        rows: list[Row] = [
            (int(u), int(i), int(t), int(s), 0.5, 1.0)
            for u, i, t, s in zip(*(rng.integers(0, n, 400) for n in (60, 30, 10**6, 4)), strict=True)
        ]
        write(folder / f"part-{part}.csv", rows)
    return folder


def content(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


class CutOff(BaseException):
    """As a killed process: nothing catches it."""


def test_a_run_that_was_cut_off_anywhere_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "num_buckets", lambda *_: 3)
    log = open_log(many(tmp_path / "log"), columns=COLUMNS)
    given_ = PrepareSettings(min_item_events=2)
    stages: list[tuple[str, int]] = []
    whole = content(
        prepare(log, tmp_path / "whole", settings=given_, progress=lambda s, d, n: stages.append((s, d))).path
    )
    for cut in range(1, len(stages) + 1):
        seen: list[Any] = []

        def stop(stage: str, done: int, total: int, seen: list[Any] = seen, cut: int = cut) -> None:
            seen.append(stage)
            if len(seen) == cut:
                raise CutOff

        with pytest.raises(CutOff):
            prepare(log, tmp_path / "store", settings=given_, progress=stop)
        assert not (tmp_path / "store").exists()
        again: list[tuple[str, int]] = []
        prepare(log, tmp_path / "store", settings=given_, progress=lambda s, d, n: again.append((s, d)))  # noqa: B023
        assert content(tmp_path / "store") == whole, cut
        assert not list(tmp_path.glob(".store*"))
        shutil.rmtree(tmp_path / "store")


def test_finished_parts_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(many(tmp_path / "log"), columns=COLUMNS)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "numbering":
            raise CutOff

    with pytest.raises(CutOff):
        prepare(log, tmp_path / "store", progress=stop)

    def fail(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(spill, "_spill_file", fail)
    store = prepare(log, tmp_path / "store")
    assert store.num_events == 1200


def test_another_log_or_setting_is_not_taken_up(tmp_path: Path) -> None:
    folder = many(tmp_path / "log")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "writing":
            raise CutOff

    with pytest.raises(CutOff):
        prepare(open_log(folder, columns=COLUMNS), tmp_path / "store", progress=stop)
    write(folder / "part-0.csv", [(1, 2, 3, "x", 1.0, 1.0)])
    store = prepare(open_log(folder, columns=COLUMNS), tmp_path / "store")
    assert store.num_events == 801
    with pytest.raises(CutOff):
        prepare(open_log(folder, columns=COLUMNS), tmp_path / "other", progress=stop)
    other = prepare(open_log(folder, columns=COLUMNS), tmp_path / "other", settings=PrepareSettings(min_user_events=14))
    assert int(other.lengths.min()) >= 14


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_looks_like_a_store(tmp_path: Path) -> None:
    many(tmp_path / "log")
    script = (
        "import os, signal, sys\nfrom lightning_gr.data.formats import open_log\n"
        "from lightning_gr.data.prepare import prepare\n"
        "def stop(stage, done, total):\n    if stage == 'writing': os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(open_log(sys.argv[1]), sys.argv[2], progress=stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "log"), str(tmp_path / "store")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "store").exists()
    whole = prepare(open_log(tmp_path / "log"), tmp_path / "whole")
    assert content(prepare(open_log(tmp_path / "log"), tmp_path / "store").path) == content(whole.path)


def test_a_full_disk_is_said_and_what_is_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(many(tmp_path / "log"), columns=COLUMNS)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_gr.data.event_store.writer.StoreWriter.write_users", full)
        with pytest.raises(OSError, match=r"\.store\.prepare: the disk is full; make room and run again") as error:
            prepare(log, tmp_path / "store")
        assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "store").exists()
    assert prepare(log, tmp_path / "store").num_events == 1200


def test_a_store_is_replaced_only_when_asked_and_nothing_else_ever(tmp_path: Path) -> None:
    log = open_log(many(tmp_path / "log"), columns=COLUMNS)
    prepare(log, tmp_path / "store")
    with pytest.raises(FileExistsError, match="an event store is there already"):
        prepare(log, tmp_path / "store")
    assert prepare(log, tmp_path / "store", overwrite=True).num_events == 1200
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="exists and is no event store"):
        prepare(log, tmp_path / "mine", overwrite=True)


def test_memory_cuts_the_users_and_changes_only_their_order(tmp_path: Path) -> None:
    log = open_log(many(tmp_path / "log"), columns=COLUMNS)
    one = prepare(log, tmp_path / "one")
    two = prepare(log, tmp_path / "two", settings=PrepareSettings(memory_gb=1e-4))
    assert len(one.parts) == 1
    assert len(two.parts) > 1
    assert sorted(events_of(one), key=repr) == sorted(events_of(two), key=repr)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bad_rows": "ignore"}, "bad_rows='ignore': expected one of refuse, drop"),
        ({"min_user_events": 0}, "min_user_events=0: expected at least 1"),
        ({"memory_gb": 0}, "memory_gb=0: expected a number above 0"),
        ({"time_unit": "min"}, "time_unit='min': expected one of auto"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**changes)


def test_a_column_has_one_meaning(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(1, 2, 3, "x", 1.0, 1.0)])
    with pytest.raises(ValueError, match="columns: price is named twice"):
        prepare(open_log(path, columns=Columns(dense=("price",), labels=("price",))), tmp_path / "store")


def test_the_summary_is_kept_with_the_store(tmp_path: Path) -> None:
    store = prepare(open_log(many(tmp_path / "log"), columns=COLUMNS), tmp_path / "store")
    assert json.loads((store.path / "store.json").read_text())["summary"] == store.summary
    assert store.summary["files"] == ["part-0.csv", "part-1.csv", "part-2.csv"]
