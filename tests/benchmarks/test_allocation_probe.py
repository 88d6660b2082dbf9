"""What `benchmarks/allocation_probe.py` writes down of a run that holds more and more on purpose."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads glibc and /proc")


def test_what_is_held_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from allocation_probe import AllocationProbe

    held: list[Any] = []

    class Holds(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            held.append([torch.ones(25_000) for _ in range(20)])  # 100 kB each: from an arena, not mapped
            held.append([object() for _ in range(5000)])

    trainer = pl.Trainer(
        max_steps=6,
        callbacks=[Holds(), AllocationProbe(folder=str(tmp_path / "found"), every_n_steps=2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    with (tmp_path / "found" / "rank-0.csv").open() as file:
        rows = [{name: int(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["malloc_in_use"] + after["mapped"] - before["malloc_in_use"] - before["mapped"] > 3_900_000
        assert after["python_blocks"] - before["python_blocks"] >= 10_000
    assert rows[-1]["resident"] > 10_000_000
