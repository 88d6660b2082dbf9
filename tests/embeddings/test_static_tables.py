"""First values of static tables: a function of (seed, table, row, column), whatever the sharding."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gr.embeddings import deferred_tables, embedding_collection, table_values


def config(name: str = "item", **changes: Any) -> Any:
    from torchrec import EmbeddingConfig

    fields = {"name": name, "num_embeddings": 500, "embedding_dim": 8, "feature_names": [f"{name}_id"]}
    return EmbeddingConfig(**(fields | changes))


def test_values_follow_the_configured_distribution() -> None:
    normal = config(init_fn=functools.partial(torch.nn.init.normal_, std=0.02))
    drawn = table_values(normal, seed=1, rows=torch.arange(5000), columns=torch.arange(8))
    assert drawn.mean().item() == pytest.approx(0, abs=4 * 0.02 / math.sqrt(40000))
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
    uniform = table_values(config(), seed=1, rows=torch.arange(500), columns=torch.arange(8))
    bound = 1 / math.sqrt(500)
    assert uniform.abs().max() <= bound
    assert uniform.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_any_piece_equals_the_same_piece_of_the_whole() -> None:
    def own(weight: torch.Tensor) -> None:
        weight.normal_()

    for init_fn in (None, functools.partial(torch.nn.init.normal_, std=1.0), own):
        table = config(init_fn=init_fn)
        whole = table_values(table, seed=3, rows=torch.arange(500), columns=torch.arange(8))
        rows, columns = torch.tensor([0, 7, 499]), torch.tensor([2, 5])
        torch.testing.assert_close(table_values(table, seed=3, rows=rows, columns=columns), whole[rows][:, columns])
        assert not torch.equal(table_values(table, seed=4, rows=rows, columns=columns), whole[rows][:, columns])


def test_building_tables_leaves_the_dense_layers_alone() -> None:
    torch.manual_seed(5)
    collection = embedding_collection([config()])
    after = torch.randn(3)
    torch.manual_seed(5)
    with deferred_tables():
        assert next(embedding_collection([config()]).parameters()).is_meta
    torch.testing.assert_close(torch.randn(3), after)
    expected = table_values(config(), seed=5, rows=torch.arange(500), columns=torch.arange(8))
    torch.testing.assert_close(collection.state_dict()["embeddings.item.weight"], expected.float())


def sharded_values(world_size: int, sharding: str) -> np.ndarray:
    import lightning.pytorch as pl
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tables: Any = None

        def configure_model(self) -> None:
            if self.tables is None:
                self.tables = embedding_collection([config()])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Nothing: only the set-up matters here."""

    pl.seed_everything(11)
    holder = Holder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sharding=sharding),  # type: ignore[arg-type]
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(holder, torch.utils.data.DataLoader(torch.zeros(2 * world_size, 1)), verbose=False)
    weight = holder.state_dict()["tables.embeddings.item.weight"]
    whole = torch.zeros(500, 8) if dist.get_rank() == 0 else None
    weight.gather(0, out=whole)
    return np.zeros(0) if whole is None else whole.numpy()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "sharding"),
    [(1, "row_wise"), (2, "row_wise"), (3, "row_wise"), (2, "column_wise"), (2, "table_wise")],
)
def test_every_sharding_starts_from_the_same_values(gloo: Any, world_size: int, sharding: str) -> None:
    values = gloo(world_size).run(sharded_values, world_size, sharding)[0]
    expected = table_values(config(), seed=11, rows=torch.arange(500), columns=torch.arange(8))
    np.testing.assert_array_equal(values, expected.float().numpy())
