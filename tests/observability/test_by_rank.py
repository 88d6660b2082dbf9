"""Numbers of every rank, and what loggers are told of them."""

from __future__ import annotations

import gc
import math
import warnings
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_gr.observability.by_rank import by_rank, is_log_step, log_values


def test_one_process_has_its_own_values() -> None:
    assert by_rank({"b": 2.5, "a": 2**53 - 1}) == {"b": [2.5], "a": [2.0**53 - 1]}
    assert by_rank({}) == {}


def gather(values: dict[str, float]) -> Any:
    import torch.distributed as dist

    rank = dist.get_rank()
    return [by_rank({name: value + rank for name, value in values.items()}) for _ in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_has_the_values_of_all_in_order(gloo: Any, world: int) -> None:
    large = float(2**53 - 8)  # float32 would lose what is counted
    for found, again in gloo(world).run(gather, {"z": large, "a": 0.5, "nothing": math.nan}):
        assert list(found) == ["z", "a", "nothing"]
        assert found["z"] == [large + rank for rank in range(world)]
        assert found["a"] == again["a"] == [0.5 + rank for rank in range(world)]
        assert all(math.isnan(x) for x in found["nothing"])
        assert len(found["nothing"]) == world


class Told(DummyLogger):
    def __init__(self, *, error: str | None = None) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.error = error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.error is not None:
            raise OSError(self.error)
        self.rows.append((step, dict(metrics)))
        metrics.clear()  # as a logger may that takes names out


def trainer_of(*loggers: Any, rank: int = 0) -> Any:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=41))
    return SimpleNamespace(callback_metrics={}, is_global_zero=rank == 0, loggers=list(loggers), fit_loop=loop)


def told(*args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_values(*args)
    return [str(x.message) for x in caught if "training goes on" in str(x.message)]


def test_a_logger_that_fails_costs_one_warning_and_no_other_logger() -> None:
    good, bad, last = Told(), Told(error="disk is full"), Told()
    trainer, values = trainer_of(good, bad, last), {"gr/mfu": 0.5, "gr/hfu": 0.75}
    (said,) = told(trainer, values)
    assert "Told: cannot write gr/mfu and others (OSError: disk is full)" in said
    assert told(trainer, values) == []
    assert good.rows == last.rows == [(41, values)] * 2
    assert {name: float(x) for name, x in trainer.callback_metrics.items()} == values
    assert told(trainer_of(Told(error="another")), values) != []


def test_loggers_are_told_apart_after_others_are_gone() -> None:
    """An address is used again."""
    for _ in range(4):
        logger = Told(error="full")
        assert len(told(trainer_of(logger), {"gr/mfu": 0.5})) == 1
        del logger
        gc.collect()


def test_other_ranks_write_nothing_and_know_everything() -> None:
    logger = Told()
    trainer = trainer_of(logger, rank=1)
    log_values(trainer, {"gr/mfu": 0.5})
    assert logger.rows == []
    assert float(trainer.callback_metrics["gr/mfu"]) == 0.5
    log_values(trainer_of(), {"gr/mfu": 0.5})


class Steps(pl.Callback):
    def __init__(self) -> None:
        self.ours: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_log_step(trainer):
            self.ours.append(batch_idx)
            log_values(trainer, {"gr/at": float(batch_idx)})


class Logged(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("at", float(batch_idx))
        return self.net(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("every", "accumulate", "expected"),
    [(1, 1, list(range(7))), (3, 1, [2, 5]), (2, 2, [3, 6]), (1, 3, [2, 5, 6]), (50, 1, []), (0, 1, [])],
)
def test_log_steps_are_lightnings_own(every: int, accumulate: int, expected: list[int]) -> None:
    logger, steps = Told(), Steps()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        callbacks=[steps],
        log_every_n_steps=every,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logged(), torch.utils.data.DataLoader(torch.randn(7, 2)))
    assert steps.ours == expected
    # The same steps, and of each the same batch.
    own = {step: row["gr/at"] for step, row in logger.rows if "gr/at" in row}
    assert own == {step: row["at"] for step, row in logger.rows if "at" in row}
    assert len(own) == len(expected)
