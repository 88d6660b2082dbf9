"""The whole system against the plain Lightning way, part by part, on two processes; see bench_end_to_end.

Two gloo processes with a core and a thread each. The baseline is what a Lightning user has without lightning-gr: dense
parameters by DDP, TorchRec's static tables sharded by rows, ids as they come, a `DataLoader` with as many samples a
batch on each process, nothing ahead. Its attention is lightning-gr's, as that of all others; the last row, the padded
reference, aside. Each form has what those above it have.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gloo_processes import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plain_lightning import TASK, Ranker, Samples, Size, System
from slow_network import LateWork

from lightning_gr.cli.compare_statistics import Interval, interval, t_quantile

WARM_UP = 3
SIZES = {
    "lookups": Size(embedding_dim=512, dim=64, num_layers=2, num_heads=2),
    "compute": Size(embedding_dim=64, dim=256, num_layers=3, num_heads=4),
}
LATENCY, BANDWIDTH = 0.001, 100e6
"""Seconds, and bytes a second of a process, of the network where there is one.

The bandwidth has the ratio to a core's 60 to 80 GFLOP/s that 200 Gbit/s have to the 19.5 TFLOP/s of an A100 in float32.
"""


def forms() -> dict[str, System]:
    """By name, each with what those before it have; and the baseline with the padded reference."""
    form, found = System(), {"base": System()}
    parts: dict[str, dict[str, Any]] = {
        "tables": {"tables": "dynamic"},
        "dedup": {"dedup": True},
        "balancing": {"balanced": True},
        "pipeline": {"pipeline_depth": 2},
        "late": {"late": True},
    }
    for name, part in parts.items():
        form = replace(form, **part)
        found[name] = form
    return found | {"padded": System(backend="reference")}


SWITCHES = {"tables": "base", "dedup": "tables", "balancing": "dedup", "pipeline": "balancing", "late": "pipeline"}
"""What each form is compared with, to see what its part does."""
WHOLE = "pipeline"
"""The whole system with nothing late, so that no number of the training differs from that of one process."""


# ---- a network -------------------------------------------------------------------------------------------------------


@contextmanager
def network(latency: float, bandwidth: float, sent: list[int]) -> Iterator[None]:
    """Inside, what this process hands to all-to-all for others takes its bytes' time, one after the other, and latency.

    Args:
        latency: seconds.
        bandwidth: bytes a second.
        sent: its first number is raised by the bytes for others.
    """
    original: Callable[..., Any] = dist.all_to_all_single
    lock, free_at = threading.Lock(), [0.0]

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        own = input_split_sizes[rank] if input_split_sizes else len(input) // world_size
        size = (len(input) - own) * input.element_size() * (input.numel() // max(len(input), 1))
        with lock:
            sent[0] += size
            free_at[0] = max(time.perf_counter(), free_at[0]) + size / bandwidth
            arrives = free_at[0] + latency
        work = original(output, input, output_split_sizes, input_split_sizes, group=group, async_op=True)
        late = LateWork(work, arrives)
        if async_op:
            return late
        late.wait()
        return None

    dist.all_to_all_single = all_to_all_single
    try:
        yield
    finally:
        dist.all_to_all_single = original


# ---- a training, in each of its processes ----------------------------------------------------------------------------


def train(system: System, size: Size, *, steps: int, slow: bool, rows: dict[str, int] | None = None) -> dict[str, Any]:
    """Trains an epoch; returns seconds of each step but the first, tokens of each, bytes sent, and the sum of losses.

    Args:
        system: which parts are lightning-gr's.
        size: of model and samples.
        steps: of batches of fixed size, behind the first ones, which are not counted.
        slow: whether there is a network between the processes.
        rows: ids of each category.
    """
    import lightning.pytorch as pl

    from lightning_gr.plugins import SequenceBalancedStrategy

    world_size = dist.get_world_size()
    samples = Samples(size=size, count=world_size * size.samples * (steps + WARM_UP), rows=rows)
    loader: Any = samples.loader(size.samples)
    if system.balanced:
        loader = samples.planned_loader(steps + WARM_UP, rank=dist.get_rank(), world_size=world_size)
    starts: list[float] = []
    processor: list[float] = []
    tokens: list[int] = []
    losses: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            starts.append(time.perf_counter())
            processor.append(time.process_time())

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            tokens.append(batch.num_tokens)
            losses.append(float(outputs["loss"]) * batch.denominators[TASK] / batch.gradient_divisor)

        def on_train_epoch_end(self, *_: Any) -> None:
            starts.append(time.perf_counter())
            processor.append(time.process_time())

    pl.seed_everything(1)
    rows_ahead: dict[str, Any] = {"sparse_update": "semi_async", "sync_steps": 2} if system.late else {}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(static_dedup=False, pipeline_depth=system.pipeline_depth, **rows_ahead),
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sent = [0]
    with network(LATENCY if slow else 0.0, BANDWIDTH if slow else math.inf, sent):
        trainer.fit(Ranker(system=system, size=size, rows=rows), loader)
    return {
        "seconds": np.diff(starts[WARM_UP:]),
        "processor": processor[-1] - processor[WARM_UP],
        "tokens": tokens,
        "sent": sent[0],
        "loss": sum(losses),
    }


# ---- what is compared ------------------------------------------------------------------------------------------------


def measure(world: World, system: System, size: Size, *, steps: int, slow: bool) -> dict[str, Any]:
    """One training of two processes: seconds and tokens of each timed step, and what explains them."""
    runs = world.train(system, size, steps=steps, slow=slow)
    tokens = np.array([run["tokens"] for run in runs])
    timed, total = tokens[:, WARM_UP:], int(tokens.sum())
    return {
        "seconds": np.mean([run["seconds"] for run in runs], axis=0),
        "tokens": tokens.sum(0),
        "processor_ms": 1e3 * sum(run["processor"] for run in runs) / timed.size,
        "sent_mb": sum(run["sent"] for run in runs) / tokens.size / 1e6,
        "waits": 1 - timed.mean(0).sum() / timed.max(0).sum(),
        "loss": sum(run["loss"] for run in runs) / total,
    }


def compare(
    world: World, size: Size, names: Sequence[str], *, steps: int, repeats: int, slow: bool
) -> dict[str, list[dict[str, Any]]]:
    """Measurements of forms that take turns, by name; each round begins with another, since the machine drifts."""
    of, found = forms(), {name: [] for name in names}  # type: dict[str, System], dict[str, list[dict[str, Any]]]
    for repeat in range(repeats):
        first = repeat * len(names) // repeats
        for name in [*names[first:], *names[:first]]:
            found[name].append(measure(world, of[name], size, steps=steps, slow=slow))
    check(found)
    return found


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    """That all forms have trained the same samples to about the same loss.

    Raises:
        SystemExit: they have not.
    """
    first = {name: runs[0] for name, runs in found.items()}
    totals = {name: int(run["tokens"].sum()) for name, run in first.items()}
    if len(set(totals.values())) != 1:
        raise SystemExit(f"the forms do not train the same samples: {totals}")
    losses = {name: run["loss"] for name, run in first.items()}
    if not all(math.isfinite(x) for x in losses.values()) or max(losses.values()) > 1.05 * min(losses.values()):
        raise SystemExit(f"the forms do not train to the same loss: {losses}")


def step_seconds(runs: list[dict[str, Any]]) -> np.ndarray:
    """Seconds of each step, the median of the repeats: what else the machine does in one of them does not count."""
    return np.median([run["seconds"] for run in runs], axis=0)


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Of two sums over steps, with its relative variance: that of what a step has beyond its share."""
    found, count = above.sum() / below.sum(), len(above)
    return float(found), float(((above - found * below) ** 2).sum() * count / max(count - 1, 1) / above.sum() ** 2)


def speedup(over: list[dict[str, Any]], of: list[dict[str, Any]]) -> Interval:
    """How many times the tokens a second, with the interval that the spread of the steps gives.

    Steps with the same samples are compared one by one.
    """
    seconds = [step_seconds(runs) for runs in (over, of)]
    tokens = [runs[0]["tokens"][-len(x) :] for runs, x in zip((over, of), seconds, strict=True)]
    if np.array_equal(*tokens):
        found, variance = ratio(seconds[1], seconds[0])
        freedom = len(seconds[0]) - 1
    else:
        (rate, variance), (before, its) = (ratio(x, y) for x, y in zip(tokens, seconds, strict=True))
        found, variance = rate / before, variance + its
        freedom = len(seconds[0]) + len(seconds[1]) - 2
    return Interval(found, found * t_quantile(max(freedom, 1)) * math.sqrt(variance))


def speedup_of_repeats(over: list[dict[str, Any]], of: list[dict[str, Any]]) -> Interval:
    """As `speedup`, by the spread of the repeats: for steps whose time is not in proportion to their tokens."""
    rates = [[x["tokens"][-len(x["seconds"]) :].sum() / x["seconds"].sum() for x in runs] for runs in (over, of)]
    return interval([x / y for x, y in zip(*rates, strict=True)])


def table(found: dict[str, list[dict[str, Any]]], suffix: str) -> dict[str, Any]:
    """Prints what was measured, and returns it by column: the speed-up of each form, and what its part does.

    Args:
        found: measurements by form.
        suffix: of the columns.
    """
    print(
        f"{'':<12}{'tokens/s':>10}{'of base':>16}{'of the one before':>20}{'CPU ms a step':>15}{'MB sent':>9}"
        f"{'waits':>8}{'loss':>9}"
    )
    result: dict[str, Any] = {}
    for name, runs in found.items():
        mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        seconds = step_seconds(runs)
        rate = runs[0]["tokens"][-len(seconds) :].sum() / seconds.sum()
        of_base, before = speedup(runs, found["base"]), SWITCHES.get(name)
        own = speedup(runs, found[before]) if before in found else None
        texts = ["" if x is None else f"{x.mean:.3f} ± {x.half_width or 0:.3f}" for x in (of_base, own)]
        print(
            f"{name:<12}{rate:>10,.0f}{texts[0]:>16}{texts[1]:>20}{mean['processor_ms']:>15.1f}"
            f"{mean['sent_mb']:>9.2f}{mean['waits']:>8.1%}{mean['loss']:>9.4f}",
            flush=True,
        )
        result |= {
            f"tokens_per_second_{name}{suffix}": round(float(rate)),
            f"processor_ms_{name}{suffix}": round(mean["processor_ms"], 1),
            f"sent_mb_{name}{suffix}": round(mean["sent_mb"], 3),
            f"waits_{name}{suffix}": round(mean["waits"], 4),
        }
        for key, x in ((f"speedup_{name}{suffix}", of_base), (f"switch_{name}{suffix}", own)):
            if x is not None and name != "base":
                result |= figure(key, x)
    return result


def figure(name: str, of: Interval) -> dict[str, float]:
    """A mean and its half width, as columns."""
    return {name: round(of.mean, 3), f"{name}_half_width": round(of.half_width or 0.0, 3)}
