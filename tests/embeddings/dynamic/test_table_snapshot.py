"""Saving while training goes on: the file is what the tables held, and training is as if there were no save."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from lightning_gr.checkpoint.storage import Storage, SummedFile
from lightning_gr.embeddings.dynamic import (
    DynamicEngine,
    DynamicTableConfig,
    SparseOptimizerConfig,
    TablePolicy,
    safetensors_stream,
)
from lightning_gr.embeddings.dynamic.row_snapshot import CopyLimit
from lightning_gr.embeddings.dynamic.row_storage import RowStorage
from lightning_gr.embeddings.dynamic.sparse_optimizers import update_rows
from lightning_gr.embeddings.dynamic.table_files import (
    TablesSnapshot,
    begin_save,
    load_static_rows,
    load_tables,
    num_waiting,
    read_columns,
    read_header,
    read_table,
    save_tables,
    table_names,
    upsert_rows,
)
from tests.embeddings.dynamic import test_table_files as shared
from tests.embeddings.dynamic.test_table_files import Features, contents, engine_of, merged, train

NAMES = ("item", "shop", "word", "score")


class Gate:
    """Lets writes of a thread through, a number of them at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed, self._is_waiting, self._ended = 0.0, False, False

    def pass_one(self) -> None:
        with self._changed:
            self._is_waiting = self._allowed < 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._allowed >= 1)
            self._is_waiting = False
            self._allowed -= 1

    def allow(self, num: float) -> None:
        """Returns when so many writes were done and the next one waits, or all was written."""
        with self._changed:
            self._allowed += num
            self._is_waiting &= num < 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_waiting or self._ended, timeout=60)

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Writer:
    """Writes a snapshot in a thread, behind a gate."""

    def __init__(self, snapshot: TablesSnapshot, folder: Storage) -> None:
        self.gate, self.snapshot = Gate(), snapshot
        self.sums: Any = None
        self._thread = threading.Thread(target=self._run, args=(OwnStorage(folder, lambda *_: self.gate.pass_one()),))
        self._thread.start()

    def _run(self, folder: Storage) -> None:
        try:
            self.sums = self.snapshot.write(folder)
        except Exception as error:
            self.sums = error
        finally:
            self.gate.end()

    def finish(self) -> Any:
        self.gate.allow(float("inf"))
        self._thread.join()
        self.snapshot.close()
        if isinstance(self.sums, Exception):
            raise self.sums
        return self.sums


class OwnStorage(Storage):
    """A directory in which something is called before each write."""

    def __init__(self, location: Any, before: Callable[[str, int], None]) -> None:
        super().__init__(location)
        self._before = before

    def __truediv__(self, name: str) -> Storage:
        return OwnStorage(super().__truediv__(name), self._before)

    @contextmanager
    def create(self, name: str) -> Iterator[SummedFile]:
        with super().create(name) as file:
            write = file.write

            def checked(data: Any) -> int:
                self._before(name, file.tell())
                return write(data)

            file.write = checked  # type: ignore[method-assign]
            yield file


# ---- rows ----------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of small chunks behind a small cache, so that chunks come and go; `change` does something at random."""

    def __init__(self, precision: Any, placement: Any, draw: random.Random) -> None:
        self.draw = draw
        self.optimizer = SparseOptimizerConfig("adagrad", lr=0.1)
        self.storage = RowStorage(
            dim=3,
            state_width=3,
            precision=precision,
            hot_count=3,
            chunk_rows=4,
            placement=placement,
            cache_rows=8 if placement == "host" else 0,
            scores=True,
        )
        self.used: list[int] = []

    def some(self, num: int) -> Tensor:
        return torch.tensor(self.draw.sample(self.used, min(num, len(self.used))), dtype=torch.int64)

    def change(self, step: int) -> None:
        storage = self.storage
        match self.draw.choice(("add", "add", "free", "all", "update", "update", "touch", "write", "scores")):
            case "add":
                rows_N = storage.allocate(self.draw.randrange(9))
                storage.write(rows_N, torch.randn(len(rows_N), 3))
                self.used += rows_N.tolist()
            case "free" | "all" as what:
                rows_N = self.some(3 if what == "free" else len(self.used) * (self.draw.random() < 0.3))
                storage.free(rows_N)
                self.used = [x for x in self.used if x not in rows_N.tolist()]
            case "update":
                rows_N = self.some(6)
                update_rows(storage, rows_N, torch.randn(len(rows_N), 3), self.optimizer, lr=0.1, step=step)
            case "touch":
                rows_N = self.some(6)
                storage.touch(rows_N, torch.full_like(rows_N, 2), step=step, time=step)
            case "write":
                rows_N = self.some(3)
                storage.write_state(rows_N, torch.rand(len(rows_N), 3))
            case "scores":
                rows_N = self.some(3)
                storage.write_metadata(rows_N, scores=torch.randn(len(rows_N)), counts=rows_N)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed"])
def test_rows_are_read_as_they_were(precision: Any, placement: Any) -> None:
    """The truth is read at the beginning, then rows are read in any order while they change."""
    copied = hot = 0
    for seed in range(8):
        torch.manual_seed(seed)
        rows = Rows(precision, placement, random.Random(seed))
        for step in range(30):
            rows.change(step)
        wanted = [x for x in rows.used if rows.draw.random() < 0.8]
        rows_N = torch.tensor(wanted, dtype=torch.int64)
        truth = {"values": rows.storage.read(rows_N).tolist(), "state": rows.storage.read_state(rows_N).tolist()}
        truth |= {name: x.tolist() for name, x in rows.storage.read_metadata(rows_N)._asdict().items()}
        if (hot_N := rows.storage.is_hot(rows_N)) is not None:
            truth["hot"] = hot_N.int().tolist()
            hot += sum(truth["hot"])
        snapshot = rows.storage.snapshot(limit := CopyLimit(1 << 30))
        assert rows.storage.is_being_saved
        snapshot.want_only(rows_N)
        order = list(range(len(wanted)))
        rows.draw.shuffle(order)
        found: dict[str, list[Any]] = {name: [None] * len(wanted) for name in truth}
        for first in range(0, len(order), 2):
            for step in range(30, 33):
                rows.change(step)
            places = order[first : first + 2]
            for column in snapshot.columns:
                for place, value in zip(places, column.take(rows_N[places]).tolist(), strict=True):
                    found[column.name][place] = value
        assert found == truth
        assert limit.held_bytes == 0  # all that was aside was read
        copied += limit.copied_bytes
        snapshot.close()
        assert limit.held_bytes == 0
        assert not rows.storage.is_being_saved
    assert copied > 100
    assert (hot > 5) is (precision == "mixed")


# ---- tables --------------------------------------------------------------------------------------------------------


def act(engine: DynamicEngine, draw: random.Random, step: int) -> int:
    """Something that changes tables, or asks them; returns the next step."""
    ids = torch.tensor(draw.sample(shared.IDS, 20))
    name = draw.choice(NAMES)
    match draw.choice(("train", "train", "train", "upsert", "delete", "scores", "ask")):
        case "train":
            train(engine, range(step, step + 1))
            return step + 1
        case "upsert":
            dim = engine.tables[engine.logical[engine.table_number(name)][0]].dim
            values = torch.tensor([[draw.random()] * dim for _ in ids])
            engine.upsert(ids, values, name)
        case "delete":
            engine.delete(ids, name)
        case "scores":
            engine.set_scores(ids, torch.tensor([draw.random() for _ in ids]), "score")
        case "ask":
            lookup = engine.take(Features({f"f_{x}": ids for x in NAMES}), training=False)
            lookup.exchange.send_keys()
            engine.find(lookup)
    return step


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("encode_ids", [False, True])
def test_training_goes_on_while_tables_are_written(
    where: str, encode_ids: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_stream, "PIECE_BYTES", 300)
    if encode_ids:
        monkeypatch.setattr(shared, "IDS", [x for x in shared.IDS if 0 <= x < 2**40])
    root = Storage(tmp_path if where == "disk" else f"memory://{tmp_path.name}{encode_ids}")
    for seed in range(2 if where == "disk" else 1):
        folder, draw, twin_draw = root / str(seed), random.Random(seed), random.Random(seed)
        engine, twin = engine_of(encode_ids=encode_ids), engine_of(encode_ids=encode_ids)
        for x in (engine, twin):
            train(x, range(12))
        truth = contents(engine)
        writer = Writer(begin_save(engine), folder)
        step = twin_step = 12
        for _ in range(12):
            writer.gate.allow(draw.randrange(25))
            twin_draw.randrange(25)
            step, twin_step = act(engine, draw, step), act(twin, twin_draw, twin_step)
        assert writer.snapshot.copied_bytes > 0
        sums = writer.finish()
        assert contents(engine) == contents(twin) != truth
        assert sums == {name: folder.sum_of(name) for name in folder.files()}
        again = engine_of(encode_ids=encode_ids)
        load_tables(folder, again)
        assert contents(again) == truth
        train(again, range(12, 15))
        train(other := engine_of(encode_ids=encode_ids), range(15))
        assert contents(again) == contents(other)


def test_a_file_is_as_other_readers_see_it(tmp_path: Path) -> None:
    """Safetensors' own reader, and what the tables have."""
    train(engine := engine_of(), range(20))
    sums = save_tables(tmp_path, engine)
    assert sorted(sums) == Storage(tmp_path).files()
    for table in engine.tables:
        for k, name in enumerate(table.key_names):
            rows, offsets = table.rows_of(k)
            with safe_open(tmp_path / name / "part-00000-of-00001.safetensors", framework="pt") as file:
                found = {x: file.get_tensor(x) for x in file.keys()}  # noqa: SIM118  # it is no dictionary
                assert file.metadata()["next_step"] == "20"
            assert found["shard_offsets"].tolist() == offsets
            assert torch.equal(found["ids"], rows.ids_N)
            assert torch.equal(found["values"].float(), rows.values_ND)
            assert torch.equal(found["state"], rows.state_NS)
            for column, x in rows.metadata._asdict().items():
                assert (x is None) == (column not in found)
                assert x is None or torch.equal(found[column], x)


# ---- what is new ---------------------------------------------------------------------------------------------------


def chain_job(root: str, saves: int) -> dict[str, Any]:
    """Saves all rows, then what is new, then all rows again at that moment; every process calls it."""
    engine = engine_of(dist.group.WORLD if dist.is_initialized() else None)
    draw, step, since, removed = random.Random(5), 0, None, 0
    for number in range(saves):
        for _ in range(9):
            step = act(engine, draw, step)
        writer = Writer(begin_save(engine, touched_since=since, journals=True), Storage(root) / str(number))
        since = engine.next_step
        writer.gate.allow(3)
        if number < saves - 1:
            step = act(engine, draw, step)  # belongs to the next one
        writer.gate.allow(float("inf"))
        writer.snapshot.published()
        writer.finish()
        removed += writer.snapshot.num_removed
    save_tables(Storage(root) / "whole", engine)
    return contents(engine) | {"removed": removed}


def load_job(folders: list[str]) -> dict[str, Any]:
    engine = engine_of(dist.group.WORLD if dist.is_initialized() else None)
    load_tables(folders, engine)
    return contents(engine)


def check_chain(folders: list[str], whole: str) -> None:
    """What one process reads of a chain is what it reads of a save of all rows."""
    for name in table_names(folders):
        found, header = read_table(folders, name)
        wanted, wanted_header = read_table(whole, name)
        for column in ("ids_N", "values_ND", "state_NS"):
            assert torch.equal(getattr(found, column), getattr(wanted, column)), (name, column)
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(found.metadata, wanted.metadata, strict=True))
        assert read_header(folders, name) == (header, read_header(whole, name)[1])
        assert header.next_step == wanted_header.next_step
        since = header.next_step - 3
        recent = read_columns(folders, name, ["ids"], since)["ids"]
        assert torch.equal(recent, wanted.ids_N[wanted.metadata.last_steps >= since])
        assert num_waiting(folders, name) == num_waiting(whole, name)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_chain_is_a_save_of_all_rows(where: str, tmp_path: Path) -> None:
    root = str(tmp_path) if where == "disk" else f"memory://{tmp_path.name}-chain"
    state = chain_job(root, 4)
    assert state.pop("removed") > 10
    folders = [f"{root}/{i}" for i in range(4)]
    assert load_job(folders) == load_job([f"{root}/whole"]) == state
    check_chain(folders, f"{root}/whole")


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_chain_of_several_processes_is_read_by_any_number(
    world: int, gloo: Callable[[int], Any], tmp_path: Path
) -> None:
    states = gloo(world).run(chain_job, str(tmp_path), 3)
    assert sum(state.pop("removed") for state in states) > 10
    folders = [str(tmp_path / str(i)) for i in range(3)]
    check_chain(folders, str(tmp_path / "whole"))
    assert load_job(folders) == merged(states)
    for readers in {2, 3} - ({3} if world == 2 else set()) or {2}:
        assert merged(gloo(readers).run(load_job, folders)) == merged(states)


def test_what_does_not_follow_is_refused(tmp_path: Path) -> None:
    chain_job(str(tmp_path), 4)
    zero, one, two, three = (tmp_path / str(i) for i in range(4))
    train(engine := engine_of(), range(2))
    before = contents(engine)
    part = "part-00000-of-00001.safetensors"
    for chain, said in (
        ([one], f"{one}/item/{part}: has only what is new since step"),
        ([zero, two], f"{two}/item/{part}: has what is new since step"),
        ([zero, one, three], f"{three}/item/{part}: has what is new since step"),
        ([zero, zero], f"{zero}/item/{part}: has all rows, and the save before it"),
        ([zero, one, one], f"{one}/item/{part}: has what is new"),
    ):
        with pytest.raises(ValueError, match="give the save before|use another") as caught:
            load_tables(chain, engine)
        assert said in str(caught.value)
        assert contents(engine) == before
    with pytest.raises(ValueError, match="has only what is new"):
        upsert_rows(one, "item", torch.tensor([1]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="has only what is new"):
        read_table(one, "item")


def test_a_journal_knows_what_it_knows(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine, range(4))
    with pytest.raises(ValueError, match="table item: what was removed since step 4 is not known; save all rows"):
        begin_save(engine, touched_since=4)
    save_tables(tmp_path / "a", engine)
    with pytest.raises(ValueError, match="since step 4 is not known; save all rows"):
        begin_save(engine, touched_since=4)
    snapshot = begin_save(engine, journals=True)
    snapshot.write(Storage(tmp_path / "b"))
    snapshot.published()
    snapshot.close()
    train(engine, range(4, 6))
    save_tables(tmp_path / "c", engine)  # by hand, in between: of no concern
    with pytest.raises(ValueError, match="since step 6 is not known, but since step 4; save all rows"):
        begin_save(engine, touched_since=6)
    snapshot = begin_save(engine, touched_since=4, journals=True)
    with pytest.raises(RuntimeError, match="table item: another save of it is under way"):
        begin_save(engine)
    snapshot.close()
    load_tables(tmp_path / "c", engine)
    with pytest.raises(ValueError, match="is not known; save all rows"):
        begin_save(engine, touched_since=4)


def test_a_write_that_fails_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """On a disk that is full after some writes; the next save of what is new begins where the failed one began."""
    engine, draw, step = engine_of(), random.Random(2), 0

    def save(name: str, since: int | None, room: int = 1000) -> None:
        writes: list[str] = []

        def check(file: str, _: int) -> None:
            writes.append(file)
            if len(writes) > room:
                raise OSError(28, "No space left on device")

        root = Storage(tmp_path / name)
        snapshot = begin_save(engine, touched_since=since, journals=True)
        try:
            snapshot.write(OwnStorage(root, check))
            snapshot.published()
        finally:
            snapshot.close()

    for _ in range(12):
        step = act(engine, draw, step)
    save("a", None)
    since = engine.next_step
    for room in (0, 5, 40):
        for _ in range(6):
            step = act(engine, draw, step)
        with pytest.raises(OSError, match="No space left on device"):
            save("b", since, room)
        assert Storage(tmp_path / "b").files() == []
    for _ in range(6):
        step = act(engine, draw, step)
    save("c", since)
    assert load_job([str(tmp_path / "a"), str(tmp_path / "c")]) == contents(engine)


def wide_engine() -> DynamicEngine:
    """One table with 3000 rows, looked up in step 0."""
    config = DynamicTableConfig(name="item", embedding_dim=32, feature_names=["f"], policy=TablePolicy())
    engine = DynamicEngine(configs=[config], optimizer=SparseOptimizerConfig(), seed=0, virtual_shards=16)
    look_up(engine, torch.arange(3000))
    return engine


def look_up(engine: DynamicEngine, ids_N: Tensor) -> None:
    lookup = engine.take(Features({"f": ids_N}), training=True)
    lookup.exchange.send_keys()
    engine.find(lookup)
    sum(x.square().sum() for x in engine.received(lookup)).backward()  # type: ignore[union-attr]
    engine.step()


def test_what_is_new_is_as_large_as_the_rows_that_were_used(tmp_path: Path) -> None:
    engine = wide_engine()
    sizes, since = {}, None
    for number, ids in enumerate((None, torch.arange(500, 900), torch.arange(0))):
        if ids is not None:
            look_up(engine, ids)
        snapshot = begin_save(engine, touched_since=since, journals=True)
        since = engine.next_step
        sums = snapshot.write(Storage(tmp_path / str(number)))
        snapshot.published()
        snapshot.close()
        sizes[snapshot.num_rows] = sums["item/part-00000-of-00001.safetensors"].size
    row_bytes = engine.tables[0].storage.row_bytes
    assert row_bytes == 32 * 4 + 4 + 24
    assert list(sizes) == [3000, 400, 0]
    assert sizes[3000] == pytest.approx(3000 * row_bytes, rel=0.1)
    assert sizes[400] == pytest.approx(400 * row_bytes, rel=0.1)
    assert sizes[0] < 2500


# ---- how much is aside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closes", [False, True])
def test_training_waits_where_too_much_is_aside(closes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream, "PIECE_BYTES", 4096)
    engine, twin = wide_engine(), wide_engine()
    truth = contents(engine)
    row_bytes = 32 * 4  # the one number of state is copied with all others
    writer = Writer(begin_save(engine, max_copied_bytes=100 * row_bytes), Storage(tmp_path))
    writer.gate.allow(0)
    look_up(engine, torch.arange(80))
    waited = writer.snapshot.waited_seconds
    assert writer.snapshot.copied_bytes == 80 * row_bytes
    training = threading.Thread(target=look_up, args=(engine, torch.arange(70, 2000)))
    training.start()
    training.join(0.2)
    assert training.is_alive()
    if closes:
        writer.snapshot.close()
        training.join(60)
    for _ in range(1000):
        if not training.is_alive():
            break
        writer.gate.allow(1)
    assert not training.is_alive()
    assert writer.snapshot.waited_seconds > waited + 0.1
    look_up(twin, torch.arange(80))
    look_up(twin, torch.arange(70, 2000))
    assert contents(engine) == contents(twin)
    if closes:
        with pytest.raises(RuntimeError, match="closed before all rows were written"):
            writer.finish()
        assert Storage(tmp_path).files() == []
        return
    writer.finish()
    again = wide_engine()
    load_tables(tmp_path, again)
    assert contents(again) == truth


def test_replicas_do_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = wide_engine()
    monkeypatch.setattr(DynamicEngine, "is_first_replica", False)
    snapshot = begin_save(engine, journals=True)
    assert snapshot.write(Storage(tmp_path)) == {}
    snapshot.published()
    snapshot.close()
    assert list(tmp_path.iterdir()) == []


# ---- static tables -------------------------------------------------------------------------------------------------


def static_job(values_ND: Tensor, state_NS: Tensor | None) -> dict[str, Any]:
    engine = engine_of(dist.group.WORLD if dist.is_initialized() else None)
    train(engine, range(3))
    load_static_rows(engine, "shop", values_ND, state_NS)
    return contents(engine)


@pytest.mark.dist
def test_a_static_table_becomes_a_dynamic_one(gloo: Callable[[int], Any]) -> None:
    values_ND, state_NS = torch.randn(100, 4), torch.rand(100, 9)
    state = static_job(values_ND, state_NS)
    assert merged(gloo(2).run(static_job, values_ND, state_NS)) == state
    rows = {i: state["shop"][i] for i in range(100)}
    clocks = ("0", str(state["clocks"][0]), str(state["clocks"][1]))
    for i, (values, own, *metadata) in rows.items():
        assert (values, own) == (str(values_ND[i].tolist()), str(state_NS[i].tolist()))
        assert tuple(metadata) == clocks
    assert not set(range(100)) & state["shop waits"].keys()
    assert all(row[1] == str([0.0] * 9) for i, row in static_job(values_ND, None)["shop"].items() if 0 <= i < 100)
    with pytest.raises(ValueError, match=r"table shop: expected values of shape \(100, 4\), got \(100, 3\)"):
        static_job(values_ND[:, :3], None)
    with pytest.raises(ValueError, match=r"table shop: expected state of shape \(100, 9\), got \(99, 9\)"):
        static_job(values_ND, state_NS[1:])
