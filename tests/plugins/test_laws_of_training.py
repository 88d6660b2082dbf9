"""The laws of training: however a run is dealt out over ranks and micro-steps, it is the run of one process.

Shape suffixes: T tokens, N labelled tokens, D dimension, I items.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.more import more

pytestmark = pytest.mark.dist

ACCELERATOR = "cuda" if os.environ.get("LIGHTNING_GR_TEST_GPUS") else "cpu"
STEPS, ITEMS, LONGEST, BUDGET = 30, 30, 24, 48


def write_log(path: Path, lengths: list[int]) -> str:
    """Events of users with so many of them each; the last two are held out."""
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user, length in enumerate(lengths):
        items = rng.integers(0, ITEMS, length) if user else np.arange(length) % ITEMS  # the first has all items
        lines += [f"{user},{item},{1_000_000 + 3600 * step + user}" for step, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("logs")
    rng = np.random.default_rng(1)
    uneven = [34, *(int(rng.integers(4, 7)) if user % 3 else int(rng.integers(12, 25)) for user in range(40))]
    kinds = {"uneven": uneven, "one user": [40], "length 1": [40, *[4] * 30]}
    return {name: write_log(folder / f"{name}.csv", lengths) for name, lengths in kinds.items()}


class NextItem(pl.LightningModule):
    """A user's dense module: the next item by the mean of the history so far."""

    def __init__(self, *, optimizer: str, mean_of_means: bool = False, double: bool = True) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, 8)
        self.mix = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.optimizer, self.mean_of_means = optimizer, mean_of_means
        self.to(torch.float64 if double else torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        layout, labels = batch.layout, batch.labels["next_item"]
        items_TD = self.items(batch.features["item_id"].values())
        sums_TD = items_TD.cumsum(0)
        first_T = layout.offsets_B1[layout.sequence_T]
        own_TD = sums_TD - sums_TD[first_T] + items_TD[first_T]
        state_TD = self.mix(torch.cat([items_TD, own_TD / (layout.position_T[:, None] + 1)], 1))
        logits_NI = state_TD[labels.tokens_N] @ self.items.weight.T
        losses_N = F.cross_entropy(logits_NI, labels.values_N, reduction="none")
        if self.mean_of_means:
            return losses_N.sum() / max(labels.num_labels, 1)
        loss: Tensor = batch.mean_over_global_batch({"next_item": losses_N.sum()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), sync_dist=True, batch_size=1)

    def sequence_cost(self) -> Any:
        from lightning_gr.balancing.cost import SequenceCost

        return SequenceCost(1.0, 0.2)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.optimizer)(self.parameters())


def make_optimizer(name: str) -> Any:
    made = {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[name]
    return lambda parameters: made(parameters, lr=0.01)


def retrieval(
    kind: str,
    optimizer: str,
    *,
    loss: str = "full_softmax",
    min_count: int = 2,
    max_rows: int | None = None,
    update: Any = "step",
) -> pl.LightningModule:
    from lightning_gr.embeddings.dynamic import Admission, DynamicTables, Eviction, TablePolicy
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    settings: dict[str, Any] = {"admission": Admission(min_count=min_count), "ttl_seconds": 60_000}
    if max_rows is not None:
        settings |= {"eviction": Eviction(policy="lru"), "max_rows": max_rows, "rows_per_group": max_rows // 2}
    return RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=LONGEST, dropout=0.0),
        loss="sampled_softmax" if loss == "in_batch" else loss,  # type: ignore[arg-type]
        negatives="in_batch" if loss == "in_batch" else "uniform",
        num_negatives=4,
        temperature=0.2,
        top_k=[3],
        dynamic_tables=DynamicTables(policy=TablePolicy(**settings), update=update) if kind == "dynamic" else None,
        optimizer=make_optimizer(optimizer),
    )


class Recorder(pl.Callback):
    """By optimiser step: the loss as this rank sees it, and its samples."""

    def __init__(self) -> None:
        self.losses: list[float] = [0.0]
        self.samples: list[list[int]] = [[]]
        self.epochs: list[int] = []
        self.first = 0  # global step at the beginning
        self.batches, self.evaluated = 0, Counter[int]()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.first = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.losses[-1] += float(outputs["loss"])  # Lightning has divided it by the batches of a step
        self.samples[-1] += batch.sample_ids_B[batch.sample_ids_B >= 0].tolist()
        if trainer.global_step > self.first + len(self.epochs):
            self.epochs.append(trainer.current_epoch)
            self.losses.append(0.0)
            self.samples.append([])

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.evaluated[int(batch.num_samples)] += 1

    def taken(self) -> dict[str, Any]:
        assert self.losses[-1] == 0.0
        assert not self.samples[-1], "batches after the last step"
        return {
            "losses": self.losses[:-1],
            "samples": self.samples[:-1],
            "epochs": self.epochs,
            "batches": self.batches,
            "evaluated": self.evaluated,
        }


def make_trainer(world_size: int, *callbacks: Any, strategy: dict[str, Any] | None = None, **settings: Any) -> Any:
    from lightning_gr.plugins import SequenceBalancedStrategy

    return pl.Trainer(
        accelerator=ACCELERATOR,
        devices=world_size,
        strategy=SequenceBalancedStrategy(**({"sparse_lr": 0.05} | (strategy or {}))),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


def state(model: Any) -> dict[str, Any]:
    """Every dense and static weight in full on rank 0, and this rank's rows of dynamic tables with their state."""
    import torch.distributed as dist

    whole: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "local_shards"):
            full = torch.zeros(value.size(), device=model.device) if dist.get_rank() == 0 else None
            value.gather(0, out=full)
            value = full if full is not None else torch.zeros(0)
        whole[name] = value.detach().cpu().double().numpy()
    for table in getattr(getattr(getattr(model, "tables", None), "engine", None), "tables", []):
        rows, _ = table.rows_of(0)
        for i, key in enumerate(rows.ids_N.tolist()):
            both = torch.cat([rows.values_ND[i], rows.state_NS[i]])
            whole[f"row {key}"] = both.cpu().double().numpy()
    return whole


def train(
    world_size: int,
    log: str,
    *,
    kind: str = "dense",
    optimizer: str = "adamw",
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    balancing: dict[str, Any] | None = None,
    sparse: str = "rowwise_adagrad",
    callback: Any = None,
    depth: int = 2,
    ckpt_path: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.data import SequenceDataModule

    pl.seed_everything(7)
    source = SequenceDataModule(
        path=log, raw_ids=kind == "dynamic", **({"global_tokens": BUDGET, "max_length": LONGEST} | (data or {}))
    )
    made: Any = NextItem if kind == "dense" else lambda **given: retrieval(kind, **given)
    module, record = made(optimizer=optimizer, **(model or {})), Recorder()
    strategy = {"balancing": Balancing(**(balancing or {})), "sparse_optimizer": sparse, "pipeline_depth": depth}
    callbacks = [record] if callback is None else [record, callback]
    settings = {"max_steps": STEPS, "limit_val_batches": 0} | settings
    trainer = make_trainer(world_size, *callbacks, strategy=strategy, **settings)
    trainer.fit(module, datamodule=source, ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return record.taken() | {"state": state(module), "metrics": metrics}


def difference(ranks: list[dict[str, Any]], truth: list[dict[str, Any]]) -> float:
    """Largest relative difference of the losses of the steps and of any weight or row."""
    (one,) = truth
    mine = np.mean([rank["losses"] for rank in ranks], axis=0)
    assert mine.shape == np.shape(one["losses"])
    # A batch with one label, which in-batch negatives know no other of, has no loss.
    found = [float(np.max(np.abs(mine - one["losses"]) / np.maximum(one["losses"], 1e-3)))]
    whole = {name: value for rank in ranks[::-1] for name, value in rank["state"].items()}
    assert sum(name.startswith("row ") for rank in ranks for name in rank["state"]) == sum(
        name.startswith("row ") for name in whole
    ), "a row is on one rank only"
    assert whole.keys() == one["state"].keys()
    for name, value in one["state"].items():
        error = np.abs(whole[name] - value).max(initial=0.0)
        found.append(float(error / max(np.abs(value).max(initial=0.0), 1e-3)))
    return max(found)


def samples(ranks: list[dict[str, Any]]) -> list[Counter[int]]:
    """Samples of each optimiser step, on all ranks together."""
    return [Counter(sum(step, [])) for step in zip(*(rank["samples"] for rank in ranks), strict=True)]


class Truth:
    """Runs of one process, each made once."""

    def __init__(self, gloo: Any, logs: dict[str, str]) -> None:
        self.gloo, self.logs, self.made = gloo, logs, {}  # type: ignore[var-annotated]

    def __call__(self, log: str = "uneven", **settings: Any) -> Any:
        key = f"{log} {settings}"
        if key not in self.made:
            self.made[key] = self.gloo(1).run(train, 1, self.logs[log], **settings)
        return self.made[key]


@pytest.fixture(scope="module")
def truth(gloo: Any, logs: dict[str, str]) -> Truth:
    return Truth(gloo, logs)


@pytest.mark.parametrize("optimizer", ["adamw", *more("adagrad")])
def test_dense_layers_to_the_last_digits_of_a_double(gloo: Any, logs: Any, truth: Any, optimizer: str) -> None:
    one = truth(optimizer=optimizer)
    assert len(one[0]["losses"]) == STEPS
    assert np.mean(one[0]["losses"][-10:]) < 0.97 * np.mean(one[0]["losses"][:10])
    for epoch in range(one[0]["epochs"][-1]):
        trained = sum((x for x, e in zip(samples(one), one[0]["epochs"], strict=True) if e == epoch), Counter())
        assert sorted(trained.elements()) == list(range(41)), "every user once an epoch"
    for world_size in (2, 3, 4):
        many = gloo(world_size).run(train, world_size, logs["uneven"], optimizer=optimizer)
        assert difference(many, one) <= 1e-10
        assert samples(many) == samples(one)
        counts = np.array([[len(step) for step in rank["samples"]] for rank in many])
        assert (counts.max(0) > counts.min(0)).any(), "some batches should be uneven"
        assert world_size == 2 or (counts == 0).any(), "some ranks should be without samples"


def test_a_mean_of_means_fails_the_law(gloo: Any, logs: Any, truth: Any) -> None:
    control = gloo(3).run(train, 3, logs["uneven"], model={"mean_of_means": True})
    assert samples(control) == samples(truth())
    assert difference(control, truth()) > 1e-2


def test_double_precision_reaches_the_module(gloo: Any, logs: Any, truth: Any) -> None:
    asked = truth(model={"double": False}, precision="64-true")
    assert difference(asked, truth()) <= 1e-5  # the first weights were made in float32
    many = gloo(2).run(train, 2, logs["uneven"], model={"double": False}, precision="64-true")
    assert difference(many, asked) <= 1e-10


MICRO: dict[str, Any] = {"data": {"global_tokens": 4 * LONGEST}, "balancing": {"tokens_per_rank": LONGEST}}


@pytest.mark.parametrize("accumulate", [*more(1), 3])
def test_micro_steps_and_accumulation_are_one_large_batch(gloo: Any, logs: Any, truth: Any, accumulate: int) -> None:
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 20}
    one = truth(data=MICRO["data"], **settings)
    assert accumulate == 1 or one[0]["batches"] < 20 * accumulate, "the last windows should be short"
    batches = set()
    for world_size in (1, 2, 4):
        many = gloo(world_size).run(train, world_size, logs["uneven"], **MICRO, **settings)
        assert difference(many, one) <= 1e-10
        assert samples(many) == samples(one)
        batches.add(many[0]["batches"] // one[0]["batches"])
    assert len(batches) >= 3, "micro-steps should differ by the number of ranks"


@pytest.mark.parametrize(
    "partitioner",
    ["contiguous", *more("lpt", "karmarkar_karp", "zigzag")],
)
def test_the_partitioner_does_not_change_the_curve(gloo: Any, logs: Any, truth: Any, partitioner: str) -> None:
    one = truth(data=MICRO["data"], max_steps=20)
    for balancing in ({}, MICRO["balancing"], {"cost": "tokens"}):
        dealt = {"partitioner": partitioner, **balancing}
        many = gloo(3).run(train, 3, logs["uneven"], data=MICRO["data"], balancing=dealt, max_steps=20)
        assert difference(many, one) <= 1e-10
        assert samples(many) == samples(one)


@pytest.mark.parametrize("world_size", [*more(2), 3, *more(4)])
@pytest.mark.parametrize(
    ("sparse", "loss"), [("adagrad", "full_softmax"), *more(("rowwise_adagrad", "sampled_softmax"))]
)
def test_static_tables(gloo: Any, logs: Any, truth: Any, sparse: str, loss: str, world_size: int) -> None:
    settings = {"kind": "static", "sparse": sparse, "model": {"loss": loss}}
    one = truth(**settings)
    many = gloo(world_size).run(train, world_size, logs["uneven"], **settings)
    assert difference(many, one) <= 1e-4
    assert samples(many) == samples(one)


@pytest.mark.parametrize("world_size", [*more(2, 3), 4])
@pytest.mark.parametrize("sparse", [*more("adagrad", "rowwise_adagrad"), "adam"])
def test_dynamic_tables_with_policies(gloo: Any, logs: Any, truth: Any, sparse: str, world_size: int) -> None:
    settings = {"kind": "dynamic", "sparse": sparse, "model": {"max_rows": 26}}
    one = truth(**settings)
    assert 0 < sum(name.startswith("row ") for name in one[0]["state"]) < ITEMS
    assert difference(gloo(world_size).run(train, world_size, logs["uneven"], **settings), one) <= 1e-4


@pytest.mark.parametrize("world_size", [*more(2), 3])
@pytest.mark.parametrize("loss", ["sampled_softmax", "in_batch"])
def test_who_is_admitted_does_not_depend_on_who_draws(
    gloo: Any, logs: Any, truth: Any, loss: str, world_size: int
) -> None:
    settings = {"kind": "dynamic", "model": {"loss": loss, "min_count": 4}, "max_steps": 20}
    many = gloo(world_size).run(train, world_size, logs["uneven"], **settings)
    assert difference(many, truth(**settings)) <= 1e-4


@pytest.mark.parametrize("world_size", [*more(1, 2), 4])
@pytest.mark.parametrize("clip", [*more(None), 0.2])
def test_dynamic_tables_in_micro_steps_with_one_norm_clipped(
    gloo: Any, logs: Any, truth: Any, clip: Any, world_size: int
) -> None:
    settings: dict[str, Any] = {"kind": "dynamic", "sparse": "adam", "model": {"loss": "sampled_softmax"}}
    settings |= {"accumulate_grad_batches": 3, "gradient_clip_val": clip, "max_steps": 12}
    one = truth(data=MICRO["data"], **settings)
    if clip:
        assert difference(one, truth(data=MICRO["data"], **settings | {"gradient_clip_val": None})) > 1e-2
    assert difference(gloo(world_size).run(train, world_size, logs["uneven"], **MICRO, **settings), one) <= 1e-4


@pytest.mark.parametrize("log", ["one user", "length 1"])
@pytest.mark.parametrize("kind", [*more("static"), "dynamic"])
@pytest.mark.parametrize("world_size", [*more(2), 4])
def test_a_single_user_and_sequences_of_one_token(
    gloo: Any, logs: Any, truth: Any, log: str, kind: str, world_size: int
) -> None:
    settings = {"kind": kind, "max_steps": 12}
    one = truth(log, **settings)
    many = gloo(world_size).run(train, world_size, logs[log], **settings)
    assert difference(many, one) <= 1e-4
    assert samples(many) == samples(one)


@pytest.mark.parametrize("world_size", [*more(2, 3), 4])
@pytest.mark.parametrize("kind", [*more("dense", "static"), "dynamic"])
def test_evaluation_has_the_same_metrics(gloo: Any, logs: Any, truth: Any, kind: str, world_size: int) -> None:
    settings = {"kind": kind, "max_steps": 6, "val_check_interval": 3, "limit_val_batches": 1.0}
    one = truth(**settings)[0]
    many = gloo(world_size).run(train, world_size, logs["uneven"], **settings)
    assert world_size == 2 or any(rank["evaluated"][0] for rank in many), "some ranks should evaluate padding"
    assert sum(n * k for rank in many for n, k in rank["evaluated"].items()) == 2 * 41
    for rank in many:
        found = {name: value for name, value in rank["metrics"].items() if name.startswith("val/")}
        assert found == pytest.approx({name: one["metrics"][name] for name in found}, rel=1e-4)
        assert "val/loss" in found


def test_bf16_agrees_loosely(gloo: Any, logs: Any, truth: Any) -> None:
    for kind in ("static", "dynamic"):
        one = truth(kind=kind, max_steps=12)[0]
        two = gloo(2).run(train, 2, logs["uneven"], kind=kind, max_steps=12, precision="bf16-mixed")
        found = np.mean([rank["losses"] for rank in two], axis=0)
        np.testing.assert_allclose(found, one["losses"], rtol=0.05)
        assert np.abs(found / one["losses"] - 1).max() > 1e-5


# ---- more than one fit -------------------------------------------------------------------------------------------


def fit_twice(world_size: int, log: str, *, kind: str, same: bool, tokens_per_rank: int | None) -> dict[str, Any]:
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.data import SequenceDataModule

    pl.seed_everything(7)
    source = SequenceDataModule(path=log, raw_ids=kind == "dynamic", max_length=LONGEST, **MICRO["data"])
    module: Any = NextItem(optimizer="adamw") if kind == "dense" else retrieval(kind, "adamw")
    strategy = {"balancing": Balancing(tokens_per_rank=tokens_per_rank), "sparse_optimizer": "adagrad"}
    records = [Recorder(), Recorder()]
    trainer = make_trainer(world_size, records[0], strategy=strategy, max_epochs=2)
    trainer.fit(module, datamodule=source)
    (metrics,) = trainer.validate(module, datamodule=source, verbose=False)
    if same:
        trainer.fit_loop.max_epochs = 4
        trainer.callbacks[trainer.callbacks.index(records[0])] = records[1]
    else:
        trainer = make_trainer(world_size, records[1], strategy=strategy, max_epochs=2)
    trainer.fit(module, datamodule=source)
    losses = records[0].losses[:-1] + records[1].losses[:-1]
    return {"losses": losses, "state": state(module), "metrics": metrics}


@pytest.mark.parametrize("same", [True, *more(False)])
@pytest.mark.parametrize(
    ("kind", "tokens", "close"),
    [*more(("dense", LONGEST, 1e-10)), ("dynamic", LONGEST, 1e-4), ("static", None, 1e-4)],
)
@pytest.mark.parametrize("world_size", [*more(1), 3])
def test_fit_validate_and_fit_again(
    gloo: Any, logs: Any, same: bool, kind: str, tokens: int | None, close: float, world_size: int
) -> None:
    settings = {"kind": kind, "same": same}
    one = gloo(1).run(fit_twice, 1, logs["uneven"], **settings, tokens_per_rank=None)
    many = gloo(world_size).run(fit_twice, world_size, logs["uneven"], **settings, tokens_per_rank=tokens)
    assert difference(many, one) <= close
    assert many[0]["metrics"] == pytest.approx(one[0]["metrics"], rel=1e-4)


def test_loaders_made_anew_each_epoch(gloo: Any, logs: Any, truth: Any) -> None:
    settings = {"max_steps": 20, "reload_dataloaders_every_n_epochs": 1}
    one = truth(data=MICRO["data"], max_steps=20)
    assert difference(gloo(2).run(train, 2, logs["uneven"], **MICRO, **settings), one) <= 1e-10


class Save(pl.Callback):
    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not Path(self.path).exists():
            trainer.save_checkpoint(self.path)


def train_and_save(world_size: int, log: str, path: str, step: int, **settings: Any) -> dict[str, Any]:
    return train(world_size, log, callback=Save(path, step), **settings)


def test_micro_steps_resume_on_any_number_of_ranks(gloo: Any, logs: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "middle.ckpt")
    one = gloo(1).run(train_and_save, 1, logs["uneven"], path, 6, max_steps=20, **MICRO)
    assert one[0]["epochs"][5] == one[0]["epochs"][6], "in the middle of an epoch"
    for world_size in (1, 4):
        many = gloo(world_size).run(train, world_size, logs["uneven"], max_steps=20, ckpt_path=path, **MICRO)
        rest = [{"losses": one[0]["losses"][6:], "samples": one[0]["samples"][6:], "state": one[0]["state"]}]
        assert samples(many) == samples(rest)
        assert difference(many, rest) <= 1e-10


@pytest.mark.parametrize("step", [*more(1), 3])
def test_resumed_with_more_micro_steps_than_before(gloo: Any, logs: Any, tmp_path: Path, step: int) -> None:
    path = str(tmp_path / "middle.ckpt")
    four = gloo(4).run(train_and_save, 4, logs["uneven"], path, step, max_steps=12, **MICRO)
    one = gloo(1).run(train, 1, logs["uneven"], max_steps=12, ckpt_path=path, **MICRO)
    rest = [x | {"losses": x["losses"][step:], "samples": x["samples"][step:]} for x in four]
    assert samples(one) == samples(rest)
    assert difference(rest, one) <= 1e-10


class SaveAtBatch(pl.Callback):
    """In the middle of a step."""

    def __init__(self, path: str, batch: int) -> None:
        self.path, self.left = path, batch

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def train_and_save_at_batch(world_size: int, log: str, path: str, batch: int, **settings: Any) -> dict[str, Any]:
    return train(world_size, log, callback=SaveAtBatch(path, batch), **settings)


def test_a_checkpoint_between_micro_steps_repeats_the_step(gloo: Any, logs: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "between.ckpt")
    whole = gloo(1).run(train_and_save_at_batch, 1, logs["uneven"], path, 9, max_steps=12, **MICRO)
    again = gloo(1).run(train, 1, logs["uneven"], max_steps=12, ckpt_path=path, **MICRO)
    done = 12 - len(again[0]["losses"])
    assert 0 < done < 9
    rest = [x | {"losses": x["losses"][done:], "samples": x["samples"][done:]} for x in whole]
    assert samples(again) == samples(rest)
    assert difference(again, rest) <= 1e-10


# ---- modes local and exchange: each rank has a stream of its own -------------------------------------------------


def stream(rank: int) -> list[Any]:
    """A rank's own batches: more on some ranks than on others, of 1 to 6 sequences with 1 to 12 tokens."""
    from torchrec import KeyedJaggedTensor

    from lightning_gr.batch import Labels, SequenceBatch

    rng = np.random.default_rng(rank)
    made = []
    for number in range(13 - 3 * rank):
        lengths = torch.from_numpy(rng.integers(1, 13, int(rng.integers(1, 7))))
        tokens, first = int(lengths.sum()), 1000 * rank + 10 * number
        places = torch.from_numpy(np.flatnonzero(rng.random(tokens) < 0.7))  # some batches have few labels
        labels = Labels(torch.from_numpy(rng.integers(0, ITEMS, len(places))), places)
        counts = torch.zeros(len(lengths), 4, dtype=torch.int64)
        counts[:, 1] = lengths
        items = torch.from_numpy(rng.integers(0, ITEMS, tokens))
        made.append(
            SequenceBatch(
                features=KeyedJaggedTensor(keys=["item_id"], values=items, lengths=lengths),
                token_counts_B4=counts,
                sample_ids_B=torch.arange(first, first + len(lengths)),
                labels={"next_item": labels},
                denominators={"next_item": float(len(places))},
            )
        )
    return made


def unions(world_size: int, accumulate: int, budget: int | None) -> list[Any]:
    """What one process has to be fed: for each optimiser step, the ranks' batches as one."""
    from lightning_gr.balancing.token_budget import token_budget_batches
    from lightning_gr.batch_samples import concatenate

    streams = [stream(rank) for rank in range(world_size)]
    if budget is not None:
        streams = [list(token_budget_batches(own, budget)) for own in streams]
    made = []
    for first in range(0, max(map(len, streams)), accumulate):
        union = concatenate([batch for own in streams for batch in own[first : first + accumulate]])
        count = float(union.labels["next_item"].num_labels)
        made.append(replace(union, denominators={"next_item": count}))
    return made


class OwnLookups(pl.LightningModule):
    """`NextItem` with its embeddings in a table."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        from lightning_gr.embeddings.dynamic import Admission, DynamicTableConfig, DynamicTables, TablePolicy

        policy = TablePolicy(admission=Admission(min_count=3))
        if kind == "dynamic":
            config: Any = DynamicTableConfig("item", 8, ["item_id"])
            self.tables: Any = DynamicTables(policy=policy).collection([config])
        else:
            config = EmbeddingConfig(name="item", num_embeddings=ITEMS, embedding_dim=8, feature_names=["item_id"])
            self.tables = EmbeddingCollection(tables=[config], device=torch.device("cpu"))
        self.head = nn.Linear(8, ITEMS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.labels["next_item"]
        logits_NI = self.head(self.tables(batch.features)["item_id"].values())[labels.tokens_N]
        loss: Tensor = batch.mean_over_global_batch(
            {"next_item": F.cross_entropy(logits_NI, labels.values_N, reduction="sum")}
        )
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train_streams(
    world_size: int, kind: str, balancing: dict[str, Any] | None, accumulate: int, feed: tuple[int, int, int | None]
) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.balancing.settings import Balancing

    pl.seed_everything(7)
    batches = unions(*feed) if balancing is None else stream(dist.get_rank())
    module = NextItem(optimizer="adamw") if kind == "dense" else OwnLookups(kind)
    record = Recorder()
    trainer = make_trainer(
        world_size,
        record,
        strategy={"balancing": Balancing(**(balancing or {}))},
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return record.taken() | {"state": state(module)}


@pytest.mark.parametrize("mode", ["local", "exchange"])
@pytest.mark.parametrize("kind", ["dense", "static", "dynamic"])
@pytest.mark.parametrize(
    ("accumulate", "budget"),
    [*more((1, None), (1, 20), (3, None)), (3, 20)],
)
@pytest.mark.parametrize("world_size", [*more(2), 3])
def test_own_streams_equal_one_process_fed_their_union(
    gloo: Any, mode: str, kind: str, accumulate: int, budget: int | None, world_size: int
) -> None:
    if kind == "static" and accumulate > 1:
        pytest.skip("static tables step on every micro-batch")
    feed = (world_size, accumulate, budget)
    one = gloo(1).run(train_streams, 1, kind, None, 1, feed)
    balancing = {"mode": mode, "tokens_per_rank": budget}
    many = gloo(world_size).run(train_streams, world_size, kind, balancing, accumulate, feed)
    assert samples(many) == samples(one)
    assert difference(many, one) <= (1e-10 if kind == "dense" else 1e-4)


# ---- what cannot be exact is said --------------------------------------------------------------------------------


def said(log: str, **settings: Any) -> str:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(1, log, max_steps=1, **settings)
        except MisconfigurationException as error:
            return str(error)
    return "\n".join(str(warning.message) for warning in caught)


def test_static_tables_in_micro_steps_are_warned_of(gloo: Any, logs: Any) -> None:
    (text,) = gloo(1).run(said, logs["uneven"], kind="static", **MICRO)
    assert "sharded static tables step on every micro-batch" in text
    (text,) = gloo(1).run(said, logs["uneven"], kind="dynamic", model={"update": "backward"}, **MICRO)
    assert "rows of tables are updated in backward" in text
