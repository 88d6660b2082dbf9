"""What a sample of many candidates saves against one row per exposure, where the model is the same.

python benchmarks/bench_aggregation.py [--json] [--samples 4] [--history 200] [--candidates 20] [--steps 4]
    [--threads 2] [--profile aggregated|split]

MTGR-small (3 blocks, d = 512, 2 heads) trained by Lightning under `SequenceBalancedStrategy`: tables, dense parameters,
forward, backward and both optimisers. The same exposures are given in two ways: users with their history and all of
their candidates, and each candidate with a copy of that history; of the history three quarters are static and the rest
real-time, which a candidate sees as far as it is earlier. A step of either way has the gradient of the same exposures,
so that both take as many optimiser steps an exposure; their losses are compared before anything is timed. `speedup` is
the ratio of the steps' times, each the median of its steps after two of warm-up, `flops_ratio` that of the work that
`module.flops` counts, and `share_of_flops` how much of it arrives.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import publish

from lightning_gr.batch import Labels, SequenceBatch
from lightning_gr.models import MTGR, RankingModule
from lightning_gr.plugins import SequenceBalancedStrategy
from lightning_gr.ranking_features import RankingFeatures

Array = np.ndarray[Any, Any]
ITEMS, USERS, CITIES, CATEGORIES, WARM_UP = 10_000, 1_000, 50, 40, 2
FEATURES = RankingFeatures(
    contextual={"user_id": USERS, "city": CITIES},
    contextual_width=0,
    tokens={"item_id": ITEMS, "category": CATEGORIES},
    width=4,
    history_width=4,
    candidate_width=6,
    tasks=("click", "buy"),
)
CONTEXTUAL = len(FEATURES.contextual)
NUMBERS = {"numbers": FEATURES.width, "actions": FEATURES.history_width, "cross": FEATURES.candidate_width}


class Exposures:
    """Users with a history and candidates, each a row of arrays: S users, H events, K candidates.

    Args:
        num_users: users of a step.
        history: events of the history of each.
        candidates: candidates of each.
        rng: where values come from.
    """

    def __init__(self, num_users: int, history: int, candidates: int, rng: np.random.Generator) -> None:
        self.history, self.candidates = history, candidates
        events = (num_users, history + candidates)
        self.users = {name: rng.integers(0, size, num_users) for name, size in (("user_id", USERS), ("city", CITIES))}
        self.events = {name: rng.integers(0, size, events) for name, size in FEATURES.tokens.items()}
        times = rng.integers(0, 1 << 20, events)
        times[:, :history].sort(1)
        static = history * 3 // 4
        times[:, :static] -= 1 << 21
        self.static, self.times = static, times
        self.dense = {name: rng.normal(size=(*events, width)).astype(np.float32) for name, width in NUMBERS.items()}
        self.labels = {task: (rng.random((num_users, candidates)) < 0.3) for task in FEATURES.tasks}

    def aggregated(self) -> SequenceBatch:
        """A sample for each user."""
        rows = np.arange(len(self.times))[:, None]
        places = np.broadcast_to(np.arange(self.history + self.candidates), self.times.shape)
        return self._batch(rows, places, self.candidates)

    def split(self) -> SequenceBatch:
        """A sample for each candidate, in the same order."""
        rows = np.repeat(np.arange(len(self.times)), self.candidates)[:, None]
        own = np.tile(self.history + np.arange(self.candidates), len(self.times))[:, None]
        history = np.broadcast_to(np.arange(self.history), (len(rows), self.history))
        return self._batch(rows, np.concatenate([history, own], 1), 1)

    def _batch(self, rows: Array, places: Array, candidates: int) -> SequenceBatch:
        from torchrec import KeyedJaggedTensor

        samples, length = len(rows), places.shape[1]
        counts_4 = [CONTEXTUAL, self.static, self.history - self.static, candidates]
        tokens = samples * (CONTEXTUAL + length)

        def on_tokens(values: Array) -> torch.Tensor:
            spread = np.zeros((samples, CONTEXTUAL + length, *values.shape[2:]), dtype=values.dtype)
            spread[:, CONTEXTUAL:] = values[rows, places]
            return torch.from_numpy(spread.reshape(tokens, *values.shape[2:]))

        ids = [of_users[rows[:, 0]] for of_users in self.users.values()]
        ids += [of_events[rows, places].ravel() for of_events in self.events.values()]
        each = [1] * len(self.users) + [length] * len(self.events)
        first = np.arange(samples)[:, None] * (CONTEXTUAL + length)
        at_N = torch.from_numpy((first + CONTEXTUAL + self.history + np.arange(candidates)).ravel())
        labels = {task: Labels(torch.from_numpy(y.ravel()).float(), at_N) for task, y in self.labels.items()}
        return SequenceBatch(
            features=KeyedJaggedTensor(
                keys=[*self.users, *self.events],
                values=torch.from_numpy(np.concatenate(ids)),
                lengths=torch.tensor(each).repeat_interleave(samples),
            ),
            token_counts_B4=torch.tensor([counts_4]).repeat(samples, 1),
            sample_ids_B=torch.arange(samples),
            labels=labels,
            denominators={task: float(len(at_N)) for task in FEATURES.tasks},
            timestamps_T=on_tokens(self.times),
            dense={name: on_tokens(values) for name, values in self.dense.items()},
        )


class StepTimes(pl.Callback):
    """Seconds and loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.flops = 0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.flops = int(module.flops(batch).model)  # type: ignore[operator]
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def train(batches: list[SequenceBatch], *, max_length: int, profile: bool) -> StepTimes:
    """Trains one step a batch."""
    pl.seed_everything(1, verbose=False)
    network = MTGR(dim=512, num_layers=3, num_heads=2, max_length=max_length, dropout=0.0)
    module = RankingModule(network=network, features=FEATURES, embedding_dim=64)
    gpu, times = torch.cuda.is_available(), StepTimes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cuda" if gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if gpu else "32-true",
            strategy=SequenceBalancedStrategy(),
            max_steps=len(batches),
            logger=False,
            callbacks=[times],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        if not profile:
            trainer.fit(module, loader)
            return times
        with torch.profiler.profile() as found:
            trainer.fit(module, loader)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the row as JSON last")
    parser.add_argument("--samples", type=int, default=4, help="users of a step")
    parser.add_argument("--history", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed, after two of warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", choices=("aggregated", "split"), help="print where the time goes, and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    steps = [Exposures(args.samples, args.history, args.candidates, rng) for _ in range(WARM_UP + args.steps)]
    max_length = CONTEXTUAL + args.history + args.candidates
    if args.profile:
        train([getattr(step, args.profile)() for step in steps], max_length=max_length, profile=True)
        return
    found = {
        way: train([getattr(step, way)() for step in steps], max_length=max_length, profile=False)
        for way in ("aggregated", "split")
    }
    first = {way: times.losses[0] for way, times in found.items()}
    if abs(first["aggregated"] - first["split"]) > 1e-4 * abs(first["split"]) and not torch.cuda.is_available():
        sys.exit(f"the two ways differ in their first loss, {first}: they do not train on the same")
    seconds = {way: statistics.median(times.seconds[WARM_UP:]) for way, times in found.items()}
    flops_ratio = found["split"].flops / found["aggregated"].flops
    speedup = seconds["split"] / seconds["aggregated"]
    row = {
        "samples": args.samples,
        "history": args.history,
        "candidates": args.candidates,
        "threads": args.threads,
        "aggregated_ms": round(1e3 * seconds["aggregated"], 1),
        "split_ms": round(1e3 * seconds["split"], 1),
        "speedup_aggregation": round(speedup, 2),
        "flops_ratio": round(flops_ratio, 2),
        "share_of_flops": round(speedup / flops_ratio, 3),
        "aggregated_gflops": round(found["aggregated"].flops / seconds["aggregated"] / 1e9, 1),
        "split_gflops": round(found["split"].flops / seconds["split"] / 1e9, 1),
    }
    for name, value in row.items():
        print(f"{name:<22}{value}")
    publish("aggregation", row, as_json=args.json)


if __name__ == "__main__":
    main()
