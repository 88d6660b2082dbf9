"""ResumableCSVLogger: whose rows are there after fit, test, resumed fit and a fit that begins anew."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gr.callbacks import ResumableCSVLogger
from lightning_gr.report.run import read_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TRAINED = "train/loss"


class Model(pl.LightningModule):
    """Logs its step in training, and a column of its own in each of validation and test."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.shift = shift

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log(TRAINED, self.global_step + self.shift)
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.net(batch).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/HR@10", 0.25 + self.shift)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, *, steps: int = -1, every: int = 4) -> pl.Trainer:
    """As a new process would have it; epochs are of 8 steps."""
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=1,
        logger=ResumableCSVLogger(str(folder), name="run", version="csv"),
        callbacks=[
            ModelCheckpoint(dirpath=folder / "saved", filename="{step}", every_n_train_steps=every, save_top_k=-1)
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.ones(8, 1))


def fit(folder: Path, steps: int, *, shift: float = 0.0, ckpt_path: str | None = None) -> None:
    trainer(folder, steps=steps).fit(Model(shift), loader(), loader(), ckpt_path=ckpt_path)


def evaluate(folder: Path) -> None:
    trainer(folder).test(Model(), loader(), verbose=False, ckpt_path=str(folder / "saved" / "step=4.ckpt"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "csv" / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def column(folder: Path, name: str) -> dict[int, float]:
    found = [(int(row["step"]), float(row[name])) for row in rows(folder) if name in row]
    assert len(found) == len(dict(found)), "a step is there twice"
    return dict(found)


def test_after_fit_test_and_a_resumed_fit_all_rows_are_there(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    first = rows(tmp_path)
    evaluate(tmp_path)
    assert rows(tmp_path)[: len(first)] == first
    assert column(tmp_path, "test/HR@10") == {0: 0.25}
    fit(tmp_path, 12, ckpt_path=str(tmp_path / "saved" / "step=8.ckpt"))
    assert column(tmp_path, TRAINED) == {step: step for step in range(12)}
    assert list(column(tmp_path, "val/loss")) == [7]
    assert column(tmp_path, "test/HR@10") == {0: 0.25}
    run = read_run(tmp_path / "run" / "csv")
    assert run.series[TRAINED].steps == list(range(12))
    assert run.series["test/HR@10"].values == [0.25]


def test_steps_that_are_trained_again_are_there_once(tmp_path: Path) -> None:
    fit(tmp_path, 11)
    evaluate(tmp_path)
    fit(tmp_path, 6, shift=100.0, ckpt_path=str(tmp_path / "saved" / "step=4.ckpt"))
    # Steps 4 and 5 are of the second run; the first one's from 6 on, and its validation at 7, would contradict it.
    assert column(tmp_path, TRAINED) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 104, 5: 105}
    assert column(tmp_path, "val/loss") == {}
    assert column(tmp_path, "test/HR@10") == {0: 0.25}


def test_a_validation_by_itself_is_no_point_of_the_trainings_curve(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    before = column(tmp_path, "val/loss")
    trainer(tmp_path).validate(Model(), loader(), verbose=False, ckpt_path=str(tmp_path / "saved" / "step=4.ckpt"))
    assert column(tmp_path, "val/loss") == before
    assert list(column(tmp_path, "validate/loss")) == [0]
    fit(tmp_path, 12, ckpt_path=str(tmp_path / "saved" / "step=8.ckpt"))
    assert list(column(tmp_path, "validate/loss")) == [0]
    assert read_run(tmp_path / "run" / "csv").series["val/loss"].steps == list(before)
    both = trainer(tmp_path, steps=3)
    both.fit(Model(), loader())
    both.validate(Model(), loader(), verbose=False)
    assert list(column(tmp_path, "val/loss")) == [3], "whose step is known"


def test_a_test_behind_its_training_stays(tmp_path: Path) -> None:
    both = trainer(tmp_path, steps=8)
    both.fit(Model(), loader(), loader())
    both.test(Model(), loader(), verbose=False)
    assert list(column(tmp_path, "test/HR@10")) == [8]
    fit(tmp_path, 12, ckpt_path=str(tmp_path / "saved" / "step=8.ckpt"))
    assert list(column(tmp_path, TRAINED)) == list(range(12))
    assert list(column(tmp_path, "test/HR@10")) == [8]


def test_a_fit_that_begins_anew_replaces_the_file_and_says_so(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    evaluate(tmp_path)
    with pytest.warns(UserWarning, match=r"metrics\.csv: 10 rows of an earlier run are replaced, .*ckpt_path=last"):
        fit(tmp_path, 3, shift=50.0)
    assert column(tmp_path, TRAINED) == {0: 50, 1: 51, 2: 52}
    assert column(tmp_path, "test/HR@10") == {}


def test_one_trainer_that_fits_twice_goes_on(tmp_path: Path) -> None:
    twice = trainer(tmp_path, steps=3)
    model = Model()
    twice.fit(model, loader())
    twice.fit_loop.epoch_loop.max_steps = 6
    twice.fit(model, loader())
    assert list(column(tmp_path, TRAINED)) == list(range(6))


def test_a_torn_line_is_left_out_where_training_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    file = tmp_path / "run" / "csv" / "metrics.csv"
    file.write_text(file.read_text() + "0,")
    fit(tmp_path, 10, ckpt_path=str(tmp_path / "saved" / "step=8.ckpt"))
    assert list(column(tmp_path, TRAINED)) == list(range(10))
    assert all("step" in row for row in rows(tmp_path))


def test_columns_that_a_test_beside_the_training_adds_are_kept_apart(tmp_path: Path) -> None:
    training = ResumableCSVLogger(str(tmp_path), name="run", version="csv", flush_logs_every_n_steps=1)
    training.log_metrics({TRAINED: 0.9}, step=9)
    beside = ResumableCSVLogger(str(tmp_path), name="run", version="csv", flush_logs_every_n_steps=1)
    beside.log_metrics({"test/HR@10": 0.25}, step=9)
    training.log_metrics({TRAINED: 0.8}, step=19)
    assert column(tmp_path, TRAINED) == {9: 0.9, 19: 0.8}
    assert column(tmp_path, "test/HR@10") == {9: 0.25}


def test_a_line_that_broke_off_behind_a_number_is_not_glued_to_the_next(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    file = tmp_path / "run" / "csv" / "metrics.csv"
    file.write_text(file.read_text() + "0,1")
    fit(tmp_path, 10, ckpt_path=str(tmp_path / "saved" / "step=8.ckpt"))
    assert column(tmp_path, TRAINED) == {step: float(step) for step in range(10)}
