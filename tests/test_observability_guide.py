"""docs/observability.md: every name that a run writes stands there with its formula, and nothing stands there alone."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import instantiate_class

from lightning_gr.data.synthetic import write_synthetic_log
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "observability.md").read_text()
TABLES = TEXT[TEXT.index("## Dynamic tables") : TEXT.index("## On the terminal")]
BLOCKS: list[str] = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)


def documented() -> set[str]:
    """Names in the first columns of its tables; a table's own under ``gr/table/item``."""
    rows = re.findall(r"^\| (`[^|]*`) \|", TEXT, re.M)
    of_tables = re.findall(r"^\| (`[^|]*`) \|", TABLES, re.M)
    names = {name for row in rows if row not in of_tables for name in re.findall(r"`(gr/\w+)`", row)}
    return names | {f"gr/table/item/{name}" for row in of_tables for name in re.findall(r"`(\w+)`", row)}


def test_its_settings_are_taken() -> None:
    for block in BLOCKS:
        trainer: dict[str, Any] = yaml.safe_load(block)["trainer"]
        made = [
            instantiate_class((), {"init_args": {}} | x) for x in trainer.get("callbacks", trainer.get("callbacks+"))
        ]
        assert all(isinstance(x, pl.Callback) for x in made)


@pytest.mark.slow
@pytest.mark.dist
def test_what_is_written_is_documented(tmp_path: Path) -> None:
    write_synthetic_log(tmp_path / "events.csv", num_users=150, num_items=60, seed=0)
    asked = "lightning-gr fit --config hstu/tiny-dynamic --data.init_args.path events.csv --trainer.max_epochs 2"
    ahead = ["--trainer.strategy.init_args.sparse_update", "semi_async", "--trainer.strategy.init_args.sync_steps", "2"]
    run([*shell(asked), *ahead, "--trainer.log_every_n_steps", "2"], tmp_path)
    (file,) = tmp_path.glob("outputs/*/csv/metrics.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    written = {name for row in rows for name, value in row.items() if name.startswith("gr/") and value}
    assert written == documented()
