"""StepProfiler: traces of real runs are opened, and what the table says is compared with work of known length."""

from __future__ import annotations

import gzip
import json
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.callbacks import StepProfiler
from lightning_gr.observability.time_shares import CLASSES

pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return torch.randn(4, 8, generator=torch.Generator().manual_seed(index))


class Model(pl.LightningModule):
    """Computes, and on rank 1 sleeps besides, which rank 0 waits for; `tables` has rows looked up."""

    def __init__(self, *, tables: bool = False, sleep: float = 0.0) -> None:
        super().__init__()
        self.sleep, self.losses = sleep, []
        self.net = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 1))
        if tables:
            from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

            config = EmbeddingBagConfig(name="t", num_embeddings=40, embedding_dim=8, feature_names=["f"])
            self.tables = EmbeddingBagCollection(tables=[config], device=torch.device("cpu"))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        big = torch.ones(256, 256)
        for _ in range(4):
            big = big @ big / 256
        if self.global_rank == 1:
            time.sleep(self.sleep)
        x = self.tables(batch)["f"] if hasattr(self, "tables") else batch
        loss = self.net(x).square().mean()
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.05)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def collate(rows: list[Any]) -> Any:
    from torchrec import KeyedJaggedTensor

    ids = torch.cat([row.abs().flatten()[:4].mul(10).long() % 40 for row in rows])
    return KeyedJaggedTensor(["f"], ids, lengths=torch.full((len(rows),), 4))


class Asks(pl.Callback):
    """Asks for a recording after some step, as a user does."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step:
            self.file.touch()


def fit(
    folder: str | Path,
    *,
    kind: str = "auto",
    world: int = 1,
    steps: int = 10,
    seconds: float = 0.0,
    sleep: float = 0.0,
    ask_at: int | None = None,
    given: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    callbacks: tuple[Any, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """A short run; `given` is the profiler's, and None leaves it out."""
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(3)
    ours = kind == "balanced"
    module = Model(tables=ours, sleep=sleep)
    loader = torch.utils.data.DataLoader(Rows(200, seconds), batch_size=2, collate_fn=collate if ours else None)
    more: list[Any] = [] if given is None else [StepProfiler(dirpath=str(folder), **given)]
    if ask_at is not None:
        more.insert(0, Asks(Path(folder) / "record", ask_at))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1) if ours else kind,
        callbacks=[*more, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(
            {"max_steps": steps, "log_every_n_steps": 2, "logger": False, "enable_checkpointing": bool(callbacks)}
            | settings
        ),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, torch.utils.data.DataLoader(Rows(2)), ckpt_path=ckpt_path)
    return {
        "losses": module.losses,
        "weight": module.net[1].weight.detach().numpy().copy(),
        "said": [str(x.message) for x in caught if str(x.message).startswith("StepProfiler")],
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def recorded(first: int, world: int = 1) -> set[str]:
    traces = {f"trace-step={first}-rank={rank}.json.gz" for rank in range(world)}
    return traces | {f"time-shares-step={first}.{kind}" for kind in ("txt", "json")}


def shares(folder: Path, first: int) -> list[dict[str, float]]:
    """By rank, from the file; they add up."""
    found = json.loads((folder / f"time-shares-step={first}.json").read_text())
    for rank in found["ranks"]:
        assert set(rank["ms"]) == set(rank["share"]) == set(CLASSES)
        assert sum(rank["share"].values()) == pytest.approx(1)
        assert all(value >= 0 for value in rank["ms"].values())
    text = (folder / f"time-shares-step={first}.txt").read_text()
    assert all(name in text for name in CLASSES)
    return [rank["ms"] for rank in found["ranks"]]


def events(folder: Path, first: int, rank: int = 0) -> list[dict[str, Any]]:
    with gzip.open(folder / f"trace-step={first}-rank={rank}.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def steps_of(folder: Path, first: int, rank: int = 0) -> list[dict[str, Any]]:
    return [event for event in events(folder, first, rank) if event["name"].startswith("lightning-gr step ")]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["ddp", "balanced"])
def test_two_ranks_are_recorded(gloo: Any, tmp_path: Path, kind: str) -> None:
    given = {"start_step": 4, "num_steps": 3}
    gloo(2).run(fit, str(tmp_path), kind=kind, world=2, sleep=0.1, given=given)
    assert names(tmp_path) == recorded(4, 2)
    table = shares(tmp_path, 4)
    for rank, row in enumerate(table):
        steps = steps_of(tmp_path, 4, rank)
        assert [step["name"] for step in steps] == [f"lightning-gr step {number}" for number in (4, 5, 6)]
        assert sum(step["dur"] for step in steps) / 3e3 == pytest.approx(sum(row.values()), rel=0.02, abs=5)
        assert row["compute"] > 0.1
        assert any(event.get("cat") == "stage" for event in events(tmp_path, 4, rank)) == (kind == "balanced")
    # Rank 1 sleeps, which nobody but idle time can be; rank 0 waits for it in the exchange of gradients.
    assert table[1]["idle"] > 95
    assert table[0]["exposed exchange"] > 60 > table[0]["idle"]
    assert sum(table[0].values()) == pytest.approx(sum(table[1].values()), rel=0.2)


def test_waits_for_data_and_evaluations(tmp_path: Path) -> None:
    fit(tmp_path, seconds=0.01, given={"start_step": 3, "num_steps": 4}, val_check_interval=2)
    (row,) = shares(tmp_path, 3)
    assert 19 < row["data wait"] < 60, "two rows a batch"
    assert row["idle"] < 40, "an evaluation is 100 ms, after every second step"
    assert row["exposed exchange"] == row["copy"] == 0
    took = sum(step["dur"] for step in steps_of(tmp_path, 3)) / 4e3
    assert took - sum(row.values()) > 25, "which the trace has and the table has not"


@pytest.mark.dist
def test_a_recording_can_be_asked_for(gloo: Any, tmp_path: Path) -> None:
    given = {"start_step": None, "num_steps": 2}
    gloo(2).run(fit, str(tmp_path), kind="ddp", world=2, steps=12, ask_at=3, given=given)
    assert names(tmp_path) == recorded(4, 2)
    assert [len(steps_of(tmp_path, 4, rank)) for rank in range(2)] == [2, 2]


def test_a_step_has_all_of_its_batches(tmp_path: Path) -> None:
    fit(tmp_path, steps=5, accumulate_grad_batches=3, given={"start_step": 0, "num_steps": 2})
    assert len(steps_of(tmp_path, 0)) == 2
    assert [event["name"] for event in events(tmp_path, 0)].count("PowBackward0") == 6


def test_a_run_that_ends_before(tmp_path: Path) -> None:
    said = fit(tmp_path, steps=5, given={"start_step": 3, "num_steps": 4})["said"]
    assert said == ["StepProfiler: training ended after 2 of num_steps=4 steps; what was recorded is written"]
    assert len(steps_of(tmp_path, 3)) == 3, "and one that never came"
    assert sum(shares(tmp_path, 3)[0].values()) > 0
    said = fit(tmp_path / "late", steps=5, given={"start_step": 30})["said"]
    assert len(said) == 1
    assert "training ended at step 5, before start_step=30: nothing was recorded" in said[0]
    assert names(tmp_path / "late") == set()


def test_after_a_resume_steps_count_on(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True)
    fit(tmp_path / "first", steps=6, given={"start_step": 8}, callbacks=(save,))
    path = str(tmp_path / "saved" / "last.ckpt")
    fit(tmp_path / "next", steps=12, given={"start_step": 8, "num_steps": 2}, ckpt_path=path)
    assert names(tmp_path / "next") == recorded(8)
    said = fit(tmp_path / "past", steps=12, given={"start_step": 2}, ckpt_path=path)["said"]
    assert len(said) == 1
    assert "start_step=2 lies before step 6, from which training goes on" in said[0]


class Fails(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyError("lost")


def test_a_run_that_fails_leaves_no_profiler_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lost"):
        fit(tmp_path, given={"start_step": 0}, callbacks=(Fails(),))
    assert fit(tmp_path, given={"start_step": 0, "num_steps": 1})["said"] == []
    assert names(tmp_path) == recorded(0)


def test_traces_are_beside_the_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    profiler = StepProfiler(start_step=1, num_steps=1)
    fit(tmp_path, callbacks=(profiler,), logger=logger, enable_checkpointing=False, steps=3)
    assert profiler.folder == tmp_path / "run" / "version_0" / "profile"
    assert names(profiler.folder) == recorded(1)


class NeverStarted(PyTorchProfiler):
    """Lightning's stumbles when it ends without having begun."""

    def teardown(self, stage: str | None) -> None:
        pass


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="start_step=-1: expected at least 0"):
        StepProfiler(start_step=-1)
    with pytest.raises(MisconfigurationException, match="num_steps=0: expected at least 1"):
        StepProfiler(num_steps=0)
    (tmp_path / "file").touch()
    with pytest.raises(MisconfigurationException, match=r"file.*cannot write there on rank 0 .*choose a folder"):
        fit(tmp_path / "file", given={})
    with pytest.raises(MisconfigurationException, match="PyTorchProfiler"):
        fit(tmp_path, given={}, profiler=NeverStarted(dirpath=tmp_path))


@pytest.mark.dist
@pytest.mark.parametrize(("world", "kind"), [(1, "auto"), (2, "ddp"), (2, "balanced")])
def test_no_number_of_training_changes(gloo: Any, tmp_path: Path, world: int, kind: str) -> None:
    runs = [
        gloo(world).run(fit, str(tmp_path), kind=kind, world=world, given=given)
        for given in ({"start_step": 2, "num_steps": 2}, None)
    ]
    for with_it, without_it in zip(*runs, strict=True):
        assert with_it["losses"] == without_it["losses"]
        np.testing.assert_array_equal(with_it["weight"], without_it["weight"])
