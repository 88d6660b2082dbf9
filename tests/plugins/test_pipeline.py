"""Pipelined = plain bit for bit, whatever happens between the steps, and stages do work beside the compute."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from tests.more import more

pytestmark = pytest.mark.dist

ACCELERATOR = "cuda" if os.environ.get("LIGHTNING_GR_TEST_GPUS") else "cpu"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("log") / "log.csv"
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        length = int(rng.integers(3, 6)) if user % 3 else int(rng.integers(12, 25))
        items = rng.integers(0, 30, length)
        lines += [f"u{user},{item},{1_000_000 + 3600 * step + user}" for step, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Recorder(pl.Callback):
    """Losses of training and validation as they come; says when to stop, and saves in the middle of an epoch."""

    def __init__(self, *, stop_after: int | None, save: str | None) -> None:
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.stop_after, self.save = stop_after, save

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) == self.stop_after:
            trainer.should_stop = True
        if self.save and len(self.losses) == 4:
            trainer.save_checkpoint(self.save)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append(float(trainer.callback_metrics["val/loss"]))


# ---- retrieval ---------------------------------------------------------------------------------------------------


def dynamic_tables() -> Any:
    from lightning_gr.embeddings.dynamic import Admission, DynamicTables, Eviction, TablePolicy

    policy = TablePolicy(
        admission=Admission(min_count=2), eviction=Eviction(policy="lru"), max_rows=25, ttl_seconds=40_000
    )
    return DynamicTables(policy=policy, virtual_shards=16)


def retrieval(kind: str, log: str, dropout: float = 0.3, **data: Any) -> tuple[Any, dict[str, Any]]:
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=24, dropout=dropout),
        loss="sampled_softmax",
        num_negatives=5,
        dynamic_tables=dynamic_tables() if kind == "dynamic" else None,
        top_k=[3],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    source = SequenceDataModule(path=log, global_tokens=48, max_length=24, raw_ids=kind == "dynamic", **data)
    return module, {"datamodule": source}


# ---- a user's own module and loaders -----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[Any]):
    """Row i: a few ids, two of another kind, and a number."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 40, (1 + index % 4,), generator=generator)
        return ids, torch.randint(0, 40, (2,), generator=generator), torch.randn((), generator=generator)


class UnsizedRows(torch.utils.data.IterableDataset[Any]):
    """This rank's rows, as a stream."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.mine = range(rank, 22 - 22 % world_size, world_size)

    def __iter__(self) -> Any:
        rows = Rows()
        return (rows[index] for index in self.mine)


def collate(rows: list[Any]) -> Any:
    from torchrec import KeyedJaggedTensor

    def features(part: int) -> KeyedJaggedTensor:
        lengths = torch.tensor([len(row[part]) for row in rows])
        return KeyedJaggedTensor(["f"], torch.cat([row[part] for row in rows]), lengths=lengths)

    return features(0), features(1), torch.stack([row[2] for row in rows])


class Own(pl.LightningModule):
    """Several forwards of one collection in a step, two of them of one features object.

    Args:
        kind: of the tables.
        makes: whether the step also looks up features that it makes itself.
    """

    def __init__(self, kind: str, *, makes: bool) -> None:
        super().__init__()
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

        from lightning_gr.embeddings.dynamic import DynamicTableConfig

        if kind == "dynamic":
            config: Any = DynamicTableConfig("t", 4, ["f"], pooling="sum")
            self.tables: Any = dynamic_tables().bag_collection([config])
        else:
            config = EmbeddingBagConfig(name="t", num_embeddings=40, embedding_dim=4, feature_names=["f"])
            self.tables = EmbeddingBagCollection(tables=[config], device=torch.device("cpu"))
        self.net, self.makes = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 1)), makes

    def loss_of(self, batch: Any) -> Any:
        from torchrec import KeyedJaggedTensor

        first, second, target_B = batch
        again = first
        if self.makes:
            again = KeyedJaggedTensor(["f"], (first.values() + 1) % 40, lengths=first.lengths())
        rows = [self.tables(features)["f"] for features in (first, second, again)]
        return ((self.net(torch.cat(rows, 1))[:, 0] - target_B) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        return sum(self.loss_of(part) for part in parts)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss_of(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def own(kind: str, *, loaders: str = "one", num_workers: int = 0, makes: bool = False) -> tuple[Any, dict[str, Any]]:
    import torch.distributed as dist

    if num_workers:
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children

    def loader(data: Any = None, **settings: Any) -> Any:
        settings |= {"num_workers": num_workers, "multiprocessing_context": "fork" if num_workers else None}
        settings |= {"collate_fn": collate, "batch_size": 2}
        return torch.utils.data.DataLoader(Rows() if data is None else data, **settings)

    train = loader(UnsizedRows(dist.get_rank(), dist.get_world_size())) if loaders == "unsized" else loader()
    if loaders == "two":
        train = {"a": loader(shuffle=True), "b": loader()}
    return Own(kind, makes=makes), {"train_dataloaders": train, "val_dataloaders": loader()}


# ---- runs --------------------------------------------------------------------------------------------------------


def fit(
    source: str,
    kind: str,
    *,
    depth: int,
    threads: bool | None = None,
    given: dict[str, Any] | None = None,
    stop_after: int | None = None,
    save: str | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Two epochs of `retrieval` or `own`, validated in the middle of each."""
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy, pipelined_loader

    pl.seed_everything(7)
    module, data = {"retrieval": retrieval, "own": own}[source](kind, **(given or {}))
    record = Recorder(stop_after=stop_after, save=save)
    strategy = SequenceBalancedStrategy(sparse_lr=0.1, pipeline_depth=depth)
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=dist.get_world_size(),
        strategy=strategy,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        deterministic="warn" if ACCELERATOR == "cuda" else None,
        **({"max_epochs": 2, "val_check_interval": 3} | settings),
    )
    begin = pipelined_loader.PipelinedLoader.__init__
    with pytest.MonkeyPatch.context() as patch:
        if threads is not None:
            chosen = lambda *args, **given: begin(*args, **given, threads=threads)  # noqa: E731
            patch.setattr(pipelined_loader.PipelinedLoader, "__init__", chosen)
        trainer.fit(module, **data, ckpt_path=ckpt_path)
    assert strategy.stage_log is not None
    return {
        "losses": record.losses,
        "validated": record.validated,
        "weights": weights(module),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "events": [(e.stage, e.batch, e.start, e.end) for e in strategy.stage_log.events()],
    }


def weights(module: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What this rank holds: dense weights, shards of static tables, rows of dynamic ones with their state."""
    held = {name: x for name, x in module.named_parameters() if not hasattr(x, "_in_backward_optimizers")}
    for name, value in module.state_dict().items():
        if hasattr(value, "local_shards"):
            held |= {f"{name} {i}": shard.tensor for i, shard in enumerate(value.local_shards())}
    for table in getattr(getattr(module.tables, "engine", None), "tables", []):
        rows, _ = table.rows_of(0)
        held |= {"ids": rows.ids_N, "rows": rows.values_ND, "states": rows.state_NS}
    return {name: value.detach().cpu().numpy().copy() for name, value in held.items()}


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], *, since: int = 0) -> None:
    """Bit for bit, on every rank; of `wanted`, the steps from `since` on."""
    for mine, plain in zip(found, wanted, strict=True):
        assert mine["losses"] == plain["losses"][since:]
        assert mine["validated"] == plain["validated"][-len(mine["validated"]) :]
        assert (mine["epochs"], mine["steps"]) == (plain["epochs"], plain["steps"])
        assert mine["weights"].keys() == plain["weights"].keys()
        for name, value in plain["weights"].items():
            np.testing.assert_array_equal(mine["weights"][name], value, err_msg=name)


def batches(rank: dict[str, Any], stage: str) -> set[int]:
    return {batch for name, batch, *_ in rank["events"] if name == stage}


@pytest.mark.parametrize("kind", [*more("static"), "dynamic"])
@pytest.mark.parametrize("ways", [({"depth": 2}, {"depth": 3, "threads": False}), *more([{"depth": 1}])], ids=str)
def test_it_is_the_plain_loader_bit_for_bit(gloo: Any, log: str, tmp_path: Path, kind: str, ways: Any) -> None:
    run, given = gloo(2).run, {"log": log}
    plain = run(fit, "retrieval", kind, depth=0, given=given, save=str(tmp_path / "plain.ckpt"))
    assert not plain[0]["events"]
    assert len(plain[0]["validated"]) > 4
    for number, settings in enumerate(ways):
        found = run(fit, "retrieval", kind, given=given, save=str(tmp_path / f"{number}.ckpt"), **settings)
        assert_same(found, plain)
        for rank in found:
            assert batches(rank, "train") == batches(rank, "copy") == set(range(len(plain[0]["losses"])))
            assert batches(rank, "train") <= batches(rank, "lookup")


@pytest.mark.parametrize("kind", [*more("static"), "dynamic"])
@pytest.mark.parametrize("depth", [*more(0, 1), 3])
def test_a_resumed_run_equals_the_uninterrupted_one(gloo: Any, log: str, tmp_path: Path, kind: str, depth: int) -> None:
    run, path = gloo(2).run, str(tmp_path / "middle.ckpt")
    given = {"log": log, "dropout": 0.0}  # the state of torch's generator is in no checkpoint
    whole = run(fit, "retrieval", kind, depth=2, given=given, save=path)
    assert_same(run(fit, "retrieval", kind, depth=depth, given=given, ckpt_path=path), whole, since=4)


OWN: dict[str, dict[str, Any]] = {
    "several forwards, accumulated": {"accumulate_grad_batches": 2},
    "workers": {"given": {"num_workers": 2}, "val_check_interval": 1.0},
    "features made in the step": {"given": {"makes": True}},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "a part of each epoch": {"limit_train_batches": 4},
    "unsized": {"given": {"loaders": "unsized"}, "val_check_interval": 3},
    "an unsized part": {"given": {"loaders": "unsized"}, "limit_train_batches": 4},
    "stopped": {"stop_after": 7},
    "by steps": {"max_steps": 7, "max_epochs": -1},
    "two loaders": {"given": {"loaders": "two"}},
}


STATIC_TOO = ("several forwards, accumulated", "features made in the step")


@pytest.mark.parametrize(
    ("case", "kind"),
    [*((x, "dynamic") for x in OWN), *((x, "static") for x in STATIC_TOO)]
    + more(*((x, "static") for x in OWN if x not in STATIC_TOO)),
)
def test_a_users_own_module_and_loaders(gloo: Any, case: str, kind: str) -> None:
    plain = gloo(2).run(fit, "own", kind, depth=0, **OWN[case])
    assert len(plain[0]["losses"]) == {"stopped": 7, "by steps": 7}.get(case, 8 if "part" in case else 12)
    for depth in (1, 3) if case == "unsized" else (2,):
        found = gloo(2).run(fit, "own", kind, depth=depth, **OWN[case])
        assert_same(found, plain)
        assert bool(batches(found[0], "train")) == (case != "two loaders")


class Breaks:
    """Twelve batches, of which the sixth cannot be had."""

    def __init__(self) -> None:
        self.batches = [collate([Rows()[index]]) for index in range(12)]

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number == 5:
                raise ValueError("batch 5 is torn")
            yield batch


def fit_until_it_breaks(depth: int, max_steps: int) -> tuple[int, str]:
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    record, said = Recorder(stop_after=None, save=None), ""
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        strategy=SequenceBalancedStrategy(pipeline_depth=depth),
        callbacks=[record],
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Own("static", makes=False), Breaks())
    except ValueError as error:
        said = str(error)
    return len(record.losses), said


def test_an_error_is_raised_where_its_batch_is_asked_for(gloo: Any) -> None:
    for depth in (0, 1, 3):
        assert gloo(1).run(fit_until_it_breaks, depth, 4) == [(4, "")], depth
        assert gloo(1).run(fit_until_it_breaks, depth, -1) == [(5, "batch 5 is torn")], depth


def test_a_stream_of_unknown_length(gloo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    write_days(folder)
    plain = gloo(2).run(fit_stream, str(folder), 0)
    assert len(plain[0]["losses"]) > 8
    assert gloo(2).run(fit_stream, str(folder), 3) == plain


def write_days(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for day in range(2):
        place = folder / f"day={day}"
        place.mkdir(parents=True)
        items = [rng.integers(-(2**62), -(2**62) + 40, int(rng.integers(3, 9))).tolist() for _ in range(30)]
        pq.write_table(pa.table({"item_id": items}), place / "a.parquet", row_group_size=5)
        (place / "_SUCCESS").touch()


def fit_stream(folder: str, depth: int) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.data import StreamDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8, dropout=0.3, time_bias=False),
        loss="sampled_softmax",
        negatives="in_batch",
        dynamic_tables=dynamic_tables(),
    )
    record = Recorder(stop_after=None, save=None)
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=dist.get_world_size(),
        strategy=SequenceBalancedStrategy(pipeline_depth=depth),
        callbacks=[record],
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=StreamDataModule(folder=folder, global_tokens=32, max_length=8))
    return {"losses": record.losses, "rows": weights(module)["rows"].tolist(), "steps": trainer.global_step}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_next_lookup_begins_before_the_present_compute_ends(gloo: Any, log: str, kind: str) -> None:
    found = gloo(2).run(fit, "retrieval", kind, depth=2, given={"log": log}, max_epochs=1, limit_val_batches=0)
    for rank in found:
        lookup = {batch: start for stage, batch, start, _ in rank["events"] if stage == "lookup"}
        fetch = {batch: start for stage, batch, start, _ in rank["events"] if stage == "fetch"}
        compute: dict[int, float] = {}
        for stage, batch, _, end in rank["events"]:
            if stage == "train":
                compute[batch] = max(end, compute.get(batch, 0.0))
        assert len(compute) == len(rank["losses"]) > 8
        for batch in range(1, len(compute) - 1):  # what is looked up is learned from batch 0
            assert lookup[batch + 1] < compute[batch]
            assert fetch[batch + 1] < compute[batch]
