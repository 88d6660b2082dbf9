"""Samples of windows against plain loops: every exposure once, two histories that do not meet, nothing later."""

from __future__ import annotations

import logging
import math
import multiprocessing
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import EventStore, Field, LastShare, LeaveOneOut, StoreWriter, check_store
from lightning_gr.data.aggregation import Aggregation
from lightning_gr.data.event_store import complete_store
from lightning_gr.data.splits import ByTime, ByUser, Split, part_events
from lightning_gr.data.task import Task
from lightning_gr.data.window_cuts import WindowCuts
from lightning_gr.data.window_index import WindowIndex, WindowSettings, find_windows, index_folder, window_index

NAN = math.nan
Event = tuple[int, float, float, int]  # time, click, order, exposed
DAY = 10  # the window of the tests, in seconds
TASKS = {
    "click": Task("click"),
    "buy": Task("order", at_least=2),
    "buy_of_click": Task("order", at_least=2, where="click"),
}
SHOWN = st.tuples(st.integers(-5, 45), st.sampled_from([0.0, 1.0, NAN]), st.sampled_from([1.0, 2.0, NAN]), st.just(1))
PAST = st.tuples(st.integers(-5, 45), st.sampled_from([NAN, 0.0, 1.0]), st.just(NAN), st.just(0))
PLAIN = st.lists(st.lists(st.one_of(SHOWN, SHOWN, PAST), min_size=1, max_size=14), min_size=1, max_size=5)
SPLITS = st.sampled_from(
    [LastShare(val=0.25, test=0.3), LeaveOneOut(), ByTime(val_from=20, test_from=30), ByUser(val=0.3, test=0.3, seed=1)]
)


def make_store(folder: Path, users: list[list[Event]], *, exposed: bool = True, users_a_group: int = 2) -> EventStore:
    """A store of events sorted by time; parts of two users, so that rows of files and of the store differ."""
    fields = [Field("click", "label", "event"), Field("order", "label", "event")]
    fields += [Field("exposed", "sparse", "event", 2)] if exposed else []
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=True, work=folder / "work")
    users = [sorted(user, key=lambda e: e[0]) for user in users]
    for first in range(0, len(users), users_a_group):
        chunk = users[first : first + users_a_group]
        columns: dict[str, Any] = {"user_id": [f"u{first + i}" for i in range(len(chunk))]}
        columns["item_id"] = pl.Series([[i % 3 for i in range(len(u))] for u in chunk], dtype=pl.List(pl.Int64))
        for number, (name, dtype) in enumerate(
            (("timestamp", pl.Int64), ("click", pl.Float32), ("order", pl.Float32), ("exposed", pl.Int64))
        ):
            if name != "exposed" or exposed:
                columns[name] = pl.Series([[e[number] for e in u] for u in chunk], dtype=pl.List(dtype))
        writer.write_users(pl.DataFrame(columns))
    writer.write_vocabulary("item_id", pl.Series("value", range(3)))
    writer.finish(summary={})
    return EventStore(folder / "store")


def made(folder: Path, users: list[list[Event]], **of_store: Any) -> tuple[EventStore, list[list[Event]]]:
    return make_store(folder, users, **of_store), [sorted(user, key=lambda e: e[0]) for user in users]


# ---- the rules once more, by loops --------------------------------------------------------------------------------


def label_of(task: str, event: Event) -> float:
    _, click, order, _ = event
    if task == "click":
        return click
    if math.isnan(order) or (task == "buy_of_click" and click != 1):
        return NAN
    return float(order >= 2)


def has_label(event: Event) -> bool:
    return not (math.isnan(event[1]) and math.isnan(event[2]))


def is_history(event: Event, *, exposed: bool, clicks: bool) -> bool:
    if exposed and event[3] == 0:
        return True
    return event[1] == 1 if clicks else (has_label(event) or not exposed)


def is_waiting(user: list[Event], event: Event, *, exposed: bool) -> bool:
    shown = [e for e in user if not exposed or e[3] == 1]
    labelled = [e[0] for e in shown if has_label(e)]
    return event in shown and not has_label(event) and event[0] > max(labelled, default=-1000)


def wanted_samples(
    users: list[list[Event]],
    store: EventStore,
    part: str,
    split: Split,
    a: Aggregation,
    *,
    exposed: bool,
    requests: bool,
) -> list[tuple[int, list[int], list[int], list[int]]]:
    """User, and the places of static history, real-time history and candidates of every sample."""
    found = []
    for row, user in enumerate(users):
        if part == "unlabelled":
            candidates = [i for i, e in enumerate(user) if is_waiting(user, e, exposed=exposed)]
        else:
            first, last = (int(x[0]) for x in part_events(split, store, part, np.array([row])))  # type: ignore[arg-type]
            candidates = [i for i in range(first, last) if has_label(user[i]) and (not exposed or user[i][3] == 1)]
        groups: dict[int, list[int]] = {}
        for i in candidates:
            groups.setdefault(user[i][0] if requests else user[i][0] // DAY, []).append(i)
        for members in groups.values():
            step = len(members) if requests else a.max_candidates
            for begin in range(0, len(members), step):
                piece = members[begin : begin + step]
                window_from = user[piece[0]][0] // DAY * DAY
                clicks = a.history is not None
                history = [i for i, e in enumerate(user) if is_history(e, exposed=exposed, clicks=clicks)]
                static = [i for i in history if user[i][0] < window_from]
                realtime = [i for i in history if window_from <= user[i][0] < user[piece[-1]][0]]
                realtime = realtime[max(len(realtime) - a.max_realtime, 0) :]
                found.append((row, static[max(len(static) - a.max_static, 0) :], realtime, piece))
    return found


def found_samples(cuts: WindowCuts, store: EventStore) -> list[tuple[int, list[int], list[int], list[int]]]:
    """The same of the cuts, as a batch of all samples has them."""
    ids, _ = cuts.samples(0, store.num_users)
    groups = [store.read_group(g, cuts.columns) for g in range(len(store.group_bounds) - 1)]
    rows = type(groups[0]).concatenate(groups)
    users = ids % store.num_users
    events = cuts.events(ids, rows, users)
    at, found = events.at_X.tolist(), []
    for user, counts in zip(users.tolist(), events.counts_B3.tolist(), strict=True):
        kinds = []
        for count in counts:
            kinds.append([x - int(rows.offsets[user]) for x in at[:count]])
            at = at[count:]
        found.append((user, *kinds))
    assert not at
    return found


AGGREGATIONS = st.builds(
    Aggregation,
    window=st.just(f"{DAY}s"),
    max_candidates=st.integers(1, 5),
    max_static=st.integers(0, 5),
    max_realtime=st.integers(0, 4),
    history=st.sampled_from([None, Task("click")]),
)


@settings(deadline=None, max_examples=60)
@given(
    PLAIN,
    st.booleans(),
    st.sampled_from([("train", False), ("val", False), ("test", False), ("test", True), ("unlabelled", True)]),
    SPLITS,
    AGGREGATIONS,
)
def test_samples_are_what_loops_say(
    tmp_path_factory: pytest.TempPathFactory,
    users: list[list[Event]],
    exposed: bool,
    part_requests: tuple[Any, bool],
    split: Split,
    aggregation: Aggregation,
) -> None:
    part, requests = part_requests
    if exposed:
        # What the log would be refused for: an exposure without a label before one that has it.
        users = [[e for e in u if e[3] == 0 or has_label(e) or is_waiting(u, e, exposed=True)] for u in users]
    store, rows = made(tmp_path_factory.mktemp("store"), users, exposed=exposed)
    wanted = wanted_samples(rows, store, part, split, aggregation, exposed=exposed, requests=requests)
    cuts = WindowCuts(store, part=part, split=split, tasks=TASKS, aggregation=aggregation, requests=requests)
    if not wanted:
        with pytest.raises(ValueError, match=r"has a candidate|waits for a score"):
            cuts.samples(0, store.num_users)
        return
    found = found_samples(cuts, store)
    assert found == wanted
    ids, tokens = cuts.samples(0, store.num_users)
    assert len(set(ids.tolist())) == len(ids)
    assert (ids % store.num_users).tolist() == [row for row, *_ in wanted]
    assert tokens.tolist() == cuts.event_counts(ids).tolist() == [sum(map(len, kinds)) for _, *kinds in wanted]
    labels = cuts.label_counts(ids)
    for task in TASKS:
        of_task = [sum(not math.isnan(label_of(task, rows[r][i])) for i in piece) for r, _, _, piece in wanted]
        assert labels[task].tolist() == of_task
    # The laws themselves, of whatever came out.
    for row, static, realtime, piece in found:
        times = [event[0] for event in rows[row]]
        start = times[piece[0]] // DAY * DAY
        assert all(times[i] < start for i in static)
        assert all(start <= times[i] < times[piece[-1]] for i in realtime)
        assert not set(static) & set(realtime)
        assert all(start <= times[i] < start + DAY for i in piece)
        assert len(static) <= aggregation.max_static
        assert len(realtime) <= aggregation.max_realtime
        assert requests or len(piece) <= aggregation.max_candidates
    if part != "unlabelled":
        shown = [(r, i) for r, u in enumerate(rows) for i, e in enumerate(u) if has_label(e) and (e[3] or not exposed)]
        of_part = [part_events(split, store, part, np.array([r])) for r in range(len(rows))]
        once = [(r, i) for r, i in shown if int(of_part[r][0][0]) <= i < int(of_part[r][1][0])]
        assert sorted((row, i) for row, _, _, piece in found for i in piece) == once


@settings(deadline=None, max_examples=20)
@given(PLAIN, SPLITS)
def test_every_labelled_exposure_is_in_one_part(
    tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]], split: Split
) -> None:
    store, rows = made(tmp_path_factory.mktemp("store"), users, exposed=False)
    aggregation = Aggregation(window=DAY)
    found = find_windows(store, WindowSettings(TASKS, split, aggregation), ("train", "val", "test"), requests=False)
    counts = sum(int(index.counts_S3[:, 2].sum(dtype=np.int64)) for index in found.values())
    labelled = sum(has_label(e) for user in rows for e in user)
    # ByUser trains on whole users, and of others it takes the last event alone.
    assert counts <= labelled if isinstance(split, ByUser) else counts == labelled


def test_samples_do_not_depend_on_row_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    users = [
        [(int(t), float(rng.integers(2)), NAN, int(rng.integers(2))) for t in rng.integers(0, 60, rng.integers(1, 30))]
        for _ in range(20)
    ]
    users = [[(t, c if e else NAN, o, e) for t, c, o, e in user] for user in users]
    settings_ = WindowSettings(TASKS, LastShare(), Aggregation(window=DAY, max_candidates=3, max_static=4))
    found = []
    for number, users_a_group in enumerate((1, 3, 20)):
        store = make_store(tmp_path / str(number), users, users_a_group=users_a_group)
        assert len(store.group_bounds) - 1 == -(-20 // users_a_group)
        found.append(find_windows(store, settings_, ("train", "test"), requests=False))
    for part in ("train", "test"):
        for name in ("starts_U1", "places_S6", "counts_S3", "labels_SK"):
            first, *others = (getattr(indices[part], name) for indices in found)
            assert all(np.array_equal(first, other) for other in others)
            assert first.dtype == np.uint8, "the least integers that hold it"


def test_ids_are_of_a_user_and_a_piece_and_stable(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[(t, 1.0, NAN, 1) for t in (0, 1, 2, 11, 25)], [(7, 0.0, NAN, 1)], []])
    settings_: dict[str, Any] = {"split": LastShare(val=0, test=0), "tasks": TASKS}
    cuts = WindowCuts(store, part="train", aggregation=Aggregation(window=DAY, max_candidates=2), **settings_)
    ids, tokens = cuts.samples(0, 3)
    assert ids.tolist() == [0, 3, 6, 9, 1]
    assert tokens.tolist() == [2 + 1, 1 + 2, 1 + 3, 1 + 4, 1]
    assert cuts.samples(1, 3)[0].tolist() == [1]
    assert cuts.samples(2, 3)[0].tolist() == []
    assert cuts.event_counts(np.array([9, 0])).tolist() == [5, 3]


# ---- the kept index -----------------------------------------------------------------------------------------------

USERS = [[(t, float(t % 2), NAN, 1) for t in range(u, 40, 3)] for u in range(5)]


def same(left: WindowIndex, right: WindowIndex) -> bool:
    return all(np.array_equal(getattr(left, n), getattr(right, n)) for n in ("starts_U1", "places_S6", "counts_S3"))


def test_the_kept_index_is_the_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, USERS)
    settings_ = WindowSettings(TASKS, LastShare(), Aggregation(window=DAY))
    in_memory = find_windows(store, settings_, ("train", "val", "test"), requests=False)
    kept = window_index(store, settings_, "val", requests=False)
    folders = {part: index_folder(store, settings_, part, requests=False) for part in in_memory}
    assert all(folder.is_dir() for folder in folders.values()), "one pass finds all parts"
    assert sorted(p.name for p in (store.path / "index").glob("*windows*")) == sorted(f.name for f in folders.values())
    assert same(kept, in_memory["val"])
    assert same(pickle.loads(pickle.dumps(kept)), kept)
    assert same(pickle.loads(pickle.dumps(in_memory["test"])), in_memory["test"])
    assert check_store(store.path) == []
    # What is kept is not looked for again.
    monkeypatch.setattr(EventStore, "read_group", None)
    assert same(window_index(store, settings_, "train", requests=False), in_memory["train"])


def test_each_setting_has_an_index_and_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    store = make_store(tmp_path, USERS)
    base = Aggregation(window=DAY)
    others = [
        Aggregation(window=DAY + 1),
        Aggregation(window=DAY, max_candidates=2),
        Aggregation(window=DAY, max_static=2),
        Aggregation(window=DAY, max_realtime=2),
        Aggregation(window=DAY, history=Task("click")),
    ]
    variants = [
        *(WindowSettings(TASKS, LastShare(), a) for a in (base, *others)),
        WindowSettings(TASKS, LastShare(test=0.2), base),
        WindowSettings({"click": Task("click")}, LastShare(), base),
        WindowSettings(TASKS | {"buy": Task("order", at_least=1)}, LastShare(), base),
    ]
    cases = [(each, part, False) for each in variants for part in ("train", "val", "test")]
    cases += [(each, "test", True) for each in variants if each.aggregation.max_candidates == 64]
    folders = [index_folder(store, each, part, requests=requests) for each, part, requests in cases]
    assert len(set(folders)) == len(folders)
    identities = {
        WindowCuts(store, part="test", split=LastShare(), tasks=TASKS, aggregation=a, requests=requests).identity
        for a in (base, *others)
        for requests in (False, True)
    }
    # Requests have as many candidates as they have.
    assert len(identities) == 2 * 6 - 1
    assert Aggregation(window="10s").seconds == Aggregation(window=10).seconds
    assert (
        index_folder(store, WindowSettings(TASKS, LastShare(), Aggregation(window="10s")), "val", requests=False)
        in folders
    )


def test_indexing_a_store_anew_forgets_samples_of_what_lay_there(tmp_path: Path) -> None:
    store = make_store(tmp_path, USERS)
    settings_ = WindowSettings(TASKS, LastShare(), Aggregation(window=DAY))
    window_index(store, settings_, "val", requests=False)
    complete_store(store.path)
    assert not list((store.path / "index").glob("*windows*"))


def test_a_store_that_cannot_be_written_to_keeps_the_index_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, USERS)
    settings_ = WindowSettings(TASKS, LastShare(), Aggregation(window=DAY))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Read-only file system")

    name = "lightning_gr.data.window_index"
    with monkeypatch.context() as patched, caplog.at_level("INFO", logger=name):
        # Libraries that configure logging, in a test before this one, disable the loggers that they find.
        patched.setattr(logging.getLogger(name), "disabled", False)
        patched.setattr(WindowIndex, "save", refuse)
        found = window_index(store, settings_, "train", requests=False)
        patched.setattr(EventStore, "read_group", None)  # the other parts were found in the same pass
        rest = {part: window_index(store, settings_, part, requests=False) for part in ("train", "val", "test")}
    assert "stays in memory" in caplog.text
    assert rest["train"] is found
    assert same(rest["val"], find_windows(store, settings_, ["val"], requests=False)["val"])
    assert not list((store.path / "index").glob("*windows*"))
    assert same(found, window_index(store, settings_, "train", requests=False))


def test_a_damaged_index_is_refused_by_name(tmp_path: Path) -> None:
    store = make_store(tmp_path, USERS)
    settings_ = WindowSettings(TASKS, LastShare(), Aggregation(window=DAY))
    window_index(store, settings_, "train", requests=False)
    folder = index_folder(store, settings_, "train", requests=False)
    whole = (folder / "counts_S3.npy").read_bytes()
    (folder / "counts_S3.npy").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"counts_S3\.npy: damaged .* it is made again"):
        window_index(store, settings_, "train", requests=False)


def _write_index(path: Path, ready: Any, results: Any) -> None:
    store = EventStore(path)
    settings_ = WindowSettings(TASKS, LastShare(), Aggregation(window=DAY))
    ready.wait()
    index = window_index(store, settings_, "test", requests=False)
    results.put((index.places_S6.tolist(), index.counts_S3.tolist()))


def test_two_processes_that_write_the_index_at_once_agree(tmp_path: Path) -> None:
    store = make_store(tmp_path, USERS)
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_write_index, args=(store.path, ready, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    wanted = find_windows(store, WindowSettings(TASKS, LastShare(), Aggregation(window=DAY)), ("test",), requests=False)
    assert found[0] == found[1] == (wanted["test"].places_S6.tolist(), wanted["test"].counts_S3.tolist())
    assert not [p for p in (store.path / "index").iterdir() if p.name.startswith(".")], "nothing is left half-written"


def test_the_loser_of_a_race_keeps_the_winners_index(tmp_path: Path) -> None:
    store = make_store(tmp_path, USERS)
    index = find_windows(store, WindowSettings(TASKS, LastShare(), Aggregation(window=DAY)), ("test",), requests=False)
    folder = store.path / "index" / "windows-x"
    index["test"].save(folder)
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    index["test"].save(folder)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written
    assert [p.name for p in (store.path / "index").glob("*windows*")] == ["windows-x"]


# ---- bad input ----------------------------------------------------------------------------------------------------


def cuts_of(store: EventStore, **changed: Any) -> WindowCuts:
    given_: dict[str, Any] = {"part": "train", "split": LastShare(val=0, test=0), "tasks": TASKS}
    return WindowCuts(store, **(given_ | {"aggregation": Aggregation(window=DAY)} | changed))


GOOD: list[Event] = [(1, 1.0, NAN, 1), (2, 0.0, NAN, 1)]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ((3, 2.0, NAN, 1), r"tasks\.click: the label click is 2, in .*part-00001\.parquet, row 1 \(user u3\), event 2"),
        ((3, -1.0, NAN, 1), r"tasks\.click: the label click is -1, .* expected 0 or 1, .* at_least"),
        ((1_650_000_000_000, 1.0, NAN, 1), r"timestamp: 1650000000000 is beyond the year 2200, in .*row 1 .* event 2"),
        ((1, NAN, NAN, 1), r"tasks: a candidate has no label \(click, order\), in .*part-00001\.parquet, row 1"),
        ((2, NAN, NAN, 1), r"tasks: a candidate has no label .* a candidate of that user and time, or of a later time"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_row_and_event(tmp_path: Path, event: Event, said: str) -> None:
    store = make_store(tmp_path, [GOOD, GOOD, GOOD, [*GOOD, event]])
    # Whatever part is asked for, all of the store is looked at.
    for part in ("train", "test"):
        with pytest.raises(ValueError, match=said):
            cuts_of(store, part=part).samples(0, 4)


def test_an_exposure_that_nothing_labelled_follows_waits_and_is_no_error(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[*GOOD, (2, NAN, NAN, 0), (5, NAN, NAN, 1), (5, NAN, NAN, 1), (9, NAN, NAN, 1)]])
    assert cuts_of(store).event_counts(np.array([0])).tolist() == [2 + 1]
    waiting = cuts_of(store, part="unlabelled", requests=True)
    assert found_samples(waiting, store) == [(0, [], [0, 1, 2], [3, 4]), (0, [], [0, 1, 2], [5])]
    assert {task: counts.tolist() for task, counts in waiting.label_counts(np.array([0, 1])).items()} == {
        task: [0, 0] for task in TASKS
    }


def test_settings_that_cannot_work_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, [GOOD])
    for changed, said in (
        ({"window": "1x"}, r"aggregation\.window='1x': expected a length such as 90m"),
        ({"window": 0}, r"aggregation\.window=0"),
        ({"max_candidates": 0}, r"aggregation\.max_candidates=0: expected at least 1"),
        ({"max_static": -1}, r"aggregation\.max_static=-1: expected at least 0"),
        ({"max_realtime": -1}, r"aggregation\.max_realtime=-1: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Aggregation(**changed)
    assert [Aggregation(window=w).seconds for w in ("90m", "1d", "2w", 30, "30", "4h", "7s")] == [
        5400, 86400, 1209600, 30, 30, 14400, 7,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"aggregation\.history: the store has no label like; it has click, order"):
        cuts_of(store, aggregation=Aggregation(history=Task("like")))
    with pytest.raises(ValueError, match="part=unlabelled: exposures without a label are scored by request"):
        cuts_of(store, part="unlabelled")


def test_a_part_without_candidates_says_what_there_is(tmp_path: Path) -> None:
    store = make_store(tmp_path, [[(1, NAN, NAN, 0), (2, NAN, NAN, 1)]])
    said = r"no window of the train part has a candidate: of the 2 events .* it has 2 .*1 have exposed 1 and no label "
    with pytest.raises(ValueError, match=said + r"\(click, order\), 1 are history .*; nor has any other .* see tasks"):
        cuts_of(store).samples(0, 1)
    labelled = make_store(tmp_path / "b", [GOOD])
    with pytest.raises(ValueError, match=r"no exposure that waits for a score, which has no label \(click, order\)"):
        cuts_of(labelled, part="unlabelled", requests=True).samples(0, 1)
    later = ByTime(val_from=7, test_from=8)
    with pytest.raises(ValueError, match=r"the test part .* of the 2 events .* it has 0 \(by-time-7-8\).*; see split$"):
        cuts_of(labelled, part="test", split=later).samples(0, 1)


@pytest.mark.parametrize(
    ("split", "part", "events", "waiting"),
    [
        (LeaveOneOut(), "val", 3, 2),
        (LeaveOneOut(), "test", 3, 3),
        (ByUser(val=0.0, test=0.999999), "test", 3, 3),
        (LastShare(val=0.2, test=0.2), "test", 6, 5),
    ],
)
@pytest.mark.parametrize("exposed", [True, False])
def test_a_split_by_count_of_a_log_that_ends_in_requests_points_to_time(
    tmp_path: Path, split: Split, part: Any, events: int, waiting: int, exposed: bool
) -> None:
    # Ten events each, of which the last two wait for a score, but for one that is history of another log.
    request = [(20, NAN, NAN, 1), (20, NAN, NAN, 1)]
    users: list[list[Event]] = [[(t, float(t % 2), NAN, 1) for t in range(8)] + request for _ in range(3)]
    users[0][8] = (20, NAN, NAN, 0)
    store = make_store(tmp_path, users, exposed=exposed)
    with pytest.raises(ValueError, match=f"no window of the {part} part has a candidate: of the 30 events") as error:
        cuts_of(store, split=split, part=part).samples(0, 3)
    said = str(error.value)
    assert "split such a log by time, with lightning_gr.data.ByTime(val_from, test_from)" in said
    assert f"it has {events} ({split.identity()})" in said
    assert f"of which {waiting if exposed else events} have " in said
    assert (f", {events - waiting} are history (exposed 0);" in said) == exposed
    # What the message names does it.
    for each in ("train", "val", "test"):
        cuts = cuts_of(store, split=ByTime(val_from=4, test_from=6), part=each)
        assert len(cuts.samples(0, 3)[0]) == 3


@pytest.mark.parametrize("history", [None, Task("click")])
def test_an_event_without_a_label_amid_labelled_ones_is_told_of(tmp_path: Path, history: Task | None) -> None:
    passed: Event = (2, NAN, NAN, 1)
    users = [GOOD, GOOD, [*GOOD, (5, NAN, NAN, 1)], [*GOOD[:1], passed, passed, (4, 1.0, NAN, 1), (9, NAN, NAN, 1)]]
    store = make_store(tmp_path, users, exposed=False)
    aggregation = Aggregation(window=DAY, history=history)
    becomes = "and history" if history is None else "and no history either, since history is click"
    said = (
        r"2 events of .* have no label \(click, order\) although one of their user of that time or later has one; "
        rf"the first is .*part-00001\.parquet, row 1 \(user u3\), event 1; they are no candidates, {becomes}"
    )
    for _ in range(2):  # what a first run found is kept with the store, and a second one says it again
        cuts = cuts_of(store, aggregation=aggregation)
        with pytest.warns(UserWarning, match=said):
            cuts.samples(0, 4)
    waiting = cuts_of(store, part="unlabelled", requests=True, aggregation=aggregation)
    with pytest.warns(UserWarning, match=said):
        assert [piece for *_, piece in found_samples(waiting, store)] == [[2], [4]]
    whole = make_store(tmp_path / "whole", [GOOD, [*GOOD, (5, NAN, NAN, 1)]], exposed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuts_of(whole, aggregation=aggregation).samples(0, 2)


def test_a_store_without_times_and_an_exposed_of_another_kind_are_refused(tmp_path: Path) -> None:
    def store_of(
        name: str, field: Field, values: list[Any], *, times: bool = True, raw: list[Any] | None = None
    ) -> EventStore:
        writer = StoreWriter(
            path=tmp_path / name,
            fields=[Field("click", "label", "event"), field],
            has_timestamps=times,
            work=tmp_path / "w" / name,
        )
        columns = {"user_id": ["a"], "item_id": [[0, 0]], "click": [[0.0, 1.0]], field.name: [values]}
        writer.write_users(pl.DataFrame(columns | ({"timestamp": [[1, 2]]} if times else {})))
        if raw is not None:
            writer.write_vocabulary(field.name, pl.Series("value", raw))
        writer.finish(summary={})
        return EventStore(tmp_path / name)

    click = {"click": Task("click")}
    with pytest.raises(ValueError, match="aggregation: .* has no times"):
        cuts_of(store_of("timeless", Field("shop", "sparse", "event", 2), [0, 1], times=False), tasks=click)
    with pytest.raises(ValueError, match="exposed: .* has it as a dense field of each event; aggregation takes it"):
        cuts_of(store_of("dense", Field("exposed", "dense", "event"), [0.0, 1.0]), tasks=click)
    with pytest.raises(ValueError, match="exposed: .* has the value yes; expected 1 of exposures, 0 of history"):
        cuts_of(store_of("text", Field("exposed", "sparse", "event", 2), [0, 1], raw=["no", "yes"][::-1]), tasks=click)
    # A vocabulary says what a code means: here all are exposures.
    only = store_of("only", Field("exposed", "sparse", "event", 1), [0, 0], raw=[1])
    assert cuts_of(only, tasks=click).event_counts(np.array([0])).tolist() == [2 + 1]


def test_tasks_count_only_where_another_label_is_positive() -> None:
    task = Task("order", at_least=2, where="click")
    fields = {"order": np.array([2, 1, 3, NAN, 2]), "click": np.array([1, 1, 0, 1, NAN])}
    assert str(task.of(fields).tolist()) == "[1.0, 0.0, nan, nan, nan]"
    with pytest.raises(ValueError, match="where=click: labels of order need its values too"):
        task.labels(fields["order"])
    assert repr(Task("order", at_least=2)) == "Task(field='order', at_least=2)", "fingerprints of old runs"
    stored = [Field("order", "label", "event"), Field("shop", "sparse", "event", 2)]
    for wrong, said in (
        (Task("order", where="click"), r"tasks\.x\.where: the store has no label click; it has order"),
        (Task("shop"), r"tasks\.x: the store has no label shop"),
        (Task("order", at_least=NAN), r"tasks\.x\.at_least=nan: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong.check("tasks.x", stored)
