"""RankingModule on dynamic tables: raw ids give what rows of static tables with the same values give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.data import LastShare, RankingDataModule, Task
from lightning_gr.data.formats import Columns, open_log
from lightning_gr.data.prepare import prepare
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.models import DLRM, MTGR, RankingModule

IDS = (-(2**63), 2**63 - 1, -1, 0, 1, 7)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ranking")
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp,click,shop"]
    for user in range(-6, 6):
        for step in range(int(rng.integers(4, 14))):
            item = int(rng.integers(len(IDS)))
            lines.append(
                f"u{user},{IDS[item]},{1_000_000 + 60 * step},{int(rng.random() < item / 6)},{'abc'[item % 3]}"
            )
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    columns = Columns(labels=("click",), sparse=("shop",))
    return str(prepare(open_log(folder / "log.csv", columns=columns), folder / "store").path)


def make_data(store: str, **changes: Any) -> RankingDataModule:
    split = LastShare(val=0.2, test=0.2)
    given: dict[str, Any] = {"path": store, "tasks": {"click": Task("click")}, "split": split, "seed": 3}
    return RankingDataModule(**(given | {"global_tokens": 64, "max_history": 8, "block": 4} | changes))


def make_module(network: str, data: Any, *, dynamic: bool) -> RankingModule:
    torch.manual_seed(5)
    mtgr = network == "mtgr"
    kind: Any = MTGR(dim=8, num_layers=1, num_heads=2, max_length=32, dropout=0.0) if mtgr else DLRM(dim=8, dropout=0.0)
    module = RankingModule(
        network=kind,
        embedding_dim=4,
        embedding_std=1.0,
        dynamic_tables=DynamicTables() if dynamic else None,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    module.trainer = SimpleNamespace(datamodule=data, training=True)  # type: ignore[assignment]
    module.setup("predict")
    module.configure_model()
    return module.eval()


@torch.no_grad()
def values_of(module: RankingModule, feature: str, ids: torch.Tensor) -> torch.Tensor:
    from torchrec import KeyedJaggedTensor

    assert module.features is not None
    keys = [*module.features.contextual, *module.features.tokens]
    lengths = torch.tensor([len(ids) if key == feature else 0 for key in keys])
    assert module.tables is not None
    return module.tables(KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths))[feature].values()


@pytest.mark.parametrize("network", ["mtgr", "dlrm"])
def test_losses_and_predictions_of_raw_ids_are_those_of_rows(network: str, store: str) -> None:
    raw_data, row_data = make_data(store, raw_ids=True), make_data(store)
    raw, rows = make_module(network, raw_data, dynamic=True), make_module(network, row_data, dynamic=False)
    missing = rows.load_state_dict(raw.state_dict(), strict=False)
    assert all("embeddings" in name for name in missing.missing_keys)
    keys = {"item_id": raw_data.item_keys, "user_id": raw_data.user_keys}
    assert rows.tables is not None
    for name, weight in rows.tables.state_dict().items():
        feature = name.split(".")[-2]
        ids = keys.get(feature)
        weight.copy_(values_of(raw, feature, torch.arange(len(weight)) if ids is None else torch.as_tensor(ids)))
    for loader in ("train_dataloader", "val_dataloader", "predict_dataloader"):
        for of_raw, of_rows in zip(getattr(raw_data, loader)(), getattr(row_data, loader)(), strict=True):
            losses = [float(m.loss_sums(m(b), b)["click"].detach()) for m, b in ((raw, of_raw), (rows, of_rows))]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
            found, wanted = raw.predict_step(of_raw, 0), rows.predict_step(of_rows, 0)
            for name in ("user_rows", "item_rows"):
                assert torch.equal(found[name], wanted[name])
            torch.testing.assert_close(found["probabilities"], wanted["probabilities"], rtol=1e-5, atol=1e-6)


def test_raw_ids_need_dynamic_tables(store: str) -> None:
    with pytest.raises(MisconfigurationException, match="dynamic_tables: not given, and the data has raw ids"):
        make_module("mtgr", make_data(store, raw_ids=True), dynamic=False)


class Recorder(pl.Callback):
    """Losses of the global batch, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def train(world_size: int, store: str, *, raw_ids: bool, dynamic: bool) -> Any:
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    data = make_data(store, raw_ids=raw_ids)
    torch.manual_seed(7)
    module = RankingModule(
        network=MTGR(dim=8, num_layers=1, num_heads=2, max_length=32, dropout=0.0),
        embedding_dim=4,
        dynamic_tables=DynamicTables() if dynamic else None,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        callbacks=[recorder],
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return recorder.losses, trainer.validate(module, datamodule=data, verbose=False)[0]


@pytest.mark.dist
def test_dynamic_tables_train_as_static_ones_on_any_number_of_ranks(gloo: Any, store: str) -> None:
    ((static, of_static),) = gloo(1).run(train, 1, store, raw_ids=False, dynamic=False)
    assert len(set(static)) > 4
    ((raw, of_raw),) = gloo(1).run(train, 1, store, raw_ids=True, dynamic=True)
    for world_size in (1, 2):
        for losses, metrics in gloo(world_size).run(train, world_size, store, raw_ids=False, dynamic=True):
            assert losses == pytest.approx(static, rel=1e-4)
            assert metrics == pytest.approx(of_static, rel=1e-4)
        for losses, metrics in gloo(world_size).run(train, world_size, store, raw_ids=True, dynamic=True):
            assert losses == pytest.approx(raw, rel=1e-4)
            assert metrics == pytest.approx(of_raw, rel=1e-4)
