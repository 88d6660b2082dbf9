"""BalanceMonitor: shares against work and waits of known size, with and without a pipeline; no number changes."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.callbacks import BalanceMonitor
from lightning_gr.models.forward_flops import ForwardFlops

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = ((10, 30), (20, 20), (40, 0), (0, 0), (8, 24), (5, 15))
"""Of each batch, by rank."""
NAMES = {"imbalance_tokens", "imbalance_flops", "wait_share", "wait_share_max", "slowest_rank", "data_wait_share"}


@dataclass
class Batch:
    """Some numbers, and what there is to know of them."""

    x: Any
    num_samples: int
    num_tokens: int
    work: int


class Batches(torch.utils.data.Dataset[Any]):
    """Batches of one rank; one takes a while to be had."""

    def __init__(self, rank: int, count: int, *, work: tuple[int, ...] = (1, 1), seconds: float = 0.0) -> None:
        self.rank, self.count, self.work, self.seconds = rank, count, work, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if index >= self.count:
            raise IndexError
        time.sleep(self.seconds)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * self.rank + index))
        return Batch(x, 4, TOKENS[index % len(TOKENS)][self.rank], self.work[self.rank])


def loader(*args: Any, **settings: Any) -> Any:
    return torch.utils.data.DataLoader(Batches(*args, **settings), batch_size=None)


class Model(pl.LightningModule):
    """Computes longer the more `work` a batch has."""

    def __init__(self, flops: str = "forward_flops") -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)
        if flops == "none":
            self.flops = lambda batch: None
        if flops == "absent":
            self.flops = None

    def flops(self, batch: Batch) -> Any:
        return ForwardFlops(attention=torch.tensor(batch.num_tokens**2))  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        ended = time.thread_time() + batch.work / 1e3
        while time.thread_time() < ended:
            torch.ones(32, 32) @ torch.ones(32, 32)
        return self.net(batch.x).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        time.sleep(0.02)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Told(DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})  # type: ignore[dict-item]


def fit(
    module: Any, data: Any, *, world: int = 1, strategy: Any = "auto", monitor: Any = None, **settings: Any
) -> dict[str, Any]:
    told = Told()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        callbacks=[x for x in [monitor] if x is not None],
        logger=told,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 1, "log_every_n_steps": 2} | settings),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, *data)
    rows = [{k.removeprefix("gr/"): v for k, v in row.items() if k.startswith("gr/")} for row in told.rows]
    return {
        "rows": [row for row in rows if "imbalance_tokens" in row or "wait_share" in row],
        "metrics": {name for name in trainer.callback_metrics if name.startswith("gr/")},
        "said": [str(x.message) for x in caught if str(x.message).startswith("BalanceMonitor")],
    }


class Event:
    """Stands in for an event of a GPU, whose kernels end when they are launched."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class OnGPU(Model):
    """Seems to be on a GPU; its backward takes long on rank 0, which waits there."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def on_after_backward(self) -> None:
        time.sleep(0.03 if self.global_rank == 0 else 0.0)


def fit_on_gpus() -> dict[str, Any]:
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        data = [loader(dist.get_rank(), 12, work=(4, 20))]
        return fit(OnGPU(), data, world=2, strategy="ddp", monitor=BalanceMonitor(max_data_wait_share=1.0))


def fit_on_ranks(accumulate: int, work: tuple[int, ...], flops: str, count: int = 12) -> dict[str, Any]:
    import torch.distributed as dist

    data = [loader(dist.get_rank(), count, work=work)]
    monitor = BalanceMonitor(max_data_wait_share=1.0)
    return fit(Model(flops), data, world=2, strategy="ddp", monitor=monitor, accumulate_grad_batches=accumulate)


def imbalances(count: int, accumulate: int, power: int) -> list[float]:
    """By hand, of windows of two optimizer steps."""
    work = np.array([TOKENS[index % len(TOKENS)] for index in range(count)], float) ** power
    steps = work.reshape(-1, accumulate, 2).sum(1)
    ratios = [step.max() / step.mean() if step.any() else math.nan for step in steps]
    return [float(np.nanmean(ratios[x : x + 2])) for x in range(0, len(ratios), 2)]


@pytest.mark.dist
@pytest.mark.parametrize("accumulate", [1, 2])
def test_imbalance_and_waits_of_two_ranks(gloo: Any, accumulate: int) -> None:
    first, second = gloo(2).run(fit_on_ranks, accumulate, (4, 20), "forward_flops", 24)
    rows = first["rows"]
    assert len(rows) == 12 // accumulate
    assert [row["imbalance_tokens"] for row in rows] == pytest.approx(imbalances(24, accumulate, 1))
    assert [row["imbalance_flops"] for row in rows] == pytest.approx(imbalances(24, accumulate, 2))
    for row in rows:
        assert set(row) == NAMES
        assert row["slowest_rank"] == 1
        # Rank 1 computes 20 ms and rank 0 computes 4; each a little more.
        assert 0.5 < row["wait_share_max"] < 0.85
        assert row["wait_share"] == pytest.approx(row["wait_share_max"] / 2)
    # Every rank can read them; rank 0 says what is large, once.
    assert first["metrics"] == second["metrics"] == {f"gr/{name}" for name in NAMES}
    assert second["said"] == []
    assert len(first["said"]) == 1
    for part in ("gr/wait_share_max: rank 1 is the slowest, and rank 0 waits for ", "SequenceBalancedStrategy"):
        assert part in first["said"][0]


@pytest.mark.dist
def test_on_a_gpu_forwards_are_compared(gloo: Any) -> None:
    rows = gloo(2).run(fit_on_gpus)[0]["rows"]
    # Single forwards may be long by chance, on either rank.
    assert np.median([row["wait_share_max"] for row in rows[1:]]) > 0.4
    assert np.median([row["slowest_rank"] for row in rows[1:]]) == 1


@pytest.mark.dist
@pytest.mark.parametrize("flops", ["none", "absent"])
def test_what_a_module_does_not_tell_is_left_out(gloo: Any, flops: str) -> None:
    first, _ = gloo(2).run(fit_on_ranks, 1, (2, 2), flops)
    assert all(NAMES - set(row) == {"imbalance_flops"} for row in first["rows"])


def test_waits_for_data_are_those_of_training() -> None:
    slow = [loader(0, 14, work=(5,), seconds=0.05)]
    found = fit(Model(), slow, monitor=BalanceMonitor(max_data_wait_share=0.3))
    for row in found["rows"]:
        assert 0.3 < row["data_wait_share"] < 1
        assert (row["wait_share"], row["slowest_rank"]) == (0, 0)
    assert len(found["said"]) == 1
    assert "gr/data_wait_share: rank 0 waits for data for " in found["said"][0]
    assert "raise data.init_args.num_workers, or read from an event store" in found["said"][0]
    # Evaluations, whatever they take, are none of it.
    quick = [loader(0, 12, work=(5,)), loader(0, 4, seconds=0.02)]
    for row in fit(Model(), quick, monitor=BalanceMonitor(), val_check_interval=3)["rows"]:
        assert row["data_wait_share"] < 0.5


@pytest.mark.parametrize("name", ["max_wait_share", "max_data_wait_share", "max_exchange_share"])
def test_a_limit_is_a_share(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}=1.5: expected a share, from 0 to 1"):
        BalanceMonitor(**{name: 1.5})


# ---- with the pipeline -------------------------------------------------------------------------------------------


class Tables(pl.LightningModule):
    """Looks rows up in a sharded table."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

        config = EmbeddingBagConfig(name="t", num_embeddings=40, embedding_dim=4, feature_names=["f"])
        self.tables = EmbeddingBagCollection(tables=[config], device=torch.device("cpu"))
        self.net = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(self.tables(batch)["f"]).square().mean()
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Ids(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        from torchrec import KeyedJaggedTensor

        if index >= self.count:
            raise IndexError
        time.sleep(self.seconds)
        ids = torch.randint(0, 40, (6,), generator=torch.Generator().manual_seed(index))
        return KeyedJaggedTensor(["f"], ids, lengths=torch.full((3,), 2))


def fit_tables(
    *, world: int, fetch: float = 0.0, look_up: float = 0.0, depth: int = 2, monitored: bool = True
) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy
    from lightning_gr.plugins.started_lookups import StartedLookups

    finish = StartedLookups.finish

    def slow(lookups: Any, **given: Any) -> None:
        time.sleep(look_up)
        finish(lookups, **given)

    pl.seed_everything(3)
    module = Tables()
    batches = torch.utils.data.DataLoader(Ids(16, fetch), batch_size=None)
    strategy = SequenceBalancedStrategy(sparse_lr=0.1, pipeline_depth=depth)
    monitor = BalanceMonitor(max_wait_share=1.0, max_data_wait_share=0.2, max_exchange_share=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StartedLookups, "finish", slow)
        found = fit(module, [batches], world=world, strategy=strategy, monitor=monitor if monitored else None)
    rank = dist.get_rank()
    return found | {"losses": module.losses, "weight": module.net[1].weight.detach().numpy().copy(), "rank": rank}


@pytest.mark.dist
def test_a_pipelines_waits_are_told_apart(gloo: Any) -> None:
    by_fetching = gloo(2).run(fit_tables, world=2, fetch=0.15)[0]
    by_exchanging = gloo(2).run(fit_tables, world=2, look_up=0.15)[0]
    for found, high, low in (
        (by_fetching, "data_wait_share", "exposed_exchange_share"),
        (by_exchanging, "exposed_exchange_share", "data_wait_share"),
    ):
        shares = {name: float(np.mean([row[name] for row in found["rows"][3:]])) for name in (high, low)}
        assert shares[high] > 0.2 > shares[low], shares
        assert shares[high] + shares[low] <= 1
        assert [said.split()[1] for said in found["said"]] == [f"gr/{high}:"]
    assert "sparse_update to semi_async or exact_async" in by_exchanging["said"][0]
    assert "pipeline_depth" in by_fetching["said"][0]


@pytest.mark.dist
def test_without_a_pipeline_exchanges_are_not_known(gloo: Any) -> None:
    rows = gloo(1).run(fit_tables, world=1, depth=0, fetch=0.05)[0]["rows"]
    assert all("exposed_exchange_share" not in row and row["data_wait_share"] > 0.2 for row in rows)


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_no_number_of_training_changes(gloo: Any, world: int) -> None:
    runs = [gloo(world).run(fit_tables, world=world, monitored=monitored) for monitored in (True, False)]
    for with_it, without_it in zip(*runs, strict=True):
        assert with_it["losses"] == without_it["losses"]
        np.testing.assert_array_equal(with_it["weight"], without_it["weight"])
