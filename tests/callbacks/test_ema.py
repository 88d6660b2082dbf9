"""ExponentialMovingAverage against a loop written by hand, on sharded tables and on plain modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.callbacks import ExponentialMovingAverage

pytestmark = pytest.mark.filterwarnings("ignore")

DECAY, START, STEPS, SAVED = 0.7, 2, 8, 5
ROWS = 11


class Tables(pl.LightningModule):
    """A table that the strategy shards, and a dense head with a buffer."""

    def configure_model(self) -> None:
        if hasattr(self, "tables"):
            return
        from torchrec import EmbeddingConfig

        from lightning_gr.embeddings import embedding_collection

        self.tables = embedding_collection(
            [EmbeddingConfig(name="t", num_embeddings=ROWS, embedding_dim=4, feature_names=["f"])]
        )
        self.head = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return ((self.head(self.tables(batch)["f"].values()) - 1) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.tables(batch)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Plain(pl.LightningModule):
    """Batch norm, which has buffers, and two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.net[2].weight = self.net[0].weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return ((self.net(batch) - 1) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def weights_of(module: Any) -> dict[str, np.ndarray]:
    """Every weight in full, on every rank."""
    import torch.distributed as dist

    whole = {}
    for name, value in module.state_dict().items():
        if hasattr(value, "local_shards"):
            full = torch.zeros(value.size())
            for shard in value.local_shards():
                (row, column), (height, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                full[row : row + height, column : column + width] = shard.tensor
            dist.all_reduce(full)
            value = full
        whole[name] = value.detach().numpy().copy()
    return whole


class Recorder(pl.Callback):
    """Weights at the start, after each optimiser step and in each validation; saves where told, even in validation."""

    def __init__(self, save: dict[int, str], save_in_validation: str | None = None) -> None:
        self.save, self.save_in_validation = save, save_in_validation
        self.steps: dict[int, Any] = {}
        self.validations: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.steps[trainer.global_step] = weights_of(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step not in self.steps:
            self.steps[trainer.global_step] = weights_of(module)
            if trainer.global_step in self.save:
                trainer.save_checkpoint(self.save[trainer.global_step])

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.validations[trainer.global_step] = weights_of(module)
        if self.save_in_validation:
            trainer.save_checkpoint(self.save_in_validation)

    on_test_epoch_end = on_validation_epoch_end


class Batches(list[Any]):
    """One dataloader; Lightning takes a bare list for several."""


def table_batches(rank: int, count: int) -> Batches:
    """One batch again and again: a resumed fit begins a list anew."""
    from torchrec import KeyedJaggedTensor

    ids = torch.randint(0, ROWS, (5,), generator=torch.Generator().manual_seed(rank))
    return Batches([KeyedJaggedTensor(["f"], ids, lengths=torch.tensor([1, 4]))] * count)


def plain_batches(rank: int, count: int) -> Batches:
    return Batches([torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))] * count)


def make_trainer(kind: str, world: int, callbacks: list[Any], **settings: Any) -> pl.Trainer:
    from lightning_gr.plugins import SequenceBalancedStrategy

    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if kind == "plain" else SequenceBalancedStrategy(sharding=kind, sparse_lr=0.5),  # type: ignore[arg-type]
        callbacks=callbacks,
        max_steps=settings.pop("max_steps", STEPS),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=4,
        **settings,
    )


def fit(kind: str, world: int, **settings: Any) -> dict[str, Any]:
    """Fits, and returns what was seen; with `tested`, also tests and fits on."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    pl.seed_everything(3)
    module, batches = (Plain(), plain_batches) if kind == "plain" else (Tables(), table_batches)
    ema = ExponentialMovingAverage(decay=DECAY, start_step=START, warmup=settings.pop("warmup", False))
    recorder = Recorder(settings.pop("save", {}), settings.pop("save_in_validation", None))
    path, after = settings.pop("ckpt_path", None), settings.pop("after", None)
    trainer = make_trainer(kind, world, [ema, recorder], **settings)
    count = 2 * STEPS if "accumulate_grad_batches" in settings else STEPS
    trainer.fit(module, batches(rank, count), batches(rank, 1), ckpt_path=path)
    found: dict[str, Any] = {"steps": recorder.steps, "validations": recorder.validations, "end": weights_of(module)}
    if after:
        trainer.save_checkpoint(after)
        found["end raw"] = fit(kind, world, ckpt_path=after, max_steps=STEPS + 1)["steps"].get(STEPS)
        tester = Recorder({})
        make_trainer(kind, world, [tester]).test(module, batches(rank, 1), verbose=False)
        found["tested"] = tester.validations
        fresh, tester = Plain() if kind == "plain" else Tables(), Recorder({})
        other = ExponentialMovingAverage()
        for callbacks in ([tester], [other, tester]):
            make_trainer(kind, world, callbacks).test(fresh, batches(rank, 1), ckpt_path=after, verbose=False)
            found.setdefault("tested from file", []).append(tester.validations.popitem()[1])
    return found


def by_hand(steps: dict[int, Any], *, warmup: bool = False) -> dict[int, dict[str, np.ndarray]]:
    """The averages after each step, buffers left as they are."""
    average, averages, updates = dict(steps[0]), {0: dict(steps[0])}, 0
    for step in range(1, max(steps) + 1):
        updates += step > START
        decay = min(DECAY, (1 + updates) / (10 + updates)) if warmup else DECAY
        for name, weight in steps[step].items():
            buffer = name.startswith("seen") or "running" in name or "num_batches" in name
            if buffer or step <= START:
                average[name] = weight
            else:
                average[name] = decay * average[name].astype(np.float64) + (1 - decay) * weight
        averages[step] = dict(average)
    return averages


def assert_close(found: dict[str, np.ndarray], truth: dict[str, np.ndarray], **tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def check(found: dict[str, Any], **settings: Any) -> None:
    truth = by_hand(found["steps"], **settings)
    assert sorted(found["validations"]) == [4, 8]
    for step, seen in found["validations"].items():
        assert_close(seen, truth[step])
    assert_close(found["end"], truth[STEPS])
    changed = [name for name, value in found["end"].items() if not np.allclose(value, found["steps"][STEPS][name])]
    assert len(changed) >= 3, "the averages should differ from the weights in training"


def check_resumed(resumed: dict[str, Any], whole: dict[str, Any], step: int, **tolerance: float) -> None:
    assert sorted(resumed["steps"]) == list(range(step, STEPS + 1))
    for number, weights in resumed["steps"].items():
        assert_close(weights, whole["steps"][number], **tolerance)
    assert_close(resumed["end"], whole["end"], **tolerance)


EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["row_wise", "column_wise"])
def test_sharded_tables(gloo: Any, tmp_path: Path, kind: str) -> None:
    saved, inside, after = (str(tmp_path / name) for name in ("step.ckpt", "inside.ckpt", "after.ckpt"))
    settings: dict[str, Any] = {"save": {SAVED: saved}, "save_in_validation": inside, "after": after}
    ranks = gloo(2).run(fit, kind, 2, **settings)
    for found in ranks:
        check(found)
        assert_close(found["tested"][0], found["end"], **EXACT)
        for tested in found["tested from file"]:
            assert_close(tested, found["end"], **EXACT)
    resumed = gloo(2).run(fit, kind, 2, ckpt_path=saved)
    for mine, whole in zip(resumed, ranks, strict=True):
        check_resumed(mine, whole, SAVED, **EXACT)
    if kind == "row_wise":
        # The averages of another number of ranks, as by hand from the weights that it trains itself.
        (alone,) = gloo(1).run(fit, kind, 1, ckpt_path=saved)
        truth = by_hand(ranks[0]["steps"])[SAVED]
        assert_close(alone["steps"][SAVED], ranks[0]["steps"][SAVED], **EXACT)
        for step in range(SAVED + 1, STEPS + 1):
            truth = {
                name: weight if name == "seen" else DECAY * truth[name] + (1 - DECAY) * weight
                for name, weight in alone["steps"][step].items()
            }
        assert_close(alone["end"], truth)


@pytest.mark.parametrize("warmup", [False, True])
def test_a_plain_module(tmp_path: Path, warmup: bool) -> None:
    saved, after = str(tmp_path / "step.ckpt"), str(tmp_path / "after.ckpt")
    whole = fit("plain", 1, save={SAVED: saved}, warmup=warmup)
    check(whole, warmup=warmup)
    resumed = fit("plain", 1, ckpt_path=saved, warmup=warmup)
    check_resumed(resumed, whole, SAVED, **EXACT)
    if not warmup:
        found = fit("plain", 1, after=after)
        assert_close(found["tested"][0], found["end"], **EXACT)
        for tested in found["tested from file"]:
            assert_close(tested, found["end"], **EXACT)
        assert_close(found["end raw"], found["steps"][STEPS], **EXACT)


def test_it_steps_with_the_optimiser_and_not_with_batches() -> None:
    found = fit("plain", 1, accumulate_grad_batches=2)
    assert sorted(found["steps"]) == list(range(STEPS + 1))
    truth = by_hand(found["steps"])[STEPS]
    parameters = {name for name, _ in Plain().named_parameters()}
    assert_close({x: found["end"][x] for x in parameters}, {x: truth[x] for x in parameters})


def test_a_second_fit_goes_on_and_an_interrupted_validation_leaves_the_weights() -> None:
    class Fails(pl.Callback):
        armed = False

        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            if self.armed:
                raise ValueError("on purpose")

    module, ema, fails = Plain(), ExponentialMovingAverage(decay=DECAY, start_step=START), Fails()
    recorder = Recorder({})
    trainer = make_trainer("plain", 1, [ema, recorder, fails], max_steps=3)
    trainer.fit(module, plain_batches(0, STEPS), plain_batches(1, 1))
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(module, plain_batches(0, STEPS), plain_batches(1, 1))
    truth = by_hand(recorder.steps)
    parameters = {name for name, _ in module.named_parameters()}
    end = weights_of(module)
    assert_close({x: end[x] for x in parameters}, {x: truth[STEPS][x] for x in parameters})
    fails.armed = True
    module = Plain()
    trainer = make_trainer("plain", 1, [ema, recorder := Recorder({}), fails])
    with pytest.raises(ValueError, match="on purpose"):
        trainer.fit(module, plain_batches(0, STEPS), plain_batches(1, 1))
    assert_close(weights_of(module), recorder.steps[4], **EXACT)


def test_a_checkpoint_without_averages_begins_them(tmp_path: Path) -> None:
    path = tmp_path / "without.ckpt"
    trainer = make_trainer("plain", 1, [Recorder({SAVED: str(path)})])
    trainer.fit(module := Plain(), plain_batches(0, STEPS), plain_batches(1, 1))
    truth = weights_of(module)
    with pytest.warns(UserWarning, match="was saved without ExponentialMovingAverage"):
        found = fit("plain", 1, ckpt_path=str(path))
    assert found["steps"][SAVED].keys() == truth.keys()


def test_settings_that_cannot_work() -> None:
    with pytest.raises(MisconfigurationException, match="decay=1"):
        ExponentialMovingAverage(decay=1.0)
    with pytest.raises(MisconfigurationException, match="start_step=-1"):
        ExponentialMovingAverage(start_step=-1)
    ema = ExponentialMovingAverage()
    checkpoint = ModelCheckpoint(save_weights_only=True)
    trainer = pl.Trainer(accelerator="cpu", callbacks=[ema, checkpoint], logger=False, enable_progress_bar=False)
    with pytest.raises(MisconfigurationException, match="save_weights_only=True"):
        trainer.fit(Plain(), plain_batches(0, 2))
    with pytest.raises(MisconfigurationException, match="bfloat16 is too coarse"):
        make_trainer("plain", 1, [ema]).fit(Plain().bfloat16(), plain_batches(0, 2))
