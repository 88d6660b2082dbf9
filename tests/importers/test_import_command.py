"""``lightning-gr import meta-hstu``: what it writes predicts Meta's logits, and a refusal leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_gr.cli import main
from lightning_gr.data import SequenceDataModule
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule
from lightning_gr.plugins import SequenceBalancedStrategy
from tests.importers.reference_model import HEADS, ITEMS, LENGTHS, Reference, read

GIN = """
train_fn.main_module = "HSTU"
train_fn.max_sequence_length = 11
train_fn.num_negatives = 5
train_fn.temperature = 0.1
hstu_encoder.num_blocks = 2
hstu_encoder.num_heads = 2
hstu_encoder.dqk = 3
hstu_encoder.dv = 5
hstu_encoder.linear_dropout_rate = 0.3
"""


@pytest.fixture
def reference() -> Reference:
    return read(Path(__file__).parent / "meta.safetensors")


@pytest.fixture
def checkpoint(reference: Reference, tmp_path: Path) -> Path:
    """As Meta's trainer saves it."""
    state = {f"module.{k}": x.float() if x.is_floating_point() else x for k, x in reference.weights.items()}
    torch.save({"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "meta.pt")
    return tmp_path / "meta.pt"


@pytest.fixture
def events(reference: Reference, tmp_path: Path) -> Path:
    """The reference's sequences as a log."""
    lines = ["user_id,item_id,timestamp"]
    rows = zip(reference.items_T.split(LENGTHS), reference.times_T.split(LENGTHS), strict=True)
    for user, (items, times) in enumerate(rows):
        lines += [f"{user},{item},{time}" for item, time in zip(items.tolist(), times.tolist(), strict=True)]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "events.csv"


def test_what_was_imported_predicts_with_metas_logits(
    reference: Reference, checkpoint: Path, events: Path, tmp_path: Path
) -> None:
    gin = tmp_path / "run.gin"
    gin.write_text(GIN)
    output = tmp_path / "imported"
    words = ["import", "meta-hstu", str(checkpoint), str(output), "--config", str(gin), "--data", str(events)]
    assert main(words) == 0
    config = yaml.safe_load((output / "config.yaml").read_text())
    settings = config["model"]["init_args"]
    assert settings["temperature"] == 0.1
    assert settings["encoder"]["init_args"]["dropout"] == 0.3
    encoder = HSTUEncoder(**settings["encoder"]["init_args"])
    model = RetrievalModule(encoder=encoder, temperature=settings["temperature"], top_k=[ITEMS])
    data = SequenceDataModule(path=str(events), max_length=max(LENGTHS))
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=SequenceBalancedStrategy(), enable_model_summary=False, **quiet
    )
    found = trainer.predict(model, datamodule=data, ckpt_path=str(output))
    assert found
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    users = 0
    for batch in found:
        assert isinstance(batch, dict)
        for user, rows, scores in zip(batch["sample_ids"], batch["item_rows"], batch["scores"], strict=True):
            raw = torch.tensor([int(data.item_ids[int(row)]) for row in rows])
            wanted = reference.logits_TI[last[int(user)], raw - 1]
            assert sorted(raw.tolist()) == list(range(1, ITEMS + 1))
            torch.testing.assert_close(scores.double() * 0.1, wanted, rtol=0, atol=1e-5)
            users += 1
    assert users == len(LENGTHS)


def test_a_refusal_leaves_nothing_behind(checkpoint: Path, events: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "imported"
    (tmp_path / "bad.csv").write_text("user_id,item_id\n1,1\n1,77\n")
    (tmp_path / "bad.gin").write_text("hstu_encoder.num_heads = 2\ntrain_fn.item_l2_norm = False\n")
    there = sorted(os.listdir(tmp_path))
    for words, culprit in (
        ([], "--num_heads"),
        (["--num_heads", "4"], "num_heads=4"),
        (["--num_heads", str(HEADS), "--data", str(tmp_path / "bad.csv")], "item 77"),
        (["--config", str(tmp_path / "bad.gin")], "item_l2_norm=False"),
        (["--config", str(tmp_path / "bad.gin"), "--num_heads", "1"], "--num_heads 1"),
    ):
        assert main(["import", "meta-hstu", str(checkpoint), str(output), *words]) == 2
        said = capsys.readouterr().err
        assert culprit in said
        assert said.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == there
    output.mkdir()
    (output / "mine").write_text("kept")
    assert main(["import", "meta-hstu", str(checkpoint), str(output), "--num_heads", str(HEADS)]) == 2
    assert os.listdir(output) == ["mine"]


def test_a_width_that_sharded_tables_cannot_have_becomes_a_file_of_lightning(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    state = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    for name, value in state.items():  # width 6 for 8
        if name.endswith(("_item_emb.weight", "_pos_emb.weight")):
            state[name] = value[:, :6]
        elif name.endswith(("_uvqk", "_o.weight", "_o.bias")):
            state[name] = value[:6]
    torch.save(state, tmp_path / "six.pt")
    output = tmp_path / "six"
    assert main(["import", "meta-hstu", str(tmp_path / "six.pt"), str(output), "--num_heads", str(HEADS)]) == 0
    assert "unsharded" in capsys.readouterr().out
    saved = torch.load(output / "model.ckpt", weights_only=True)
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["trainer"]["strategy"] == "auto"
    model = RetrievalModule(
        encoder=HSTUEncoder(**config["model"]["init_args"]["encoder"]["init_args"]), num_items=ITEMS
    )
    model.configure_model()
    assert not any(model.load_state_dict(saved["state_dict"]))
