"""What monitors write, read back from the files of TensorBoard, CSV, W&B and MLflow."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_gr.callbacks import MFUMonitor
from lightning_gr.models.forward_flops import ForwardFlops

pytestmark = pytest.mark.filterwarnings("ignore")

Rows = dict[int, dict[str, float]]
"""By step, what was written."""

NAMES = {
    *("gr/mfu", "gr/hfu", "gr/tflops_per_device", "gr/samples_per_second", "gr/attention_share"),
    *("gr/flops_total", "gr/peak_memory_gib"),
}
OWN = {"train/loss", "train/at"}


class Model(pl.LightningModule):
    """Logs as modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def flops(self, batch: Any) -> ForwardFlops:
        return ForwardFlops(attention=2**40 + len(batch), head=3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss)
        self.log("train/at", float(self.global_step))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recorder(pl.Callback):
    """Metrics that callbacks see behind each log step; stands behind the monitor."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        found = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("gr/")}
        if found and (not self.seen or found != self.seen[-1]):
            self.seen.append(found)


def fit(logger: Any, *, accumulate: int = 1) -> list[dict[str, float]]:
    """Eight batches an epoch, with evaluations between, and log steps that are not theirs."""
    recorder, loader = Recorder(), torch.utils.data.DataLoader(torch.randn(32, 3), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        val_check_interval=4,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        callbacks=[MFUMonitor(peak_tflops=1.0), recorder],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), loader, loader)
    return recorder.seen


def check(rows: Rows, seen: list[dict[str, float]], *, own: set[str], rel: float) -> None:
    """Names, values, and the steps of Lightning's own metrics."""
    assert rows, "nothing was written"
    ours = {step: row for step, row in rows.items() if NAMES & set(row)}
    lightnings = {step for step, row in rows.items() if own & set(row)}
    assert set(ours) == lightnings
    assert len(ours) == len(seen) > 1
    for (_, row), known in zip(sorted(ours.items()), seen, strict=True):
        found = {name: value for name, value in row.items() if name.startswith("gr/")}
        assert set(found) == set(known) == NAMES
        assert found == pytest.approx(known, rel=rel)
    for step, row in ours.items():
        assert row["train/at"] == step, "the module logged the step it was at"


def read_tensorboard(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    rows: Rows = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name == "epoch" or name not in rows[event.step], "written twice"
            rows[event.step][name] = event.value
    return rows


def read_csv(folder: Path) -> Rows:
    rows: Rows = defaultdict(dict)
    with open(folder / "metrics.csv") as file:
        for line in csv.DictReader(file):
            step = int(line.pop("step"))
            rows[step] |= {name: float(value) for name, value in line.items() if value}
    return rows


def read_wandb(folder: Path) -> Rows:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    rows: Rows = defaultdict(dict)
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        line = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
        step = int(line["trainer/global_step"])
        rows[step] |= {name: float(x) for name, x in line.items() if name.startswith(("gr/", "train/", "val/"))}
    return rows


def read_mlflow(folder: Path, run: str) -> Rows:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{folder}")
    rows: Rows = defaultdict(dict)
    for name in client.get_run(run).data.metrics:
        for metric in client.get_metric_history(run, name):
            assert name == "epoch" or name not in rows[metric.step], "written twice"
            rows[metric.step][name] = metric.value
    return rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tensorboard_has_every_value(tmp_path: Path, accumulate: int) -> None:
    seen = fit(TensorBoardLogger(str(tmp_path), name="", version=""), accumulate=accumulate)
    check(read_tensorboard(tmp_path), seen, own=OWN, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_csv_has_every_value(tmp_path: Path, accumulate: int) -> None:
    seen = fit(CSVLogger(str(tmp_path), name="", version=""), accumulate=accumulate)
    rows = read_csv(tmp_path)
    check(rows, seen, own=OWN, rel=1e-6)
    # Totals are written in full, beyond what float32 holds.
    totals = [row["gr/flops_total"] for _, row in sorted(rows.items()) if "gr/flops_total" in row]
    batches = [3 * accumulate * (number + 1) for number in range(len(totals))]
    if accumulate == 1:
        assert totals == [3.0 * count * (2**40 + 4 + 3) for count in batches]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_has_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("ERROR_REPORTING", "false")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))
    import wandb

    try:
        seen = fit(WandbLogger(save_dir=str(tmp_path), offline=True, project="tests"))
        assert wandb.run is not None
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
        wandb.teardown()
    check(read_wandb(tmp_path), seen, own=OWN, rel=1e-6)
    assert {name: summary[name] for name in NAMES} == pytest.approx(seen[-1], rel=1e-6)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_every_value_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes packages that mlflow-skinny leaves out
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    logger = MLFlowLogger(experiment_name="tests", tracking_uri=f"file:{tmp_path}")
    seen = fit(logger)
    check(read_mlflow(tmp_path, str(logger.run_id)), seen, own=OWN, rel=1e-6)


def test_loggers_beside_each_other_are_told_the_same(tmp_path: Path) -> None:
    loggers: list[Logger] = [
        TensorBoardLogger(str(tmp_path / "board"), name="", version=""),
        CSVLogger(str(tmp_path / "csv"), name="", version=""),
    ]
    seen = fit(loggers)
    boards, lines = read_tensorboard(tmp_path / "board"), read_csv(tmp_path / "csv")
    for rows in (boards, lines):
        check(rows, seen, own=OWN, rel=1e-6)
    assert boards.keys() == lines.keys()
    assert any("val/loss" in row for row in lines.values())
