"""TurboGR's system put together part by part, on two processes: tokens a second, bytes sent, memory.

python benchmarks/bench_ablation.py [--repeats 5] [--steps 16] [--quick] [--json]

Lightning's Trainer under `SequenceBalancedStrategy` trains the model of ablation_model.py (HSTU over the sum of six
embeddings, sampled softmax) on a synthetic log in KuaiRand's form: items by Zipf's law, their authors, music, tags and
types, log-normal lengths with a heavy tail. A step's samples are those of a token budget, the same for all rows; each
process gets a half. Each row of the table has what is in its name beside all of the rows above it:

- `base`: samples as they come; TorchRec's static tables, a table a feature, sharded by rows; sequences padded to the
  longest that is allowed; negatives of every position, padded ones too, each looked up and kept as a row of its own;
  nothing runs ahead
- `dynamic`: lightning-gr's dynamic tables in their place, apart, every id sent as it comes
- `merging`: tables of one width are one
- `dedup`: ids are made distinct before they travel and where they arrive
- `jagged`: fused operators on jagged sequences; negatives of labels alone, a row an item
- `balancing`: samples are dealt out by their cost
- `pipeline`: the next batches' ids travel ahead
- `semi_async`: the next batch's rows do, one update behind
- `negatives`: half as many negatives of a label's own, which other labels share (k = 2), in 16 bits

Jagged operators come before balancing, since padded samples cost the same however they are dealt out. The first loss of
all rows up to the last must be the same to 1e-3, or the benchmark fails.

`tokens_per_second`: of real tokens, both processes, over the steps after the first three; `sent_mb`: what a step of a
process hands to all-to-all, dense gradients aside; `peak_mb`: growth of a process's memory in use during the training.
Forms take turns; each figure has the half width of its 95 % interval over repeats, the speedup over that of the same
repeat's `base`.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gloo_processes import World, cores_of_two
from reporting import commit, device, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablation_model import EVENT_FIELDS, Form, Recommender

DIM, LAYERS, CAP = 64, 2, 256
ITEMS, EXPONENT = 100_000, 1.05
FIELDS = {"author_id": 20_000, "music_id": 5_000, "tag": 64, "video_type": 3, "tab": 15}
SEQUENCES, MEAN, SIGMA = 8, 64, 1.0  # of a process in a step; tokens before the cut
WARM_UP = 3
Array = np.ndarray[Any, Any]


def forms() -> dict[str, Form]:
    """By name, each with what those before it have."""
    base = Form()
    parts: dict[str, dict[str, Any]] = {
        "base": {},
        "dynamic": {"tables": "dynamic"},
        "merging": {"merge": True},
        "dedup": {"dedup": "two_stage"},
        "jagged": {"jagged": True},
        "balancing": {"partitioner": "lpt"},
        "pipeline": {"pipeline_depth": 2},
        "semi_async": {"sparse_update": "semi_async"},
        "negatives": {"own_negatives": 32, "sharing": 2, "half": True},
    }
    found = {}
    for name, part in parts.items():
        base = replace(base, **part)
        found[name] = base
    return found


def write_store(folder: Path, steps: int) -> Path:
    """A store in KuaiRand's manner, with samples for so many steps of two processes."""
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    rng = np.random.default_rng(0)
    users = 2 * SEQUENCES * (steps + WARM_UP + 2)
    lengths = rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, users).clip(5, CAP).astype(int) + 2
    shares = np.arange(1, ITEMS + 1, dtype=np.float64) ** -EXPONENT
    popularity = np.cumsum(shares / shares.sum())
    total = int(lengths.sum())
    items = np.searchsorted(popularity, rng.random(total))
    columns: dict[str, Array] = {
        "user_id": np.repeat(np.arange(users), lengths),
        "item_id": items,
        "timestamp": 1_650_000_000 + rng.integers(1, 600, total).cumsum(),
    }
    for number, (name, count) in enumerate(FIELDS.items()):
        columns[name] = rng.integers(count, size=total) if name == "tab" else items * (2 * number + 7919) % count
    import polars as pl

    pl.DataFrame(columns).write_csv(folder / "log.csv")
    return prepare(open_log(folder / "log.csv", columns=Columns(sparse=EVENT_FIELDS)), folder / "store").path


# ---- a training, in each of its processes ----------------------------------------------------------------------------


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Inside, adds up the bytes that this process hands to all-to-all."""
    lock, original = threading.Lock(), dist.all_to_all_single

    def all_to_all_single(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            sent[0] += input.numel() * input.element_size()
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single
    try:
        yield
    finally:
        dist.all_to_all_single = original


def memory(field: str) -> int:
    """Kibibytes of this process: ``VmRSS`` in use, ``VmHWM`` the most so far."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return int(line.split()[1])


def train(path: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains one form; returns when steps began, their tokens, what was sent, the memory it took, the first loss."""
    import lightning.pytorch as pl

    from lightning_gr.balancing import Balancing
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    form = Form(**settings)
    starts: list[float] = []
    tokens: list[int] = []
    losses: list[float] = []
    sent, by_step = [0], []

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            starts.append(time.perf_counter())
            tokens.append(batch.num_tokens)
            by_step.append(sent[0])

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            if not losses:
                losses.append(float(outputs["loss"]))

    pl.seed_everything(1)
    asynchronous: dict[str, Any] = {"sparse_update": form.sparse_update, "sync_steps": 2}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=SequenceBalancedStrategy(
            balancing=Balancing(partitioner=form.partitioner),
            static_dedup=False,
            pipeline_depth=form.pipeline_depth,
            **(asynchronous if form.sparse_update != "sync" else {}),
        ),
        max_steps=steps + WARM_UP,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SequenceDataModule(
        path=path, global_tokens=2 * SEQUENCES * MEAN, max_length=CAP, features=list(EVENT_FIELDS), seed=0
    )
    data.setup()
    rows = {"item_id": data.num_items, **{name: count + 1 for name, count in FIELDS.items()}}
    model = Recommender(form=form, rows=rows, dim=DIM, num_layers=LAYERS, max_length=CAP)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
    before = memory("VmRSS")
    with counted(sent):
        trainer.fit(model, datamodule=data)
    return {
        "seconds": np.diff(starts)[WARM_UP:],
        "tokens": tokens[WARM_UP:-1],
        "sent": np.diff(by_step)[WARM_UP:],
        "peak": memory("VmHWM") - before,
        "loss": losses[0],
    }


# ---- what is compared ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="that are timed, of each training")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; nothing is kept")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    repeats, steps = (1, 4) if args.quick else (args.repeats, args.steps)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"{device()}; commit {commit()}; torch {torch.__version__}; 2 gloo processes, 1 core each")
    measured: dict[str, dict[str, list[float]]] = {
        name: {"tokens_per_second": [], "sent_mb": [], "peak_mb": [], "loss": []} for name in forms()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_store(Path(folder), steps))
        for _ in range(repeats):
            for name, form in forms().items():
                world = World(cores_of_two(), train)  # new ones, whose memory nobody else has grown
                runs = world.train(path, asdict(form), steps)
                world.close()
                seconds = np.mean([run["seconds"] for run in runs], axis=0).sum()
                kept = measured[name]
                kept["tokens_per_second"].append(sum(sum(run["tokens"]) for run in runs) / seconds)
                kept["sent_mb"].append(float(np.mean([run["sent"].mean() for run in runs])) / 1e6)
                kept["peak_mb"].append(max(run["peak"] for run in runs) * 1024 / 1e6)
                kept["loss"].append(sum(run["loss"] for run in runs) / len(runs))
    first = {name: kept["loss"][0] for name, kept in measured.items()}
    result: dict[str, Any] = {"repeats": repeats, "steps": steps}
    from lightning_gr.cli.compare_statistics import interval

    base = np.array(measured["base"]["tokens_per_second"])
    print(f"\n{'':<12}{'tokens/s':>20}{'of base':>18}{'MB sent a step':>16}{'peak MB':>18}{'first loss':>12}")
    for name, kept in measured.items():
        rate, peak = interval(kept["tokens_per_second"]), interval(kept["peak_mb"])
        speedup = interval((np.array(kept["tokens_per_second"]) / base).tolist())
        sent = float(np.mean(kept["sent_mb"]))
        widths = [x.half_width or 0.0 for x in (rate, speedup, peak)]
        print(
            f"{name:<12}{rate.mean:>11,.0f} ± {widths[0]:>6,.0f}{speedup.mean:>11.2f} ± {widths[1]:.2f}{sent:>16.2f}"
            f"{peak.mean:>11.0f} ± {widths[2]:>4.0f}{first[name]:>12.4f}"
        )
        result |= {
            f"tokens_per_second_{name}": round(rate.mean),
            f"speedup_{name}": round(speedup.mean, 3),
            f"speedup_{name}_half_width": round(widths[1], 3),
            f"sent_mb_{name}": round(sent, 3),
            f"peak_mb_{name}": round(peak.mean, 1),
        }
    same = [loss for name, loss in first.items() if name != "negatives"]
    if max(same) - min(same) > 1e-3 * max(same):
        raise SystemExit("the forms do not train the same: first losses differ")
    if not args.quick:
        publish("ablation", result, as_json=args.json)


if __name__ == "__main__":
    main()
