"""What cannot be balanced as asked is refused or warned of, by name and with the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.dist


class Own(pl.LightningModule):
    """A user's module without sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.net(batch) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(batch))}}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unsized(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.ones(4, 2))


def planned_data(log: str) -> Any:
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    model = RetrievalModule(encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8), top_k=[1])
    return model, SequenceDataModule(path=log, global_tokens=16, max_length=8)


def attempt(log: str, case: str) -> str:
    """The refusal's text, or the warnings of a run that was not refused."""
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.plugins import SequenceBalancedStrategy

    rows = torch.utils.data.DataLoader(torch.ones(5, 2), batch_size=1)  # type: ignore[arg-type]
    unsized = torch.utils.data.DataLoader(Unsized(), batch_size=1)
    callbacks: list[Any] = []
    model, data = (Own(), rows) if case not in ("local", "scheduler", "budget") else planned_data(log)
    settings: dict[str, Any] = {
        "planned": {"mode": "planned"},
        "unsized": {"mode": "planned"},
        "local": {"mode": "local"},
        "no lengths": {"mode": "exchange"},
        "budget": {"tokens_per_rank": 7},
        "own batches": {"tokens_per_rank": 100},
    }.get(case, {})
    if case == "unsized":
        data = unsized
    if case == "scheduler":
        callbacks.append(pl.callbacks.GradientAccumulationScheduler(scheduling={1: 2}))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=SequenceBalancedStrategy(balancing=Balancing(**settings)),
        callbacks=callbacks,
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer.fit(model, data)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "\n".join(str(x.message) for x in said)


CASES = {
    "planned": "MisconfigurationException: balancing.mode=planned: DataLoader has no plan",
    "unsized": "MisconfigurationException: balancing.mode=planned: DataLoader has no length and has no plan",
    "local": "MisconfigurationException: balancing.mode=local: the training data has an index",
    "no lengths": "TypeError: the training loader yields Tensor: mode exchange counts and moves the sequences",
    "budget": "ValueError: tokens_per_rank=7: the longest sample has 8 tokens; raise it to at least 8",
    "scheduler": "MisconfigurationException: GradientAccumulationScheduler: a balanced batch carries",
    "own batches": "balancing.tokens_per_rank=100: not used, since DataLoader makes its own batches",
    "sampler": "DistributedSampler: 5 samples do not divide by 2 processes, so it repeats 1 of them",
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named(gloo: Any, tmp_path: Path, case: str) -> None:
    log = tmp_path / "log.csv"
    rows = [f"u{user},{item},{item}" for user in range(6) for item in range(12)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    assert CASES[case] in gloo(2).run(attempt, str(log), case)[0]


def test_a_depth_below_0() -> None:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_gr.plugins import SequenceBalancedStrategy

    with pytest.raises(MisconfigurationException, match="pipeline_depth=-1: expected at least 0"):
        SequenceBalancedStrategy(pipeline_depth=-1)
