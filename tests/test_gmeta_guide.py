"""docs/gmeta.md, followed by somebody who types what it says in an empty folder."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shlex
from pathlib import Path

import polars as pl
import pytest

from lightning_gr.data import TaskDataModule
from lightning_gr.models import MetaRankingModule
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "gmeta.md").read_text()
LINES = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)).splitlines()
STEPS = ["fit", "test", "predict", "prepare"]


def step(name: str) -> list[str]:
    """A step's command, as a process of this interpreter."""
    (line,) = [x for x in LINES if x.split()[1] == name]
    first, *words = shlex.split(line)
    return [*shell(first), *words]


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}")[2].partition("\n## ")[0]


def test_its_commands_are_those_that_are_tried_here() -> None:
    assert [x.split()[1] for x in LINES if "compare" not in x] == STEPS


def test_every_switch_of_the_inner_loop_is_explained_with_its_default() -> None:
    said = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section("Adaptation").partition("\n\nDense ")[0], re.M))
    taken = inspect.signature(MetaRankingModule).parameters
    inherited = inspect.signature(MetaRankingModule.__mro__[1]).parameters
    assert said.keys() == taken.keys() - inherited.keys()
    for name, default in said.items():
        value = taken[name].default
        if value is not None:
            assert default.strip("`").lstrip("0") == json.dumps(value).strip('"').lstrip("0"), name


def test_every_switch_of_episodes_is_explained() -> None:
    rows = re.findall(r"^\| (`.+?) \|", section("Episodes"), re.M)
    said = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    own = inspect.signature(TaskDataModule).parameters
    inherited = inspect.signature(TaskDataModule.__mro__[1]).parameters
    assert said - {"user_token", "predict_part"} == own.keys() - inherited.keys()


@pytest.mark.slow
@pytest.mark.dist
def test_from_nothing_to_adapted_scores(tmp_path: Path) -> None:
    run([*step("fit"), "--trainer.max_epochs=3"], tmp_path)
    oracle = json.loads((tmp_path / "outputs/gmeta/cold-start/log.oracle.json").read_text())["AUC"]
    with (tmp_path / "outputs/gmeta-tiny/csv/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/click/AUC@5")]
    best = max(rows, key=lambda row: float(row["val/click/AUC@5"]))
    reached = {shots: float(best[f"val/click/AUC@{shots}"]) for shots in (0, 1, 5, 10)}
    assert reached[0] + 0.08 < reached[5]
    assert reached[0] + 0.1 < reached[10] < float(oracle["10"]) + 0.03
    said = run(step("test"), tmp_path)
    for metric in ("AUC", "GAUC", "NE", "calibration", "loss"):
        for shots in (0, 1, 5, 10):
            assert f"test/click/{metric}@{shots}" in said
    run(step("predict"), tmp_path)
    parts = sorted(tmp_path.rglob("predictions/part-*.parquet"))
    assert len(parts) == 2
    found = pl.concat([pl.read_parquet(part) for part in parts])
    assert found["user_id"].is_unique().all()
    asked = pl.read_csv(tmp_path / "outputs/gmeta/cold-start/log.csv").group_by("user_id").agg("item_id")
    later = {user: set(items[10:]) for user, items in asked.iter_rows()}
    for user, items, scores in found.select("user_id", "item_ids", "scores").iter_rows():
        assert set(items) <= later[user]
        assert scores == sorted(scores, reverse=True)
    assert "tasks (item_id)" in run(step("prepare"), tmp_path)
