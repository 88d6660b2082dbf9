"""Losses of the tiny recipes over 50 steps, against committed ones: what changes them is seen.

python -m tests.recipes.test_golden_losses writes them anew; say in the commit why they changed.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.forked_command import run_command

GOLDEN = Path(__file__).with_name("golden_losses.json")
RECIPES = {"hstu/tiny": "log", "mtgr/tiny": "store"}
STEPS, EVERY = 50, 10
TOLERANCE = 0.01
"""Relative; another processor rounds differently, and 50 steps carry it on."""


def data(folder: Path) -> dict[str, Path]:
    """The demo's log, smaller, and its store."""
    from lightning_gr.data import write_synthetic_log
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    log = folder / "events.csv"
    write_synthetic_log(log, num_users=600, num_items=200, seed=0)
    store = prepare(open_log(log, columns=Columns(labels=("click",))), folder / "store")
    return {"log": log, "store": store.path}


def losses(recipe: str, path: Path, folder: Path) -> list[float]:
    """The training loss at every tenth step, by the command a user types, on one process."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "csv"}}
    settings = {
        "--data.init_args.path": str(path),
        "--trainer.devices": "1",
        "--trainer.max_steps": str(STEPS),
        "--trainer.limit_val_batches": "0",
        "--trainer.log_every_n_steps": str(EVERY),
        "--trainer.enable_checkpointing": "false",
        "--trainer.logger": json.dumps(logger),
        "--trainer.callbacks": "[]",
    }
    words = [word for pair in settings.items() for word in pair]
    command = [sys.executable, "-m", "lightning_gr", "fit", "--config", recipe, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_command(command, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    with (folder / "csv" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return data(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_first_steps_of_a_recipe_are_what_they_were(recipe: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    wanted = json.loads(GOLDEN.read_text())[recipe]
    assert len(wanted) == STEPS // EVERY
    assert wanted[-1] < wanted[0]
    assert losses(recipe, inputs[RECIPES[recipe]], tmp_path) == pytest.approx(wanted, rel=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        made = data(Path(name))
        found = {}
        for number, recipe in enumerate(RECIPES):
            (Path(name) / str(number)).mkdir()
            found[recipe] = [round(x, 5) for x in losses(recipe, made[RECIPES[recipe]], Path(name) / str(number))]
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
