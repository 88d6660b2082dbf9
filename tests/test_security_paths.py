"""Names that lead out of a directory are refused wherever a file gives them, and nothing is written outside."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_gr.checkpoint.checksummed_json import from_json, to_json
from lightning_gr.checkpoint.export_format import EXPORT_FILENAME, Export, ExportInfo
from lightning_gr.checkpoint.export_format import FORMAT as EXPORT_FORMAT
from lightning_gr.checkpoint.export_writer import ExportWriter
from lightning_gr.checkpoint.manifest import FORMAT, MANIFEST_FILENAME, Manifest
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.cli import main
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import Field

PATHS = ["../evil", "/evil", "a/../../evil", "..", ".", "", "a//b", "a\\..\\b", "a/./b"]


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Path]:
    """A folder two levels deep, outside of which nothing may appear."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    yield folder
    assert {x.name for x in tmp_path.iterdir()} == {"outer"}
    assert {x.name for x in folder.parent.iterdir()} == {"inner"}
    assert not Path("/evil").exists()


@pytest.mark.parametrize("name", [*PATHS, 3, None])
def test_a_checkpoint_that_names_files_elsewhere_is_refused(name: object, inside: Path) -> None:
    manifest = Manifest(id="a", step=1, epoch=0, world_size=1, saved_at="", attempt=1, files={"ok": FileSum(1, "0")})
    (inside / MANIFEST_FILENAME).write_bytes(manifest.to_bytes())
    assert Manifest.read(Storage(inside)).files
    content = from_json(manifest.to_bytes(), format=FORMAT)
    for changes in ({"base": {"name": name, "id": "b"}}, {"files": {name: [1, "0"]}}):
        if name is None and "files" in changes:
            continue  # JSON has no such key
        (inside / MANIFEST_FILENAME).write_bytes(to_json({**content, **changes}, format=FORMAT))
        if name == 3 and "files" in changes:
            assert list(Manifest.read(Storage(inside)).files) == ["3"]  # JSON made it a name
            continue
        with pytest.raises(ValueError, match=r"manifest\.json"):
            Manifest.read(Storage(inside))


@pytest.mark.parametrize("name", PATHS)
def test_an_export_that_names_files_elsewhere_is_refused(name: str, inside: Path) -> None:
    with ExportWriter(Storage(inside), ExportInfo("c", "i", 0, 0, {}), tables="safetensors") as writer:
        writer.add_static_table("t", torch.ones(2, 4))
    good = from_json((inside / EXPORT_FILENAME).read_bytes(), format=EXPORT_FORMAT)
    for changes in (
        {"files": {**good["files"], name: {"size": 1, "checksum": "0"}}},
        {"static_tables": {"t": {**good["static_tables"]["t"], "file": name}}},
    ):
        (inside / EXPORT_FILENAME).write_bytes(to_json({**good, **changes}, format=EXPORT_FORMAT))
        with pytest.raises(ValueError, match=r"export\.json"):
            Export(inside)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "..", "a/b", "a\\b", "évil\0", "#x"])
@pytest.mark.parametrize("tables", ["parquet", "safetensors"])
def test_tables_are_exported_inside_whatever_they_are_called(name: str, tables: str, inside: Path) -> None:
    with ExportWriter(Storage(inside), ExportInfo("c", "i", 0, 0, {}), tables=tables) as writer:  # type: ignore[arg-type]
        writer.add_static_table(name, torch.ones(2, 4))
        writer.add_dynamic_table(
            f"c/{name}", lambda: [(torch.arange(2), torch.ones(2, 4))], width=4, precision="fp32", seed=0
        )
    export = Export(inside)
    assert name in export.info.static_tables
    assert f"c/{name}" in export.info.dynamic_tables
    assert len(list((inside / "tables").iterdir())) == 2


@pytest.mark.parametrize("name", ["../evil", "/evil", "..", ".", "", "a/b", "a\\b", "a\0"])
def test_fields_are_names_of_files(name: str) -> None:
    Field("a.b c", "dense", "event")
    with pytest.raises(ValueError, match="rename the column"):
        Field(name, "dense", "event")


def test_a_log_whose_columns_lead_elsewhere_is_not_prepared(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = inside / "log.csv"
    log.write_text("user_id,item_id,timestamp,../../../evil\n1,2,3,a\n1,3,4,b\n2,2,3,a\n")
    config = inside / "prepare.yaml"
    config.write_text(f"path: {log}\noutput: {inside / 'store'}\ncolumns:\n  sparse: ['../../../evil']\n")
    assert main(["prepare", "--config", str(config)]) == 2
    assert "rename the column" in capsys.readouterr().err
    assert not (inside / "store").exists()
    assert not list(inside.rglob("*evil*"))


@pytest.mark.parametrize("name", ["../../evil.parquet", "/evil.parquet", 3])
def test_a_store_that_names_parts_elsewhere_is_refused(name: object, inside: Path) -> None:
    (inside / "log.csv").write_text("user_id,item_id,timestamp\n1,2,3\n1,3,4\n2,2,3\n")
    assert main(["prepare", str(inside / "log.csv"), str(inside / "store")]) == 0
    file = inside / "store" / "store.json"
    EventStore(inside / "store")
    file.write_text(json.dumps({**json.loads(file.read_text()), "parts": [name]}))
    with pytest.raises(ValueError, match="parts: .* is no name of a file"):
        EventStore(inside / "store")


@pytest.mark.parametrize("name", ["../../pyproject", "/etc/passwd", "..", "hstu/../../x"])
def test_recipes_are_named_not_reached_by_paths(name: str, inside: Path) -> None:
    assert main(["recipes", "cp", name, str(inside / "copy.yaml")]) == 2
    assert main(["recipes", "show", name]) == 2
    assert not list(inside.iterdir())


def test_a_copied_recipe_replaces_a_link_and_not_what_it_leads_to(inside: Path) -> None:
    target = inside / "mine"
    target.write_text("kept")
    (inside / "link.yaml").symlink_to(target)
    assert main(["recipes", "cp", "hstu/tiny", str(inside / "link.yaml"), "--force"]) == 0
    assert target.read_text() == "kept"
    assert not (inside / "link.yaml").is_symlink()


def test_an_export_does_not_follow_a_link_out_of_an_empty_directory(inside: Path) -> None:
    kept = inside / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (inside / "output").mkdir()
    (inside / "output" / "tables").symlink_to(kept)
    with pytest.raises(FileExistsError):
        ExportWriter(Storage(inside / "output"), ExportInfo("c", "i", 0, 0, {}), tables="parquet")
    assert os.listdir(kept) == ["file"]


def test_removing_a_link_to_a_checkpoint_keeps_the_checkpoint(inside: Path) -> None:
    kept = inside / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (inside / "link").symlink_to(kept)
    Storage(inside / "link").remove_all()
    assert (kept / "file").read_text() == "kept"
    assert not (inside / "link").exists()
