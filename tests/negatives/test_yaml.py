"""Negatives as a YAML file names them: every class trains, and what is refused is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gr.cli import main
from lightning_gr.cli.training import GRCLI
from lightning_gr.data import write_synthetic_log

UNUSED = ["logger=false", "callbacks=[]", "enable_checkpointing=false", "enable_progress_bar=false"]
UNIFORM = {"class_path": "lightning_gr.negatives.UniformNegatives", "init_args": {"num_negatives": 8}}
POPULARITY = {
    "class_path": "lightning_gr.negatives.PopularityNegatives",
    "init_args": {"num_negatives": 8, "power": 0.75, "log_q": True, "smoothing": 1},
}
IN_BATCH = {"class_path": "lightning_gr.negatives.InBatchNegatives", "init_args": {"scope": "rank"}}
MIXED = {
    "class_path": "lightning_gr.negatives.MixedNegatives",
    "init_args": {"samplers": [UNIFORM, IN_BATCH], "log_q": True},
}
HARD = {"class_path": "lightning_gr.negatives.HardNegatives", "init_args": {"of": UNIFORM, "num_negatives": 2}}
KEPT = {
    "negatives": "uniform",
    "num_negatives": 8,
    "negatives_offload": {"class_path": "lightning_gr.negatives.Offload", "init_args": {"segment": 50}},
    "negatives_dtype": "float16",
    "logit_sharing": 2,
}
BY_NAME = {
    "popularity": {"negatives": POPULARITY},
    "mixed": {"negatives": MIXED},
    "hard": {"negatives": HARD},
    "kept": KEPT,
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "events.csv"
    write_synthetic_log(path, num_users=60, num_items=40, seed=0)
    return path


def words(log: Path, folder: Path, **settings: Any) -> list[str]:
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"loss": "sampled_softmax"} | settings}}))
    data = [f"--data.init_args.path={log}", "--data.init_args.global_tokens=100"]
    common = [f"--trainer.{x}" for x in (*UNUSED, "devices=1", "max_steps=2", "limit_val_batches=0")]
    small = ["--model.init_args.encoder.init_args.dim=16", f"--trainer.default_root_dir={folder}"]
    return ["fit", "--config", "hstu/tiny", "--config", str(overlay), *data, *common, *small]


@pytest.mark.recipe
@pytest.mark.parametrize("name", BY_NAME)
def test_a_class_of_a_file_trains(name: str, log: Path, tmp_path: Path) -> None:
    cli = GRCLI(args=words(log, tmp_path, **BY_NAME[name]))
    assert cli.trainer.global_step == 2
    contrast = cli.model.contrast
    wanted = BY_NAME[name]["negatives"]
    if isinstance(wanted, dict):
        assert type(contrast.sampler).__name__ == wanted["class_path"].rpartition(".")[2]
    else:
        assert (contrast.offload.segment, contrast.sharing, contrast.sampler.num_drawn) == (50, 2, 8)
    assert float(cli.trainer.callback_metrics["train/loss"]) > 0


@pytest.mark.recipe
def test_what_is_refused_is_said_in_one_line(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {**UNIFORM, "init_args": {"num_negatives": 41}}
    assert main(words(log, tmp_path, negatives=many)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "num_negatives" in line]
    assert len(said) == 1
    assert "num_negatives=41: the corpus has only num_items=40" in said[0]
