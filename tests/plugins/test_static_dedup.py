"""Deduplication of static tables on the CPU: the operator in FBGEMM's form, and training with it on and off."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gr.plugins.static_dedup import jagged_unique_indices, register_static_dedup


@settings(max_examples=60, deadline=None)
@given(
    features=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    size=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_distinct_ids_of_each_table_give_all_ids_back(features: list[int], size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (sum(features) * size,), generator=generator)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    ids = torch.randint(0, 5, (int(lengths.sum()),), generator=generator)
    starts = [0]
    for n in features:
        starts += [starts[-1] + n] * n
    cumsum = torch.arange(sum(features) + 1)  # as TorchRec has it, of the same length
    new_lengths, new_offsets, unique, inverse = jagged_unique_indices(cumsum, torch.tensor(starts), offsets, ids)
    assert torch.equal(unique[inverse], ids)
    assert len(new_lengths) == len(lengths)
    assert new_offsets[-1] == len(unique) == new_lengths.sum()
    first = 0
    for n in features:
        cells = slice(first * size, (first + n) * size)
        mine = ids[offsets[cells.start] : offsets[cells.stop]]
        of_table = unique[new_offsets[cells.start] : new_offsets[cells.stop]]
        assert sorted(of_table.tolist()) == sorted(set(mine.tolist()))
        places = inverse[offsets[cells.start] : offsets[cells.stop]]
        assert ((places >= new_offsets[cells.start]) & (places < new_offsets[cells.stop])).all()
        first += n


def test_torchrec_finds_the_kernel() -> None:
    register_static_dedup()
    found = torch.ops.fbgemm.jagged_unique_indices(
        torch.tensor([0, 10]), torch.tensor([0, 1]), torch.tensor([0, 2, 3]), torch.tensor([7, 7, 1])
    )
    assert [x.tolist() for x in found] == [[1, 1], [0, 1, 2], [7, 1], [0, 0, 1]]


class Repeats(pl.LightningModule):
    """Two features of one table, and a table of its own for a third, with many equal ids."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        pl.seed_everything(1)
        self.tables = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name="t", num_embeddings=20, embedding_dim=4, feature_names=["f", "g"]),
                EmbeddingConfig(name="u", num_embeddings=9, embedding_dim=4, feature_names=["h"]),
            ],
            device=torch.device("cpu"),
        )
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = self.tables(batch)
        rows = torch.cat([found["f"].values(), found["g"].values(), found["h"].values()])
        losses = (self.head(rows) - 1) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(losses))}}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader:
    """Batches that Lightning leaves as they are."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def run(world_size: int, dedup: bool) -> dict[str, np.ndarray]:
    import torch.distributed as dist
    from torchrec import KeyedJaggedTensor

    from lightning_gr.plugins import SequenceBalancedStrategy

    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    batches = []
    for step in range(6):
        lengths = torch.randint(0, 6, (3 * 4,), generator=generator)
        if step == 2:
            lengths[4:8] = 0  # a feature without ids
        ids = torch.randint(0, 9, (int(lengths.sum()),), generator=generator)
        batches.append(KeyedJaggedTensor(keys=["f", "g", "h"], values=ids, lengths=lengths))
    model = Repeats()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(static_dedup=dedup, sparse_lr=0.1),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Loader(batches))
    whole = {"head": model.head.weight.detach().numpy()}
    for name, value in model.state_dict().items():
        if hasattr(value, "local_shards"):
            full = torch.zeros(value.size()) if dist.get_rank() == 0 else None
            value.gather(0, out=full)
            whole[name] = np.zeros(0) if full is None else full.numpy()
    return whole


@pytest.mark.dist
def test_training_is_the_same_with_and_without(gloo: Any) -> None:
    for world_size in (1, 2):
        without, with_ = (gloo(world_size).run(run, world_size, dedup)[0] for dedup in (False, True))
        assert len(with_) == 3
        for name, weight in without.items():
            np.testing.assert_allclose(with_[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)
