"""SequenceDataModule: from a file to the loaders of every split, under a plain Trainer too."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_gr.data import SequenceDataModule

LENGTHS = [1, 2, 3, 4, 9, 6, 5, 12]


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    rows = [
        f"u{user},{100 + (7 * user + step) % 11},{1_000 + step}" for user, n in enumerate(LENGTHS) for step in range(n)
    ]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return path


def make_data(path: Path, **settings: Any) -> SequenceDataModule:
    return SequenceDataModule(path=str(path), **({"global_tokens": 40, "seed": 0} | settings))


def samples(loader: Any) -> list[int]:
    return [sample for batch in loader for sample in batch.sample_ids_B.tolist()]


def test_setup_reads_once_and_says_what_it_read(
    log_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(log_file)
    with caplog.at_level(logging.INFO, logger="lightning_gr.data.datamodule"):
        data.setup("fit")
    (message,) = [record.getMessage() for record in caplog.records if record.name == "lightning_gr.data.datamodule"]
    for said in ("8 users", "11 items", f"{sum(LENGTHS)} events", "2 users have fewer than 3 events"):
        assert said in message
    log_file.unlink()
    data.setup("test")
    assert data.num_items == 11
    assert list(data.item_ids) == list(range(100, 111))
    assert list(data.users) == [f"u{user}" for user in range(8)]
    other = log_file.with_name("other.csv")
    other.write_text("user_id,item_id\n1,2\n")
    assert data.fingerprint != make_data(other).fingerprint


def test_splits_hold_the_users_that_they_can(log_file: Path) -> None:
    data = make_data(log_file)
    evaluated = [user for user, length in enumerate(LENGTHS) if length >= 3]
    assert sorted(samples(data.train_dataloader())) == [user for user in range(8) if LENGTHS[user] not in (1, 3)]
    # Only training is shuffled.
    assert samples(data.val_dataloader()) == samples(data.test_dataloader()) == evaluated
    assert samples(data.predict_dataloader()) == list(range(8))
    assert samples(make_data(log_file, predict_from="test").predict_dataloader()) == evaluated
    for batch in data.predict_dataloader():
        assert batch.labels == {}
    lengths = [length for batch in data.predict_dataloader() for length in batch.features.lengths().tolist()]
    assert lengths == LENGTHS


def test_budgets_of_training_and_evaluation_are_apart(log_file: Path) -> None:
    data = make_data(log_file, global_tokens=24, eval_global_tokens=1000, max_length=12)
    assert len(data.train_dataloader()) > 1
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 1
    with pytest.raises(ValueError, match="^global_tokens=8: "):
        make_data(log_file, global_tokens=8).train_dataloader()
    with pytest.raises(ValueError, match="^eval_global_tokens=8: "):
        make_data(log_file, eval_global_tokens=8).test_dataloader()
    assert max(max(b.features.lengths()) for b in make_data(log_file, max_length=4).predict_dataloader()) == 4


def test_the_shuffle_is_seeded_by_the_run_and_not_by_torch(log_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    orders = {}
    for seed in (None, 3, 4):
        if seed is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        for torch_seed in (1, 2):
            torch.manual_seed(torch_seed)
            orders[seed, torch_seed] = samples(make_data(log_file, seed=None).train_dataloader())
        assert orders[seed, 1] == orders[seed, 2] == samples(make_data(log_file, seed=seed or 0).train_dataloader())
    assert orders[3, 1] != orders[4, 1]


class Recorder(pl.LightningModule):
    """A plain module that notes what each stage hands to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["predict"].append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(data: SequenceDataModule, stages: list[str], **settings: Any) -> Recorder:
    module = Recorder()
    given: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 0} | settings
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **given,
    )
    for stage in stages:
        getattr(trainer, stage)(module, datamodule=data)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_plain_trainer_takes_every_stage(log_file: Path) -> None:
    module = run(make_data(log_file), ["fit", "test", "predict"])
    loader = make_data(log_file).train_dataloader()
    expected = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        expected += samples(loader)
    assert samples(module.seen["train"]) == expected
    assert {batch.gradient_divisor for batch in module.seen["train"]} == {1.0}
    assert samples(module.seen["test"]) * 2 == samples(module.seen["val"])
    assert samples(module.seen["predict"]) == list(range(8))


@pytest.mark.filterwarnings("ignore")
def test_accumulated_batches_share_their_denominator(log_file: Path) -> None:
    module = run(make_data(log_file, global_tokens=22), ["fit"], max_epochs=1, accumulate_grad_batches=2)
    first, second, *_ = module.seen["train"]
    assert first.denominators == second.denominators == {"next_item": float(first.num_tokens + second.num_tokens)}
    assert {batch.gradient_divisor for batch in module.seen["train"]} == {2.0}
    assert {batch.gradient_divisor for batch in module.seen["val"]} == {1.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_follow_the_trainer(log_file: Path, world_size: int) -> None:
    """Each rank's trainer is stood in for by its two numbers; the distributed tests run real ones."""

    class Rank:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size, self.accumulate_grad_batches = rank, world_size, 1

    shares = []
    for rank in range(world_size):
        data = make_data(log_file)
        stand_in: Any = Rank(rank)
        data.trainer = stand_in
        loader = data.train_dataloader()
        shares.append(samples(loader))
        assert {batch.gradient_divisor for batch in loader} == {float(world_size)}
    whole = samples(make_data(log_file).train_dataloader())
    assert sorted(sample for share in shares for sample in share if sample >= 0) == sorted(whole)


def test_more_processes_than_samples(log_file: Path) -> None:
    class Rank:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size, self.accumulate_grad_batches = rank, 7, 1

    dealt = []
    for rank in range(7):
        data = make_data(log_file)
        stand_in: Any = Rank(rank)
        data.trainer = stand_in
        dealt += samples(data.val_dataloader())
    whole = samples(make_data(log_file).val_dataloader())
    assert len(whole) == 6
    assert sorted(sample for sample in dealt if sample >= 0) == sorted(whole)


@pytest.mark.parametrize(
    ("setting", "value"), [("max_length", 0), ("num_workers", -1), ("predict_from", "tests"), ("format", "excel")]
)
def test_settings_that_cannot_work_are_named(log_file: Path, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value!r}") as error:
        make_data(log_file, **{setting: value}).setup()
    assert "\n" not in str(error.value)


def test_an_absent_log_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv.*data\.path.*lightning-gr demo"):
        make_data(tmp_path / "none.csv").setup()


def test_a_log_without_a_user_to_evaluate(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n1,2\n1,3\n2,2\n")
    data = make_data(path)
    assert samples(data.train_dataloader()) == [0]
    with pytest.raises(ValueError, match="^val split: no samples"):
        data.val_dataloader()


def test_item_rows_are_the_sorted_raw_ids(log_file: Path) -> None:
    data = make_data(log_file)
    (batch,) = make_data(log_file, eval_global_tokens=100).predict_dataloader()
    raw = np.array(data.item_ids)[batch.features.values().numpy()]
    assert raw.tolist() == [100 + (7 * user + step) % 11 for user, n in enumerate(LENGTHS) for step in range(n)]
