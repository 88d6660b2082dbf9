"""How close training comes to the machine's best matrix products, and what the monitors cost.

python benchmarks/bench_mfu.py [--json] [--steps 12] [--profile]

MTGR-small (3 blocks, d = 512, 2 heads) trained by Lightning under `SequenceBalancedStrategy` on one device, with the
monitors of a recipe. Samples have 600 tokens on average, log-normal (sigma = 0.5, 64 ... 2,048): 2 contextual, the rest
60 % static history, 25 % real-time history, 15 % candidates; 16 samples a batch. `mfu` is MFUMonitor's own figure, the
median over log steps; its peak is the best of twenty products of matrices of 2,048 in the same run with the same
threads (on a GPU, where the shape is 16 blocks, d = 1,024, 8 heads, length 2,048 in bf16, the peak is the table's).
With ``MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647`` in the environment glibc keeps memory that
a step has freed, so that the next one does not touch fresh pages; the row says whether it did.
`overhead` is the time inside the monitors' hooks over the time of the steps. `--profile` prints torch's profile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_attention import peak
from reporting import publish

from lightning_gr.batch import Labels, SequenceBatch
from lightning_gr.callbacks import MFUMonitor
from lightning_gr.models import MTGR, RankingModule
from lightning_gr.plugins import SequenceBalancedStrategy
from lightning_gr.ranking_features import RankingFeatures

GPU = torch.cuda.is_available()
SHAPE = (
    {"dim": 1024, "num_layers": 16, "num_heads": 8, "max_length": 2048}
    if GPU
    else {"dim": 512, "num_layers": 3, "num_heads": 2, "max_length": 2048}
)
MEAN, SIGMA, SHORTEST, SAMPLES, ITEMS, USERS = 2048 if GPU else 600, 0.5, 64, 16, 10_000, 1_000
FEATURES = RankingFeatures(
    contextual={"user_id": USERS, "city": 50},
    contextual_width=0,
    tokens={"item_id": ITEMS, "category": 40},
    width=4,
    history_width=4,
    candidate_width=6,
    tasks=("click", "buy"),
)
WARM_UP = 2


def lengths(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Tokens of each sample, of the wanted mean before they are clipped."""
    if GPU:
        return np.full(SAMPLES, MEAN)
    drawn = rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, SAMPLES)
    return np.clip(drawn.round(), SHORTEST, SHAPE["max_length"]).astype(np.int64)


def batch(rng: np.random.Generator, number: int) -> SequenceBatch:
    """Random features on tokens of all kinds, in the order of `RankingDataModule`'s batches."""
    from torchrec import KeyedJaggedTensor

    total_B, contextual = lengths(rng), len(FEATURES.contextual)
    candidates_B = (total_B * 0.15).astype(np.int64)
    realtime_B = (total_B * 0.25).astype(np.int64)
    static_B = total_B - contextual - candidates_B - realtime_B
    counts_B4 = np.stack([np.full(SAMPLES, contextual), static_B, realtime_B, candidates_B], 1)
    tokens, events = int(total_B.sum()), total_B - contextual
    first_B = total_B.cumsum() - total_B
    times = np.concatenate([np.r_[np.zeros(contextual), np.sort(rng.integers(0, 1 << 20, n))] for n in events])
    candidates = np.concatenate(
        [np.arange(start + n - c, start + n) for start, n, c in zip(first_B, total_B, candidates_B, strict=True)]
    )
    at_N = torch.from_numpy(candidates)
    ids = {name: rng.integers(0, size, SAMPLES) for name, size in FEATURES.contextual.items()}
    ids |= {name: rng.integers(0, size, int(events.sum())) for name, size in FEATURES.tokens.items()}
    of_events = torch.from_numpy(events)
    one_each = torch.ones(SAMPLES, dtype=torch.int64)
    return SequenceBatch(
        features=KeyedJaggedTensor(
            keys=list(ids),
            values=torch.from_numpy(np.concatenate(list(ids.values()))),
            lengths=torch.cat([one_each if name in FEATURES.contextual else of_events for name in ids]),
        ),
        token_counts_B4=torch.from_numpy(counts_B4),
        sample_ids_B=torch.arange(number * SAMPLES, (number + 1) * SAMPLES),
        labels={task: Labels((torch.rand(len(at_N)) < 0.3).float(), at_N) for task in FEATURES.tasks},
        denominators={task: float(len(at_N)) for task in FEATURES.tasks},
        timestamps_T=torch.from_numpy(times.astype(np.int64)),
        dense={
            "numbers": torch.randn(tokens, FEATURES.width),
            "actions": torch.randn(tokens, FEATURES.history_width),
            "cross": torch.randn(tokens, FEATURES.candidate_width),
        },
    )


class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """So many batches, made before training."""

    def __init__(self, num_batches: int) -> None:
        rng = np.random.default_rng(0)
        self.batches = [batch(rng, number) for number in range(num_batches)]

    def __iter__(self) -> Iterator[SequenceBatch]:
        return iter(self.batches)


class Watched(pl.Callback):
    """Adds up the time inside the hooks of other callbacks, and what they log.

    Args:
        monitors: the callbacks that stand before this one in the Trainer.
    """

    def __init__(self, monitors: list[pl.Callback]) -> None:
        self.in_hooks = self.in_steps = self.began = 0.0
        self.mfus: list[float] = []
        for monitor in monitors:
            for name in ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"):
                self._time(monitor, name)

    def _time(self, monitor: pl.Callback, name: str) -> None:
        hook = getattr(monitor, name)

        def timed(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            hook(*args, **kwargs)
            self.in_hooks += time.perf_counter() - began

        setattr(monitor, name, timed)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.in_hooks, self.began = 0.0, time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.in_steps = time.perf_counter() - self.began
        if trainer.global_step > WARM_UP:
            self.mfus.append(float(trainer.callback_metrics["gr/mfu"]))


def monitors(peak_tflops: float | None) -> list[pl.Callback]:
    """Those that watch every step."""
    import lightning_gr.callbacks as callbacks

    others = [getattr(callbacks, name)() for name in ("BalanceMonitor", "TableMonitor") if hasattr(callbacks, name)]
    return [MFUMonitor(peak_tflops=peak_tflops), *others]


def run(steps: int, peak_tflops: float | None, *, profile: bool) -> tuple[Watched, pl.Trainer]:
    pl.seed_everything(1, verbose=False)
    watching = monitors(peak_tflops)
    watched = Watched(watching)
    module = RankingModule(network=MTGR(**SHAPE), features=FEATURES, embedding_dim=64)
    loader = torch.utils.data.DataLoader(Batches(steps), batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cuda" if GPU else "cpu",
            devices=1,
            precision="bf16-mixed" if GPU else "32-true",
            strategy=SequenceBalancedStrategy(),
            max_steps=steps,
            log_every_n_steps=1,
            logger=DummyLogger(),
            callbacks=[*watching, watched],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        if not profile:
            trainer.fit(module, loader)
            return watched, trainer
        with torch.profiler.profile() as found:
            trainer.fit(module, loader)
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    return watched, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the row as JSON last")
    parser.add_argument("--steps", type=int, default=12, help="steps, of which the first two are not counted")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args()
    found = None if GPU else peak() / 1e12
    watched, trainer = run(args.steps, found, profile=args.profile)
    if found is not None:
        found = max(found, peak() / 1e12)  # the best of the run, whenever the machine gave it
    used = watched.mfus and trainer.callbacks[0].peak.flops / 1e12  # type: ignore[attr-defined]
    mfu = statistics.median(watched.mfus) * (1.0 if found is None else used / found)
    tokens = float(trainer.callback_metrics["gr/tokens_per_second"])
    row = {
        "mfu": round(mfu, 4),
        "overhead": round(watched.in_hooks / watched.in_steps, 5),
        "peak_tflops": round(used if found is None else found, 4),
        "step_ms": round(1e3 * watched.in_steps / (args.steps - WARM_UP), 1),
        "tokens_per_second": round(tokens, 1),
        "attention_share": round(float(trainer.callback_metrics["gr/attention_share"]), 4),
        "threads": torch.get_num_threads(),
        "malloc": "keeps memory" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default",
    }
    for name, value in row.items():
        print(f"{name:<20}{value}")
    publish("mfu", row, as_json=args.json)


if __name__ == "__main__":
    main()
