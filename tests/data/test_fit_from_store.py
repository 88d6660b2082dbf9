"""From every public form to training steps; and a store is read window by window, each row group once an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars as frames
import pytest
import torch

from lightning_gr.data import (
    EventStore,
    GlobalBatchPlan,
    PlannedLoader,
    RetrievalSource,
    SequenceDataModule,
    StoreWriter,
)
from lightning_gr.data.formats import Columns, open_log
from lightning_gr.data.prepare import prepare
from lightning_gr.data.synthetic_formats import WRITERS, write_like
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_trains(form: str, tmp_path: Path) -> None:
    path, events = write_like(form, tmp_path / "published", seed=3, num_users=40, num_items=25)
    columns = Columns(labels=("rating",)) if form in ("csv", "parquet", "jsonl") else None
    prepare(open_log(path, columns=columns), tmp_path / "store")
    data = SequenceDataModule(path=str(tmp_path / "store"), global_tokens=64, max_length=10)
    encoder = HSTUEncoder(dim=8, num_layers=1, num_heads=1, max_length=10)
    module = RetrievalModule(encoder=encoder, top_k=[5], optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2 * len(data.train_dataloader()) > 2
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert 0 <= float(trainer.callback_metrics["val/HR@5"]) <= 1
    assert data.num_items == len({event.item for event in events})


def write_store(folder: Path, num_users: int, patch: pytest.MonkeyPatch) -> EventStore:
    patch.setattr("lightning_gr.data.event_store.writer._GROUP_USERS", 10)
    rng = np.random.default_rng(0)
    writer = StoreWriter(path=folder / "store", fields=(), has_timestamps=False, work=folder / "work")
    items = [rng.integers(0, 99, int(n)).tolist() for n in rng.integers(4, 20, num_users)]
    writer.write_users(frames.DataFrame({"user_id": range(num_users), "item_id": items}))
    writer.finish(summary={})
    return EventStore(folder / "store")


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_group_is_read_once_an_epoch_and_few_are_held(
    shuffle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path, 1000, monkeypatch)
    source = RetrievalSource(store, part="train", max_length=10)
    plan = GlobalBatchPlan(source, global_tokens=200, window_rows=50, shuffle=shuffle)
    reads: Counter[int] = Counter()
    most = 0
    original = EventStore.read_group

    def read(self: EventStore, group: int, columns: Any = ()) -> Any:
        reads[group] += 1
        return original(self, group, columns)

    monkeypatch.setattr(EventStore, "read_group", read)
    for _ in PlannedLoader(source, plan):
        held = sum(len(window.rows.offsets) - 1 for window in source._rows._held.values())
        most = max(most, held)
    assert set(reads) == set(range(100))
    assert set(reads.values()) == {1}
    assert most <= 2 * 60  # two windows of fifty users, to the next whole group
