"""`fit`, `test --ckpt_path best` and a resumed `fit` of a recipe: which checkpoint, and whose rows in metrics.csv."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from lightning_gr import recipes
from lightning_gr.data.synthetic import write_synthetic_log
from lightning_gr.report.run import read_run
from tests.forked_command import run_command

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_recipe_is_trained_tested_and_trained_on(tmp_path: Path) -> None:
    write_synthetic_log(tmp_path / "events.csv", num_users=80, num_items=40, mean_length=10, max_length=20)
    recipe = yaml.safe_load(recipes.path("hstu/tiny").read_text())
    recipe["trainer"] |= {"devices": 1, "max_epochs": 2, "check_val_every_n_epoch": 1, "log_every_n_steps": 1}
    recipe["data"]["init_args"] |= {"path": "events.csv", "global_tokens": 256}
    recipe["model"]["init_args"]["encoder"]["init_args"] |= {"dim": 16, "num_layers": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    # Each command has a Trainer of its own; one interpreter saves the seconds of further starts.
    script = (
        "import json, sys\nfrom lightning_gr.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n    assert main(words) == 0\n    print('=====', flush=True)\n"
    )
    common = ["--config", "small.yaml"]
    commands = [
        ["fit", *common],
        ["test", *common, "--ckpt_path", "best"],
        ["fit", *common, "--ckpt_path", "last", "--trainer.max_epochs", "3"],
    ]
    (tmp_path / "commands.py").write_text(script)
    command = [sys.executable, "commands.py", json.dumps(commands)]
    done = run_command(command, cwd=tmp_path, env=ENV, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    csvs = tmp_path / "outputs" / "hstu-tiny" / "csv"
    with (csvs / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [int(row["step"]) for row in rows if row["train/loss"]]
    assert trained == list(range(len(trained)))
    assert len(trained) == 3 * (len(trained) // 3) > 3
    validated = {int(row["step"]): float(row["val/NDCG@10"]) for row in rows if row["val/NDCG@10"]}
    assert len(validated) == 3
    (tested,) = [float(row["test/HR@10"]) for row in rows if row["test/HR@10"]]
    run = read_run(csvs)
    assert run.series["train/loss"].steps == trained
    assert run.series["test/HR@10"].values == [tested]
    # The best of the first two epochs was tested.
    best = max(list(validated)[:2], key=lambda step: validated[step])
    said = (done.stdout + done.stderr).split("Loaded model weights from the checkpoint at ")[1].splitlines()[0]
    assert Path(said).name == f"epoch={0 if best < len(trained) // 3 else 1}-step={best + 1}.ckpt"
