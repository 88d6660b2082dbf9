"""Meta training on two processes against its textbook form, against one process, and what reads its batches.

python benchmarks/bench_meta.py [--repeats 5] [--steps 12] [--quick] [--json]

Lightning's Trainer under `SequenceBalancedStrategy` trains `MetaRankingModule` over a DLRM with dynamic tables of some
hundred thousand rows on episodes of 10 support and 10 query records, which are in memory; ids by Zipf's law. Each
process has a core of its own and one thread, processes talk by gloo, and forms take turns. Two sizes: `both` adapts
dense parameters and rows, `rows` rows alone, so that a process's episodes are one group.

Forms of a step on two processes, all with the same losses, or the benchmark fails:

- `ours`: one lookup of support and query, its ids sent ahead while the step before computes; each process's outer
  gradient, dense parameters all-reduced, rows by one exchange
- `ours_no_pipeline`: the same without sending ids ahead
- `textbook`: `TextbookModule`: a lookup of supports and one of queries; the gradients of each task gathered on the
  first process, which updates, and hands out parameters and row gradients
- `textbook_summed`: the same, but each process adds up its tasks' gradients before they are gathered

`speedup_meta`: a step of `textbook` over one of `ours`, of size `both`; `..._summed` over `textbook_summed`; `_rows` of
the other size. `exchanges` and `sent_mb`: collectives and bytes of a process in a step, means over processes; DDP's
all-reduce counts as one that sends 2 (N - 1) / N of the parameters. `apart`: the share of a step that one process alone
with the same work does not have: waiting, sending, updating for others. `weak_scaling`: the step of two trainings of
one process each, which run side by side, over that of one training on two with as much work a process.
`speedup_meta_io`: see meta_io.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gloo_processes import World, cores_of_two
from reporting import commit, device, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ITEMS, EXPONENT = 200_000, 1.05
FIELDS = {"author": 50_000, "category": 300, "place": 2_000, "hour": 24}
HIDDEN = (256, 128)
SUPPORT = QUERY = 10
WARM_UP = 3
COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather", "gather", "scatter", "broadcast")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Size:
    """A training's size.

    Args:
        adapt: of `MetaRankingModule`.
        episodes: of a process in a step.
        dim: width of rows.
    """

    adapt: str
    episodes: int
    dim: int


SIZES = {"both": Size("both", 16, 32), "rows": Size("embedding", 64, 32)}
FORMS = ("ours", "ours_no_pipeline", "textbook", "textbook_summed")


def write_store(folder: Path, tasks: int) -> str:
    """A store of tasks with an episode each; popular items are so in all of them."""
    import polars as pl

    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    rng = np.random.default_rng(0)
    total = tasks * (SUPPORT + QUERY)
    shares = np.arange(1, ITEMS + 1, dtype=np.float64) ** -EXPONENT
    items = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(total))
    columns: dict[str, Array] = {
        "user_id": np.repeat(np.arange(tasks), SUPPORT + QUERY),
        "item_id": items,
        "timestamp": 1_650_000_000 + rng.integers(1, 600, total).cumsum(),
        "click": (rng.random(total) < np.where(items % 3, 0.3, 0.7)).astype(np.float64),
        "author": items * 7919 % FIELDS["author"],
        "category": items * 7877 % FIELDS["category"],
        "place": rng.integers(FIELDS["place"], size=total),
        "hour": rng.integers(FIELDS["hour"], size=total),
    }
    pl.DataFrame(columns).write_csv(folder / "log.csv")
    asked = Columns(sparse=tuple(FIELDS), labels=("click",))
    return str(prepare(open_log(folder / "log.csv", columns=asked), folder / "store").path)


# ---- a training, in each of its processes ----------------------------------------------------------------------------


class Batches:
    """A loader of batches that are there; Lightning takes a list for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def batches_of(source: Any, size: Size, steps: int, share: tuple[int, int]) -> list[Any]:
    """A process's batches.

    Args:
        source: of training episodes.
        size: of a batch.
        steps: how many.
        share: which of so many processes.
    """
    place, ranks = share
    ids, _ = source.samples(0, source.num_rows)
    found = []
    for step in np.split(ids[: steps * ranks * size.episodes], steps):
        denominators = {task: float(count.sum()) for task, count in source.label_counts(step).items()}
        windows = [tuple(range(len(source.group_bounds) - 1))]
        own = np.split(step, ranks)[place]
        found.append(
            source.collate(own, windows=windows, epoch=0, denominators=denominators, gradient_divisor=float(ranks))
        )
    return found


@contextmanager
def counted(calls: list[int], sent: list[float]) -> Iterator[None]:
    """Inside, counts collectives and the bytes that this process sends to others."""
    lock, originals = threading.Lock(), {name: getattr(dist, name) for name in COLLECTIVES}

    def noted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            ranks, rank = group.size(), group.rank()  # type: ignore[union-attr]
            num_bytes = 0.0
            if name == "all_to_all_single":
                outgoing, splits = args[1], args[3] if len(args) > 3 else kwargs.get("input_split_sizes")
                cut = outgoing.split(splits or len(outgoing) // ranks)
                num_bytes = sum(x.nbytes for to, x in enumerate(cut) if to != rank)
            elif name == "all_reduce":
                num_bytes = args[0].nbytes * 2 * (ranks - 1) / ranks
            elif name == "all_gather":
                num_bytes = args[1].nbytes * (ranks - 1)
            elif name == "gather":
                num_bytes = args[0].nbytes if rank else 0
            elif not rank:  # scatter, broadcast
                num_bytes = args[0].nbytes * (ranks - 1)
            with lock:
                calls[0] += 1
                sent[0] += num_bytes
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, noted(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def train(path: str, form: str, size: Size, steps: int, share: tuple[int, int] | None = None) -> dict[str, Any]:
    """Trains; returns by step the seconds it took, collectives, bytes sent, and the losses.

    Args:
        path: of the store.
        form: of `FORMS`.
        size: of the training.
        steps: that are timed.
        share: which of so many processes' batches; None takes those of the rank.
    """
    import lightning.pytorch as pl

    from lightning_gr.data import Task, TaskDataModule
    from lightning_gr.embeddings.dynamic import DynamicTables
    from lightning_gr.models import DLRM, MetaRankingModule
    from lightning_gr.plugins import SequenceBalancedStrategy
    from meta_model import TextbookModule

    world_size, calls, sent = dist.get_world_size(), [0], [0.0]
    clock: list[tuple[float, int, float]] = []
    losses: list[float] = []

    class Clock(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            # All rows are there, as in a training that has run for some time.
            for name, rows in ({"item_id": ITEMS} | FIELDS).items():
                values = torch.randn(rows, size.dim, generator=torch.Generator().manual_seed(rows)) * 0.1
                module.tables.engine.upsert(torch.arange(rows), values, name)

        def on_train_batch_start(self, *_: Any) -> None:
            clock.append((time.perf_counter(), calls[0], sent[0]))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    pl.seed_everything(1)
    data = TaskDataModule(
        path=path,
        tasks={"click": Task("click")},
        support=SUPPORT,
        query=QUERY,
        val_tasks=0.0,
        test_tasks=0.0,
        user_token=False,
    )
    source = data._source("train")
    of_rank = (dist.get_rank(), world_size) if share is None else share
    batches = batches_of(source, size, steps + WARM_UP + 1, of_rank)
    if world_size == 1:
        for batch in batches:
            batch.gradient_divisor = 1.0
    settings: dict[str, Any] = {
        "network": DLRM(dim=size.dim, hidden_dims=HIDDEN, pooling="none", dropout=0.0),
        "inner_lr": 0.1,
        "adapt": size.adapt,
        "shots": [0, SUPPORT],
        "features": source.ranking_features,
        "embedding_dim": size.dim,
        "dynamic_tables": DynamicTables(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
    }
    textbook = form.startswith("textbook")
    module = TextbookModule(by_task=form == "textbook", **settings) if textbook else MetaRankingModule(**settings)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(pipeline_depth=0 if form == "ours_no_pipeline" else 2),
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with counted(calls, sent):
        trainer.fit(module, Batches(batches))
    steps_3 = np.diff(np.array(clock), axis=0)[WARM_UP:]
    if not textbook and world_size > 1:
        parameters = sum(x.numel() * x.element_size() for x in module.parameters() if x.requires_grad)
        steps_3 = steps_3 + np.array([0, 1, parameters * 2 * (world_size - 1) / world_size])
    return {"steps": steps_3, "losses": losses}
