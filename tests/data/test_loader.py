"""PlannedLoader: the ranks' shares, the cursor, and resume under a real Trainer at every step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_gr.data import GlobalBatchPlan, Interactions, PlannedLoader, RetrievalSource


def make_source(num_users: int = 30, seed: int = 0) -> RetrievalSource:
    lengths = np.random.default_rng(seed).integers(4, 14, num_users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = np.arange(offsets[-1])
    log = Interactions(np.arange(num_users), offsets, events, events * 60, events)
    return RetrievalSource(log, split="train", max_length=10)


def make_loader(
    source: RetrievalSource | None = None, *, seed: int = 1, global_tokens: int = 48, **settings: Any
) -> PlannedLoader:
    source = source or make_source()
    plan = GlobalBatchPlan(
        token_counts=source.token_counts,
        label_counts=source.label_counts,
        global_tokens=global_tokens,
        seed=seed,
        shuffle=True,
    )
    return PlannedLoader(source, plan, **settings)


def ids(batches: Any) -> list[list[int]]:
    return [batch.sample_ids_B.tolist() for batch in batches]


def test_ranks_share_the_global_batches_and_their_denominators() -> None:
    one = list(make_loader())
    for world_size in (2, 3, 4):
        ranks = [list(make_loader(rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {len(one)}
        for whole, *parts in zip(one, *ranks, strict=True):
            assert sorted(sum((part.sample_ids_B.tolist() for part in parts), [])) == sorted(
                whole.sample_ids_B.tolist()
            )
            for part in parts:
                assert part.denominators == whole.denominators == {"next_item": float(whole.num_tokens)}
                assert part.gradient_divisor == world_size


def test_a_rank_without_samples_gets_a_padding_sequence() -> None:
    source = make_source(4)
    batches = [list(make_loader(source, global_tokens=20, rank=rank, world_size=4)) for rank in range(4)]
    padded = [batch for rank in batches for batch in rank if batch.num_samples == 0]
    assert padded
    assert all(batch.sample_ids_B.tolist() == [-1] for batch in padded)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients_are_those_of_the_whole_window(accumulate: int) -> None:
    """Each label's loss is 1 in turn, so the divided and summed losses of a window are the mean over its labels."""
    single = list(make_loader())
    ranks = [list(make_loader(rank=rank, world_size=2, accumulate=accumulate)) for rank in range(2)]
    for first in range(0, len(single), accumulate):
        labels = [batch.labels["next_item"].values_N.float().sum() for batch in single[first : first + accumulate]]
        count = sum(batch.num_tokens for batch in single[first : first + accumulate])
        total = 0.0
        for rank in ranks:
            for batch in rank[first : first + accumulate]:
                loss = batch.mean_over_global_batch({"next_item": batch.labels["next_item"].values_N.float().sum()})
                total += float(loss) / accumulate / 2  # Lightning divides by one, DDP by the other
        assert total == pytest.approx(float(sum(labels)) / count, rel=1e-5)


def test_epochs_differ_and_repeat() -> None:
    loader = make_loader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert {batch.epoch for batch in batches} == {epoch}
        assert len(batches) == len(loader)
        epochs.append(ids(batches))
    assert epochs[0] == epochs[2] != epochs[1]


def test_workers_change_nothing() -> None:
    alone, helped = list(make_loader()), list(make_loader(num_workers=2))
    assert ids(alone) == ids(helped)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.features.values(), other.features.values())
        assert torch.equal(one.labels["next_item"].values_N, other.labels["next_item"].values_N)
        assert torch.equal(one.request_timestamps_T, other.request_timestamps_T)
        assert one.layout.num_tokens == other.layout.num_tokens == other.num_tokens


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_counts_the_batches_handed_out(num_workers: int) -> None:
    loader = make_loader(num_workers=num_workers)
    loader.set_epoch(2)
    whole = ids(make_with_epoch(2))
    iter(loader)  # an iterator that nobody asks for a batch
    batches = iter(loader)
    for done in range(1, 4):
        next(batches)
        state = loader.state_dict()
        assert (state["epoch"], state["batches_done"]) == (2, done)
        resumed = make_loader(num_workers=num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert len(resumed) == len(whole)
        iter(resumed)
        resumed.set_epoch(2)
        assert ids(resumed) == whole[done:]
        assert resumed.state_dict()["batches_done"] == len(whole)
        resumed.set_epoch(3)
        assert ids(resumed) == ids(make_with_epoch(3))


def make_with_epoch(epoch: int) -> PlannedLoader:
    loader = make_loader()
    loader.set_epoch(epoch)
    return loader


def test_a_cursor_holds_on_any_number_of_ranks() -> None:
    loader = make_loader(rank=1, world_size=3)
    batches = iter(loader)
    next(batches)
    next(batches)
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert ids(resumed) == ids(make_loader())[2:]


def test_another_epoch_than_the_saved_one_starts_at_its_beginning() -> None:
    loader = make_loader()
    loader.load_state_dict(make_loader().state_dict() | {"epoch": 0, "batches_done": 3})
    loader.set_epoch(1)
    assert ids(loader) == ids(make_with_epoch(1))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", {"seed": 2}),
        ("global_tokens", {"global_tokens": 64}),
        ("data", {"source": make_source(seed=1)}),
    ],
)
def test_another_plan_is_refused_by_name(name: str, other: dict[str, Any]) -> None:
    state = make_loader().state_dict()
    loader = make_loader(**other)
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        loader.load_state_dict(state)
    message = str(error.value)
    assert repr(state[name]) in message
    assert repr(loader.state_dict()[name]) in message
    assert "\n" not in message


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^val split: 3 sample.* for 4 processes.*--trainer.devices to at most 3"):
        make_loader(make_source(3), world_size=4, name="val")
    with pytest.raises(ValueError, match=r"^train split: no samples"):
        make_loader(make_source(0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_numbers_of_the_training_process_are_left_alone(num_workers: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    list(make_loader(num_workers=num_workers))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


# ---- under Lightning's own loop ----------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> PlannedLoader:
        return make_loader(num_workers=self.num_workers)

    def val_dataloader(self) -> PlannedLoader:
        return make_loader(name="val")


class Module(pl.LightningModule):
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
    """A checkpoint after every step and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"validation-{trainer.global_step}.ckpt")


def fit(num_workers: int, *callbacks: pl.Callback, ckpt_path: Path | None = None, **settings: Any) -> Any:
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, datamodule=Data(num_workers), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3, "limit_val_batches": 0},
        {"max_steps": 12, "limit_val_batches": 0},
        {"max_epochs": 3, "limit_val_batches": 1},
        {"max_epochs": 3, "limit_val_batches": 1, "val_check_interval": 2},
        {"max_epochs": 3, "limit_val_batches": 0, "limit_train_batches": 3},
        {"max_epochs": 3, "limit_val_batches": 0, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_resume_at_every_step_goes_on_with_the_same_samples(tmp_path: Path, settings: dict[str, Any]) -> None:
    per_epoch = settings.get("limit_train_batches", len(make_loader()))
    whole = fit(0, Save(tmp_path), **settings)
    assert len(whole) == settings.get("max_steps", 3 * per_epoch)
    truth = [
        (epoch, epoch, index, batch)
        for epoch in range(3)
        for index, batch in enumerate(ids(make_with_epoch(epoch))[:per_epoch])
    ]
    assert whole == truth[: len(whole)]
    paths = list(tmp_path.glob("*.ckpt"))
    window = settings.get("accumulate_grad_batches", 1)
    assert len(paths) >= 12 // window
    for path in paths:
        state = torch.load(path, weights_only=True)
        done = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        resumed = fit(0, ckpt_path=path, **settings)
        assert resumed == whole[done:], path.name


@pytest.mark.filterwarnings("ignore")
def test_resume_with_workers_that_run_ahead(tmp_path: Path) -> None:
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    whole = fit(2, Save(tmp_path), **settings)
    assert whole == fit(0, **settings)
    for step in (2, len(make_loader()), len(make_loader()) + 1):
        assert fit(2, ckpt_path=tmp_path / f"step-{step}.ckpt", **settings) == whole[step:]


@pytest.mark.filterwarnings("ignore")
def test_resume_with_another_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(0, Save(tmp_path), max_epochs=1, limit_val_batches=0)
    monkeypatch.setattr(Data, "train_dataloader", lambda self: make_loader(seed=5))
    with pytest.raises(ValueError, match="^seed: the checkpoint's data plan has 1, this run has 5"):
        fit(0, ckpt_path=tmp_path / "step-2.ckpt", max_epochs=2, limit_val_batches=0)
