"""Meta training on two processes: against the textbook's step, against one process, and reading its batches.

python benchmarks/bench_meta.py [--repeats 5] [--steps 16] [--quick] [--json]

Lightning's Trainer under `SequenceBalancedStrategy` trains `MetaRankingModule` over a DLRM with dynamic tables of some
hundred thousand rows on episodes of 10 support and 10 query records, which are in memory; items by Zipf's law. Each
process has a core of its own and one thread, processes talk by gloo, and forms take turns. Three sizes: `rows` adapts
embedding rows, so that the 16 episodes of a process are computed together; `rows_64` has 64 of them; `both` adapts
dense parameters too, 16 episodes one by one. Each adapts in one inner step, of first order. The more a process
computes in a step, the less there is to gain.

Forms of a step on two processes. All must have the same losses, or the benchmark fails:

- `ours`: one lookup of support and query, whose ids are sent ahead while the step before computes; each process takes
  the outer gradient of its tasks, dense parameters are all-reduced, rows get theirs by one exchange
- `..._no_pipeline`: the same, but nothing runs ahead of the step; a process's other threads share its one core
- `textbook_summed`: `TextbookModule`: a lookup of supports and one of queries; gradients are gathered on the first
  process, which updates dense parameters, sends them to all, and each row's gradient to where the row is. Each process
  adds up the gradients of its tasks before, as textbooks do not say, so that both forms compute the same
- `textbook`: the same, but each task's gradients travel, as textbooks have it; of size `both` alone, since tasks that
  are computed together have no gradients of their own

`speedup_meta`: a step of `textbook_summed` over one of `ours`, of size `rows`, and `..._rows_64`;
`speedup_meta_no_pipeline`: of size `rows`, both without a pipeline; `speedup_meta_both` and
`speedup_meta_both_by_task`: of size `both`, over `textbook_summed` and `textbook`. `exchanges` and `sent_mb`:
collectives and bytes of a process in a step, means over processes; DDP's all-reduce, which is not called from Python,
counts as one that sends 2 (N - 1) / N of the parameters; the Trainer's own are in all forms. `apart`: the share of a
step that two trainings of one process each with as much work, side by side, do not have: sending, waiting, and what is
done for others.

`weak_scaling`: the step of those two trainings over one of `ours`, of size `both`; `..._rows` and `..._rows_64` of
the others.

`speedup_meta_io` and all that begins with `meta_io` and `buffer`: see meta_io.py.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import meta_io
import numpy as np
import torch
import torch.distributed as dist
from batches import Batches
from gloo_processes import World, cores_of_two
from reporting import commit, device, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ITEMS, EXPONENT = 200_000, 1.05
FIELDS = {
    "author": 50_000,
    "campaign": 30_000,
    "brand": 20_000,
    "topic": 3_000,
    "category": 300,
    "query": 100_000,
    "place": 2_000,
    "device": 500,
    "page": 60,
    "hour": 24,
}
OF_ITEM = ("author", "campaign", "brand", "topic", "category")
HIDDEN = (256, 128)
SUPPORT = QUERY = 10
WARM_UP, TAIL = 3, 3  # steps that are not timed; the last ones have no batch to look up ahead
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


SIZES = {"rows": Size("embedding", 16, 32), "rows_64": Size("embedding", 64, 32), "both": Size("both", 16, 32)}
FORMS = {
    "rows": ("ours", "ours_no_pipeline", "textbook_summed", "textbook_summed_no_pipeline"),
    "rows_64": ("ours", "textbook_summed"),
    "both": ("ours", "ours_no_pipeline", "textbook_summed", "textbook"),
}
GOALS = {"speedup_meta": 1.5, "weak_scaling": 0.9, "speedup_meta_io": 2}


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
    }
    for number, (name, count) in enumerate(FIELDS.items()):
        columns[name] = (
            items * (2 * number + 7919) % count if name in OF_ITEM else (rng.random(total) ** 2 * count).astype(int)
        )
    pl.DataFrame(columns).write_csv(folder / "log.csv")
    asked = Columns(sparse=tuple(FIELDS), labels=("click",))
    return str(prepare(open_log(folder / "log.csv", columns=asked), folder / "store").path)


# ---- a training, in each of its processes ----------------------------------------------------------------------------


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
        form: of a step.
        size: of the training.
        steps: that are timed.
        share: which of so many processes' batches; None takes those of the rank.
    """
    import lightning.pytorch as pl
    from meta_model import TextbookModule

    from lightning_gr.data import Task, TaskDataModule
    from lightning_gr.embeddings.dynamic import DynamicTables
    from lightning_gr.models import DLRM, MetaRankingModule
    from lightning_gr.plugins import SequenceBalancedStrategy

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
    batches = batches_of(source, size, steps + WARM_UP + TAIL, of_rank)
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
        strategy=SequenceBalancedStrategy(pipeline_depth=0 if form.endswith("_no_pipeline") else 2),
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
    steps_3 = np.diff(np.array(clock), axis=0)[WARM_UP : WARM_UP + steps]
    if not textbook and world_size > 1:
        parameters = sum(x.numel() * x.element_size() for x in module.parameters() if x.requires_grad)
        steps_3 = steps_3 + np.array([0, 1, parameters * 2 * (world_size - 1) / world_size])
    return {"steps": steps_3, "losses": losses}


# ---- what is compared ------------------------------------------------------------------------------------------------


def measure(path: str, name: str, size: Size, steps: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """By form and repeat, what a step took and sent on average; `alone` are two processes with a training each."""
    cores = cores_of_two()
    together, alone = World(cores, train), [World([core], train) for core in cores]
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in ("alone", *FORMS[name])}
    for repeat in range(repeats):
        for form, kept in found.items():
            if form == "alone":
                for place, world in enumerate(alone):
                    world.start(path, "ours", size, steps, (place, 2))
                runs = [run for world in alone for run in world.results()]
            else:
                runs = together.train(path, form, size, steps)
            steps_S3 = np.mean([run["steps"] for run in runs], axis=0)
            seconds, exchanges, sent = np.median(steps_S3[:, 0]), *steps_S3[:, 1:].mean(0)
            losses = np.mean([run["losses"] for run in runs], axis=0)
            kept.append({"seconds": seconds, "exchanges": exchanges, "sent": sent, "losses": losses})
            if form not in ("alone", "ours") and not repeat:
                np.testing.assert_allclose(losses, found["ours"][0]["losses"], rtol=1e-4, err_msg=f"{name} {form}")
    for world in (together, *alone):
        world.close()
    return found


def ratios(found: dict[str, list[dict[str, Any]]], form: str, over: str) -> list[float]:
    """Of each repeat, a step of one form over one of another."""
    return [a["seconds"] / b["seconds"] for a, b in zip(found[form], found[over], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=16, help="that are timed of each training; half as many of size both"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; nothing is kept")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    repeats, steps = (1, 3) if args.quick else (args.repeats, args.steps)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    from lightning_gr.cli.compare_statistics import interval

    print(f"{device()}; commit {commit()}; torch {torch.__version__}; gloo, a core each")
    result: dict[str, Any] = {"repeats": repeats, "steps": steps}

    def keep(name: str, found: list[float]) -> None:
        taken = interval(found)
        result[name], result[f"{name}_half_width"] = round(taken.mean, 3), round(taken.half_width or 0.0, 3)

    with tempfile.TemporaryDirectory() as folder:
        tasks = 2 * max(size.episodes for size in SIZES.values()) * (steps + WARM_UP + TAIL)
        path = write_store(Path(folder), tasks)
        for name, whole in SIZES.items():
            size = replace(whole, episodes=2) if args.quick else whole
            found = measure(path, name, size, -(-steps // 2) if name == "both" else steps, repeats)
            print(f"\n{name}: {size.episodes} episodes a process, {len(FIELDS) + 1} tables {size.dim} wide")
            print(f"{'':<28}{'ms a step':>12}{'of ours':>18}{'exchanges':>11}{'MB sent':>10}{'apart':>8}")
            for form, runs in found.items():
                seconds, exchanges, sent = (
                    float(np.mean([run[x] for run in runs])) for x in ("seconds", "exchanges", "sent")
                )
                of_ours, apart = interval(ratios(found, form, "ours")), 1 - np.mean(ratios(found, "alone", form))
                width = of_ours.half_width or 0.0
                print(
                    f"{form:<28}{seconds * 1e3:>12.1f}{of_ours.mean:>11.2f} ± {width:.2f}{exchanges:>11.0f}"
                    f"{sent / 1e6:>10.2f}{apart:>8.2f}"
                )
                result |= {f"ms_{name}_{form}": round(seconds * 1e3, 2), f"apart_{name}_{form}": round(float(apart), 3)}
                if form != "alone":
                    result |= {
                        f"exchanges_{name}_{form}": round(exchanges),
                        f"sent_mb_{name}_{form}": round(sent / 1e6, 3),
                    }
            if name == "rows":
                keep("speedup_meta", ratios(found, "textbook_summed", "ours"))
                keep("speedup_meta_no_pipeline", ratios(found, "textbook_summed_no_pipeline", "ours_no_pipeline"))
                keep("weak_scaling_rows", ratios(found, "alone", "ours"))
            elif name == "rows_64":
                keep("speedup_meta_rows_64", ratios(found, "textbook_summed", "ours"))
                keep("weak_scaling_rows_64", ratios(found, "alone", "ours"))
            else:
                keep("speedup_meta_both", ratios(found, "textbook_summed", "ours"))
                keep("speedup_meta_both_by_task", ratios(found, "textbook", "ours"))
                keep("weak_scaling", ratios(found, "alone", "ours"))
    result |= meta_io.measure(**({"tasks": 2_000, "repeats": 1} if args.quick else {}))
    print()
    for name, goal in GOALS.items():
        print(f"{name:<20}{result[name]:>8}   goal {goal}")
    result |= {f"goal_{name}": goal for name, goal in GOALS.items()}
    if not args.quick:
        publish("meta", result, as_json=args.json)


if __name__ == "__main__":
    main()
