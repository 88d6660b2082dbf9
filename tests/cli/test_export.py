"""``lightning-gr export``: what it writes is what the checkpoint holds, and predicts the same, bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_gr.checkpoint.export_format import Export, ExportInfo, TableFormat, is_export
from lightning_gr.checkpoint.export_tables import load_exported_tables
from lightning_gr.checkpoint.export_writer import ExportWriter
from lightning_gr.checkpoint.reader import CheckpointReader
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.cli import main
from lightning_gr.embeddings.dynamic import DynamicTableConfig, SparseOptimizerConfig, TablePolicy
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.policies import Admission
from lightning_gr.embeddings.dynamic.table_files import begin_save, read_table

USERS = 40
TTL = 2
# Admission, shared rows, expiry and 16 bits in one table.
DYNAMIC = {
    "precision": "mixed",
    "hot_count": 6,
    "policy": {"on_missing": "bucket", "admission": {"min_count": 3}, "ttl_steps": TTL, "buckets_per_group": 2},
}


def overlay(folder: Path, recipe: str) -> str:
    """Settings that make a recipe small, and its log with text ids."""
    draw = random.Random(0)
    lines = ["user_id,item_id,timestamp,click"]
    for user in range(USERS):
        for step in range(draw.randint(4, 14)):
            item = int(100 * draw.random() ** 2)
            lines.append(f"{user},item {item},{1_000_000 + 60 * step},{draw.randint(0, 1)}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    checkpoint = {"dirpath": "checkpoints", "filename": "last", "monitor": None, "every_n_train_steps": 9}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}]
    trainer = {"max_steps": 9, "max_epochs": None, "logger": False, "limit_val_batches": 0, "callbacks": callbacks}
    model: dict[str, Any]
    data = {"path": str(folder / "log.csv"), "global_tokens": 64, "eval_global_tokens": 2048}
    if recipe.startswith("hstu"):
        callbacks.append({"class_path": "lightning_gr.callbacks.TopKWriter", "init_args": {"output_dir": "top"}})
        model = {"encoder": {"init_args": {"dim": 16, "num_layers": 1, "num_heads": 2, "max_length": 8}}}
        model |= {"loss": "sampled_softmax", "negatives": "in_batch"}
        data["max_length"] = 8
    else:
        assert main(["prepare", str(data["path"]), str(folder / "store"), "--columns.labels", "[click]"]) == 0
        model = {"network": {"init_args": {"dim": 16, "num_layers": 1, "max_length": 48}}, "embedding_dim": 8}
        data |= {"path": str(folder / "store"), "max_history": 8, "block": 4}
    if recipe.endswith("dynamic"):
        model["dynamic_tables"] = DYNAMIC
    settings = {"trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "small.yaml")


def command(folder: str, *words: str, broken: bool = False) -> tuple[int, str, str]:
    """Runs a command in a process of a pool; returns its exit code and what it said."""
    from lightning_gr.cli import export

    os.chdir(folder)
    whole, pieces = export._whole, export._pieces
    if broken:
        export._whole = lambda *args: whole(*args) + 0.25
        export._pieces = lambda *args: ((ids, values + 0.25) for ids, values in pieces(*args))
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
    finally:
        export._whole, export._pieces = whole, pieces
        os.chdir("/")
    return code, out.getvalue(), err.getvalue()


class Trained:
    """A recipe that was trained for some steps, in its folder."""

    def __init__(self, gloo: Any, folder: Path, *, recipe: str, world: int) -> None:
        self.gloo, self.folder, self.dynamic = gloo, folder, recipe.endswith("dynamic")
        self.settings = ["--config", recipe, "--config", overlay(folder, recipe)]
        for code, _, error in gloo(world).run(
            command, str(folder), "fit", *self.settings, "--trainer.devices", str(world)
        ):
            assert code == 0, error
        self.checkpoint = str(folder / "checkpoints" / "last.ckpt")

    def export(self, output: Path, *more: str, checkpoint: str | None = None, **changes: Any) -> tuple[int, str, str]:
        words = [*self.settings, "--ckpt_path", checkpoint or self.checkpoint, "--output", str(output), *more]
        result: tuple[int, str, str] = self.gloo(1).run(command, str(self.folder), "export", *words, **changes)[0]
        return result


@pytest.fixture(scope="module")
def trained(gloo: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def make(recipe: str) -> Trained:
        if recipe not in made:
            world = 2 if recipe.endswith("dynamic") else 1
            made[recipe] = Trained(gloo, tmp_path_factory.mktemp("run"), recipe=recipe, world=world)
        return made[recipe]

    return make


def read_back(folder: Path, file: str) -> dict[int, list[float]]:
    """Rows of an exported table by id, with readers of others."""
    if file.endswith(".parquet"):
        frame = pl.read_parquet(folder / file)
        assert frame.schema["id"] == pl.Int64
        assert isinstance(frame.schema["vector"], pl.Array)
        return dict(zip(frame["id"].to_list(), frame["vector"].to_list(), strict=True))
    tensors = load_file(folder / file)
    return dict(zip(tensors["ids"].tolist(), tensors["values"].tolist(), strict=True))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("recipe", "tables"),
    [
        ("hstu/tiny", "safetensors"),
        ("hstu/tiny-dynamic", "parquet"),
        pytest.param("hstu/tiny", "parquet", marks=pytest.mark.long),
        pytest.param("hstu/tiny-dynamic", "safetensors", marks=pytest.mark.long),
        pytest.param("mtgr/tiny-dynamic", "parquet", marks=pytest.mark.long),
    ],
)
def test_an_export_is_what_the_checkpoint_holds(
    trained: Callable[[str], Trained], tmp_path: Path, recipe: str, tables: TableFormat
) -> None:
    run = trained(recipe)
    output = tmp_path / "out"
    code, said, error = run.export(output, "--tables", tables)
    assert code == 0, error
    users = re.fullmatch(r"export: predictions of (\d+) users are equal", said.splitlines()[-1])
    assert users is not None
    assert int(users[1]) == USERS or recipe.startswith("mtgr")
    assert int(users[1]) > 0

    reader, content = CheckpointReader(run.checkpoint), json.loads((output / "export.json").read_text())
    assert (content["step"], content["checkpoint_id"]) == (9, reader.manifest.id)
    saved = {key.removeprefix("state_dict."): x for key, x in reader.tensors("state_dict.").items()}
    dense = load_file(output / "weights.safetensors")
    assert dense.keys() | content["static_tables"].keys() == saved.keys()
    for name, weight in dense.items():
        assert torch.equal(weight, saved[name])
    assert len(content["static_tables"]) == (0 if run.dynamic else 1)
    for name, table in content["static_tables"].items():
        assert read_back(output, table["file"]) == dict(enumerate(saved[name].tolist()))
    if recipe.startswith("hstu"):
        assert sorted(content["dynamic_tables"]) == (["tables/item", "tables/item#bucket"] if run.dynamic else [])
    expired = 0
    for name, table in content["dynamic_tables"].items():
        path, _, of_collection = name.rpartition("/")
        rows, header = read_table(reader.collections()[path], of_collection)
        kept = rows.metadata.last_steps >= header.next_step - TTL
        if "#" in name:
            kept[:] = True
        else:
            expired += int((~kept).sum())
        wanted = dict(zip(rows.ids_N[kept].tolist(), rows.values_ND[kept].tolist(), strict=True))
        assert read_back(output, table["file"]) == wanted
        assert table["rows"] == len(wanted)
    assert not run.dynamic or (expired > 0 and any(x["rows"] for x in content["dynamic_tables"].values()))
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config.keys() == {"seed_everything", "trainer", "model", "data"}
    assert config["trainer"]["max_steps"] == 9
    Export(output).verify()


def predicted(run: Trained, world: int, *words: str) -> pl.DataFrame:
    for code, _, error in run.gloo(world).run(
        command, str(run.folder), "predict", *words, "--trainer.devices", str(world)
    ):
        assert code == 0, error
    return pl.read_parquet(run.folder / "top" / "*.parquet").sort("user_id")


@pytest.mark.dist
@pytest.mark.parametrize("recipe", ["hstu/tiny-dynamic", pytest.param("hstu/tiny", marks=pytest.mark.long)])
def test_prediction_and_training_from_an_export_alone(
    trained: Callable[[str], Trained], tmp_path: Path, recipe: str
) -> None:
    run = trained(recipe)
    output = tmp_path / "out"
    assert run.export(output, "--check_batches", "0")[0] == 0
    alone = ["--config", str(output / "config.yaml"), "--ckpt_path", str(output)]
    wanted = predicted(run, 2, *run.settings, "--ckpt_path", run.checkpoint)
    assert predicted(run, 2, *alone).equals(wanted)
    assert len(wanted) == USERS

    ((code, _, error),) = run.gloo(1).run(command, str(run.folder), "fit", *alone, "--trainer.devices", "1")
    assert code == 2
    assert "--init_from" in error
    still = ["--model.init_args.optimizer.init_args.lr", "0", "--trainer.strategy.init_args.sparse_lr", "0"]
    saved = {"dirpath": str(tmp_path / "after"), "every_n_train_steps": 1}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saved}
    begun = ["--trainer.max_steps", "1", "--trainer.callbacks", json.dumps([callback])]
    for code, _, error in run.gloo(2).run(
        command, str(run.folder), "fit", *alone[:2], "--init_from", str(output), *still, *begun
    ):
        assert code == 0, error
    (after,) = (CheckpointReader(x) for x in (tmp_path / "after").iterdir())
    before = CheckpointReader(run.checkpoint)
    for key, weight in before.tensors("state_dict.").items():
        assert torch.equal(after.tensors(key)[key], weight)
    for name, table in Export(output).tables().items():
        path, _, of_collection = name.rpartition("/")
        rows, _ = read_table(after.collections()[path], of_collection)
        found = dict(zip(rows.ids_N.tolist(), rows.values_ND.tolist(), strict=True))
        for ids, values in table.pieces():
            assert all(found[i] == v for i, v in zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.dist
def test_mistakes_are_one_line_and_leave_nothing(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("hstu/tiny-dynamic")

    def fails(*more: str, checkpoint: str | None = None) -> str:
        code, _, error = run.export(tmp_path / "out", *more, checkpoint=checkpoint)
        assert code == 2
        (line,) = [x for x in error.splitlines() if "lightning-gr: error:" in x]
        assert not is_export(tmp_path / "out")
        return line.removeprefix("lightning-gr: error: ")

    assert "encoder.layers.0" in fails("--model.init_args.encoder.init_args.dim", "8")
    static = ["--model.init_args.dynamic_tables", "null", "--data.init_args.raw_ids", "false"]
    assert "tables.embeddings.item.weight is missing there, and of shape (" in fails(*static)
    assert "no such directory" in fails(checkpoint=str(tmp_path / "none"))
    assert "meta.pt is missing" in fails(checkpoint=str(run.folder))
    torn = Path(shutil.copytree(run.checkpoint, tmp_path / "torn"))
    part = next(torn.rglob("part-*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert fails(checkpoint=str(torn)).startswith(f"{part}: damaged")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert fails() == f"--output {tmp_path / 'out'}: exists and is not empty; give another directory"
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.dist
@pytest.mark.long
def test_other_predictions_are_told_and_nothing_is_removed(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    code, said, error = trained("hstu/tiny-dynamic").export(tmp_path / "out", broken=True)
    assert code == 1
    assert "are equal" not in said
    assert f"predictions of {USERS} users differ by up to " in error
    assert is_export(tmp_path / "out")


def test_predictions_are_compared_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_gr.batch import PADDING_SAMPLE_ID
    from lightning_gr.cli.export import _compare

    def predictions(nudge: float = 0.0, users: int = 3) -> list[Any]:
        scores = torch.tensor([[1.0, torch.nan], [0.5, -torch.inf], [0.0, 2.0]])
        scores[1, 0] += nudge
        ids = torch.tensor([4, 5, PADDING_SAMPLE_ID])
        return [{"sample_ids": ids[:users], "of": {"task": scores[:users]}}]

    output = Storage(tmp_path)
    assert _compare(predictions(), predictions(), output) == 0
    assert capsys.readouterr().out == "export: predictions of 2 users are equal\n"
    for other, said in (
        (predictions(6e-8), "differ by up to 5.96e-08 in [0].of.task"),
        (predictions(users=2), "differ in their number"),
        ([], "differ in their number"),
    ):
        assert _compare(predictions(), other, output) == 1
        assert said in capsys.readouterr().err
    assert _compare([], [], output) == 1
    assert "nothing was predicted" in capsys.readouterr().err


# ---- tables of one process -------------------------------------------------------------------------------------


def engine_of(precision: Any, **policy: Any) -> DynamicEngine:
    configs = [
        DynamicTableConfig(
            name=name,
            embedding_dim=4,
            feature_names=(name,),
            precision=precision,
            hot_count=3,
            policy=TablePolicy(on_missing="bucket", admission=Admission(min_count=2), **policy),
        )
        for name in ("item", "[tag]")
    ]
    return DynamicEngine(configs=configs, optimizer=SparseOptimizerConfig(), seed=7, virtual_shards=16)


def fill(engine: DynamicEngine, draw: torch.Generator) -> None:
    for table in engine.tables:
        for _ in range(3):
            ids = torch.randint(-50, 50, (60,), generator=draw).unique()
            for k in range(len(table.configs)):
                offsets = [0] * (k + 1) + [len(ids)] * (len(table.configs) - k)
                step, counts = engine.next_step, torch.ones_like(ids)
                found = table.lookup(ids, offsets, counts, step=step, time=0, training=True)
                rows = found.rows_U.unique()
                rows = rows[rows >= 0]
                table.storage.write(rows, torch.randn(len(rows), 4, generator=draw))
            table.commit_step(engine.next_step)
            engine.next_step += 1


def answers(engine: DynamicEngine) -> torch.Tensor:
    """What lookups of evaluation get for ids with a row, with a shared one, and with none."""
    ids, found = torch.arange(-70, 70), []
    for table in engine.tables:
        for k in range(len(table.configs)):
            offsets = [0] * (k + 1) + [len(ids)] * (len(table.configs) - k)
            step, time = engine.next_step, engine.time
            found.append(
                table.lookup(ids, offsets, torch.ones_like(ids), step=step, time=time, training=False).values_UD
            )
    return torch.cat(found)


@pytest.mark.parametrize("tables", ["parquet", "safetensors"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "mixed"])
def test_tables_of_a_chain_answer_as_before(precision: str, tables: TableFormat, tmp_path: Path) -> None:
    from lightning_gr.cli.export import _pieces

    draw = torch.Generator().manual_seed(1)
    engine = engine_of(precision, ttl_steps=4)
    folders = []
    since = None
    for link in range(3):
        fill(engine, draw)
        if link:
            gone = engine.tables[0].rows_of(0)[0].ids_N[::7]
            assert engine.tables[0].delete(gone, 0) > 0
        folders.append(Storage(tmp_path / f"link{link}"))
        snapshot = begin_save(engine, touched_since=since, journals=True)
        snapshot.write(folders[-1])
        snapshot.published()
        snapshot.close()
        since = engine.next_step
    output = Storage(tmp_path / "out")
    policy = engine.configs[0].policy
    info = ExportInfo(checkpoint="", checkpoint_id="", step=9, epoch=0, versions={})
    with ExportWriter(output, info, tables=tables) as writer:
        for table in engine.tables:
            for k, name in enumerate(table.key_names):
                of_bucket = k >= len(table.configs)
                writer.add_dynamic_table(
                    f"model.tables/{name}",
                    lambda name=name, of_bucket=of_bucket: _pieces(folders, name, None if of_bucket else policy),  # type: ignore[misc]
                    width=4,
                    precision=precision,
                    seed=7,
                    group_bits=table.group_bits[0],
                    buckets_per_group=1,
                )
    other = engine_of(precision, ttl_steps=4)
    other.seed = 99
    collection = Export(output).collections()["model.tables"]
    assert sorted(collection) == ["[tag]", "[tag]#bucket", "item", "item#bucket"]
    assert not torch.equal(answers(other), answers(engine))
    load_exported_tables(other, collection)
    assert torch.equal(answers(other), answers(engine))
    whole, header = read_table(folders, "item")
    expired = whole.metadata.last_steps < header.next_step - 4
    assert 0 < int(expired.sum()) < len(expired)
    assert collection["item"].info.rows == int((~expired).sum())
    with pytest.raises(ValueError, match=r"lacks table .* of the model; use its own config.yaml"):
        load_exported_tables(other, {"item": collection["item"]})


def write_small(folder: Path | str) -> Storage:
    output = Storage(folder)
    info = ExportInfo(checkpoint="last.ckpt", checkpoint_id="abc", step=3, epoch=1, versions={"torch": "2"})
    with ExportWriter(output, info, tables="parquet") as writer:
        writer.add_config("model: {}\n")
        writer.add_module({"item_vocabulary": "x", "epoch": 1})
        shared = torch.arange(6.0).double()
        writer.add_weights({"a": shared[:3], "b": shared, "n": torch.tensor(3), "flag": torch.tensor([True])})
        writer.add_static_table("t.embeddings.x.weight", torch.arange(12.0).view(4, 3).bfloat16())
        writer.add_static_table("t.embeddings.x#weight", torch.zeros(0, 3))
    return output


@pytest.mark.parametrize("where", ["disk", "url"])
def test_weights_come_back_in_their_own_types(where: str, tmp_path: Path) -> None:
    export = Export(write_small(tmp_path / "out" if where == "disk" else f"memory://{tmp_path}/out"))
    export.verify()
    weights = export.weights()
    assert torch.equal(weights["b"], torch.arange(6.0).double())
    assert torch.equal(weights["t.embeddings.x.weight"], torch.arange(12.0).view(4, 3).bfloat16())
    assert weights["t.embeddings.x#weight"].shape == (0, 3)
    assert weights["flag"].dtype == torch.bool
    assert {name: tuple(x.shape) for name, x in weights.items()} == export.shapes()
    assert export.meta() == {"item_vocabulary": "x", "epoch": 1}
    into = {name: torch.zeros_like(x) for name, x in weights.items()}
    export.load_weights(into)
    assert all(torch.equal(into[name], x) for name, x in weights.items())
    for broken, said in (({"c": torch.zeros(1)}, "has no c"), ({"a": torch.zeros(2)}, r"a has shape \(3,\)")):
        with pytest.raises(ValueError, match=said):
            export.load_weights(broken)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", ["export.json", "config.yaml", "module.pt", "weights.safetensors", "table"])
def test_a_damaged_export_names_the_file(name: str, how: str, tmp_path: Path) -> None:
    write_small(tmp_path / "out")
    path = tmp_path / "out" / name if name != "table" else max((tmp_path / "out" / "tables").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data if how == "flipped" else data[:-1])
    with pytest.raises(ValueError, match=str(path)):
        Export(tmp_path / "out").verify()


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield torch.arange(2), torch.zeros(2, 3)
        raise OSError("disk full")

    def write(output: Path) -> None:
        with ExportWriter(Storage(output), info, tables="parquet") as writer:
            writer.add_config("x")
            writer.add_dynamic_table("a/b", pieces, width=3, precision="fp32", seed=0)

    info = ExportInfo(checkpoint="", checkpoint_id="", step=0, epoch=0, versions={})
    for there in (False, True):
        output = tmp_path / f"out{there}"
        if there:
            output.mkdir()
        with pytest.raises(OSError, match="disk full"):
            write(output)
        assert output.exists() is there
        assert not there or not list(output.iterdir())
    with pytest.raises(FileExistsError, match="not empty"):
        ExportWriter(write_small(tmp_path / "full"), info, tables="parquet")
