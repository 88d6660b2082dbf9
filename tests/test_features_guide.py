"""docs/features.md, followed by somebody who types what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.forked_command import run_command
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "features.md").read_text()
COMMANDS = re.findall(r"^lightning-gr .*$", "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)), re.M)
FILES = dict(re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", TEXT, re.M | re.S))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 40, 600))
    pl.DataFrame(
        {
            "user_id": users,
            "item_id": rng.integers(0, 12, 600),
            "timestamp": 1_700_000_000 + 60 * np.arange(600),
            "click": rng.integers(0, 2, 600),
            "device": rng.choice(["phone", "desk"], 600),
            "affinity": rng.normal(size=600).round(3),
            "price": rng.random(600).round(2),
        }
    ).write_csv(folder / "shown.csv")
    kinds = ["garden", "toys", "tools", "garden|toys", ""]
    pl.DataFrame(
        {
            "user_id": range(40),
            "segment": [f"s{u % 3}" for u in range(40)],
            "favourites": [kinds[u % 5] for u in range(40)],
            "spend": [None if u % 7 == 0 else 10.0 * u for u in range(40)],
        }
    ).write_csv(folder / "users.csv")
    pl.DataFrame(
        {
            "item_id": range(12),
            "category": [["garden", "garden|tools", "toys", "books"][i % 4] for i in range(12)],
            "weight": [0.5 * i for i in range(12)],
        }
    ).write_csv(folder / "items.csv")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def words(line: str) -> list[str]:
    return [*shell("lightning-gr"), *shlex.split(line)[1:]]


def test_from_declared_features_to_scores(folder: Path) -> None:
    prepare, fit = COMMANDS
    run(words(prepare), folder)
    quick = ["--trainer.max_epochs=1", "--trainer.devices=1", "--trainer.logger=false"]
    said = run([*words(fit), *quick], folder)
    assert "val/click/AUC" in said
    without = ["--config", "mtgr/ablations/without-cross-features"]
    checkpoints = ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    assert "cross_features" not in run([*words(fit), *without, *quick, *checkpoints], folder)


def test_what_is_wrong_is_said_in_one_line(folder: Path) -> None:

    (folder / "wrong.yaml").write_text(FILES["features.yaml"].replace("name: affinity", "name: afinity"))
    command = [*words(COMMANDS[1].replace("features.yaml", "wrong.yaml")), "--trainer.devices=1"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = run_command(command, cwd=folder, env=env)
    assert done.returncode != 0
    assert "features.afinity: the store shop has no such column" in done.stderr
    assert "did you mean affinity?" in done.stderr
    assert "Traceback" not in done.stderr
