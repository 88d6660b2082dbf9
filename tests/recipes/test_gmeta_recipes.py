"""G-Meta's recipes: each trains and evaluates on generated data of the form that it is for."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gr import recipes
from tests.forked_command import run_command

CASES = [
    ["gmeta/tiny"],
    ["gmeta/movielens"],
    ["gmeta/movielens", "gmeta/ablations/joint"],
    ["gmeta/movielens", "gmeta/with-mtgr"],
    ["gmeta/kuairand-1k"],
]


def loaded(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(recipes.path(name).read_text())
    return settings


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By recipe, a store of generated data: of users for MovieLens, of videos for KuaiRand."""
    from lightning_gr.data.formats import open_log, with_tasks
    from lightning_gr.data.prepare import prepare
    from lightning_gr.data.synthetic_formats import write_like
    from lightning_gr.data.synthetic_tasks import write_cold_start_store

    folder = tmp_path_factory.mktemp("gmeta")
    films, _ = write_like("movielens-20m", folder / "films", seed=3, num_users=60, num_items=25)
    videos, _ = write_like("kuairand", folder / "videos", seed=3, num_users=90, num_items=25)
    write_cold_start_store(folder / "cold", num_tasks=40, num_items=20, seed=3)
    return {
        "gmeta/tiny": folder / "cold" / "store",
        "gmeta/movielens": prepare(open_log(films), folder / "of_users").path,
        "gmeta/kuairand-1k": prepare(with_tasks(open_log(videos), "video_id"), folder / "of_videos").path,
    }


@pytest.mark.dist
@pytest.mark.recipe
@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_a_recipe_trains_and_evaluates(names: list[str], stores: dict[str, Path], tmp_path: Path) -> None:
    store = stores[names[0]]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "csv"}}
    words = [word for name in names for word in ("--config", name)]
    words += ["--data.init_args.path", str(store), "--trainer.logger", json.dumps(logger), "--trainer.devices", "1"]
    words += ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1", "--trainer.callbacks", "[]"]
    words += ["--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]
    words += ["--data.init_args.num_workers", "0", "--data.init_args.global_tokens", "700"]
    words += ["--data.init_args.val_tasks", "0.3", "--trainer.val_check_interval", "2"]
    words += ["--trainer.check_val_every_n_epoch", "null"]
    done = run_command(
        [sys.executable, "-m", "lightning_gr", "fit", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 2
    assert all(math.isfinite(x) for x in losses)
    (judged,) = [row for row in rows if any(key.startswith("val/") and value for key, value in row.items())]
    for label in loaded(names[0])["data"]["init_args"]["tasks"]:
        for shots in (0, 1, 5, 10):
            assert 0 <= float(judged[f"val/{label}/AUC@{shots}"]) <= 1
        adapts = judged[f"val/{label}/loss@0"] != judged[f"val/{label}/loss@10"]
        assert adapts == ("gmeta/ablations/joint" not in names)


def test_the_baseline_learns_from_as_many_records_as_an_episode_has() -> None:
    own, joint = (loaded(name)["data"]["init_args"] for name in ("gmeta/movielens", "gmeta/ablations/joint"))
    assert own["support"] + own["query"] == joint["support"] + joint["query"]
    assert loaded("gmeta/ablations/joint")["model"]["init_args"]["inner_steps"] == 0
