"""Training on two processes: what balancing gains, what a second process costs, and how much latency is hidden.

python benchmarks/bench_scaling.py [--repeats 3] [--quick] [--json]

The real thing: Lightning's Trainer, `SequenceBalancedStrategy`, `RetrievalModule` with an HSTU encoder and sampled
softmax, and `SequenceDataModule` on a log whose lengths are log-normal with a heavy tail, about 8 sequences a process
and step. A process has one core of its own and one thread for its operators; processes talk by gloo. Forms that are
compared take turns in one run, and the time of a step is the median over repeats. Each repeat trains two epochs, of
which the first is not timed (for latency one epoch, without its first steps).

`step_speedup_balanced`: step time on two processes with samples dealt out as they come over that with `lpt`, of the
same global batches. `predicted_speedup`: the same ratio of the sum over steps of the costlier process's cost, by the
model's count of operations; `..._calibrated`, by a cost fitted to steps of single processes. `speedup_share`: what was
gained over what was predicted to be, of the parts above 1.

`scaling_efficiency_2`: tokens a second of one training on two processes over those of two trainings of one process
each, which run side by side, with the same samples in all and the same number of steps.

`hidden_latency_fraction`: each exchange of ids (a lookup has two, one after the other: sizes, then ids) is made to take
a latency at least, by a wait that sleeps. The share of the time this adds to a step without a pipeline
(`pipeline_depth` 0) that it does not add with one (2). Steps have a quarter of the tokens, and in one training the
latency is there for eight of them, then away for eight, the other way round in every other repeat, so that each step is
compared with itself and what the machine does in minutes drops out. The first three after each change do not count.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gloo_processes import World, cores_of_two
from reporting import commit, device, publish
from slow_network import LateWork

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LAYERS, DIM, HEADS, NEGATIVES, ITEMS = 2, 256, 4, 32, 5_000
SEQUENCES = 8  # of a process in a step, on average
MEAN, SIGMA, CAP = 320, 1.0, 1024  # tokens: log-normal before the cut
BLOCK, CHANGE = 8, 3  # steps with a latency or without, and the first of them, which are not counted
Array = np.ndarray[Any, Any]


def write_logs(folder: str, steps: int, sequences: int) -> list[str]:
    """Two logs of alike lengths, for a process each, and one of all their users."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, 2 * sequences * steps)
    lengths = np.sort(lengths.clip(5, CAP).astype(int)) + 2  # two are held out
    paths = [str(Path(folder, f"{name}.csv")) for name in ("first", "second", "both")]
    lines: list[list[str]] = [[], []]
    for user, length in enumerate(lengths):
        items, times = rng.integers(ITEMS, size=length), 1_700_000_000 + rng.integers(1, 9999, length).cumsum()
        lines[user % 2] += [f"u{user},{item},{at}" for item, at in zip(items, times, strict=True)]
    for path, own in zip(paths, (*lines, lines[0] + lines[1]), strict=True):
        Path(path).write_text("\n".join(["user_id,item_id,timestamp", *own]) + "\n")
    return paths


# ---- a training, in each of its processes ----------------------------------------------------------------------------


@contextmanager
def slow_exchange(latency: Callable[[], float]) -> Iterator[None]:
    """Inside, no exchange of integers arrives sooner than so many seconds after it was started."""
    original: Callable[..., Any] = dist.all_to_all_single

    def all_to_all(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        arrives = time.perf_counter() + latency()
        inner = original(output, *args, **kwargs)
        if output.dtype.is_floating_point:
            return inner
        assert inner is not None
        return LateWork(inner, arrives)

    dist.all_to_all_single = all_to_all  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.all_to_all_single = original  # type: ignore[assignment]


def is_slow(step: int, first: int) -> bool:
    """Whether exchanges that begin in a step have the latency."""
    return max(step, 0) // BLOCK % 2 == first


def train(
    path: str,
    *,
    tokens: int,
    epochs: int = 2,
    partitioner: str = "lpt",
    depth: int = 2,
    dynamic: bool = False,
    latency: float | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """Trains; returns when each step of the last epoch began and the epoch's end, and the lengths of its sequences.

    Args:
        path: the log.
        tokens: about as many of each process in a step.
        epochs: to train.
        partitioner: see `Balancing`.
        depth: of the pipeline.
        dynamic: whether tables are.
        latency: of each exchange of ids, in seconds, in every other block of steps; None leaves exchanges alone.
        first: the first block that has it: 0 or 1.
    """
    import lightning.pytorch as pl

    from lightning_gr.balancing import Balancing
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.embeddings.dynamic import DynamicTables
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    starts: list[float] = []
    ends: list[float] = []
    lengths: list[list[int]] = []

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            for each in (starts, ends, lengths):
                each.clear()

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            starts.append(time.perf_counter())
            lengths.append(batch.layout.lengths_B.tolist())

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    pl.seed_everything(1)
    world_size = dist.get_world_size()
    model = RetrievalModule(
        encoder=HSTUEncoder(dim=DIM, num_layers=LAYERS, num_heads=HEADS, max_length=CAP, dropout=0.1),
        loss="sampled_softmax",
        num_negatives=NEGATIVES,
        dynamic_tables=DynamicTables() if dynamic else None,
    )
    strategy = SequenceBalancedStrategy(
        balancing=Balancing(partitioner=partitioner),  # type: ignore[arg-type]
        pipeline_depth=depth,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_epochs=epochs,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # A batch is cut so that it may exceed its share by the longest sample.
    data = SequenceDataModule(path=path, global_tokens=world_size * tokens + CAP - 1, max_length=CAP, raw_ids=dynamic)
    with nullcontext() if latency is None else slow_exchange(lambda: latency * is_slow(len(starts) - 1, first)):
        trainer.fit(model, datamodule=data)
    cost, log = model.sequence_cost(), strategy.stage_log
    assert log is not None
    stages = {}
    for stage in dict.fromkeys(event.stage for event in log.events()):
        took = [event.end - event.start for event in log.events(stage)]
        stages[stage] = (sum(took) / len(starts) / epochs, log.hidden_fraction(stage))
    return {
        "starts": starts,
        "end": ends[-1],
        "lengths": lengths,
        "cost": (cost.linear, cost.quadratic),
        "stages": stages,
    }


def processor_time() -> Array:
    """Time of all cores since the start of the machine: all of it, and what its host gave to others meanwhile."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return np.array([1.0, 0.0])
    ticks = [float(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return np.array([sum(ticks), ticks[7]])


# ---- what the trainings say ------------------------------------------------------------------------------------------


def step_seconds(repeats: list[list[dict[str, Any]]]) -> Array:
    """Of each step of the last epoch: the mean over processes, of which the median over repeats.

    The same step trains the same samples in every repeat, so that what else the machine does drops out.
    """
    times = [[np.diff([*run["starts"], run["end"]]) for run in runs] for runs in repeats]
    medians: Array = np.median(np.mean(times, axis=1), axis=0)
    return medians


def num_tokens(runs: list[dict[str, Any]]) -> int:
    return sum(sum(map(sum, run["lengths"])) for run in runs)


def critical_cost(runs: list[dict[str, Any]], cost: Callable[[Array], Array]) -> float:
    """Sum over steps of the costlier process's cost."""
    per_step = [[float(cost(np.array(x)).sum()) for x in run["lengths"]] for run in runs]
    return sum(map(max, zip(*per_step, strict=True)))


def balance_and_scaling(
    pair: World, singles: list[World], logs: list[str], repeats: int, tokens: int
) -> dict[str, Any]:
    from lightning_gr.balancing import SequenceCost, fit_cost

    runs: dict[str, list[list[dict[str, Any]]]] = {"contiguous": [], "lpt": [], "first": [], "second": []}
    for _ in range(repeats):
        for partitioner in ("contiguous", "lpt"):
            runs[partitioner].append(pair.train(logs[2], tokens=tokens, partitioner=partitioner))
        for world, log in zip(singles, logs, strict=False):
            world.start(log, tokens=tokens)
        for world, name in zip(singles, ("first", "second"), strict=True):
            runs[name].append(world.results())
    once = {name: each[0] for name, each in runs.items()}
    times = {name: step_seconds(each) for name, each in runs.items()}
    # However samples are dealt out, they are the same, and as many steps.
    moved = {name: num_tokens(each) for name, each in once.items()}
    assert moved["contiguous"] == moved["lpt"] == moved["first"] + moved["second"]
    assert len(times["contiguous"]) == len(times["lpt"])

    lengths = [np.array(x) for name in ("first", "second") for x in once[name][0]["lengths"]]
    fitted = fit_cost(lengths, np.concatenate([times["first"], times["second"]]))
    model = SequenceCost(*once["lpt"][0]["cost"])
    predicted, calibrated = (
        critical_cost(once["contiguous"], cost) / critical_cost(once["lpt"], cost) for cost in (model, fitted)
    )
    speedup = times["contiguous"].sum() / times["lpt"].sum()
    rates = {name: moved[name] / took.sum() for name, took in times.items()}
    efficiency = rates["lpt"] / (rates["first"] + rates["second"])

    print(f"\n{len(times['lpt'])} steps of {moved['lpt'] / len(times['lpt']):,.0f} tokens on two processes")
    names = ("2 processes, as they come", "2 processes, lpt", "1 process beside another", "the other")
    for name, (form, took) in zip(names, times.items(), strict=True):
        print(f"  {name:<28}{took.mean() * 1e3:>8.1f} ms a step,{rates[form]:>10,.0f} tokens a second")
    for name, cost in (("model", model), ("fit", fitted)):
        quadratic = f"{cost.quadratic / cost.linear * 1e3:.2f} L^2 / 1000" if cost.linear else "L^2"
        print(f"  cost of L tokens by the {name:<6} as L + {quadratic}")
    print_stages(once["lpt"])
    return {
        **{f"{name}_step_ms": round(took.mean() * 1e3, 2) for name, took in times.items()},
        "step_speedup_balanced": round(speedup, 4),
        "predicted_speedup": round(predicted, 4),
        "predicted_speedup_calibrated": round(calibrated, 4),
        "speedup_over_predicted": round(speedup / predicted, 4),
        "speedup_share": round((speedup - 1) / (predicted - 1), 3),
        "speedup_share_calibrated": round((speedup - 1) / (calibrated - 1), 3),
        "scaling_efficiency_2": round(efficiency, 4),
    }


def print_stages(runs: list[dict[str, Any]]) -> None:
    for stage, (took, hidden) in runs[0]["stages"].items():
        beside = "" if stage == "train" else f", {hidden:.0%} of it while another batch trained"
        print(f"    {stage:<8}{took * 1e3:>8.1f} ms a step{beside}")


def hidden_latency(pair: World, log: str, repeats: int, tokens: int, latency: float, dynamic: bool) -> dict[str, Any]:
    suffix = "_dynamic" if dynamic else ""
    depths = {"plain": 0, "pipelined": 2}
    runs: dict[str, list[list[list[dict[str, Any]]]]] = {name: [[], []] for name in depths}
    for repeat in range(2 * repeats):
        for name, depth in depths.items():
            run = pair.train(
                log, tokens=tokens // 4, epochs=1, depth=depth, dynamic=dynamic, latency=latency, first=repeat % 2
            )
            runs[name][repeat % 2].append(run)
    ms, added = {}, {}
    for name, of_first in runs.items():
        times = [step_seconds(each) * 1e3 for each in of_first]
        # Nor the last steps, behind which there is nothing to prepare.
        steps = [step for step in range(BLOCK, len(times[0]) - 2) if step % BLOCK >= CHANGE]
        # Each step is slow in the trainings of one kind and not in those of the other.
        slow, fast = (
            float(np.mean([times[0 if is_slow(step, 0) == wanted else 1][step] for step in steps]))
            for wanted in (True, False)
        )
        ms[name], added[name] = fast, slow - fast
    print(f"\n{'dynamic' if dynamic else 'static'} tables; an exchange of ids takes {latency * 1e3:.0f} ms or more")
    for name, more in added.items():
        print(f"  {name:<12}{ms[name]:>8.1f} ms a step,{more:>8.1f} ms more with the latency")
    print_stages(runs["pipelined"][0][0])
    result = {f"{name}_ms{suffix}": round(took, 2) for name, took in ms.items()}
    result |= {f"{name}_slow_ms{suffix}": round(took + added[name], 2) for name, took in ms.items()}
    return result | {f"hidden_latency_fraction{suffix}": round(1 - added["pipelined"] / added["plain"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of an epoch, about")
    parser.add_argument("--latency", type=float, default=0.05, help="of an exchange of ids, in seconds")
    parser.add_argument("--quick", action="store_true", help="few small steps, to see that it runs; nothing is kept")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    repeats, steps, sequences = (1, 8, 4) if args.quick else (args.repeats, args.steps, SEQUENCES)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"{device()}; commit {commit()}; torch {torch.__version__}; 1 core a process, gloo")
    print(f"HSTU of {LAYERS} layers, {DIM} wide; log-normal lengths, mean about {MEAN}, at most {CAP} tokens")
    with tempfile.TemporaryDirectory() as folder:
        logs = write_logs(folder, steps, sequences)
        tokens = sequences * MEAN
        cores = cores_of_two()
        pair, singles = World(cores, train), [World([core], train) for core in cores]
        before = processor_time()
        result: dict[str, Any] = {"latency_ms": args.latency * 1e3, "repeats": repeats}
        result |= balance_and_scaling(pair, singles, logs, repeats, tokens)
        for dynamic in (False, True):
            result |= hidden_latency(pair, logs[2], max(repeats - 1, 1), tokens, args.latency, dynamic)
    everything, stolen = processor_time() - before
    result["stolen_share"] = round(stolen / max(everything, 1.0), 3)
    if result["stolen_share"] > 0.02:
        print(
            f"\nthe host gave {result['stolen_share']:.0%} of the cores' time to others: measure again before you judge"
        )
    print()
    for name in result:
        if not ("_ms" in name or name == "repeats"):
            print(f"  {name:<34}{result[name]:>8}")
    result |= {"goal_speedup_over_predicted": 0.8, "goal_efficiency": 0.9, "goal_hidden": 0.8}
    if not args.quick:
        publish("scaling", result, as_json=args.json)


if __name__ == "__main__":
    main()
