"""RetrievalModule on dynamic tables: raw ids give what rows of a static table with the same values give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.batch import SequenceBatch
from lightning_gr.callbacks import TopKWriter
from lightning_gr.data import SequenceDataModule, StreamDataModule, UserRows
from lightning_gr.data.raw_ids import raw_key
from lightning_gr.data.stream import Block
from lightning_gr.embeddings.dynamic import DynamicTables, TablePolicy
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule

IDS = (-(2**63), 2**63 - 1, -1, 0, 1, 7, 1 << 40, -5, 12345, 99)
LOSSES = [
    {"loss": "full_softmax"},
    {"loss": "sampled_softmax"},
    {"loss": "bce"},
    {"loss": "sampled_softmax", "negatives": "in_batch"},
    {"loss": "bce", "negatives": "in_batch"},
]


def write_log(path: Path, name: Any = str) -> str:
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(12):
        for step in range(int(rng.integers(4, 14))):
            lines.append(f"{user},{name(IDS[int(rng.integers(len(IDS)))])},{1_000_000 + 60 * step}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def text_of(item: int) -> str:
    return f"item {item}"


def make_data(log: str, **changes: Any) -> SequenceDataModule:
    return SequenceDataModule(**({"path": log, "global_tokens": 48, "max_length": 8, "seed": 3} | changes))


def make_module(data: Any, *, stage: str = "predict", dynamic: bool = True, **changes: Any) -> RetrievalModule:
    torch.manual_seed(5)
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8, dropout=0.0),
        dynamic_tables=DynamicTables() if dynamic else None,
        **({"num_negatives": 4, "embedding_std": 1.0, "top_k": [4], "temperature": 0.3} | changes),
    )
    module.trainer = SimpleNamespace(datamodule=data, training=True)  # type: ignore[assignment]
    module.setup(stage)
    module.configure_model()
    return module.eval()


@torch.no_grad()
def values_of(module: RetrievalModule, ids: torch.Tensor) -> torch.Tensor:
    from torchrec import KeyedJaggedTensor

    keys = ["item_id", "target", "sampled", "corpus"]
    lengths = torch.zeros(4, dtype=torch.int64)
    lengths[-1] = len(ids)
    assert module.tables is not None
    return module.tables(KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths))["corpus"].values()


def pair(
    log: str, **changes: Any
) -> tuple[RetrievalModule, RetrievalModule, list[tuple[SequenceBatch, SequenceBatch]]]:
    """A module of raw ids, one of rows with the same values, and the batches of both."""
    raw_data, row_data = make_data(log, raw_ids=True), make_data(log)
    raw, rows = make_module(raw_data, **changes), make_module(row_data, dynamic=False, **changes)
    rows.encoder.load_state_dict(raw.encoder.state_dict())
    (weight,) = rows.tables.parameters()  # type: ignore[union-attr]
    weight.data.copy_(values_of(raw, torch.as_tensor(raw_data.item_keys)))
    batches = list(zip(raw_data.train_dataloader(), row_data.train_dataloader(), strict=True))
    return raw, rows, batches


@pytest.mark.parametrize("settings", LOSSES, ids=lambda x: "-".join(x.values()))
@pytest.mark.parametrize("name", [str, text_of])
def test_losses_of_raw_ids_are_those_of_rows(name: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    raw, rows, batches = pair(write_log(tmp_path / "log.csv", name), **settings)
    for of_raw, of_rows in batches:
        for training in (True, False):
            found = raw.with_lookup_ids(of_raw, training=training)
            wanted = rows.with_lookup_ids(of_rows, training=training)
            one, other = raw.loss_sums(raw(found), found), rows.loss_sums(rows(wanted), wanted)
            assert float(one["next_item"].detach()) == pytest.approx(float(other["next_item"].detach()), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"remove_seen": True, "top_k": [8]}, {"corpus": [-1, "0", 7, 99, -(2**63)]}], ids=str
)
def test_rankings_of_raw_ids_are_those_of_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    raw, rows, _ = pair(write_log(tmp_path / "log.csv"), **settings)
    raw_data, row_data = (module.trainer.datamodule for module in (raw, rows))  # type: ignore[attr-defined]
    for of_raw, of_rows in zip(raw_data.val_dataloader(), row_data.val_dataloader(), strict=True):
        ranks = []
        for module, batch in ((raw, of_raw), (rows, of_rows)):
            full = module.with_lookup_ids(batch, training=False)
            scores = module(full)
            labels = full.labels["next_item"]
            assert scores.candidates is not None
            ranks.append(
                scores.candidates.ranks(
                    scores.queries_ND, labels.values_N, excluded=module._seen(scores, full)
                ).tolist()
            )
        assert ranks[0] == ranks[1]
    for of_raw, of_rows in zip(raw_data.predict_dataloader(), row_data.predict_dataloader(), strict=True):
        found = raw.predict_step(raw.with_lookup_ids(of_raw, training=False), 0)
        wanted = rows.predict_step(rows.with_lookup_ids(of_rows, training=False), 0)
        assert torch.equal(found["item_rows"], wanted["item_rows"])
        assert torch.allclose(found["scores"], wanted["scores"], atol=1e-5)
        if settings.get("remove_seen"):
            assert bool((found["item_rows"] == -1).any()), "nobody has seen so much that no item is left"


def test_predictions_are_written_with_raw_ids(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv")
    module = make_module(make_data(log, raw_ids=True))
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[TopKWriter(output_dir=str(tmp_path / "out"))])
    predictions = trainer.predict(module, datamodule=make_data(log, raw_ids=True))
    table = pq.read_table(tmp_path / "out" / "part-0.parquet")
    assert sorted(table["user_id"].to_pylist()) == list(range(12))
    best = dict(zip(*(table[x].to_pylist() for x in ("user_id", "item_ids")), strict=True))
    assert {item for items in best.values() for item in items} <= set(IDS)
    assert predictions is not None
    rows = torch.cat([x["item_rows"] for x in predictions])
    assert [[sorted(IDS)[row] for row in of_user] for of_user in rows.tolist()] == list(best.values())


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_raw_ids_need_dynamic_tables(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv")
    for data in (make_data(log, raw_ids=True), StreamDataModule(folder=str(tmp_path))):
        with pytest.raises(MisconfigurationException, match="dynamic_tables: not given, and the data has raw ids"):
            make_module(data, dynamic=False, num_items=10)


def without_items(*, stage: str = "fit", validates: bool = False, **changes: Any) -> RetrievalModule:
    module = RetrievalModule(
        encoder=nn.Identity(), dynamic_tables=DynamicTables(), **({"loss": "bce", "negatives": "in_batch"} | changes)
    )
    data = StreamDataModule(folder="anywhere")
    module.trainer = SimpleNamespace(datamodule=data, enable_validation=validates)  # type: ignore[assignment]
    module.setup(stage)
    return module


def test_without_a_vocabulary_the_corpus_is_named_or_nothing_is_ranked(tmp_path: Path) -> None:
    without_items()
    for loss in ("full_softmax", "bce"):
        with pytest.raises(MisconfigurationException, match=f"loss={loss}: takes negatives from all items"):
            without_items(loss=loss, negatives="uniform")
    for settings in ({"validates": True}, {"stage": "validate"}, {"stage": "predict"}):
        with pytest.raises(MisconfigurationException, match=r"corpus: not given.*limit_val_batches: 0"):
            without_items(**settings)
    numbers, texts = tmp_path / "numbers.txt", tmp_path / "texts.txt"
    numbers.write_text("5\n-1\n5\n")
    texts.write_text("5\nb\n")
    for corpus, wanted in ([5, -1], [-1, 5]), (str(numbers), [-1, 5]), (str(texts), raw_key(["5", "b"]).tolist()):
        module = without_items(validates=True, corpus=corpus, top_k=[2])
        assert module._corpus.ranked_C is not None
        assert module._corpus.ranked_C.tolist() == sorted(wanted)


def test_a_checkpoint_of_raw_ids_fits_other_items_but_no_rows(tmp_path: Path) -> None:
    log, other = write_log(tmp_path / "log.csv"), tmp_path / "other.csv"
    other.write_text("user_id,item_id\n1,5\n1,6\n1,77\n")
    checkpoint: dict[str, Any] = {}
    make_module(make_data(log, raw_ids=True)).on_save_checkpoint(checkpoint)
    few: dict[str, Any] = {"top_k": [2]}
    make_module(make_data(str(other), raw_ids=True), **few).on_load_checkpoint(checkpoint)
    for data in (make_data(log), make_data(str(other))):
        with pytest.raises(MisconfigurationException, match="item vocabulary"):
            make_module(data, **few).on_load_checkpoint(checkpoint)


# ---- training ----------------------------------------------------------------------------------------------------


class Recorder(pl.Callback):
    """Losses of the global batch, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def fit(
    world_size: int, data: Any, *, dynamic: bool, steps: int = 8, max_rows: int | None = None, **changes: Any
) -> Any:
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8, dropout=0.0),
        dynamic_tables=DynamicTables(policy=TablePolicy(max_rows=max_rows)) if dynamic else None,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        **({"num_negatives": 4, "top_k": [4]} | changes),
    )
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        callbacks=[recorder],
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    metrics = trainer.validate(module, datamodule=data, verbose=False)
    return recorder.losses, metrics


def train(world_size: int, log: str, raw_ids: bool, dynamic: bool, **changes: Any) -> Any:
    return fit(world_size, make_data(log, raw_ids=raw_ids), dynamic=dynamic, **changes)


@pytest.mark.dist
@pytest.mark.parametrize("settings", LOSSES, ids=lambda x: "-".join(x.values()))
def test_dynamic_tables_of_row_numbers_train_as_static_ones(
    gloo: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log.csv")
    ((wanted, measured),) = gloo(1).run(train, 1, log, raw_ids=False, dynamic=False, **settings)
    assert len(set(wanted)) > 4
    for world_size in (1, 2):
        for losses, metrics in gloo(world_size).run(train, world_size, log, raw_ids=False, dynamic=True, **settings):
            assert losses == pytest.approx(wanted, rel=1e-4)
            assert metrics[0] == pytest.approx(measured[0], rel=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize("settings", [LOSSES[0], LOSSES[1], LOSSES[3]], ids=lambda x: "-".join(x.values()))
def test_raw_ids_train_alike_on_any_number_of_ranks(gloo: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv")
    ((wanted, measured),) = gloo(1).run(train, 1, log, raw_ids=True, dynamic=True, **settings)
    # With a small budget all rows are on one rank, and the other has no item to rank.
    for max_rows in (None, 1000):
        found = gloo(2).run(train, 2, log, raw_ids=True, dynamic=True, max_rows=max_rows, **settings)
        for losses, metrics in found:
            assert losses == pytest.approx(wanted, rel=1e-4)
            assert metrics[0] == pytest.approx(measured[0], rel=1e-4)


class Days:
    """Days of users, with ids from anywhere in int64."""

    def days(self) -> list[str]:
        return ["0", "1", "2"]

    def blocks(self, day: str, first: int = 0) -> Any:
        rng = np.random.default_rng(int(day))
        items = np.array(IDS)[rng.integers(0, len(IDS), 64)]
        yield Block(UserRows(np.arange(0, 65, 8), items, np.tile(np.arange(8), 8)), np.full(8, 8))


def train_on_stream(world_size: int, **changes: Any) -> Any:
    data = StreamDataModule(stream=Days(), global_tokens=16, max_length=8)
    return fit(world_size, data, dynamic=True, steps=4, loss="sampled_softmax", negatives="in_batch", **changes)


@pytest.mark.dist
def test_a_stream_without_vocabulary_trains_and_ranks_the_named_corpus(gloo: Any) -> None:
    ((losses, metrics),) = gloo(1).run(train_on_stream, 1, corpus=list(IDS))
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert set(metrics[0]) >= {"val/HR@4", "val/NDCG@4", "val/loss"}
