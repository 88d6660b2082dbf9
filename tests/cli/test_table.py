"""`lightning-gr table`: what is in a checkpoint's dynamic tables, out of them and into them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_gr.checkpoint.manifest import Base
from lightning_gr.checkpoint.reader import CheckpointReader
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.checkpoint.tensors import write_tensors
from lightning_gr.checkpoint.writer import CheckpointWriter, pack, recommit
from lightning_gr.cli import main
from lightning_gr.embeddings.dynamic import Admission, DynamicEngine, DynamicTableConfig, TablePolicy
from lightning_gr.embeddings.dynamic.keyed_rows import KeyRows
from lightning_gr.embeddings.dynamic.row_storage import Metadata
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
from lightning_gr.embeddings.dynamic.table_files import begin_save, load_tables, save_tables

IDS = [-(2**63), -7, 0, 3, 5, 2**62]
COUNTS = [1, 2, 3, 9, 40, 4]
STEPS = [0, 4, 9, 9, 8, 2]
STATIC = torch.arange(12.0).view(4, 3) / 8


def engine() -> DynamicEngine:
    names = {"item": TablePolicy(max_rows=64), "[tag]": TablePolicy(admission=Admission(min_count=2))}
    return DynamicEngine(
        configs=[
            DynamicTableConfig(
                name=name,
                embedding_dim=3,
                feature_names=[name],
                policy=policy,
                precision="fp16" if name == "[tag]" else "fp32",
            )
            for name, policy in names.items()
        ],
        optimizer=SparseOptimizerConfig("adagrad", lr=0.1),
        seed=0,
        virtual_shards=8,
    )


def rows(width: int = 3) -> KeyRows:
    values = torch.arange(float(len(IDS) * width)).view(len(IDS), width)
    metadata = Metadata(torch.tensor(COUNTS), torch.tensor(STEPS), torch.tensor(STEPS) + 1_700_000_000)
    return KeyRows(torch.tensor(IDS), values, values + 100, metadata)


def write(path: Path, folders: list[str]) -> Path:
    made = engine()
    made.next_step, made.time = 10, 1_700_000_100
    for table in made.tables:
        table.add_rows(0, rows())
        if table.names == ["[tag]"]:
            waiting = {"ids": torch.tensor([8, 9]), "counts": torch.tensor([1, 1]), "last_steps": torch.tensor([3, 4])}
            table.load_counter_state(0, waiting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {"state_dict": {"tables.item.weight": STATIC, "tables.wide.weight": torch.zeros(2, 5)}}
        writer = CheckpointWriter(Storage(path))
        files: dict[str, FileSum] = write_tensors(writer.where, tensors)
    for folder in folders:
        sums = save_tables(writer.where / "dynamic" / folder, made)
        files |= {f"dynamic/{folder}/{name}": x for name, x in sums.items()}
    writer.commit(pack({"epoch": 1}), files, step=0, epoch=1, world_size=1)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("saved") / "last.ckpt", ["model.tables"])


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that fails, and returns its one line."""

    def run(*words: Any) -> str:
        assert main(["table", *map(str, words)]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert not captured.out
        return line.removeprefix("lightning-gr: error: ")

    return run


def table(path: Path, name: str) -> KeyRows:
    """The rows of a checkpoint's table, by way of an engine."""
    loaded = engine()
    load_tables(path / "dynamic" / "model.tables", loaded)
    p, local = loaded.logical[loaded.table_number(name)]
    found = loaded.tables[p].rows_of(local)[0]
    order = found.ids_N.argsort()
    return KeyRows(
        found.ids_N[order],
        found.values_ND[order],
        found.state_NS[order],
        Metadata(*(None if x is None else x[order] for x in found.metadata)),  # type: ignore[arg-type]
    )


def test_inspect_says_what_is_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "inspect", str(checkpoint), "--json"]) == 0
    tag, item = json.loads(capsys.readouterr().out)["tables"]
    assert (item["collection"], item["table"], item["rows"], item["width"]) == ("model.tables", "item", 6, 3)
    assert (item["budget"], item["budget_share"], item["waiting"], item["next_step"]) == (64, 6 / 64, None, 10)
    assert (tag["table"], tag["budget"], tag["admission"], tag["waiting"]) == ("[tag]", None, "exact", 2)
    assert item["bytes"] > 6 * (3 + 3) * 4
    # Last used 9, 5, 0, 0, 1 and 7 steps before the last one.
    ages = [{"from": 0, "to": 0, "rows": 2}, {"from": 1, "to": 1, "rows": 1}, {"from": 2, "to": 3, "rows": 0}]
    assert item["steps_since_last_use"] == [
        *ages,
        {"from": 4, "to": 7, "rows": 2},
        {"from": 8, "to": 15, "rows": 1},
    ]
    assert [x["rows"] for x in item["occurrences"]] == [0, 1, 2, 1, 1, 0, 1]
    assert item["hottest"][:2] == [{"id": 5, "count": 40, "last_step": 8}, {"id": 3, "count": 9, "last_step": 9}]
    assert main(["table", "inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "after 10 steps, data up to 2023-11-14 22:15 UTC" in shown
    assert "9% of 64" in shown
    assert "model.tables/[tag]" in shown  # a name is no markup
    assert main(["table", "inspect", str(checkpoint), "--table", "item"]) == 0
    shown = capsys.readouterr().out
    assert "[tag]" not in shown
    assert str(-(2**63)) in shown


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_export_gives_ids_and_vectors(checkpoint: Path, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"item.{suffix}"
    assert main(["table", "export", str(checkpoint), str(file), "--table", "item"]) == 0
    if suffix == "parquet":
        frame = pl.read_parquet(file)
        assert frame.schema["vector"] == pl.Array(pl.Float32, 3)
        assert frame["id"].to_list() == IDS
        assert frame["vector"].to_list() == rows().values_ND.tolist()
        columns = [frame[x].to_list() for x in ("count", "last_step", "last_time")]
    else:
        tensors = load_file(file)
        assert tensors["ids"].tolist() == IDS
        assert torch.equal(tensors["values"], rows().values_ND)
        columns = [tensors[x].tolist() for x in ("counts", "last_steps", "last_times")]
    assert columns == [COUNTS, STEPS, [x + 1_700_000_000 for x in STEPS]]
    assert list(tmp_path.iterdir()) == [file]


def test_export_and_delta_since_a_step(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["table", "export", str(checkpoint), str(tmp_path / "a.parquet"), "--table", "item", "--since", "8"]) == 0
    )
    recent = [i for i, step in zip(IDS, STEPS, strict=True) if step >= 8]
    assert pl.read_parquet(tmp_path / "a.parquet")["id"].to_list() == recent
    capsys.readouterr()
    assert main(["table", "delta", str(checkpoint), str(tmp_path / "delta"), "--since", "8"]) == 0
    assert "the next one is --since 10" in capsys.readouterr().out
    files = sorted((tmp_path / "delta").rglob("*.parquet"))
    assert [str(x.relative_to(tmp_path)) for x in files] == [
        "delta/model.tables/[tag].parquet",
        "delta/model.tables/item.parquet",
    ]
    assert all(pl.read_parquet(x, glob=False)["id"].to_list() == recent for x in files)
    words = ["table", "delta", str(checkpoint), str(tmp_path / "none"), "--since", "10", "--format", "safetensors"]
    assert main(words) == 0
    assert load_file(tmp_path / "none" / "model.tables" / "item.safetensors")["values"].shape == (0, 3)


@pytest.mark.parametrize("suffix", ["parquet", "list.parquet", "safetensors"])
def test_import_sets_rows_in_a_copy(
    checkpoint: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, values = [77, 3, 8, -(2**63)], torch.tensor([[0.5, 1, 2], [3, 4, 5], [6, 7, 8], [9, 9, 9]])
    source, target = tmp_path / f"in.{suffix}", tmp_path / "new.ckpt"
    if suffix == "safetensors":
        save_file({"ids": torch.tensor(ids), "values": values}, source)
    else:
        kind: Any = pl.List(pl.Float64) if suffix.startswith("list") else pl.Array(pl.Float32, 3)
        pl.DataFrame({"id": ids, "vector": values.tolist()}, schema_overrides={"vector": kind}).write_parquet(source)
    before = {x: x.read_bytes() for x in checkpoint.rglob("*") if x.is_file()}
    for name in ("item", "[tag]"):
        shutil.rmtree(target, ignore_errors=True)
        capsys.readouterr()
        words = ["table", "import", str(checkpoint), str(source), "--table", name, "--out", str(target)]
        assert main(words) == 0
        assert f"4 rows set in table {name}, 2 of them new" in capsys.readouterr().out
        assert before == {x: x.read_bytes() for x in checkpoint.rglob("*") if x.is_file()}
        old, new = rows(), table(target, name)
        wanted = {i: (v, s, c) for i, v, s, c in zip(IDS, old.values_ND, old.state_NS, COUNTS, strict=True)}
        for i, v in zip(ids, values, strict=True):
            wanted[i] = (v, *wanted.get(i, (v, torch.zeros(3), 0))[1:])
        assert new.ids_N.tolist() == sorted(wanted)
        for i, v, s, c in zip(new.ids_N.tolist(), new.values_ND, new.state_NS, new.metadata.counts, strict=True):
            assert torch.equal(v, wanted[i][0])
            assert torch.equal(s, wanted[i][1])
            assert c == wanted[i][2]
        clock = dict(zip(new.ids_N.tolist(), new.metadata.last_steps.tolist(), strict=True))
        assert all(step == 10 if i in ids else step < 10 for i, step in clock.items())
    # Nobody who has a row waits for one.
    assert main(["table", "inspect", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tables"][0]["waiting"] == 1
    CheckpointReader(target).verify()
    assert CheckpointReader(target).meta() == {"epoch": 1}
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted([source.name, target.name])


def test_a_static_table_becomes_a_dynamic_one(checkpoint: Path, tmp_path: Path) -> None:
    words = ["table", "import", str(checkpoint), "--table", "item", "--from-static", str(checkpoint)]
    words += ["--key", "state_dict.tables.item.weight"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    rows_of = table(tmp_path / "a", "item")
    found = dict(zip(rows_of.ids_N.tolist(), rows_of.values_ND.tolist(), strict=True))
    assert [found[i] for i in range(4)] == STATIC.tolist()
    assert found[5] == rows().values_ND[IDS.index(5)].tolist()
    own = [10**12, -3, 5, 4]
    pl.DataFrame({"id": own}).write_parquet(tmp_path / "ids.parquet")
    assert main([*words, "--out", str(tmp_path / "b"), "--ids", str(tmp_path / "ids.parquet")]) == 0
    rows_of = table(tmp_path / "b", "item")
    found = dict(zip(rows_of.ids_N.tolist(), rows_of.values_ND.tolist(), strict=True))
    assert [found[i] for i in own] == STATIC.tolist()


def test_mistakes_of_names_are_one_line(
    checkpoint: Path, error: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    assert error("inspect", tmp_path / "no") == (
        f"checkpoint {tmp_path / 'no'}: no such directory; give the path of a saved checkpoint"
    )
    assert "meta.pt is missing" in error("inspect", tmp_path)
    assert error("export", checkpoint, out, "--table", "itm") == (
        f"--table itm: no such table in {checkpoint}; choose from [tag], item"
    )
    assert "expected a number of steps" in error("export", checkpoint, out, "--table", "item", "--since", "-1")
    assert ".parquet or .safetensors" in error("export", checkpoint, tmp_path / "out.csv", "--table", "item")
    assert "no such folder; make it first" in error("delta", checkpoint, tmp_path / "a" / "b", "--since", 1)
    out.write_text("mine")
    assert error("export", checkpoint, out, "--table", "item") == f"{out}: exists; give another name"
    assert "exists" in error("import", checkpoint, out, "--table", "item", "--out", out)
    both = write(tmp_path / "two.ckpt", ["a", "b"])
    assert error("inspect", both, "--table", "item") == (
        "--table item: several are called so; choose from a/item, b/item"
    )
    assert main(["table", "inspect", str(both), "--table", "b/item"]) == 0
    capsys.readouterr()
    assert "has no dynamic tables" in error("inspect", write(tmp_path / "none.ckpt", []))
    assert "COMMAND" in error()


def test_a_torn_file_is_one_line(checkpoint: Path, error: Callable[..., str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    part = copy / "dynamic" / "model.tables" / "item" / "part-00000-of-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    assert error("inspect", copy).startswith(f"{part}: has {part.stat().st_size} bytes of ")
    recommit(copy)  # as if it had been saved so
    assert error("inspect", copy).startswith(f"{part}: torn, or no saved table (")
    part.unlink()
    assert error("inspect", copy) == f"{part}: missing; use another checkpoint"


def test_a_checkpoint_of_what_is_new_is_read_with_those_it_adds_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, base, since = engine(), None, None
    for step, name in ((10, "a"), (11, "b")):
        made.next_step, made.time = step, 1_700_000_100
        for table_ in made.tables:
            if base is None:
                table_.add_rows(0, rows())
        if base is not None:
            made.upsert(torch.tensor([3, 77]), torch.ones(2, 3), "item")
            made.delete(torch.tensor([0]), "item")
        writer = CheckpointWriter(Storage(tmp_path / name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files: dict[str, FileSum] = write_tensors(writer.where, {"state_dict": {"weight": STATIC}})
        snapshot = begin_save(made, touched_since=since, journals=True)
        sums = snapshot.write(writer.where / "dynamic" / "model.tables")
        files |= {f"dynamic/model.tables/{x}": found for x, found in sums.items()}
        manifest = writer.commit(pack({"epoch": 1}), files, step=0, epoch=1, world_size=1, base=base)
        snapshot.published()
        snapshot.close()
        base, since = Base(name, manifest.id), step
    path, source = tmp_path / "b", tmp_path / "in.safetensors"
    assert main(["table", "export", str(path), str(tmp_path / "b.safetensors"), "--table", "item"]) == 0
    found = load_file(tmp_path / "b.safetensors")
    assert found["ids"].tolist() == [-(2**63), -7, 3, 5, 77, 2**62]
    assert found["values"][2].tolist() == [1, 1, 1]
    assert found["values"][3].tolist() == rows().values_ND[4].tolist()
    capsys.readouterr()
    assert main(["table", "inspect", str(path), "--json", "--table", "item"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"][0]["rows"] == 6
    save_file({"ids": torch.tensor([5]), "values": torch.zeros(1, 3)}, source)
    words = ["table", "import", str(path), str(source), "--table", "item", "--out", str(tmp_path / "c")]
    assert main(words) == 0
    CheckpointReader(tmp_path / "c").verify()
    assert len(CheckpointReader(tmp_path / "c").chain) == 1
    new = table(tmp_path / "c", "item")
    assert new.ids_N.tolist() == found["ids"].tolist()
    assert new.values_ND[2:4].tolist() == [[1, 1, 1], [0, 0, 0]]


BROKEN: dict[str, tuple[Any, str]] = {
    "width": (
        {"id": [1, 2], "vector": [[1.0], [2.0]]},
        "vectors of 1 numbers, table [tag] has rows of 3; give vectors of that width",
    ),
    "twice": ({"id": [1, 2, 1], "vector": [[0.0] * 3] * 3}, "1 ids occur more than once, 1 for one"),
    "nan": ({"id": [1, 2], "vector": [[0.0] * 3, [0.0, float("nan"), 0.0]]}, "1 vectors are not finite, that of id 2"),
    "range": ({"id": [1], "vector": [[1e5] * 3]}, "1 vectors do not fit into fp16, that of id 1 first; scale them"),
    "ragged": ({"id": [1, 2], "vector": [[0.0] * 3, [0.0]]}, "lists of 1 to 3 numbers; give equal ones"),
    "null": ({"id": [1], "vector": [[0.0, None, 1.0]]}, "column vector has 1 nulls"),
    "text": ({"id": ["a"], "vector": [[0.0] * 3]}, "; give whole numbers"),
    "whole": ({"id": [1], "vector": [[1, 2, 3]]}, "; give lists of float"),
    "column": ({"item": [1], "vector": [[1.0]]}, "has no column id, only item, vector; name it so"),
    "none": (
        pl.DataFrame({"id": [], "vector": []}, schema={"id": pl.Int64, "vector": pl.Array(pl.Float32, 3)}),
        "has no rows; give a file that has",
    ),
    "unsigned": (
        pl.DataFrame({"id": [2**63], "vector": [[0.0]]}, schema_overrides={"id": pl.UInt64}),
        "give ids of 64 bits with a sign",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_vectors_are_refused(what: str, checkpoint: Path, error: Callable[..., str], tmp_path: Path) -> None:
    content, said = BROKEN[what]
    source = tmp_path / "in.parquet"
    pl.DataFrame(content).write_parquet(source)
    line = error("import", checkpoint, source, "--table", "[tag]", "--out", tmp_path / "new")
    assert line.startswith(str(source))
    assert said in line
    assert list(tmp_path.iterdir()) == [source]


def test_other_mistakes_of_import(checkpoint: Path, error: Callable[..., str], tmp_path: Path) -> None:
    out = ("--table", "item", "--out", tmp_path / "new")
    assert "no such file; check the path" in error("import", checkpoint, tmp_path / "in.parquet", *out)
    assert "no such file; check the path" in error("import", checkpoint, tmp_path / "in.safetensors", *out)
    for name in ("in.parquet", "in.safetensors"):
        (tmp_path / name).write_text("none")
        assert "; give another file" in error("import", checkpoint, tmp_path / name, *out)
    save_file({"ids": torch.arange(2)}, tmp_path / "in.safetensors")
    assert "has no values, only ids" in error("import", checkpoint, tmp_path / "in.safetensors", *out)
    save_file({"ids": torch.arange(2), "values": torch.zeros(3, 3)}, tmp_path / "in.safetensors")
    assert "a row for each of 2 ids" in error("import", checkpoint, tmp_path / "in.safetensors", *out)
    assert "give either a file IN or --from-static" in error("import", checkpoint, *out)
    assert "--key and --ids are of --from-static" in error("import", checkpoint, "a.parquet", *out, "--key", "x")
    static = ("import", checkpoint, *out, "--from-static", checkpoint)
    known = "state_dict.tables.item.weight, state_dict.tables.wide.weight"
    assert error(*static) == f"--key: missing; choose from {known}"
    assert error(*static, "--key", "item") == f"--key item: no such table in {checkpoint}; choose from {known}"
    assert "vectors of 5 numbers" in error(*static, "--key", "state_dict.tables.wide.weight")
    pl.DataFrame({"id": [1, 2]}).write_parquet(tmp_path / "ids.parquet")
    words = (*static, "--key", "state_dict.tables.item.weight", "--ids", tmp_path / "ids.parquet")
    assert "2 ids for 4 rows; give one for each, in order" in error(*words)
    assert not (tmp_path / "new").exists()


def test_a_failed_copy_leaves_nothing(
    checkpoint: Path, error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    save_file({"ids": torch.arange(2), "values": torch.zeros(2, 3)}, tmp_path / "in.safetensors")
    monkeypatch.setattr(shutil, "copytree", full)
    words = ("import", checkpoint, tmp_path / "in.safetensors", "--table", "item", "--out", tmp_path / "new")
    assert "could not be copied (No space left on device)" in error(*words)
    assert [x.name for x in tmp_path.iterdir()] == ["in.safetensors"]
