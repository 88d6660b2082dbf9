"""Resume of the data under Lightning's own loop, from a checkpoint of every step and of every place that saves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_gr.data import SequenceDataModule

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.csv"
    lengths = np.random.default_rng(0).integers(4, 14, 30)
    rows = [f"{user},{step}" for user, length in enumerate(lengths) for step in range(length)]
    path.write_text("\n".join(["user_id,item_id", *rows]) + "\n")
    return path


def make_data(path: Path, *, seed: int = 1, global_tokens: int = 48, num_workers: int = 0) -> SequenceDataModule:
    return SequenceDataModule(path=str(path), global_tokens=global_tokens, seed=seed, num_workers=num_workers)


class Module(pl.LightningModule):
    """Notes Lightning's epoch, the batch's, Lightning's batch index and the samples of every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int, int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch.epoch, batch_idx, batch.sample_ids_B.tolist()))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(pl.Callback):
    """A checkpoint after every batch, validation and epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: pl.Trainer, place: str) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"{place}-{batches}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "end")


class StopAfter(pl.Callback):
    """Ends a run within an epoch."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.num_steps


def fit(data: SequenceDataModule, *callbacks: pl.Callback, ckpt_path: Path | None = None, **settings: Any) -> Any:
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"limit_val_batches": 0} | settings),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


def planned(path: Path, num_epochs: int, per_epoch: int | None = None) -> list[tuple[int, int, int, list[int]]]:
    """The steps as the plan alone says them."""
    loader = make_data(path).train_dataloader()
    steps = []
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        batches = [batch.sample_ids_B.tolist() for batch in loader][:per_epoch]
        steps += [(epoch, epoch, index, batch) for index, batch in enumerate(batches)]
    return steps


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3},
        {"max_steps": 12},
        {"max_epochs": 3, "limit_val_batches": 1},
        {"max_steps": 12, "limit_val_batches": 1},
        {"max_epochs": 3, "max_steps": 12, "limit_val_batches": 1, "val_check_interval": 2},
        {"max_epochs": 3, "limit_train_batches": 3},
        {"max_steps": 8, "limit_train_batches": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(
    log_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = fit(make_data(log_file), Save(tmp_path), **settings)
    steps = planned(log_file, 3, settings.get("limit_train_batches"))
    assert whole == steps[: settings.get("max_steps", len(steps))]
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert sum(path.name.startswith("batch-") for path in paths) == len(whole)
    assert any(path.name.startswith("epoch-") for path in paths)
    assert any(path.name.startswith("validation-") for path in paths) == ("limit_val_batches" in settings)
    for path in paths:
        done = int(path.stem.split("-")[1])
        assert fit(make_data(log_file), ckpt_path=path, **settings) == whole[done:], path.name


def test_workers_that_run_ahead_do_not_move_the_cursor(log_file: Path, tmp_path: Path) -> None:
    whole = fit(make_data(log_file, num_workers=2), Save(tmp_path), max_epochs=2)
    assert whole == planned(log_file, 2)
    per_epoch = len(whole) // 2
    for name, done in (("batch", 2), ("batch", per_epoch), ("epoch", per_epoch), ("batch", per_epoch + 1)):
        path = tmp_path / f"{name}-{done}.ckpt"
        assert fit(make_data(log_file, num_workers=2), ckpt_path=path, max_epochs=2) == whole[done:]


def test_a_finished_run_can_be_lengthened(log_file: Path, tmp_path: Path) -> None:
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_epochs": 1}, {"max_epochs": 3}),
        ({"max_steps": 5}, {"max_steps": 12}),
    ]
    for settings, longer in runs:
        whole = fit(make_data(log_file), Save(tmp_path), **settings)
        steps = planned(log_file, 3)
        assert len(whole) == 5
        for place in ("batch", "epoch"):
            resumed = fit(make_data(log_file), ckpt_path=tmp_path / f"{place}-5.ckpt", **longer)
            assert resumed == steps[5 : longer.get("max_steps", len(steps))], (place, longer)


@pytest.mark.parametrize("by", ["max_steps", "should_stop"])
@pytest.mark.parametrize("done", [3, 8])
def test_a_run_that_was_stopped_within_an_epoch_goes_on_in_it(
    log_file: Path, tmp_path: Path, by: str, done: int
) -> None:
    save = Save(tmp_path)
    if by == "max_steps":
        fit(make_data(log_file), save, max_steps=done)
        longer: dict[str, Any] = {"max_steps": 12}
    else:
        fit(make_data(log_file), save, StopAfter(done), max_epochs=3)
        longer = {"max_epochs": 3}
    steps = planned(log_file, 3)
    for place in ("batch", "epoch", "end"):
        resumed = fit(make_data(log_file), ckpt_path=tmp_path / f"{place}-{done}.ckpt", **longer)
        assert resumed == steps[done : longer.get("max_steps", len(steps))], place


def test_the_state_is_read_without_pickled_objects(log_file: Path, tmp_path: Path) -> None:
    data = make_data(log_file)
    fit(data, Save(tmp_path), max_epochs=1)
    state = torch.load(tmp_path / "batch-2.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]
    (loader,) = state["combined_loader"]
    identity = f"{data.fingerprint}-train-200-leave-one-out"
    plan = {"seed": 1, "global_tokens": 48, "shuffle_window": 1 << 16, "data": identity}
    assert loader == {"epoch": 0, "batches_done": 2} | plan


@pytest.mark.parametrize(("name", "other"), [("seed", {"seed": 5}), ("global_tokens", {"global_tokens": 50})])
def test_resume_into_another_plan_is_refused(log_file: Path, tmp_path: Path, name: str, other: dict[str, Any]) -> None:
    fit(make_data(log_file), Save(tmp_path), max_epochs=1)
    with pytest.raises(ValueError, match=f"^{name}: the checkpoint's data plan has .*, this run has {other[name]}"):
        fit(make_data(log_file, **other), ckpt_path=tmp_path / "batch-2.ckpt", max_epochs=2)
