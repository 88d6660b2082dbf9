"""``fit --init_from``: weights of a checkpoint, value by value, and nothing else of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.callbacks import ExponentialMovingAverage, InitFrom
from lightning_gr.cli import main

ROWS = 11


class InitCliModel(pl.LightningModule):
    """A plain module that tells what it began with."""

    begun: list[Any] = []

    def __init__(self, *, width: int = 2, extra: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.head = nn.Linear(3, width)
        self.extra = nn.Linear(2, 2) if extra else None

    def on_train_start(self) -> None:
        state = {name: value.clone() for name, value in self.state_dict().items()}
        states = len(self.trainer.optimizers[0].state)
        self.begun.append((self.trainer.global_step, self.trainer.current_epoch, states, state))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(self.layer(batch)).sum()

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


FIT = ["fit", "--model", "InitCliModel", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
FIT += ["--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu", "--trainer.devices=1"]
FIT += ["--trainer.max_steps=3"]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command saves its configuration where it runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file of Lightning, of two steps."""
    path = tmp_path_factory.mktemp("file") / "plain.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(InitCliModel())
    trainer.save_checkpoint(path)
    return path


def saved_in(file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return state


def test_a_file_by_the_command(file: Path) -> None:
    InitCliModel.begun.clear()
    assert main([*FIT, "--init_from", str(file)]) == 0
    ((step, epoch, states, state),) = InitCliModel.begun
    assert (step, epoch, states) == (0, 0, 0)
    assert state.keys() == saved_in(file).keys()
    for name, value in saved_in(file).items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_what_does_not_fit_is_listed_once(file: Path) -> None:
    InitCliModel.begun.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main([*FIT, "--init_from", str(file), "--model.width=5", "--model.extra=true"]) == 0
    (said,) = [str(w.message) for w in caught if "init_from" in str(w.message)]
    assert "2 weights loaded" in said
    assert "not in the checkpoint: extra.weight, extra.bias" in said
    assert "of another shape: head.weight (2, 3) for (5, 3), head.bias (2,) for (5,)" in said
    state = InitCliModel.begun[0][3]
    torch.testing.assert_close(state["layer.weight"], saved_in(file)["layer.weight"], rtol=0, atol=0)


def test_mistakes_are_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*args: str) -> str:
        assert main([*FIT, *args]) == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if "lightning-gr: error:" in x]
        assert len(lines) == 1
        return lines[0].removeprefix("lightning-gr: error: ")

    missing = tmp_path / "none.ckpt"
    assert fails("--init_from", str(missing)).startswith(f"init_from={missing}: no such file or directory; ")
    both = fails("--init_from", str(file), "--ckpt_path", str(file))
    assert both.startswith(f"init_from={file}: ckpt_path={file} brings weights of its own; ")
    assert "no such file" not in both
    (tmp_path / "torn").mkdir()
    assert "the save was cut off" in fails("--init_from", str(tmp_path / "torn"))
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    assert fails("--init_from", str(tmp_path / "junk.ckpt")).startswith(f"init_from={tmp_path / 'junk.ckpt'}: cannot")
    torch.save({"state_dict": {"other": torch.zeros(3)}}, tmp_path / "other.ckpt")
    assert "no weight fits the model" in fails("--init_from", str(tmp_path / "other.ckpt"))


def test_a_resumed_fit_keeps_its_own_weights(file: Path, tmp_path: Path) -> None:
    zeros = tmp_path / "zeros.ckpt"
    torch.save({"state_dict": {name: torch.zeros_like(x) for name, x in saved_in(file).items()}}, zeros)
    InitCliModel.begun.clear()
    for path in (None, str(file)):
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=3, callbacks=[InitFrom(path=str(zeros))], logger=False,
            enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(InitCliModel(), ckpt_path=path)
    (_, _, _, begun), (step, _, states, resumed) = InitCliModel.begun
    assert all(not value.any() for value in begun.values())
    assert (step, states) == (2, 4)
    assert all(torch.equal(resumed[name], value) for name, value in saved_in(file).items())


# ---- sharded tables ----------------------------------------------------------------------------------------------


class Tables(pl.LightningModule):
    """A table that the strategy shards, and a dense head."""

    def __init__(self, *, depth: int = 1) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(depth))

    def configure_model(self) -> None:
        if hasattr(self, "tables"):
            return
        from torchrec import EmbeddingConfig

        from lightning_gr.embeddings import embedding_collection

        self.tables = embedding_collection(
            [EmbeddingConfig(name="t", num_embeddings=ROWS, embedding_dim=4, feature_names=["f"])]
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        looked_up = self.tables(batch)["f"].values()
        return sum(((head(looked_up) - 1) ** 2).mean() for head in self.heads)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Batches(list[Any]):
    """One dataloader; Lightning takes a bare list for several."""


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


class Begin(pl.Callback):
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        dense = [len(optimizer.state) for optimizer in trainer.optimizers]
        self.found = {"weights": weights_of(module), "step": trainer.global_step, "states": dense}


def fit_tables(
    world: int, kind: str, *, path: str | None = None, save: str | None = None, seed: int = 1, depth: int = 1,
    ema: bool = False,
) -> dict[str, Any]:  # fmt: skip
    from torchrec import KeyedJaggedTensor

    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(seed)
    module, begin = Tables(depth=depth), Begin()
    callbacks: list[Any] = [begin]
    callbacks += [InitFrom(path=path)] if path else []
    callbacks += [ExponentialMovingAverage(decay=0.5)] if ema else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if kind == "plain" else SequenceBalancedStrategy(sharding=kind, sparse_lr=0.5),  # type: ignore[arg-type]
        callbacks=callbacks,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = KeyedJaggedTensor(["f"], torch.arange(3), lengths=torch.tensor([1, 2]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Batches([batch] * 3))
    if save:
        trainer.save_checkpoint(save)
    said = [str(w.message) for w in caught if "init_from" in str(w.message)]
    return begin.found | {"end": weights_of(module), "said": said}


def same(found: dict[str, Any], truth: dict[str, Any]) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.dist
def test_directories_and_files_with_tables(gloo: Any, tmp_path: Path) -> None:
    directory, single = str(tmp_path / "directory.ckpt"), str(tmp_path / "file.ckpt")
    written = gloo(2).run(fit_tables, 2, "row_wise", save=directory, ema=True)[0]["end"]
    plain = fit_tables(1, "plain", save=single)["end"]
    assert not np.array_equal(plain["tables.embeddings.t.weight"], written["tables.embeddings.t.weight"])
    for path, truth in ((directory, written), (single, plain)):
        begun = [
            *gloo(2).run(fit_tables, 2, "row_wise", path=path, seed=9),
            *gloo(2).run(fit_tables, 2, "column_wise", path=path, seed=9),
            *gloo(1).run(fit_tables, 1, "row_wise", path=path, seed=9),
            fit_tables(1, "plain", path=path, seed=9),
        ]
        for found in begun:
            same(found["weights"], truth)
            assert (found["step"], found["states"], found["said"]) == (0, [0], [])
            assert not np.array_equal(found["end"]["tables.embeddings.t.weight"], truth["tables.embeddings.t.weight"])
    deeper = gloo(2).run(fit_tables, 2, "row_wise", path=directory, seed=9, depth=2)
    for name, value in written.items():
        np.testing.assert_array_equal(deeper[0]["weights"][name], value)
    assert "3 weights loaded; not in the checkpoint: heads.1." in deeper[0]["said"][0]
    assert all(name in deeper[0]["said"][0] for name in ("heads.1.weight", "heads.1.bias"))
    assert len(deeper[0]["said"]) == 1


def test_other_items_are_refused(tmp_path: Path) -> None:
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    def fit(prefix: str, *callbacks: Any) -> pl.Trainer:
        log = tmp_path / f"{prefix}.csv"
        rows = [f"u{user},{prefix}{(user + step) % 5},{step}" for user in range(6) for step in range(5)]
        log.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
        encoder = HSTUEncoder(dim=4, num_layers=1, num_heads=1, max_length=8)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=1, limit_val_batches=0, callbacks=list(callbacks), logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        data = SequenceDataModule(path=str(log), global_tokens=64, max_length=8)
        trainer.fit(RetrievalModule(encoder=encoder, top_k=[2]), datamodule=data)
        return trainer

    path = str(tmp_path / "items.ckpt")
    fit("a").save_checkpoint(path)
    fit("a", InitFrom(path=path))
    with pytest.raises(MisconfigurationException, match="item vocabulary"):
        fit("b", InitFrom(path=path))
