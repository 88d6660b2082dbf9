"""Negatives on one, two and three ranks: the same items for each label, and the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_gr.data import SequenceDataModule
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule
from lightning_gr.negatives import (
    HardNegatives,
    InBatchNegatives,
    MixedNegatives,
    NegativeSampler,
    Offload,
    PopularityNegatives,
    UniformNegatives,
)
from tests.more import more

ITEMS, STEPS = 30, 3
KINDS = [("popularity", True), ("mixed", False), ("hard", False), ("hard", True), ("in_batch", True)]
"""With dynamic tables of raw ids, or static ones."""


def sampler_of(kind: str) -> NegativeSampler:
    uniform = UniformNegatives(num_negatives=5)
    if kind == "mixed":
        popularity = PopularityNegatives(num_negatives=4, log_q=False, smoothing=1.0)
        return MixedNegatives(samplers=[uniform, popularity, InBatchNegatives()], log_q=True)
    return {
        "popularity": PopularityNegatives(num_negatives=4, smoothing=1.0),
        "hard": HardNegatives(of=uniform, num_negatives=2),
        "in_batch": InBatchNegatives(log_q=True),
        "rank": InBatchNegatives(scope="rank"),
        "uniform": uniform,
    }[kind]


class Recorder(pl.Callback):
    """Losses of the global batch, and the negatives of each label by sample and position."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.negatives: dict[tuple[int, int, int], list[int]] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))
        if not module.contrast.draws:
            return
        tokens = batch.labels["next_item"].tokens_N
        places = batch.features["drawn"].values().view(len(tokens), -1)[:, 1:]
        items = batch.features["sampled"].values()[places].tolist()
        ids = batch.sample_ids_B[batch.layout.sequence_T[tokens]].tolist()
        for sample, position, drawn in zip(ids, batch.layout.position_T[tokens].tolist(), items, strict=True):
            key = (trainer.global_step, sample, position)
            assert key not in self.negatives
            self.negatives[key] = drawn


def fit(world_size: int, log: str, kind: str, *, dynamic: bool = False, **changes: Any) -> Any:
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8, dropout=0.0),
        loss="sampled_softmax",
        negatives=sampler_of(kind),
        top_k=[4],
        temperature=0.3,
        dynamic_tables=DynamicTables() if dynamic else None,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        **changes,
    )
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        callbacks=[recorder],
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = SequenceDataModule(path=log, global_tokens=48, max_length=8, seed=3, raw_ids=dynamic)
    trainer.fit(module, datamodule=data)
    return recorder.losses, recorder.negatives


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Histories whose items are the rarer, the higher their number."""
    path: Path = tmp_path_factory.mktemp("log") / "log.csv"
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(24):
        for step in range(int(rng.integers(4, 14))):
            lines.append(f"{user},{7 * min(int(rng.exponential(6)), ITEMS - 1) + 3},{1_000_000 + 60 * step}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [*more(2), 3])
@pytest.mark.parametrize(("kind", "dynamic"), KINDS)
def test_any_number_of_ranks_draws_the_same_and_has_the_same_losses(
    gloo: Any, log: str, kind: str, dynamic: bool, world_size: int
) -> None:
    changes: dict[str, Any] = {"dynamic": dynamic}
    if kind == "hard":
        changes |= {"negatives_dtype": "bfloat16", "negatives_offload": Offload(segment=3)}
    ((wanted, drawn),) = gloo(1).run(fit, 1, log, kind, **changes)
    assert len(set(wanted)) == STEPS
    assert bool(drawn) == (kind != "in_batch")
    found = gloo(world_size).run(fit, world_size, log, kind, **changes)
    together: dict[Any, Any] = {}
    for losses, negatives in found:
        assert losses == pytest.approx(wanted, rel=2e-4)
        assert not together.keys() & negatives.keys()
        together |= negatives
    assert together == drawn


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "changes"), [("rank", {}), ("uniform", {"logit_sharing": 20})])
def test_what_is_of_the_rank_alone_has_other_losses_on_two(
    gloo: Any, log: str, kind: str, changes: dict[str, Any]
) -> None:
    ((one, drawn),) = gloo(1).run(fit, 1, log, kind, **changes)
    found = gloo(2).run(fit, 2, log, kind, **changes)
    assert {x: y for _, of_rank in found for x, y in of_rank.items()} == drawn
    for two, _ in found:
        assert np.isfinite(two).all()
        assert two[0] < one[0] - 0.05, "fewer negatives, a lower loss"
