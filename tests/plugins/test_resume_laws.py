"""The law of resume: a run that goes on from any of its checkpoints is the run that was never interrupted."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from tests.more import more

pytestmark = pytest.mark.dist

STEPS, ITEMS, USERS, BUDGET = 20, 60, 30, 32
LOGGED = ("train/metric", "train/mean_step", "train/mean_epoch", "train/most_step", "train/most_epoch", "epoch")
Line = tuple[str, int, float]


def write_log(path: Path) -> str:
    """Events of users whose histories differ in length and time, so that rows expire."""
    rng = np.random.default_rng(3)
    lines = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        items = np.arange(ITEMS) if user == 0 else rng.integers(0, ITEMS, int(rng.integers(5, 12)))
        lines += [f"{user},{item},{1_000_000 + 3600 * step + 4000 * user}" for step, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_log(tmp_path_factory.mktemp("resume") / "events.csv")


class Everything(pl.LightningModule):
    """Static and dynamic tables, numbers of all generators, a metric, logged values, a schedule."""

    def __init__(self, *, noise: bool, static: bool) -> None:
        super().__init__()
        from torchmetrics import MeanMetric
        from torchrec import EmbeddingCollection, EmbeddingConfig

        from lightning_gr.embeddings.dynamic import Admission, DynamicTableConfig, DynamicTables, TablePolicy

        policy = TablePolicy(
            admission=Admission(min_count=2),
            ttl_seconds=60_000,
            ttl_steps=4,
            max_rows=44,
            rows_per_group=22,
        )
        fixed = EmbeddingConfig(name="fixed", num_embeddings=ITEMS, embedding_dim=4, feature_names=["item_id"])
        self.static = EmbeddingCollection(tables=[fixed], device=torch.device("cpu")) if static else None
        dynamic = DynamicTableConfig("own", 4, ["item_id"])
        self.dynamic = DynamicTables(virtual_shards=16, policy=policy).collection([dynamic])
        self.mix, self.head = nn.Linear(4 + 4 * static, 8), nn.Linear(8, ITEMS)
        self.noise, self.seen = noise, MeanMetric()

    def losses(self, batch: Any) -> Tensor:
        labels = batch.labels["next_item"]
        tables = [x for x in (self.static, self.dynamic) if x is not None]
        state_TD = torch.cat([table(batch.features)["item_id"].values() for table in tables], 1)
        state_TD = torch.tanh(self.mix(state_TD))
        if self.training and self.noise:
            state_TD = F.dropout(state_TD, 0.2) * (1 + 0.1 * np.random.random() + 0.1 * random.random())
        logits_NI = self.head(state_TD[labels.tokens_N])
        return F.cross_entropy(logits_NI, labels.values_N, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses_N = self.losses(batch)
        loss: Tensor = batch.mean_over_global_batch({"next_item": losses_N.sum()})
        self.seen.update(losses_N.detach())
        self.log("train/metric", self.seen, on_step=False, on_epoch=True, batch_size=1)
        most = losses_N.detach().max() if len(losses_N) else loss.new_zeros(())
        self.log("train/most", most, on_epoch=True, reduce_fx="max", batch_size=1)
        self.log("train/mean", losses_N.detach().sum(), on_step=True, on_epoch=True, batch_size=len(losses_N) + 1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.losses(batch).sum() / 100, sync_dist=True, batch_size=1, reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.95**n)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Records(DummyLogger):
    """What a run logs, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.lines += [(name, int(step or 0), float(x)) for name, x in metrics.items()]


class Lines(pl.Callback):
    """Adds the loss and the samples of every micro-batch as this rank sees them, the ends of epochs, and saves."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lines.append(("loss", trainer.global_step, float(outputs["loss"])))
        self.lines += [("sample", trainer.global_step, float(x)) for x in batch.sample_ids_B.tolist() if x >= 0]

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.lines.append(("epoch end", trainer.current_epoch, 0.0))

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        self.lines.append(("saved", trainer.global_step, 0.0))


def tables_of(module: Any) -> dict[str, Any]:
    """What this rank has of dynamic tables: by id row, optimiser state, counter and clocks; who waits."""
    from lightning_gr.plugins.dynamic_sharding import sharded_dynamic_collections

    kept: dict[str, Any] = {}
    for collection in sharded_dynamic_collections(module).values():
        engine = collection.engine
        kept |= {"next step": engine.next_step, "clock": engine.time}
        for table in engine.tables:
            for number, name in enumerate(table.key_names):
                rows, _ = table.rows_of(number)
                used_N3 = torch.stack(rows.metadata[:3], 1).tolist()
                for i, key in enumerate(rows.ids_N.tolist()):
                    kept[f"row {name} {key}"] = torch.cat([rows.values_ND[i], rows.state_NS[i]]).numpy()
                    kept[f"used {name} {key}"] = used_N3[i]
                state = table.counter_state(number) if number < len(table.configs) else None
                numbers = [] if state is None else [x.tolist() for x in state[0].values()]
                kept |= {f"waits {name} {key}": rest for key, *rest in zip(*numbers, strict=True)}
    return kept


def state_of(trainer: Any, module: Any) -> dict[str, Any]:
    """Everything that this process has in its memory at the end; whole static tables on rank 0."""
    rank = trainer.global_rank
    whole = tables_of(module)
    for name, value in module.state_dict().items():
        if hasattr(value, "local_shards"):
            full = torch.zeros(value.size()) if rank == 0 else None
            value.gather(0, out=full)
            value = full if full is not None else torch.zeros(0)
        whole[name] = value.detach().numpy().copy()
    (optimizer,) = trainer.optimizers
    for weight, parameter in module.named_parameters():
        entries = optimizer.state.get(parameter, {})
        whole |= {f"optimizer {weight} {name}": x.detach().numpy().copy() for name, x in entries.items()}
    for name, entries in trainer.strategy.checkpoints._sparse_optimizer_state().items():
        for entry, value in entries.items():
            for shard in value.local_shards() if hasattr(value, "local_shards") else []:
                whole[f"sparse optimizer {name} {entry} of {rank}"] = shard.tensor.numpy().copy()
    whole["rates"] = [group["lr"] for group in optimizer.param_groups]
    whole["schedule"] = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    return whole


def generators() -> str:
    name, numbers, *rest = np.random.get_state()
    found = [torch.get_rng_state().numpy().tobytes(), name, numbers.tobytes(), rest, random.getstate()]  # type: ignore[union-attr]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def train(
    world_size: int,
    log: str,
    *,
    folder: str = "",
    start: int | None = None,
    save: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
    noise: bool = True,
    static: bool = True,
    days: bool = False,
    ckpt_path: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A run of 20 steps, or what follows step `start` of them; with `save` it saves every step into `folder`."""
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.data import SequenceDataModule, StreamDataModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    if start is not None:
        ckpt_path = f"{folder}/step={start}.ckpt"
    pl.seed_everything(7)
    if ckpt_path is not None:  # what a resumed run draws has to come from the checkpoint
        torch.rand(3), np.random.random(), random.random()
    source: Any = SequenceDataModule(path=log, global_tokens=BUDGET, max_length=12)
    if days:
        source = StreamDataModule(folder=log, num_items=ITEMS, global_tokens=BUDGET, max_length=12)
    module, records = Everything(noise=noise, static=static), Records()
    callbacks: list[Any] = [Lines(records.lines)]
    if save is not None:
        asked = {"every_n_steps": 1, "keep_last": -1} | save
        callbacks.append(ResumeCheckpoint(dirpath=folder, filename="{step}", **asked))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=SequenceBalancedStrategy(sparse_lr=0.05, **(strategy or {})),
            callbacks=callbacks,
            logger=records,
            log_every_n_steps=1,
            enable_checkpointing=save is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **({"max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 4} | settings),
        )
        trainer.fit(module, datamodule=source, ckpt_path=ckpt_path)
    assert trainer.global_step == settings.get("max_steps", STEPS)
    state = state_of(trainer, module)
    happened = vars(module.dynamic.engine.tables[0].statistics[0])
    return {"lines": records.lines, "state": state, "generators": generators(), "happened": happened}


def rest_of(lines: list[Line], step: int) -> list[Line]:
    """What a run that is killed when it has saved `step` leaves to the run that goes on."""
    place = lines.index(("saved", step, 0.0)) + 1
    # What Lightning logs at the very end of a step or an epoch, behind the save, is the saving run's.
    while place < len(lines) and lines[place][:2] in [(name, step - 1) for name in LOGGED]:
        place += 1
    return [line for line in lines[place:] if line[0] != "saved"]


def assert_equal(found: list[dict[str, Any]], truth: list[dict[str, Any]], step: int) -> None:
    """Bit by bit, on each rank."""
    for mine, full in zip(found, truth, strict=True):
        assert [x for x in mine["lines"] if x[0] != "saved"] == rest_of(full["lines"], step), step
        assert mine["state"].keys() == full["state"].keys(), step
        for name, value in full["state"].items():
            assert np.array_equal(mine["state"][name], value), (step, name)
        if any(x[0] == "loss" for x in mine["lines"]):  # else nothing was left to draw
            assert mine["generators"] == full["generators"], step


def assert_close(found: list[dict[str, Any]], one: dict[str, Any], step: int, *, copies: int = 1) -> None:
    """Of another number of processes: keys, counters and clocks are the same, numbers to the last digits of a float."""
    rest = rest_of(one["lines"], step)
    found = [rank | {"lines": [x for x in rank["lines"] if x[0] != "saved"]} for rank in found]
    losses = [[x[2] for x in rank["lines"] if x[0] == "loss"] for rank in found]
    np.testing.assert_allclose(np.mean(losses, axis=0), [x[2] for x in rest if x[0] == "loss"], rtol=1e-4)
    samples = sorted(x for rank in found for x in rank["lines"] if x[0] == "sample")
    assert samples == sorted(x for x in rest if x[0] == "sample")
    for name in ("val/loss", "train/metric"):
        (logged, wanted) = ([x for x in lines if x[0] == name] for lines in (found[0]["lines"], rest))
        assert [x[:2] for x in logged] == [x[:2] for x in wanted]
        np.testing.assert_allclose([x[2] for x in logged], [x[2] for x in wanted], rtol=1e-4)
    own = ("row ", "used ", "waits ")
    rows: dict[str, Any] = {}
    for rank in found:
        mine = {name: x for name, x in rank["state"].items() if name.startswith(own)}
        assert len(rows.keys() & mine.keys()) == (len(mine) if copies > 1 and rows else 0)
        rows |= mine
    whole = {name: x for name, x in found[0]["state"].items() if not name.startswith(own)} | rows
    for name, value in one["state"].items():
        if name.startswith(("used ", "waits ", "next ", "clock", "schedule")):
            assert whole[name] == value, (step, name)
        elif not name.startswith("sparse optimizer"):  # which is by rank
            np.testing.assert_allclose(whole[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{step} {name}")
    assert rows.keys() == {name for name in one["state"] if name.startswith(own)}


# ---- from every step ---------------------------------------------------------------------------------------------


class Full:
    """Uninterrupted runs that saved every step, each made once."""

    def __init__(self, gloo: Any, log: str, factory: pytest.TempPathFactory) -> None:
        self.gloo, self.log, self.factory, self.made = gloo, log, factory, {}  # type: ignore[var-annotated]

    def __call__(self, world_size: int, save: dict[str, Any] | None = None, **settings: Any) -> Any:
        key = f"{world_size} {save} {settings}"
        if key not in self.made:
            folder = str(self.factory.mktemp("full"))
            ranks = self.gloo(world_size).run(train, world_size, self.log, folder=folder, save=save or {}, **settings)
            self.made[key] = folder, ranks
        return self.made[key]


@pytest.fixture(scope="module")
def full(gloo: Any, log: str, tmp_path_factory: pytest.TempPathFactory) -> Full:
    return Full(gloo, log, tmp_path_factory)


def test_the_run_has_everything_in_it(full: Full) -> None:
    _, (one,) = full(1)
    names = [x[0] for x in one["lines"]]
    assert names.count("epoch end") == 4
    assert names.count("val/loss") >= 8
    assert names.count("saved") == STEPS
    steps = [x[1] for x in one["lines"] if x[0] == "loss"]
    assert len(steps) > len(set(steps)) + 10, "accumulation"
    assert min(one["happened"][what] for what in ("inserted", "evicted", "expired", "rejected")) > 3
    assert any(name.startswith("waits ") for name in one["state"])


SAVES: list[dict[str, Any]] = [{}, {"full_every": 3}, {"background": False}, {"background": False, "full_every": 3}]


@pytest.mark.parametrize(
    ("save", "steps"), [(SAVES[1], range(2, STEPS + 1, 3)), *more(*((save, range(1, STEPS + 1)) for save in SAVES))]
)
def test_from_every_step_on_one_process(
    gloo: Any, log: str, full: Full, save: dict[str, Any], steps: Sequence[int]
) -> None:
    folder, ranks = full(1, save)
    for step in steps:
        assert_equal(gloo(1).run(train, 1, log, folder=folder, start=step), ranks, step)


@pytest.mark.parametrize("steps", [(5,), *more(range(1, STEPS + 1))])
def test_on_two_processes(gloo: Any, log: str, full: Full, steps: Any) -> None:
    folder, ranks = full(2, {"full_every": 3})
    for step in steps:
        assert_equal(gloo(2).run(train, 2, log, folder=folder, start=step), ranks, step)


def test_between_two_micro_batches_validation_changes_nothing(gloo: Any, log: str, full: Full) -> None:
    folder, ranks = full(1, val_check_interval=5)
    for step in (5,):
        found = gloo(1).run(train, 1, log, folder=folder, start=step, val_check_interval=5)
        assert_equal(found, ranks, step)


@pytest.mark.parametrize("saved_by", [1, 2])
@pytest.mark.parametrize("steps", [(10,), pytest.param(range(1, STEPS), marks=pytest.mark.long)])
def test_on_another_number_of_processes(gloo: Any, log: str, full: Full, saved_by: int, steps: Any) -> None:
    _, (truth,) = full(1, noise=False)
    folder, _ = full(saved_by, {"full_every": 3}, noise=False)
    for step in steps:
        for world_size in {1: (3,), 2: (1, 4) if len(steps) > 1 else (1,)}[saved_by]:
            found = gloo(world_size).run(train, world_size, log, folder=folder, start=step, noise=False)
            assert_close(found, truth, step)


# ---- other settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.long)])
def test_whatever_is_in_flight(gloo: Any, log: str, full: Full, depth: int) -> None:
    folder, ranks = full(2, {"full_every": 3})
    strategy = {"pipeline_depth": depth}
    assert_equal(gloo(2).run(train, 2, log, folder=folder, start=14, strategy=strategy), ranks, 14)


@pytest.mark.parametrize("update", [pytest.param(x, marks=pytest.mark.long) for x in ("exact_async", "semi_async")])
def test_rows_updated_beside_the_dense_step(gloo: Any, log: str, full: Full, tmp_path: Path, update: str) -> None:
    """The batch after a save is looked up synchronously, so the run that goes on saves as the first one did."""
    again: dict[str, Any] = {"strategy": {"sparse_update": update, "sync_steps": 4}, "save": {"full_every": 3}}
    folder, ranks = full(2, again["save"], strategy=again["strategy"])
    for step in (2, 7, 10):
        path = f"{folder}/step={step}.ckpt"
        found = gloo(2).run(train, 2, log, folder=str(tmp_path / str(step)), ckpt_path=path, **again)
        assert_equal(found, ranks, step)


def test_groups_that_become_one_and_two_again(gloo: Any, log: str, full: Full, tmp_path: Path) -> None:
    module = {"noise": False, "static": False}
    _, (truth,) = full(1, **module)
    folder, _ = full(2, {"full_every": 3}, **module, strategy={"table_groups": 2})
    save: dict[str, Any] = {"every_n_steps": 6, "full_every": 2}
    path = f"{folder}/step=3.ckpt"
    one = gloo(2).run(train, 2, log, folder=str(tmp_path), ckpt_path=path, save=save, **module)
    assert_close(one, truth, 3)
    two = gloo(2).run(train, 2, log, folder=str(tmp_path), start=12, **module, strategy={"table_groups": 2})
    assert_close(two, truth, 12, copies=2)


# ---- loaders without a length ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("days")
    rng = np.random.default_rng(4)
    for day in range(5):
        users = [rng.integers(0, ITEMS, int(rng.integers(3, 9))).tolist() for _ in range(16)]
        times = [[100_000 * day + 100 * place for place, _ in enumerate(items)] for items in users]
        place = folder / f"day=2024-01-0{day + 1}"
        place.mkdir()
        columns = {"item_id": users, "new_events": [2] * len(users), "timestamp": times}
        pq.write_table(pa.table(columns), place / "a.parquet", row_group_size=5)
        (place / "_SUCCESS").touch()
    return str(folder)


STREAMED: dict[str, Any] = {"days": True, "max_steps": 9, "accumulate_grad_batches": 1, "val_check_interval": None}


@pytest.mark.parametrize("steps", [(2, 5, 9), *more(range(1, 10))])
def test_a_stream_from_every_step(gloo: Any, days: str, tmp_path: Path, steps: Sequence[int]) -> None:
    folder = str(tmp_path)
    (one,) = gloo(1).run(train, 1, days, folder=folder, save={"full_every": 2}, **STREAMED)
    assert sum(x[0] == "epoch end" for x in one["lines"]) >= 2
    for step in steps:
        found = gloo(1).run(train, 1, days, folder=folder, start=step, **STREAMED)
        if step == 9:  # with which training ended before the end of the day
            one = one | {"lines": [x for x in one["lines"] if x[1] < 8 or x[0] == "saved"]}
        assert_equal(found, [one], step)


class Unsized:
    """A user's stream with a position and no length, each number once."""

    def __init__(self, count: int) -> None:
        self.count, self.next = count, 0

    def __iter__(self) -> Iterator[Tensor]:
        if self.next >= self.count:
            self.next = 0
        while self.next < self.count:
            self.next += 1
            yield torch.tensor([float(self.next - 1)])

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Counts(Unsized):
    """The same with a length."""

    def __len__(self) -> int:
        return self.count


class Plain(pl.LightningModule):
    """Asks the Trainer how long it will train, as many schedules do (PL#20550)."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.head, self.asks = nn.Linear(1, 1), asks
        self.trained: list[tuple[int, int]] = []
        self.total = -1
        self.ended: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append((self.current_epoch, int(batch)))
        return {"loss": (loss := self.head(batch / 10).square().sum()), "loss_sums": {"all": (loss, 1)}}

    def on_train_epoch_end(self) -> None:
        self.ended.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if not self.asks:
            return optimizer
        self.total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_plain(
    folder: str, *, sized: bool, depth: int, start: int | None = None, save: bool = False, **settings: Any
) -> dict[str, Any]:
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(1)
    module = Plain(asks=sized)
    callback = ResumeCheckpoint(dirpath=folder, filename="{step}", every_n_steps=1, keep_last=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SequenceBalancedStrategy(pipeline_depth=depth),
        callbacks=[callback] if save else [],
        logger=False,
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=3,
        **settings,
    )
    path = None if start is None else f"{folder}/step={start}.ckpt"
    loader = Counts(7) if sized else Unsized(7)
    trainer.fit(module, loader, ckpt_path=path)
    weights = [float(x) for x in module.parameters()]
    return {"trained": module.trained, "weights": weights, "total": module.total, "ended": module.ended}


@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("depth", [pytest.param(0, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("sized", [True, False])
def test_a_users_own_loader(gloo: Any, tmp_path: Path, sized: bool, depth: int, accumulate: int) -> None:
    settings = {"sized": sized, "depth": depth, "accumulate_grad_batches": accumulate}
    (one,) = gloo(1).run(train_plain, str(tmp_path), save=True, **settings)
    assert one["trained"] == [(epoch, batch) for epoch in range(3) for batch in range(7)]
    steps = 3 * -(-7 // accumulate)
    assert one["total"] == (steps if sized else -1)
    for step in range(2, steps, 4):
        (found,) = gloo(1).run(train_plain, str(tmp_path), start=step, **settings)
        epoch, steps_in = divmod(step, steps // 3)
        done = 7 * epoch + accumulate * steps_in
        assert found["trained"] == one["trained"][done:], step
        assert found["ended"] == one["ended"][epoch:], step
        assert (found["weights"], found["total"]) == (one["weights"], one["total"]), step
