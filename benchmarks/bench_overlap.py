"""How much of a training step waits for the exchange of rows, with a network put in, schedule by schedule.

python benchmarks/bench_overlap.py [--steps 24] [--quick] [--json] [--events PATH.csv] [--timeline PATH.svg]

The embedding path is real: `DynamicEmbeddingCollection` under `SequenceBalancedStrategy` in Lightning's Trainer, gloo
processes on one machine, each with its own ids a batch, Zipf's law mixed with uniform ones so that a stated share of a
step's keys was looked up a step before too. The dense part is an accelerator that leaves the host free: its forward and
backward sleep for a third and two thirds of `DENSE` seconds. Dense gradients are next to nothing.

The network: each process has a link to the ranks of its node and one to others. A message leaves when those issued
before it on its link have left, takes its bytes over the bandwidth, and arrives a latency later; only then is it handed
to gloo, so that a receiver waits for the slowest sender as it would. Constants are chosen so that the plain step waits
for about 24 % of its time, as TurboGR's did before it was made semi-asynchronous (arXiv 2605.13433; 2.19 % after).

`exposed_share`: time during which the main thread waits for keys, rows, gradients or updates, over the time of a step;
means over ranks, medians over the steps after the warm-up. With tables in a thread of their own this counts what that
thread computes while it is waited for, too, so that schedules with such a thread are judged the harder. `not_dense` is
all of a step but the dense sleep: exchange and every operation of the host.

`sync`: nothing runs ahead (`pipeline_depth` 0); `pipelined`: ids do; `semi_async` and `exact`: rows do; `six_stage`: as
`semi_async`; `sync_free`: `sync` over a network that takes no time. `..._alpha_A`: at another share of repeated keys;
`alpha` is what training logs as `gr/collision_rate`. `..._MxI`: M sets of tables, each spread over I ranks, in two
nodes; without it there are two ranks in one node, with one set of tables.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from batches import Batches
from gloo_processes import be_a_rank, free_port
from reporting import commit, device, publish
from slow_network import Link, Network, Waits, slowed
from timeline import draw
from torch import Tensor, nn
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DENSE = 0.3  # seconds of a step
KEYS, DIM = 4096, 64  # distinct keys of a process's batch, width
POPULAR, VOCABULARY, EXPONENT = 20_000, 400_000, 1.05  # ids drawn by Zipf's law are the first of all
LINKS = (Link(0.0005, 12e6), Link(0.001, 12e6))  # in a node, between nodes
WARM_UP, TAIL = 8, 3  # steps that are not timed
ALPHA, ALPHAS = 0.1, (0.05, 0.3, 0.5)
GOALS = {"semi_async": 0.03, "exact": 0.06}
SEMI: dict[str, Any] = {"sparse_update": "semi_async", "sync_steps": 2}
EXACT: dict[str, Any] = {"sparse_update": "exact_async", "sync_steps": 2}
SIX: dict[str, Any] = {"schedule": "six_stage", "pipeline_depth": 4}
MODES: dict[str, dict[str, Any]] = {
    "sync": {"pipeline_depth": 0},
    "pipelined": {},
    "semi_async": SEMI,
    "exact": EXACT,
    "six_stage": SIX | SEMI,
    "six_stage_exact": SIX | EXACT,
}
"""Of the strategy: a plain step; lookups ahead; rows ahead, stale or exact; the same in six stages."""
TOPOLOGIES: dict[str, tuple[int, int, int, list[str]]] = {
    "": (2, 1, 2, [*MODES]),
    "_2x1": (2, 2, 1, [*MODES]),
    "_1x4": (4, 1, 2, ["sync", "pipelined", "semi_async"]),
    "_2x2": (4, 2, 2, ["sync", "pipelined", "semi_async", "exact", "six_stage"]),
}
"""Ranks, groups of tables, ranks of a node, and what is trained."""
Array = np.ndarray[Any, Any]


# ---- batches ---------------------------------------------------------------------------------------------------------


def draws(rng: np.random.Generator, zipf_share: float, popularity: Array) -> Array:
    """Ids, so many that `KEYS` of them are distinct."""
    ids, distinct = np.zeros(0, np.int64), 0
    while distinct < KEYS:
        popular = np.searchsorted(popularity, rng.random(KEYS))
        ids = np.append(ids, np.where(rng.random(KEYS) < zipf_share, popular, rng.integers(VOCABULARY, size=KEYS)))
        first = np.unique(ids, return_index=True)[1]
        distinct = len(first)
    return ids[: np.sort(first)[KEYS - 1] + 1]


def zipf() -> Array:
    shares = np.arange(1, POPULAR + 1, dtype=np.float64) ** -EXPONENT
    cumulated: Array = np.cumsum(shares / shares.sum())
    return cumulated


def collision_rate(zipf_share: float, ranks: int) -> float:
    """The share of a step's keys that the step before had too, over all ranks."""
    popularity, rng = zipf(), np.random.default_rng(7)
    steps = [set(np.concatenate([draws(rng, zipf_share, popularity) for _ in range(ranks)])) for _ in range(4)]
    return statistics.fmean(len(a & b) / len(b) for a, b in zip(steps, steps[1:], strict=False))


def zipf_share(alpha: float, ranks: int) -> float:
    """How many ids to draw by Zipf's law to reach a collision rate."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if collision_rate(middle, ranks) < alpha else (low, middle)
    return (low + high) / 2


# ---- a training, in each of its processes ----------------------------------------------------------------------------


class Accelerator(torch.autograd.Function):
    """Dense layers that leave the host free: forward takes a third of the time, backward two."""

    busy = 0.0  # seconds in all

    @staticmethod
    def _sleep(seconds: float) -> None:
        began = time.perf_counter()
        time.sleep(seconds)
        Accelerator.busy += time.perf_counter() - began

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Accelerator._sleep(DENSE / 3)
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Accelerator._sleep(DENSE * 2 / 3)
        return grad


def train(mode: str, *, groups: int, node: int, ids: list[Array], is_free: bool = False) -> dict[str, Any]:
    """Trains; returns by step the seconds it took, waited and computed, the collision rates, and the stages' events.

    Args:
        mode: of `MODES`.
        groups: of ranks, with a full set of tables each.
        node: ranks of a node.
        ids: of this process's batches.
        is_free: whether the network takes no time.
    """
    import lightning.pytorch as pl
    from torchrec import KeyedJaggedTensor

    from lightning_gr.embeddings.dynamic import DynamicEmbeddingCollection, DynamicTableConfig
    from lightning_gr.plugins import SequenceBalancedStrategy

    waits, clock, alphas = Waits(), [], []

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.rows = DynamicEmbeddingCollection(tables=[DynamicTableConfig("item", DIM, ["item"])])
            self.head = nn.Linear(DIM, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rows_ND = self.rows(batch)["item"].values()
            loss: Tensor = self.head(Accelerator.apply(rows_ND)).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.append((time.perf_counter(), waits.seconds, Accelerator.busy))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            alphas.append(float(trainer.callback_metrics.get("gr/collision_rate", float("nan"))))

    pl.seed_everything(1)
    strategy = SequenceBalancedStrategy(table_groups=groups, **MODES[mode])
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=1,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [KeyedJaggedTensor(["item"], torch.from_numpy(x), lengths=torch.tensor([len(x)])) for x in ids]
    with slowed(Network(node, () if is_free else LINKS), waits):
        trainer.fit(Model(), Batches(batches))
    assert strategy.stage_log is not None
    steady = slice(WARM_UP, -TAIL)
    steps = np.diff(np.array(clock), axis=0)[steady]
    return {"steps": steps, "alpha": float(np.mean(alphas[steady])), "log": strategy.stage_log}


def work(rank: int, port: int, world_size: int, jobs: list[dict[str, Any]], steps: int, directory: str) -> None:
    """One process: trains what it is told to; the first one leaves what all have measured in the directory."""
    be_a_rank(rank, world_size, port)
    popularity, found = zipf(), []
    for job in jobs:
        rng, share = np.random.default_rng([rank, 1]), job.pop("zipf_share")
        events = job.pop("events", None)
        run = train(ids=[draws(rng, share, popularity) for _ in range(WARM_UP + steps + TAIL)], **job)
        log = run.pop("log")
        if events and rank == 0:
            log.write_csv(events)
        of_all: list[Any] = [None] * world_size
        dist.all_gather_object(of_all, run)
        found.append(of_all)
    if rank == 0:
        torch.save(found, Path(directory, "found"))
    dist.barrier()
    dist.destroy_process_group()


def run_all(world_size: int, jobs: list[dict[str, Any]], steps: int) -> list[dict[str, float]]:
    """What each job measured: medians over steps of means over ranks, in milliseconds, and shares."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(work, (port, world_size, jobs, steps, directory), nprocs=world_size)
        found = torch.load(Path(directory, "found"), weights_only=False)
    measured = []
    for runs in found:
        step, waited, dense = np.median(np.mean([run["steps"] for run in runs], axis=0), axis=0).tolist()
        measured.append(
            {
                "step_ms": step * 1e3,
                "dense_ms": dense * 1e3,
                "exposed_ms": waited * 1e3,
                "exposed_share": waited / step,
                "not_dense": 1 - dense / step,
                "alpha": runs[0]["alpha"],
            }
        )
    return measured


# ---- what is compared ------------------------------------------------------------------------------------------------


def show(name: str, of: dict[str, float]) -> None:
    times = f"{of['step_ms']:>12.1f}{of['step_ms'] / of['dense_ms']:>12.3f}{of['exposed_ms']:>12.1f}"
    shares = f"{of['exposed_share']:>12.4f}{of['not_dense']:>12.4f}"
    print(f"  {name:<28}{times}{shares}" + ("" if np.isnan(of["alpha"]) else f"{of['alpha']:>12.3f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="that are timed, of each training")
    parser.add_argument("--quick", action="store_true", help="two ranks and one group alone; nothing is kept")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--events", type=Path, help="where to write the events of six_stage, as CSV")
    parser.add_argument("--timeline", type=Path, help="where to draw them, as SVG or PNG")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"{device()}; commit {commit()}; torch {torch.__version__}; gloo, dense {DENSE * 1e3:.0f} ms a step")
    print(f"{KEYS:,} distinct keys a process and step, {DIM} wide, float32")
    for name, link in zip(("in a node", "between nodes"), LINKS, strict=True):
        print(f"  {name}: {link.latency * 1e3:g} ms and {link.bandwidth / 1e6:g} MB a second")
    result: dict[str, Any] = {"dense_ms": DENSE * 1e3, "keys": KEYS, "dim": DIM}
    with tempfile.TemporaryDirectory() as directory:
        events = args.events or Path(directory, "events.csv")
        for suffix, (ranks, groups, node, modes) in TOPOLOGIES.items():
            if suffix and args.quick:
                break
            common: dict[str, Any] = {"groups": groups, "node": node, "zipf_share": zipf_share(ALPHA, ranks)}
            jobs, names = [common | {"mode": mode} for mode in modes], [*modes]
            if not suffix:
                jobs[names.index("six_stage")]["events"] = str(events)
                jobs += [common | {"mode": "sync", "is_free": True}]
                jobs += [common | {"mode": "exact", "zipf_share": zipf_share(alpha, ranks)} for alpha in ALPHAS]
                names += ["sync_free", *(f"exact_alpha_{alpha}" for alpha in ALPHAS)]
            print(
                f"\n{ranks} ranks, {groups} group{'s' * (groups > 1)} of tables, {node} rank{'s' * (node > 1)} a node"
            )
            columns = ("ms a step", "/ dense", "exposed, ms", "exposed", "not dense", "alpha")
            print(" " * 30 + "".join(f"{column:>12}" for column in columns))
            for name, of in zip(names, run_all(ranks, jobs, args.steps), strict=True):
                show(name, of)
                result[f"exposed_share_{name}{suffix}"] = round(of["exposed_share"], 4)
                result[f"not_dense_{name}{suffix}"] = round(of["not_dense"], 4)
                result[f"step_ms_{name}{suffix}"] = round(of["step_ms"], 1)
                if name == "exact" and not suffix:
                    result["alpha"] = round(of["alpha"], 4)
        if args.timeline:
            draw(events, args.timeline)
    print()
    for mode, goal in GOALS.items():
        print(f"  {f'exposed_share_{mode}':<28}{result[f'exposed_share_{mode}']:>8}   goal {goal} at most")
    result |= {f"goal_{mode}": goal for mode, goal in GOALS.items()}
    if not args.quick:
        publish("overlap", result, as_json=args.json)


if __name__ == "__main__":
    main()
