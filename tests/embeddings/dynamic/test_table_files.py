"""Saved tables: what any number of processes saves, any other reads, and nothing half."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_gr.checkpoint.storage import Storage
from lightning_gr.embeddings.dynamic import (
    Admission,
    DynamicEngine,
    DynamicTableConfig,
    Eviction,
    SparseOptimizerConfig,
    TablePolicy,
    safetensors_stream,
)
from lightning_gr.embeddings.dynamic.table_files import (
    find_tables,
    load_tables,
    num_waiting,
    read_columns,
    read_header,
    read_table,
    save_tables,
    table_names,
    upsert_rows,
)

IDS = [0, -1, -(2**63), 2**63 - 1, *range(1, 500)]


class Features:
    """As much of a `KeyedJaggedTensor` as an engine asks for."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    def keys(self) -> list[str]:
        return list(self._values)

    def length_per_key(self) -> list[int]:
        return [len(x) for x in self._values.values()]

    def values(self) -> Tensor:
        return torch.cat(list(self._values.values()))


def engine_of(group: Any = None, **changed: Any) -> DynamicEngine:
    policies: dict[str, TablePolicy] = {
        "item": TablePolicy(max_rows=256, rows_per_group=64, eviction=Eviction("lfu_lru", slack=0.1), ttl_steps=40),
        "shop": TablePolicy(admission=Admission(min_count=3), max_rows=256, rows_per_group=64, on_missing="bucket"),
        "word": TablePolicy(admission=Admission(min_count=2, counter="sketch", sketch_width=32)),
        "score": TablePolicy(max_rows=256, rows_per_group=64, eviction=Eviction("score")),
    } | changed.pop("policies", {})
    widths = {"item": 4, "shop": 4, "word": 3, "score": 3} | changed.pop("widths", {})
    precision = {"item": "fp32", "shop": "fp32", "word": "bf16", "score": "mixed"} | changed.pop("precision", {})
    names = changed.pop("names", list(policies))
    configs = [
        DynamicTableConfig(
            name=name,
            embedding_dim=widths[name],
            feature_names=[f"f_{name}"],
            policy=policies[name],
            precision=precision[name],  # type: ignore[arg-type]
            hot_count=4,
        )
        for name in names
    ]
    settings: dict[str, Any] = {"optimizer": SparseOptimizerConfig("adam", lr=0.1), "seed": 3, "virtual_shards": 16}
    return DynamicEngine(configs=configs, group=group, **(settings | changed))


def train(engine: DynamicEngine, steps: range) -> None:
    """Looks up the same ids whatever the number of processes, and moves rows by gradients that depend on the id."""
    for step in steps:
        draw = random.Random(step)
        features = {}
        for name in ("item", "shop", "word", "score"):
            ids = [draw.choice(IDS) for _ in range(64)]
            features[f"f_{name}"] = torch.tensor(ids[engine.rank :: engine.world_size], dtype=torch.int64)
        engine.observe_time(1000 + 7 * step)
        lookup = engine.take(Features(features), training=True)
        lookup.exchange.send_keys()
        engine.find(lookup)
        rows = engine.received(lookup)
        # Gradients are divided by the number of processes.
        loss = torch.stack([x[places].sum() for x, places in zip(rows, lookup.exchange.places, strict=True)]).sum()
        (loss * engine.world_size).backward()
        engine.step()


def contents(engine: DynamicEngine) -> dict[str, Any]:
    """All that a process holds, by table and id."""
    state: dict[str, Any] = {"clocks": (engine.next_step, engine.time)}
    for table in engine.tables:
        for k, name in enumerate(table.key_names):
            rows, _ = table.rows_of(k)
            columns = [rows.values_ND, rows.state_NS, *(x for x in rows.metadata if x is not None)]
            columns += [] if rows.hot_N is None else [rows.hot_N]
            lists = [rows.ids_N.tolist(), *(x.tolist() for x in columns)]
            state[name] = {i: tuple(map(str, rest)) for i, *rest in zip(*lists, strict=True)}
            waiting = table.counter_state(k) if k < len(table.configs) else None
            if waiting is not None:
                lists = [x.tolist() for x in waiting[0].values()]
                state[f"{name} waits"] = {i: str(rest) for i, *rest in zip(*lists, strict=True)}
    return state


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What all processes hold together; nothing twice."""
    joint = dict(states[0])
    for state in states[1:]:
        assert state["clocks"] == joint["clocks"]
        for name in set(joint) - {"clocks"}:
            assert not joint[name].keys() & state[name].keys()
            joint[name] = joint[name] | state[name]
    return joint


def job(source: str | None, steps: range, target: str | None, changed: dict[str, Any] | None = None) -> Any:
    """Loads, trains and saves on every process."""
    engine = engine_of(dist.group.WORLD if dist.is_initialized() else None, **(changed or {}))
    if source is not None:
        load_tables(Path(source), engine)
    train(engine, steps)
    if target is not None:
        save_tables(Path(target), engine)
    return contents(engine)


def failing_job(source: str, rank: int) -> str:
    """A process that cannot read stops all, and nothing has changed."""
    engine = engine_of(dist.group.WORLD)
    train(engine, range(3))
    before = contents(engine)
    if engine.rank == rank:
        source += " elsewhere"
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_tables(Path(source), engine)
    assert contents(engine) == before
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A collection that one process saved after 30 steps, and what it held."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint" / "dynamic" / "model.tables"
    return folder, job(None, range(30), str(folder))


@pytest.fixture
def copy(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_training_uses_every_sort_of_row(saved: tuple[Path, dict[str, Any]]) -> None:
    """Else the tests below would show less than they say."""
    folder, state = saved
    assert set(state) == {"clocks", "item", "shop", "shop#bucket", "shop waits", "word", "word waits", "score"}
    assert all(len(x) > 2 for x in state.values() if isinstance(x, dict))
    engine = engine_of()
    train(engine, range(30))
    statistics = {t.names[i]: x for t in engine.tables for i, x in enumerate(t.statistics)}
    assert statistics["item"].evicted > 0
    assert statistics["shop"].rejected > 0
    assert find_tables(folder.parents[1]) == {"model.tables": Storage(folder)}
    assert table_names(folder) == ["item", "score", "shop", "shop#bucket", "word"]
    assert num_waiting(folder, "shop") == len(state["shop waits"])
    assert num_waiting(folder, "word") is None
    with safe_open(folder / "word" / "part-00000-of-00001.safetensors", framework="pt") as file:
        assert file.get_tensor("values").dtype == torch.bfloat16


def test_one_process_reads_what_it_saved(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, state = saved
    assert job(str(folder), range(0), None) == state
    assert job(str(folder), range(30, 45), None) == job(None, range(45), None)


def test_pieces_make_no_difference(saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream, "PIECE_BYTES", 50)
    assert job(str(saved[0]), range(0), None) == saved[1]


@pytest.mark.dist
def test_any_number_of_processes_reads_what_any_saved(
    saved: tuple[Path, dict[str, Any]], gloo: Callable[[int], Any], tmp_path: Path
) -> None:
    folder, state = saved
    for world in (2, 3, 1, 4, 2):
        target = tmp_path / str(world)
        shutil.rmtree(target, ignore_errors=True)
        if world == 1:
            states = [job(str(folder), range(0), str(target))]
        else:
            states = gloo(world).run(job, str(folder), range(0), str(target))
            assert all(len(x["item"]) < len(state["item"]) for x in states)
        assert merged(states) == state
        folder = target


@pytest.mark.dist
def test_training_goes_on_as_if_it_had_never_stopped(gloo: Callable[[int], Any], tmp_path: Path) -> None:
    """Evictions, admission and expiry too; sums of one gradient an id are exact, so all numbers are equal."""
    gloo(2).run(job, None, range(20), str(tmp_path / "two"))
    gloo(3).run(job, str(tmp_path / "two"), range(20, 40), str(tmp_path / "three"))
    resumed = job(str(tmp_path / "three"), range(40, 60), None)
    unbroken = job(None, range(60), None)
    assert resumed.keys() == unbroken.keys()
    for name in unbroken:
        assert resumed[name] == unbroken[name], name


@pytest.mark.dist
def test_a_process_that_fails_stops_all(saved: tuple[Path, dict[str, Any]], gloo: Callable[[int], Any]) -> None:
    own, others = gloo(2).run(failing_job, str(saved[0]), 0)
    assert "no such folder" in own
    assert "by process 0; its own message says why" in others


def test_read_table_is_what_the_engine_has(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, state = saved
    for name in table_names(folder):
        rows, header = read_table(folder, name)
        assert rows.ids_N.tolist() == sorted(state[name])
        assert [str(x) for x in rows.values_ND.tolist()] == [state[name][i][0] for i in sorted(state[name])]
        assert (header.table, header.next_step, header.time, header.seed) == (name, *state["clocks"], 3)
        recent, _ = read_table(folder, name, touched_since=26)
        last_steps = rows.metadata.last_steps
        assert torch.equal(recent.ids_N, rows.ids_N[last_steps >= 26])
        assert torch.equal(recent.values_ND, rows.values_ND[last_steps >= 26])
        assert len(read_columns(folder, name, ["ids"], touched_since=30)["ids"]) == 0
        assert read_header(folder, name) == (header, len(rows.ids_N))
    assert read_table(folder, "item")[1].budget == 256


def test_precision_may_change(saved: tuple[Path, dict[str, Any]]) -> None:
    def read(precision: dict[str, str]) -> DynamicEngine:
        engine = engine_of(precision=precision)
        load_tables(saved[0], engine)
        return engine

    def rows(engine: DynamicEngine, name: str) -> tuple[Tensor, Any]:
        table = engine.tables[engine.logical[engine.table_number(name)][0]]
        found = table.rows_of(table.names.index(name))[0]
        return found.values_ND, found

    same = read({})
    item, score = rows(same, "item")[0], rows(same, "score")[0]
    assert torch.equal(rows(read({"item": "fp16"}), "item")[0], item.half().float())
    assert torch.equal(rows(read({"score": "fp32"}), "score")[0], score)
    mixed, found = rows(read({"item": "mixed"}), "item")
    hot_N = found.metadata.counts >= 4
    assert torch.equal(found.hot_N, hot_N)
    assert 0 < int(hot_N.sum()) < len(hot_N)
    assert torch.equal(mixed, torch.where(hot_N[:, None], item, item.half().float()))


def test_a_lowered_budget_evicts_where_it_is_read(saved: tuple[Path, dict[str, Any]]) -> None:
    policy = TablePolicy(max_rows=32, rows_per_group=64, eviction=Eviction("lfu_lru"))
    state = job(str(saved[0]), range(0), None, {"policies": {"item": policy}})
    # One group of 32 rows: the least often used go, of those the least recently, of those the least id.
    kept = sorted(saved[1]["item"], key=lambda i: (*map(int, saved[1]["item"][i][2:4]), i))[-32:]
    assert state["item"] == {i: saved[1]["item"][i] for i in kept}
    assert state["shop"] == saved[1]["shop"]


def test_scores_are_dropped_where_nobody_evicts_by_them(saved: tuple[Path, dict[str, Any]]) -> None:
    state = job(str(saved[0]), range(0), None, {"policies": {"score": TablePolicy()}})
    assert state["score"].keys() == saved[1]["score"].keys()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "dim": ({"widths": {"item": 5}}, "item: saved with dim=4, this run has 5"),
    "optimizer": ({"optimizer": SparseOptimizerConfig("sgd", lr=0.1)}, "saved with optimizer=adam, this run has sgd"),
    "shards": ({"virtual_shards": 32}, "saved with virtual_shards=16, this run has 32"),
    "buckets": (
        {"policies": {"shop": TablePolicy(admission=Admission(min_count=3), on_missing="bucket")}},
        "shop#bucket: saved with group_bits=2, this run has 4; its budget decides that",
    ),
    "counter": (
        {"policies": {"word": TablePolicy(admission=Admission(min_count=2))}},
        "word: saved with counter=sketch, this run has exact",
    ),
    "sketch": (
        {"policies": {"word": TablePolicy(admission=Admission(min_count=2, counter="sketch", sketch_width=64))}},
        "has 32 counters a row, not 64",
    ),
    "less": ({"names": ["item", "shop", "word"]}, "has table score, and the model has not"),
    "no bucket": ({"policies": {"shop": TablePolicy()}}, "has table shop#bucket, and the model has not"),
    "more": (
        {"policies": {"word": TablePolicy(on_missing="bucket")}},
        "lacks table word#bucket of the model; use the tables it was saved with: item, score",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused_and_nothing_changes(saved: tuple[Path, dict[str, Any]], change: str) -> None:
    settings, said = CHANGES[change]
    engine = engine_of(**settings)
    if "names" not in settings:
        train(engine, range(2))
    before = contents(engine)
    with pytest.raises(ValueError, match=r"use|set") as caught:
        load_tables(saved[0], engine)
    assert said in str(caught.value)
    assert contents(engine) == before


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def _other_shape(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"counts": tensors["counts"][:-1].clone()}, path, metadata)


def _shifted(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"ids": tensors["ids"] + 10**6}, path, metadata)


@pytest.fixture(scope="module")
def of_two(gloo: Callable[[int], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection that two processes saved."""
    folder = tmp_path_factory.mktemp("of_two")
    gloo(2).run(job, None, range(8), str(folder))
    return folder


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "harm"),
    # Of shifted ids that wait nobody can tell.
    [("part", _shifted)]
    + [(kind, x) for kind in ("part", "waiting") for x in (_cut, _empty, _foreign, _other_shape, Path.unlink)],
)
def test_a_broken_file_is_refused_and_nothing_changes(
    kind: str, harm: Callable[[Path], None], of_two: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(of_two, tmp_path / "copy"))
    harm(folder / "shop" / f"{kind}-00001-of-00002.safetensors")
    engine = engine_of()
    train(engine, range(1))
    before = contents(engine)
    with pytest.raises(ValueError, match=r"shop.*; use another checkpoint"):
        load_tables(folder, engine)
    assert contents(engine) == before


def test_parts_of_two_saves_are_refused(copy: Path, tmp_path: Path) -> None:
    item = copy / "item"
    shutil.copy(item / "part-00000-of-00001.safetensors", item / "part-00000-of-00002.safetensors")
    with pytest.raises(ValueError, match="files of 1 and of 2 processes"):
        load_tables(copy, engine_of())
    with pytest.raises(ValueError, match="of an earlier save by 2 processes; save to an empty folder"):
        save_tables(copy, engine_of())
    (item / "part-00000-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="part-00001-of-00002 is missing"):
        load_tables(copy, engine_of())
    shutil.rmtree(item)
    job(None, range(5), str(tmp_path / "five"))
    shutil.copytree(tmp_path / "five" / "item", item)
    with pytest.raises(ValueError, match="its tables were saved after"):
        load_tables(copy, engine_of())
    shutil.rmtree(item)
    shutil.copytree(copy / "score", item)
    with pytest.raises(ValueError, match="holds table score of 1 processes"):
        load_tables(copy, engine_of())


def test_tables_are_not_loaded_while_a_step_is_under_way(saved: tuple[Path, dict[str, Any]]) -> None:
    engine = engine_of()
    lookup = engine.take(
        Features({f"f_{x}": torch.arange(3) for x in ("item", "shop", "word", "score")}), training=True
    )
    lookup.exchange.send_keys()
    engine.find(lookup)
    engine.received(lookup)
    with pytest.raises(RuntimeError, match="after the step"):
        load_tables(saved[0], engine)


@pytest.mark.dist
def test_upserting_files_is_upserting_the_engine(gloo: Callable[[int], Any], tmp_path: Path) -> None:
    """The engine's own upsert is the truth; the files are of three processes."""
    # Without budgets, which files do not apply.
    names = ("item", "shop", "word", "score")
    changed = {"policies": {name: TablePolicy(admission=Admission(min_count=3)) for name in names}}
    gloo(3).run(job, None, range(9), str(tmp_path), changed)
    engine = engine_of(**changed)
    load_tables(tmp_path, engine)
    have = contents(engine)
    for name in names:
        ids = torch.tensor([*IDS[::3], 7777, -5, 10**15])[torch.randperm(len(IDS[::3]) + 3)]
        values = torch.randn(len(ids), engine.tables[engine.logical[engine.table_number(name)][0]].dim)
        assert upsert_rows(tmp_path, name, ids, values) == len(set(ids.tolist()) - set(have[name]))
        assert upsert_rows(tmp_path, name, ids[:0], values[:0]) == 0
        engine.upsert(ids, values, name)
    assert job(str(tmp_path), range(0), None, changed) == contents(engine) != have
    train(engine, range(9, 14))
    assert job(str(tmp_path), range(9, 14), None, changed) == contents(engine)


def test_shared_rows_are_not_upserted(copy: Path) -> None:
    with pytest.raises(ValueError, match="shop#bucket: rows that keys share"):
        upsert_rows(copy, "shop#bucket", torch.tensor([0]), torch.zeros(1, 4))
