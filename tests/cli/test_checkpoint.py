"""`lightning-gr checkpoint`: what is listed, what is found damaged, and one line a mistake; no process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_gr.checkpoint.manifest import Base, Manifest
from lightning_gr.checkpoint.reader import CheckpointReader
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.checkpoint.tensors import write_tensors
from lightning_gr.checkpoint.writer import CheckpointWriter, pack
from lightning_gr.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder: Path | str, name: str, step: int, base: Manifest | None = None, at: str = "") -> Manifest:
    """A checkpoint of one process, without tables."""
    writer = CheckpointWriter(Storage(folder) / name)
    files: dict[str, FileSum] = write_tensors(
        writer.where, {"state_dict": {"weight": torch.full((1000,), float(step))}}
    )
    files["rank-00000-of-00001.pt"] = writer.where.publish("rank-00000-of-00001.pt", b"x" * 1024)
    meta = {"global_step": step, "epoch": step // 4}
    step, epoch = meta.get("global_step", 0), meta.get("epoch", 0)
    return writer.commit(
        pack(meta), files, step=step, epoch=epoch, world_size=1, base=Base(at, base.id) if base else None
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chain of three, the last of which was cut off, and a folder that is something else."""
    first = save(tmp_path, "step=10", 10)
    second = save(tmp_path, "step=8", 12, first, "step=10")  # by its manifest, not by its name
    save(tmp_path, "step=14", 14, second, "step=8")
    (tmp_path / "step=14" / "meta.pt").unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text("a")
    return tmp_path


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_ls_goes_by_step_and_says_why_one_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(folder)]) == 0
    header, first, second, third = lines(capsys.readouterr().out)[:4]
    assert header[:5] == ["checkpoint", "step", "epoch", "processes", "size"]
    assert first[:4] == ["step=10", "10", "2", "1"]
    assert first[6] == "all"
    assert first[-1] == "complete"
    assert second[:3] == ["step=8", "12", "3"]
    assert "changed since step=10" in " ".join(second)
    assert second[-1] == "complete"
    assert third[:2] == ["step=14", "14"]
    assert "meta.pt is missing" in " ".join(third)


def test_ls_adds_up_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(folder)]) == 0
    size = sum(x.stat().st_size for x in (folder / "step=10").iterdir() if x.name != "manifest.json")
    assert f" {size / 1024:.1f} KiB " in capsys.readouterr().out


def test_ls_shows_a_manifest_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "step=8" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "ls", str(folder)]) == 0
    assert "manifest.json: damaged" in capsys.readouterr().out


def test_ls_and_verify_behind_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    save("memory://test-checkpoint-command", "step=3", 3)
    assert main(["checkpoint", "ls", "memory://test-checkpoint-command"]) == 0
    assert main(["checkpoint", "verify", "memory://test-checkpoint-command/step=3"]) == 0
    out = capsys.readouterr().out
    assert "step=3" in out
    assert "step=3: OK" in out


def test_verify_reads_the_whole_chain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(folder / "step=8")]) == 0
    assert "OK, 8 files of 2 checkpoints that add to each other" in capsys.readouterr().out
    shard = next((folder / "step=10").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    CheckpointReader(folder / "step=8")  # its size is right
    assert main(["checkpoint", "verify", str(folder / "step=8")]) == 1
    out = capsys.readouterr().out
    assert f"{shard}: damaged" in out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("harm", ["shard", "base", "other base", "mark"])
def test_verify_names_what_is_wrong(folder: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, said = folder / "step=8", ""
    if harm == "shard":
        shard = next(checkpoint.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
        said = str(shard)
    elif harm == "base":
        (folder / "step=10").rename(folder / "away")
        said = "adds to step=10"
    elif harm == "other base":
        save(folder, "step=10", 10)
        said = "adds to another save"
    else:
        (checkpoint / "meta.pt").unlink()
        said = "meta.pt is missing"
    assert main(["checkpoint", "verify", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "nowhere"], "nowhere: no such folder"),
        (["ls", "logs"], "logs: has no checkpoints"),
        (["verify", "nowhere"], "nowhere: no such directory"),
        (["compact", "step=8", "logs"], "logs: exists"),
        (["compact", "nowhere", "new"], "nowhere: no such directory"),
        (["compact", "step=14", "new"], "step=14: meta.pt is missing"),
        ([], "checkpoint: the following arguments are required"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["checkpoint", *words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("lightning-gr: error: ")
    assert said in told.err
    assert len(told.err.splitlines()) == 1
    assert not (folder / "new").exists()


def test_compact_makes_one_of_a_chain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "whole"
    assert main(["checkpoint", "compact", str(folder / "step=8"), str(out)]) == 0
    reader = CheckpointReader(out)
    reader.verify()
    assert reader.manifest.base is None
    assert (reader.manifest.step, reader.meta()["global_step"]) == (12, 12)
    assert torch.equal(reader.tensors()["state_dict.weight"], torch.full((1000,), 12.0))
    assert "step 12 of 2 checkpoints" in capsys.readouterr().out
