"""Corners of the pipeline: what users' modules, settings and loaders do that recipes do not."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.dist


class Lookups(pl.LightningModule):
    """Looks up one feature and sums the rows.

    Args:
        keyword: whether the collection is given its features by keyword.
        asks: whether the optimiser asks how many steps there will be.
    """

    def __init__(self, *, keyword: bool = False, asks: bool = False) -> None:
        super().__init__()
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

        table = EmbeddingBagConfig(name="t", num_embeddings=30, embedding_dim=4, feature_names=["f"])
        self.tables = EmbeddingBagCollection(tables=[table], device=torch.device("cpu"))
        self.head = nn.Linear(4, 1)
        self.keyword, self.asks = keyword, asks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = self.tables(features=batch[0]) if self.keyword else self.tables(batch[0])
        losses = self.head(rows["f"]).squeeze(1) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(losses))}}

    def configure_optimizers(self) -> Any:
        if self.asks:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sized:
    """Eight batches."""

    def __iter__(self) -> Any:
        from torchrec import KeyedJaggedTensor

        for seed in range(8):
            values = torch.randint(0, 30, (6,), generator=torch.Generator().manual_seed(seed))
            yield (KeyedJaggedTensor(["f"], values, lengths=torch.tensor([1, 2, 3])),)

    def __len__(self) -> int:
        return 8


class Unsized(Sized):
    __len__ = None  # type: ignore[assignment]


def fit(loader: Any, model: Any, *, strategy: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Losses, kind of the training loader, and how many prefetched lookups were taken up by a forward."""
    from lightning_gr.plugins import SequenceBalancedStrategy

    losses: list[float] = []
    plain: list[int] = []

    class Record(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            tables = getattr(module, "tables", None)
            if tables is None:
                return
            inner = type(tables).input_dist

            def input_dist(context: Any, features: Any) -> Any:
                # The pipeline has a twin of the collection, and a thread for it.
                plain.extend([1] if threading.current_thread() is threading.main_thread() else [])
                return inner(tables, context, features)

            tables.__dict__["input_dist"] = input_dist

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    chosen = SequenceBalancedStrategy(**({"sparse_lr": 0.1} | (strategy or {})))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=chosen,
        callbacks=[Record()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 1} | settings),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model, loader)
    return {
        "losses": losses,
        "loader": type(trainer.train_dataloader).__name__,
        "plain": len(plain),
        "said": [str(x.message) for x in said],
        "settings": (trainer.accumulate_grad_batches, trainer.limit_train_batches, trainer.val_check_interval),
    }


def one_of(case: str, depth: int) -> dict[str, Any]:
    pl.seed_everything(1)
    model = Lookups(keyword=case == "keyword", asks=case == "asks")
    return fit(Unsized() if case == "unsized" else Sized(), model, strategy={"pipeline_depth": depth})


@pytest.mark.parametrize("case", ["sized", "unsized", "keyword", "asks"])
def test_lookups_of_later_batches_are_taken_up(gloo: Any, case: str) -> None:
    (plain,), (found,) = gloo(1).run(one_of, case, 0), gloo(1).run(one_of, case, 2)
    assert found["losses"] == plain["losses"]
    assert len(found["losses"]) == 8
    assert plain["plain"] == 8
    assert "PipelinedLoader" in found["loader"]
    # The first step shows what is looked up, when two more batches are in flight; an unsized loader is one further.
    assert found["plain"] <= 4


def wrapped_twice() -> list[str]:
    model = Lookups()
    fit(Sized(), model)
    said: list[str] = fit(Sized(), model, strategy={"sparse_lr": 0.0})["said"]
    return said


def test_settings_of_a_second_strategy_are_not_ignored_silently(gloo: Any) -> None:
    said = "\n".join(gloo(1).run(wrapped_twice)[0])
    assert "sparse_lr=0.0: not used, since an earlier strategy has sharded this module with 0.1" in said


def limited(tokens_per_rank: int | None, path: str) -> dict[str, Any]:
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    pl.seed_everything(1)
    model = RetrievalModule(encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=8, dropout=0.0), top_k=[1])
    data = SequenceDataModule(path=path, global_tokens=32, max_length=8)
    balancing = Balancing(tokens_per_rank=tokens_per_rank)
    # Static tables step in every micro-step; without, the two are the same.
    return fit(
        data, model, strategy={"balancing": balancing, "sparse_lr": 0.0}, limit_train_batches=2, limit_val_batches=0
    )


def test_numbers_of_batches_mean_global_ones(gloo: Any, tmp_path: Any) -> None:
    path = tmp_path / "log.csv"
    rows = [f"u{user},{item % 20},{item}" for user in range(16) for item in range(user, user + 12)]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (whole,), (parts,) = gloo(1).run(limited, None, str(path)), gloo(1).run(limited, 8, str(path))
    micro_steps = len(parts["losses"]) // 2
    assert len(whole["losses"]) == 2
    assert micro_steps > 1
    for step in range(2):  # Lightning has divided each by the micro-steps
        of_step = sum(parts["losses"][step * micro_steps : (step + 1) * micro_steps])
        assert of_step == pytest.approx(whole["losses"][step], rel=1e-4)
    assert parts["settings"] == whole["settings"] == (1, 2, 1.0)
