"""docs/migrating.md: what it calls ours is there, and RecBole's files go through its commands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from lightning_gr import recipes
from lightning_gr.cli import TOOLS, TRAINING, main
from lightning_gr.data.synthetic_formats import write_like
from tests.guide_blocks import ROOT, commands_of

TEXT = (ROOT / "docs/migrating.md").read_text()
HOMES = ["lightning_gr", *(f"lightning_gr.{x}" for x in ("callbacks", "data", "layers", "models", "plugins"))]


def test_its_commands_and_recipes_exist() -> None:
    for line in commands_of("migrating.md"):
        assert line.split()[1] in {**TRAINING, **TOOLS, "import": ""}, line
    for name in re.findall(r"(?:--config |`)((?:hstu|sasrec|mtgr)/[\w-]+)", TEXT):
        assert name in recipes.ls()


def test_classes_of_the_right_hand_columns_exist() -> None:
    ours = " ".join(line.rpartition(" | ")[2] for line in TEXT.splitlines() if line.startswith("| "))
    elsewhere = {"EarlyStopping", "AdamW"}
    names = set(
        re.findall(
            r"\b((?:[A-Z][a-z]*)+(?:Encoder|Layer|Module|Batch|Config|Checkpoint|Schedule|Out|Share|Time|User))\b", ours
        )
    )
    assert len(names) > 10
    for name in names - elsewhere:
        assert any(hasattr(importlib.import_module(home), name) for home in HOMES), name


def test_encoder_settings_exist() -> None:
    import inspect

    from lightning_gr.layers import HSTUEncoder, SASRecEncoder
    from lightning_gr.models import RetrievalModule

    known = {x for kind in (HSTUEncoder, SASRecEncoder, RetrievalModule) for x in inspect.signature(kind).parameters}
    for name in ("qk_dim", "v_dim", "num_layers", "num_heads", "attention_dropout", "position_bias", "time_bias"):
        assert name in TEXT
        assert name in known
    for name in (
        "time_buckets",
        "bias_per_head",
        "num_negatives",
        "similarity",
        "temperature",
        "hidden_dim",
        "remove_seen",
    ):
        assert name in TEXT
        assert name in known


def test_recboles_atomic_files_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write_like("recbole", tmp_path / "made", seed=3, num_users=20, num_items=10)
    (tmp_path / "dataset").mkdir()
    target = tmp_path / "dataset/ml-100k"
    (folder if folder.is_dir() else folder.parent).rename(target)
    monkeypatch.chdir(tmp_path)
    (line,) = [x for x in commands_of("migrating.md") if "dataset/ml-100k" in x]
    assert main(line.split()[1:]) == 0
    assert "recbole" in capsys.readouterr().out
