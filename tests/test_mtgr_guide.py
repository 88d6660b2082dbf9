"""docs/mtgr.md, followed by somebody who types what it says, on a smaller log."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from lightning_gr import recipes
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "mtgr.md").read_text()
LINES = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)).splitlines()
SIZES = ("num_users=600, mean_exposures=120, request_size=50", "num_users=60, mean_exposures=60, request_size=50")
STEPS = ["python", "prepare", "mask", "fit", "test", "predict", "compare"]
pytestmark = pytest.mark.slow


def step(name: str) -> list[str]:
    """A step's command, as a process of this interpreter."""
    (line,) = [x for x in LINES if name in x.split()[:2]]
    first, *words = shlex.split(line.replace(*SIZES))
    return [*shell(first), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the log and the store."""
    folder = tmp_path_factory.mktemp("mtgr")
    assert "the best possible" in run(step("python"), folder)
    run(step("prepare"), folder)
    return folder


def test_its_commands_are_those_that_are_tried_here() -> None:
    assert [x.split()[0] if x.startswith("python") else x.split()[1] for x in LINES] == STEPS
    assert SIZES[0] in LINES[0]


def test_its_settings_are_those_of_the_recipe() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)
    shown: dict[str, Any] = yaml.safe_load(block)["data"]
    recipe: dict[str, Any] = yaml.safe_load(recipes.path("mtgr/exposures").read_text())["data"]
    assert shown["class_path"] == recipe["class_path"]
    for name in ("tasks", "aggregation", "features"):
        assert shown["init_args"][name] == recipe["init_args"][name]


def test_the_columns_are_those_of_the_files(folder: Path) -> None:
    rows = dict(re.findall(r"^\| `(log[\w.]*csv)` \| (.*) \|$", TEXT, re.M))
    for file, said in rows.items():
        names = [name for words in re.findall(r"`([\w,]+)`", said) for name in words.split(",")]
        assert pl.read_csv(folder / file, n_rows=1).columns == names
    assert set(json.loads((folder / "log.oracle.json").read_text())) >= {"val", "test"}


def test_the_mask_shows_no_leak(folder: Path) -> None:
    assert "no leak" in run(step("mask"), folder)


@pytest.mark.dist
def test_test_and_predict_after_fit(folder: Path) -> None:
    run([*step("fit"), "--trainer.max_epochs=1"], folder)
    said = run(step("test"), folder)
    for task in ("click", "ctcvr"):
        for metric in ("AUC", "GAUC", "NE", "calibration"):
            assert f"test/{task}/{metric}" in said
    run(step("predict"), folder)
    parts = sorted(folder.rglob("predictions/part-*.parquet"))
    assert len(parts) == 2
    found = pl.concat([pl.read_parquet(part) for part in parts])
    log = pl.read_csv(folder / "log.csv")
    waiting = log.filter(pl.col("click").is_null())
    assert sorted(found["user_id"].to_list()) == sorted(waiting["user_id"].unique().to_list())
    shown = {user: set(items) for user, items in waiting.group_by("user_id").agg("item_id").iter_rows()}
    for user, items, scores in found.select("user_id", "item_ids", "scores").iter_rows():
        assert len(items) == 10
        assert set(items) <= shown[user]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score < 1 for score in scores)


@pytest.mark.long
@pytest.mark.dist
def test_the_comparison(folder: Path) -> None:
    said = run([*step("compare"), "--trainer.max_epochs=1"], folder)
    for name in ("cross-features", "group-norm", "dynamic-mask"):
        assert f"mtgr/exposures+mtgr/ablations/without-{name}" in said.replace("\n", "")
