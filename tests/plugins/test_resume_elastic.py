"""Checkpoints on other numbers of processes, with other shardings, and of static tables that have become dynamic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_gr.checkpoint.reader import CheckpointReader

pytestmark = pytest.mark.dist

IDS, DIM, SAMPLES, FIRST = 40, 8, 12, 4


class Model(pl.LightningModule):
    """A user's module with a table that is dynamic or static, and one that is always static."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        from lightning_gr.embeddings.dynamic import DynamicEmbeddingCollection, DynamicTableConfig

        def static(name: str) -> EmbeddingCollection:
            config = EmbeddingConfig(name=name, num_embeddings=IDS, embedding_dim=DIM, feature_names=[name])
            return EmbeddingCollection(tables=[config], device=torch.device("cpu"))

        if kind == "dynamic":
            self.items: nn.Module = DynamicEmbeddingCollection(tables=[DynamicTableConfig("item", DIM, ["item"])])
        else:
            self.items = static("item")
        self.others = static("other")
        self.head = nn.Linear(2 * DIM, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = torch.cat([self.items(batch)["item"].values(), self.others(batch)["other"].values()], 1)
        errors: Tensor = (self.head(rows)[:, 0] - 1) ** 2
        return {"loss": errors.mean(), "loss_sums": {"mse": (errors.sum(), len(errors))}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Steps:
    """A user's loader that knows its position: the samples of a step are the same on any number of processes."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.done = rank, world_size, 0

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[Any]:
        from torchrec import KeyedJaggedTensor

        while self.done < len(self):
            ids = torch.randint(IDS, (2, SAMPLES), generator=torch.Generator().manual_seed(self.done))
            low, high = (SAMPLES * x // self.world_size for x in (self.rank, self.rank + 1))
            self.done += 1
            lengths = torch.tensor([high - low] * 2)
            yield KeyedJaggedTensor(["item", "other"], ids[:, low:high].reshape(-1), lengths=lengths)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def train(
    world: int, source: str | None, target: str, steps: int, *, kind: str = "dynamic", sharding: str = "row_wise"
) -> list[float]:
    """Goes on from a checkpoint up to so many steps, and saves another; the losses on the way."""
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(5)
    model = Model(kind)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=SequenceBalancedStrategy(sharding=sharding, sparse_lr=0.1),  # type: ignore[arg-type]
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Steps(dist.get_rank(), world), ckpt_path=source)
    trainer.save_checkpoint(target)
    return model.losses


def rows_of(path: Path) -> dict[int, tuple[Tensor, ...]]:
    """All that is kept of each key."""
    from lightning_gr.embeddings.dynamic.table_files import read_columns

    columns = ["ids", "values", "state", "counts", "last_steps", "last_times"]
    found = read_columns(CheckpointReader(path).collections()["items"], "item", columns)
    return {int(found["ids"][i]): tuple(found[x][i] for x in columns[1:]) for i in range(len(found["ids"]))}


SHARDINGS = {2: "table_wise", 3: "row_wise", 1: "column_wise", 4: "row_wise"}


def test_round_trips_over_numbers_of_processes_change_nothing(gloo: Any, tmp_path: Path) -> None:
    gloo(2).run(train, 2, None, str(tmp_path / "0.ckpt"), FIRST, sharding="table_wise")
    for number, world in enumerate((3, 1, 4, 2), start=1):
        source, target = (str(tmp_path / f"{x}.ckpt") for x in (number - 1, number))
        gloo(world).run(train, world, source, target, FIRST, sharding=SHARDINGS[world])
    first, last = (CheckpointReader(tmp_path / f"{x}.ckpt") for x in (0, 4))
    assert [CheckpointReader(tmp_path / f"{x}.ckpt").manifest.world_size for x in range(5)] == [2, 3, 1, 4, 2]
    before, after = rows_of(tmp_path / "0.ckpt"), rows_of(tmp_path / "4.ckpt")
    assert before.keys() == after.keys()
    assert len(before) > IDS // 2
    for key, kept in before.items():
        assert all(torch.equal(a, b) for a, b in zip(kept, after[key], strict=True)), key
    tensors, others = first.tensors(), last.tensors()
    assert tensors.keys() == others.keys()
    assert any(key.startswith("sparse_optimizer.") for key in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("worlds", [(1, 3), *(pytest.param(x, marks=pytest.mark.long) for x in [(3, 1, 4, 2)])])
def test_steps_between_are_those_of_one_process(gloo: Any, tmp_path: Path, worlds: tuple[int, ...]) -> None:
    gloo(2).run(train, 2, None, str(tmp_path / "0.ckpt"), FIRST, sharding="table_wise")
    for number, world in enumerate(worlds, start=1):
        source, target = (str(tmp_path / f"{x}.ckpt") for x in (number - 1, number))
        gloo(world).run(train, world, source, target, FIRST + number, sharding=SHARDINGS[world])
    gloo(1).run(train, 1, None, str(tmp_path / "alone.ckpt"), FIRST + len(worlds))
    last = tmp_path / f"{len(worlds)}.ckpt"
    ours, truth = rows_of(last), rows_of(tmp_path / "alone.ckpt")
    assert ours.keys() == truth.keys()
    for key, (values, state, *counters) in truth.items():
        torch.testing.assert_close(ours[key][0], values, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[key][1], state, rtol=1e-4, atol=1e-8)
        assert [int(x) for x in ours[key][2:]] == [int(x) for x in counters], key
    tensors = CheckpointReader(last).tensors()
    for name, tensor in CheckpointReader(tmp_path / "alone.ckpt").tensors().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_static_table_goes_on_as_a_dynamic_one(gloo: Any, tmp_path: Path, world: int) -> None:
    source = str(tmp_path / "static.ckpt")
    gloo(world).run(train, world, None, source, FIRST, kind="static")
    truth = gloo(world).run(train, world, source, str(tmp_path / "on.ckpt"), FIRST + 3, kind="static")
    found = gloo(world).run(train, world, source, str(tmp_path / "dynamic.ckpt"), FIRST + 3)
    assert len(truth[0]) == 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(truth), rtol=1e-5, atol=1e-6)
    rows = rows_of(tmp_path / "dynamic.ckpt")
    weight = CheckpointReader(tmp_path / "on.ckpt").tensors("state_dict.items")[
        "state_dict.items.embeddings.item.weight"
    ]
    assert sorted(rows) == list(range(IDS))
    torch.testing.assert_close(torch.stack([rows[key][0] for key in range(IDS)]), weight, rtol=1e-4, atol=1e-6)
