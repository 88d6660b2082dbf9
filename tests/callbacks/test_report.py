"""ReportCallback: what it keeps is what was logged and trained, on any number of ranks, however a run ends."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from lightning_gr.callbacks import ReportCallback
from lightning_gr.callbacks.report import stage_times
from lightning_gr.plugins.stage_log import StageLog
from lightning_gr.report.lengths import count_lengths
from lightning_gr.report.run import Run, read_run

pytestmark = pytest.mark.filterwarnings("ignore")


class Line(pl.LightningModule):
    """Logs known numbers; does what a test wants in a batch of its choice."""

    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None, lr: float = 0.25) -> None:
        super().__init__()
        self.save_hyperparameters("lr")
        self.head = nn.Linear(1, 1)
        self.at, self.act = at, act

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.at:
            self.act()
        loss = self.head(torch.ones(1, 1)).square().sum()
        self.log("train/loss", loss)
        self.log("train/step", float(self.global_step))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/step", float(self.global_step))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Late(pl.Callback):
    """A monitor that logs after the report's own hook."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.callback_metrics["gr/late"] = torch.tensor(float(trainer.global_step))


def fit(
    folder: Path, module: pl.LightningModule | None = None, *, dirpath: str | None = None, **settings: Any
) -> tuple[pl.Trainer, pl.LightningModule]:
    report = settings.pop("report", True)
    ckpt_path, late = settings.pop("ckpt_path", None), settings.pop("late", True)
    common: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2, "logger": False, "num_sanity_val_steps": 1}
    torch.manual_seed(0)
    module = module or Line()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=str(folder),
        callbacks=[*([ReportCallback(dirpath=dirpath)] if report else []), *([Late()] if late else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **(common | settings),
    )
    batches = torch.arange(6.0).unsqueeze(1)
    data = [DataLoader(x, batch_size=None) for x in (batches, batches[:2])]  # type: ignore[arg-type]
    trainer.fit(module, *data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer, module


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]


def test_it_keeps_what_was_logged(tmp_path: Path) -> None:
    fit(tmp_path)
    run = read_run(tmp_path)
    steps = [2, 4, 6, 8, 10, 12]
    assert run.series["train/step"].steps == steps
    assert run.series["train/step"].values == [x - 1.0 for x in steps]
    assert (run.series["val/step"].steps, run.series["val/step"].values) == ([6, 12], [6.0, 12.0])
    assert [run.series["gr/late"].values[i] for i in range(5)] == steps[:5]  # of the same step, not of the one before
    assert run.series["train/loss"].seconds == sorted(run.series["train/loss"].seconds)
    facts = facts_of(tmp_path / "report")
    assert (facts["state"], facts["step"], facts["ranks"], facts["name"]) == ("finished", 12, 1, tmp_path.name)
    assert yaml.safe_load(facts["config"])["Line"] == {"lr": 0.25}
    assert yaml.safe_load(facts["config"])["trainer"]["max_epochs"] == 2
    assert facts["environment"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(facts)
    assert "<svg" in (tmp_path / "report" / "report.html").read_text()


def test_training_is_the_same_with_it(tmp_path: Path) -> None:
    (_, one), (_, other) = fit(tmp_path / "a"), fit(tmp_path / "b", report=False)
    for x, y in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fit(tmp_path)  # the run before is replaced, and this one goes beyond the checkpoint
    trainer, _ = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    lines = (tmp_path / "report" / "run.jsonl").read_text()
    beyond = json.dumps({"step": 8, "seconds": 9.0, "values": {"train/step": -1.0}})
    (tmp_path / "report" / "run.jsonl").write_text(f'{lines}{beyond}\n{{"step": 9, "val')
    fit(tmp_path, ckpt_path=tmp_path / "end.ckpt")
    run = read_run(tmp_path)
    assert run.series["train/step"].steps == [2, 4, 6, 8, 10, 12]
    assert run.series["train/step"].values == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert run.series["train/step"].seconds == sorted(run.series["train/step"].seconds)
    assert run.notes == []


def test_a_resumed_run_elsewhere_takes_what_was_written(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first" / "checkpoints" / "end.ckpt")
    fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "checkpoints" / "end.ckpt")
    assert read_run(tmp_path / "second").series["train/step"].steps == [2, 4, 6, 8, 10, 12]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="has nothing of the steps up to 6"):
        fit(tmp_path / "third", ckpt_path=tmp_path / "end.ckpt")
    assert read_run(tmp_path / "third").series["train/step"].steps == [8, 10, 12]


def test_a_new_run_replaces_an_old_one_and_says_so(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.warns(UserWarning, match="the report of an earlier run in .* is replaced"):
        fit(tmp_path, max_epochs=1)
    assert read_run(tmp_path).last_step == 6


def fail() -> None:
    raise ValueError("lost\nin a batch")


def test_a_run_that_fails_has_its_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lost"):
        fit(tmp_path, Line(at=9, act=fail))
    facts = facts_of(tmp_path / "report")
    assert (facts["state"], facts["reason"], facts["step"]) == ("failed", "ValueError: lost in a batch", 9)
    assert read_run(tmp_path).series["train/step"].steps == [2, 4, 6, 8]
    assert "failed: ValueError: lost in a batch" in (tmp_path / "report" / "report.html").read_text()


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {x: signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "")])
def test_a_run_that_is_stopped_has_its_report(tmp_path: Path, number: int, reason: str) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011  # SIGTERMException, SystemExit
        fit(tmp_path, Line(at=9, act=lambda: os.kill(os.getpid(), number)))
    facts = facts_of(tmp_path / "report")
    assert (facts["state"], facts["reason"]) == ("interrupted", reason)
    assert (tmp_path / "report" / "report.html").is_file()


def test_what_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot start the report in .*file/x .*; training goes on without it") as said:
        trainer, _ = fit(tmp_path, dirpath=str(tmp_path / "file" / "x"))
    assert trainer.global_step == 12
    assert len([x for x in said if "ReportCallback" in str(x.message)]) == 1


def test_files_that_vanish_cost_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_gr.report.run_files.RunFiles.append", full)
    with pytest.warns(UserWarning, match="No space left on device") as said:
        trainer, _ = fit(tmp_path)
    assert trainer.global_step == 12
    assert len([x for x in said if "ReportCallback" in str(x.message)]) == 1


def test_a_run_without_a_number_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not one number was logged"):
        fit(tmp_path, log_every_n_steps=100, limit_val_batches=0, late=False)


def test_times_are_those_of_whole_batches() -> None:
    log = StageLog()
    log.add("fetch", 0, 0.0, 0.010)
    log.add("train", 0, 0.010, 0.030)  # with its backward
    log.add("fetch", 1, 0.010, 0.040)
    log.add("train", 0, 0.030, 0.035)  # the optimiser's step
    log.add("train", 1, 0.040, 0.055)
    log.add("fetch", 2, 0.055, 9.0)  # finds the end
    found = stage_times(log)
    assert found["fetch"] == pytest.approx({"ms": 20.0, "hidden": 25 / 40})
    assert found["train"]["ms"] == pytest.approx(20.0)
    assert stage_times(StageLog())["train"]["ms"] == 0


# ---- several processes -------------------------------------------------------------------------------------------


def train(folder: str, with_report: bool) -> tuple[list[float], list[int]]:
    """Losses, and the lengths of the real sequences that this rank trained."""
    from lightning_gr.callbacks import BalanceMonitor, MFUMonitor
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    losses: list[float] = []
    lengths: list[int] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))
            lengths.extend(batch.token_counts_B4.sum(1)[batch.sample_ids_B >= 0].tolist())

    warnings.simplefilter("ignore")
    pl.seed_everything(1)
    report = [ReportCallback(dirpath=f"{folder}/report", name="two ranks")] if with_report else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=SequenceBalancedStrategy(sharding="row_wise"),
        max_epochs=2,
        log_every_n_steps=3,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[*report, MFUMonitor(peak_tflops=1.0), BalanceMonitor(), Recorder()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=1, max_length=20, dropout=0.1), loss="full_softmax"
    )
    trainer.fit(model, datamodule=SequenceDataModule(path=f"{folder}/events.csv", global_tokens=80, max_length=20))
    return losses, lengths


def write_log(path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        for step in range(int(rng.integers(3, 6) if user % 3 else rng.integers(12, 25))):
            lines.append(f"u{user},{rng.integers(0, 30)},{1_000_000 + step}")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.dist
def test_two_ranks(gloo: Any, tmp_path: Path) -> None:
    write_log(tmp_path / "events.csv")
    plain = gloo(2).run(train, str(tmp_path), False)
    with_report = gloo(2).run(train, str(tmp_path), True)
    assert with_report == plain
    run: Run = read_run(tmp_path)
    lengths = np.array([x for _, of_rank in with_report for x in of_rank])
    assert run.lengths == count_lengths(lengths).tolist()
    assert {"gr/mfu", "gr/tokens_per_second", "gr/imbalance_flops", "val/NDCG@10"} <= set(run.series)
    assert run.facts["ranks"] == 2
    assert set(run.facts["balance"]["dealt"]) == {"contiguous", "lpt"}
    steps = run.facts["balance"]["steps"]
    tokens = [row["tokens_mean"] * steps for row in run.facts["balance"]["dealt"]["lpt"]]
    assert tokens == pytest.approx([sum(of_rank) for _, of_rank in with_report])
    page = (tmp_path / "report" / "report.html").read_text()
    for title in (
        "Utilisation of the device",
        "Time of training",
        "Lengths of training sequences",
        "before and after balancing",
    ):
        assert title in page
