"""Day-by-day training on raw ids: rows come, expire and are evicted within a budget, on any number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytestmark = pytest.mark.dist

NUM_DAYS = 3
MAX_ROWS = 128
"""Two groups of 64, so that each of two ranks has rows."""


def write_days(folder: Path) -> Path:
    """Each day most events are of items that came that day or the day before; all ids are random 64-bit numbers."""
    rng = np.random.default_rng(0)
    came = [rng.integers(-(2**63), 2**63 - 1, 120) for _ in range(NUM_DAYS + 1)]
    for day in range(NUM_DAYS):
        known = np.concatenate(came[day : day + 2])
        popularity = 1.0 / np.arange(5, len(known) + 5)
        items = [
            rng.choice(known, int(rng.integers(3, 9)), p=popularity / popularity.sum()).tolist() for _ in range(60)
        ]
        place = folder / f"day={day}"
        place.mkdir(parents=True)
        pq.write_table(pa.table({"item_id": items}), place / "a.parquet", row_group_size=5)
        (place / "_SUCCESS").touch()
    return folder


class Recorder(pl.Callback):
    """Losses of the global batches by day; saves when a day is over, and in the middle of the second."""

    def __init__(self, saves: str | None) -> None:
        self.saves = saves
        self.losses: dict[int, list[float]] = {}
        self.most_rows = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        own = self.losses.setdefault(batch.epoch, [])
        own.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))
        rows = torch.tensor(module.tables.engine.tables[0].num_rows(0))
        self.most_rows = max(self.most_rows, int(trainer.strategy.reduce(rows, reduce_op="sum")))
        if self.saves and batch.epoch == 1 and len(own) == 3:
            trainer.save_checkpoint(f"{self.saves}/middle.ckpt")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.saves:
            trainer.save_checkpoint(f"{self.saves}/day-{trainer.current_epoch}.ckpt")


def train(world_size: int, folder: str, *, saves: str | None = None, ckpt_path: str | None = None) -> dict[str, Any]:
    from lightning_gr.data import StreamDataModule
    from lightning_gr.embeddings.dynamic import Admission, DynamicTables, TablePolicy
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    policy = TablePolicy(max_rows=MAX_ROWS, rows_per_group=64, ttl_steps=6, admission=Admission(min_count=2))
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8, dropout=0.0, time_bias=False),
        loss="sampled_softmax",
        negatives="in_batch",
        dynamic_tables=DynamicTables(policy=policy),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    recorder = Recorder(saves)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        callbacks=[recorder],
        max_epochs=NUM_DAYS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = StreamDataModule(folder=folder, global_tokens=32, max_length=8)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    (table,) = module.tables.engine.tables  # type: ignore[union-attr]
    rows, _ = table.rows_of(0)
    return {
        "losses": recorder.losses,
        "most_rows": recorder.most_rows,
        "statistics": vars(table.statistics[0]),
        "rows": dict(zip(rows.ids_N.tolist(), rows.values_ND.tolist(), strict=True)),
    }


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks know as one."""
    assert all(own["losses"] == ranks[0]["losses"] for own in ranks)
    rows = [key for own in ranks for key in own["rows"]]
    assert len(rows) == len(set(rows)), "an id has a row on one rank only"
    statistics: Counter[str] = Counter()
    for own in ranks:
        statistics.update(own["statistics"])
    return {
        "losses": ranks[0]["losses"],
        "most_rows": ranks[0]["most_rows"],
        "statistics": dict(statistics),
        "rows": {key: values for own in ranks for key, values in own["rows"].items()},
    }


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], *, rel: float) -> None:
    """The same losses, as far as `found` goes, and the same rows in the end."""
    for day, losses in found["losses"].items():
        assert losses == pytest.approx(wanted["losses"][day][-len(losses) :], rel=rel, abs=0), day
    assert found["rows"].keys() == wanted["rows"].keys()
    for key, values in found["rows"].items():
        assert values == pytest.approx(wanted["rows"][key], rel=rel, abs=rel)


def test_days_of_raw_ids_with_inserts_expiry_and_evictions(gloo: Any, tmp_path: Path) -> None:
    folder, saves = str(write_days(tmp_path / "log")), tmp_path / "saves"
    one = together(gloo(1).run(train, 1, folder))
    assert sorted(one["losses"]) == list(range(NUM_DAYS))
    assert all(len(losses) > 4 for losses in one["losses"].values())
    statistics = one["statistics"]
    for event in ("inserted", "rejected", "expired", "evicted", "found"):
        assert statistics[event] > 0, event
    assert statistics["inserted"] - statistics["expired"] - statistics["evicted"] == len(one["rows"])
    assert 0 < len(one["rows"]) <= one["most_rows"] <= MAX_ROWS

    ranks = gloo(2).run(train, 2, folder, saves=str(saves))
    assert all(len(own["rows"]) > 10 for own in ranks)
    two = together(ranks)
    assert_equal(two, one, rel=1e-4)
    decided = ("inserted", "rejected", "expired", "evicted")
    assert [two["statistics"][event] for event in decided] == [statistics[event] for event in decided]

    for checkpoint, days in (("middle", [1, 2]), ("day-1", [2])):
        resumed = together(gloo(2).run(train, 2, folder, ckpt_path=str(saves / f"{checkpoint}.ckpt")))
        assert sorted(resumed["losses"]) == days
        assert_equal(resumed, two, rel=0)
    elsewhere = together(gloo(1).run(train, 1, folder, ckpt_path=str(saves / "day-1.ckpt")))
    assert_equal(elsewhere, one, rel=1e-4)
