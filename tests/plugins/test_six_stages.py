"""The six-stage schedule: six batches in flight, the numbers of the plain loop, and no rank outlives an error."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import socket
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import PRELOADED
from tests.more import more

pytestmark = pytest.mark.dist

BATCHES = 14
STAGES = ("fetch", "copy", "exchange", "wait", "train")
AHEAD = ("embed", "embed_backward")
"""Stages that there are where rows are sent ahead."""
WAITS = ("await_fetch", "await_lookup")
"""What the main thread waits for."""
PLAIN: dict[str, Any] = {"pipeline_depth": 0}
SIX: dict[str, Any] = {"schedule": "six_stage", "pipeline_depth": 4, "sync_steps": 0}
EXACT = SIX | {"sparse_update": "exact_async"}


class Model(pl.LightningModule):
    """Squared error of pooled rows, under dropout; a hook may go wrong."""

    def __init__(self) -> None:
        super().__init__()
        from lightning_gr.embeddings.dynamic import (
            Admission,
            DynamicEmbeddingBagCollection,
            DynamicTableConfig,
            DynamicTables,
            TablePolicy,
        )

        policy = TablePolicy(admission=Admission(min_count=2), max_rows=20, ttl_steps=6, on_missing="default_row")
        self.tables = DynamicEmbeddingBagCollection(
            tables=[DynamicTableConfig("f", 4, ["f"]), DynamicTableConfig("g", 4, ["g"], policy=policy)],
            settings=DynamicTables(virtual_shards=16),
        )
        self.net = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 1))
        self.hook = lambda: None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.hook()
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, target_B = batch
        rows = self.tables(features)
        losses_B = (self.net(torch.cat([rows["f"], rows["g"]], 1))[:, 0] - target_B) ** 2
        return {"loss": losses_B.mean(), "loss_sums": {"mse": (losses_B.sum(), len(losses_B))}}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Rows(torch.utils.data.Dataset[Any]):
    """Row i: ids of two features, of which id 0 is in many, and a number."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def __len__(self) -> int:
        return 3 * self.num_batches

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        ids = [torch.randint(0, 20, (1 + index % 3,), generator=generator) * (index % 3) for _ in "fg"]
        return ids, torch.randn((), generator=generator)


def collate(rows: list[Any]) -> Any:
    from torchrec import KeyedJaggedTensor

    ids = [row[0][place] for place in (0, 1) for row in rows]
    features = KeyedJaggedTensor(["f", "g"], torch.cat(ids), lengths=torch.tensor([len(x) for x in ids]))
    return features, torch.stack([row[1] for row in rows])


class Stream(torch.utils.data.IterableDataset[Any]):
    """The same as a stream, of this rank."""

    def __init__(self, num_batches: int, rank: int, world_size: int) -> None:
        self.num_batches, self.rank, self.world_size = num_batches, rank, world_size

    def __iter__(self) -> Any:
        rows = Rows(self.num_batches * self.world_size)
        return (rows[index] for index in range(self.rank, len(rows), self.world_size))


def make_loader(kind: str, num_batches: int, rank: int, world_size: int) -> Any:
    settings: dict[str, Any] = {"collate_fn": collate, "batch_size": 3}
    if kind == "unsized":
        return torch.utils.data.DataLoader(Stream(num_batches, rank, world_size), **settings)
    if kind == "workers":
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children
        settings |= {"num_workers": 1, "multiprocessing_context": "fork"}
    return torch.utils.data.DataLoader(Rows(num_batches * world_size), shuffle=True, **settings)


def make_trainer(strategy: Any, world_size: int, *callbacks: Any, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 1} | settings),
    )


def fit(
    strategy: dict[str, Any], *, loader: str = "sized", num_batches: int = BATCHES, **settings: Any
) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    losses: list[float] = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    model, chosen = Model(), SequenceBalancedStrategy(**({"sparse_lr": 0.1} | strategy))
    trainer = make_trainer(chosen, dist.get_world_size(), Record(), **settings)
    trainer.fit(model, make_loader(loader, num_batches, dist.get_rank(), dist.get_world_size()))
    assert chosen.stage_log is not None
    kept = {name: x.detach().numpy().copy() for name, x in model.net.named_parameters()}
    for number, name in enumerate(model.tables.engine.tables[0].key_names):
        rows, _ = model.tables.engine.tables[0].rows_of(number)
        found = (rows.ids_N, rows.values_ND, rows.state_NS, rows.metadata.counts, rows.metadata.last_steps)
        kept |= {f"{name} {place}": x.numpy() for place, x in enumerate(found)}
    return {
        "losses": losses,
        "kept": kept,
        "steps": (trainer.global_step, model.tables.engine.next_step),
        "events": [(e.stage, e.batch, e.start, e.end) for e in chosen.stage_log.events()],
    }


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Bit for bit, on every rank."""
    for mine, plain in zip(found, wanted, strict=True):
        assert mine["losses"] == plain["losses"]
        assert mine["steps"] == plain["steps"]
        for name, value in plain["kept"].items():
            np.testing.assert_array_equal(mine["kept"][name], value, err_msg=name)


def times(rank: dict[str, Any], stage: str, *, end: bool = False) -> dict[int, float]:
    """When a stage first began with each batch, or last ended."""
    found: dict[int, float] = {}
    for name, batch, *span in rank["events"]:
        if name == stage:
            found[batch] = max(found.get(batch, span[1]), span[1]) if end else min(found.get(batch, span[0]), span[0])
    return found


def most_in_flight(rank: dict[str, Any]) -> int:
    """The most batches that had been begun to be fetched and were not yet updated with."""
    begun, done = times(rank, "fetch"), times(rank, "embed_backward", end=True)
    return max(sum(begun[x] <= now < done[x] for x in done) for now in begun.values())


# ---- the numbers of the plain loop -------------------------------------------------------------------------------

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "sized": (BATCHES, {}),
    "unsized": (BATCHES, {"loader": "unsized"}),
    "workers": (9, {"loader": "workers", "num_batches": 9}),
    "one batch": (1, {"num_batches": 1}),
    "fewer batches than in flight": (9, {"num_batches": 3, "max_epochs": 3}),
    "two epochs": (16, {"num_batches": 8, "max_epochs": 2}),
    "by steps": (9, {"max_steps": 9, "max_epochs": -1}),
    "a part": (9, {"limit_train_batches": 9}),
    "accumulated": (BATCHES, {"accumulate_grad_batches": 3}),
    "clipped": (BATCHES, {"gradient_clip_val": 0.05}),
}


LONG = ("one batch", "two epochs", "by steps", "a part", "clipped")


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in RUNS])
def test_it_is_the_plain_loop_bit_for_bit(gloo: Any, case: str) -> None:
    number, settings = RUNS[case]
    plain = gloo(2).run(fit, PLAIN, **settings)
    assert len(plain[0]["losses"]) == number
    for strategy in (EXACT, SIX):
        found = gloo(2).run(fit, strategy, **settings)
        assert_same(found, plain)
        for rank in found:
            assert len(times(rank, "train")) == number, "all of them went through the stages"
            assert set(times(rank, "train")) <= set(times(rank, "fetch"))


@pytest.mark.parametrize(("world_size", "groups"), [*more((1, 1), (2, 2)), (4, 2)])
def test_on_any_number_of_ranks_and_groups(gloo: Any, world_size: int, groups: int) -> None:
    plain = gloo(world_size).run(fit, PLAIN | {"table_groups": groups}, num_batches=8)
    assert_same(gloo(world_size).run(fit, EXACT | {"table_groups": groups}, num_batches=8), plain)


def test_staleness_does_not_depend_on_the_schedule(gloo: Any) -> None:
    semi = {"sparse_update": "semi_async", "sync_steps": 2}
    stale = gloo(2).run(fit, semi)
    assert_same(gloo(2).run(fit, SIX | semi), stale)
    assert stale[0]["losses"] != gloo(2).run(fit, PLAIN)[0]["losses"]


# ---- the event log -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["semi_async", "exact_async"])
def test_six_batches_are_in_flight(gloo: Any, mode: str) -> None:
    found = gloo(2).run(fit, SIX | {"sparse_update": mode})
    for rank in found:
        assert most_in_flight(rank) >= 6
    for rank in gloo(2).run(fit, {"sparse_update": mode, "sync_steps": 0, "pipeline_depth": 1}):
        assert most_in_flight(rank) <= 4, "the control"


def test_every_stage_is_in_the_log_in_its_order(gloo: Any) -> None:
    for rank in gloo(2).run(fit, EXACT):
        began = {stage: times(rank, stage) for stage in (*STAGES, *AHEAD)}
        ended = {stage: times(rank, stage, end=True) for stage in (*STAGES, *AHEAD)}
        assert {stage for stage, *_ in rank["events"]} == {*STAGES, *AHEAD, *WAITS}
        for stage in ("fetch", "copy", "train", "embed_backward"):
            assert set(began[stage]) == set(range(BATCHES)), stage
        # What is looked up is learned from the first batch.
        for stage in ("exchange", "wait", "embed"):
            assert set(began[stage]) >= set(range(2, BATCHES)), stage
        for batch in range(6, BATCHES):  # those before were in flight, and have gone through the stages twice
            for before, after in zip(("fetch", "copy", "exchange"), ("copy", "exchange", "wait"), strict=True):
                assert ended[before][batch] <= began[after][batch], (before, batch)
            assert began["wait"][batch] <= began["embed"][batch] <= ended["embed"][batch] <= ended["train"][batch]
            assert began["train"][batch] <= began["embed_backward"][batch] <= ended["embed_backward"][batch]
            assert began["embed"][batch] < ended["embed_backward"][batch - 1], "rows are sent ahead"
            assert ended["embed_backward"][batch - 1] <= ended["embed_backward"][batch], "one update after another"


def test_without_rows_ahead_there_is_no_stage_for_them(gloo: Any) -> None:
    for rank in gloo(2).run(fit, SIX):
        assert {stage for stage, *_ in rank["events"]} == {*STAGES, *WAITS}
        assert set(times(rank, "wait")) >= set(range(2, BATCHES))


# ---- an error ends every rank ------------------------------------------------------------------------------------

SECONDS = 40
"""Evidence takes 9 s at most; the rest is the machine's other work. The time-out of collectives is far longer."""
WORDS = "rank 1 has bad luck"


class Misfortune:
    """Goes wrong on rank 1 when it is called the n-th time."""

    def __init__(self, rank: int, n: int, happened: Any) -> None:
        self.left, self.happened = n if rank == 1 else -1, happened

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happened.value = time.time()
            raise ValueError(WORDS)

    def before(self, owner: Any, name: str) -> None:
        """Has a method of a class go wrong when it is called the n-th time."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def method(*args: Any, **kwargs: Any) -> Any:
            self()
            return inner(*args, **kwargs)

        setattr(owner, name, method)


def fit_until_it_fails(stage: str, rank: int, port: int, happened: Any, pipe: Any) -> None:
    """A process of two."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "CUDA_VISIBLE_DEVICES": "",
    }
    from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine
    from lightning_gr.embeddings.dynamic.exchange import LookupExchange
    from lightning_gr.embeddings.dynamic.row_travel import RowTravel
    from lightning_gr.plugins import SequenceBalancedStrategy

    torch.set_num_threads(1)
    logging.getLogger().addHandler(said := _Said())
    pl.seed_everything(7)
    model, data = Model(), Rows(2 * BATCHES)
    luck = functools.partial(Misfortune, rank, happened=happened)
    strategy = SequenceBalancedStrategy(**EXACT, timeout=timedelta(seconds=10 * SECONDS))
    trainer = make_trainer(strategy, 2, max_epochs=2)
    match stage:
        case "fetch":
            luck(n=20).before(Rows, "__getitem__")
        case "copy":
            model.hook = luck(n=7)
        case "exchange":
            luck(n=7).before(DynamicEngine, "begin")
        case "wait":
            luck(n=7).before(LookupExchange, "received_keys")
        case "embed":
            luck(n=7).before(RowTravel, "send_rows")
        case "train":
            luck(n=7).before(Model, "training_step")
        case "embed_backward":
            luck(n=7).before(DynamicTable, "update")
    try:
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate))
        pipe.send("the end")
    except BaseException as error:
        pipe.send("\n".join([repr(error), repr(error.__cause__), *said.lines]))
        raise


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [pytest.param(x, marks=pytest.mark.long) if x in ("copy", "exchange", "train") else x for x in (*STAGES, *AHEAD)],
)
def test_an_error_in_any_stage_ends_every_rank(stage: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    happened, pipes, processes = context.Value("d", 0.0), [], []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=fit_until_it_fails, args=(stage, rank, port, happened, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    begin = time.time()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            assert time.time() - (happened.value or begin + 120) < SECONDS, [x.is_alive() for x in processes]
    finally:
        for process in processes:
            process.kill()
    assert happened.value
    for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
        assert process.exitcode == 1, f"rank {rank} ended by {process.exitcode}, without an exception"
        said = pipe.recv()
        assert WORDS in said if rank == 1 else "rank 1" in said, (rank, said)
