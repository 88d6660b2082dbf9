"""An epoch of next-item training, by lightning-gr and by a plain loop of the same model; see bench_end_to_end.

Every training has a process of its own that has nothing else in it, or two with a core and a thread each. The epoch
that is timed is the mean of all but the first. Memory is the growth of the resident set to its peak during training,
beyond what imports take and above what the data takes as both read it; of two processes together.
"""

from __future__ import annotations

import csv
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from gloo_processes import World, cores_of_two
from plain_loop import TableOptimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MODEL: dict[str, Any] = {"dim": 64, "num_layers": 2, "num_heads": 2, "max_length": 50, "dropout": 0.3}
TEMPERATURE, LR, ADAGRAD_LR, WARM_UP, TOP_K = 0.07, 0.004, 0.03, 50, 10
BEAUTY = {"num_users": 22_363, "num_items": 12_101, "mean_length": 8.9, "max_length": 204}
"""Of the public log, by which the synthetic one is made."""


@dataclass(frozen=True)
class Training:
    """One way to train.

    Args:
        path: the log, ``user item item ...`` a line.
        tokens: of a batch, about; of all processes together.
        epochs: at least 2.
        processes: that train, of ours 1 or 2.
        threads: of each.
        table: of the plain loop, what trains the item table.
        seed: of the initial values, the order and dropout.
    """

    path: str
    tokens: int
    epochs: int
    processes: int = 1
    threads: int = 2
    table: TableOptimizer = "adamw"
    seed: int = 1


def synthetic_log(folder: Path, **sizes: Any) -> Path:
    """A log in the form of the public one, with as many users, items and events a user."""
    from lightning_gr.data.synthetic import write_synthetic_log

    write_synthetic_log(folder / "log.csv", **(BEAUTY | sizes))
    sequences: dict[str, list[str]] = {}
    with (folder / "log.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            sequences.setdefault(row["user_id"].strip("u"), []).append(row["item_id"])
    lines = (f"{user} {' '.join(items)}\n" for user, items in enumerate(sequences.values(), 1))
    (folder / "sequences.txt").write_text("".join(lines))
    return folder / "sequences.txt"


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` in use, ``VmHWM`` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def memory_now() -> int:
    """Bytes in use; the most so far begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def train_plainly(of: Training) -> dict[str, Any]:
    """Trains by the loop of plain_loop.py; returns seconds and processor seconds of each epoch, memory, Recall@10."""
    from plain_loop import PlainHSTU, examples, optimizers, read_sequences, recall, train_epoch, warm_ups

    torch.set_num_threads(of.threads)
    torch.manual_seed(of.seed)
    sequences = read_sequences(of.path)
    before = memory_now()
    train, test = examples(sequences, MODEL["max_length"])
    num_items = 1 + max(int(x.max()) for x in sequences)
    model = PlainHSTU(num_items=num_items, temperature=TEMPERATURE, **MODEL)
    step_with = optimizers(model, of.table, lr=LR, table_lr=ADAGRAD_LR)
    schedules = warm_ups(step_with, WARM_UP)
    seconds, processor = [], []
    for _ in range(of.epochs):
        began = time.process_time()
        seconds.append(train_epoch(model, train, of.tokens, step_with, schedules)[0])
        processor.append(time.process_time() - began)
    peak = memory("VmHWM") - before
    tokens = sum(len(history) for history, _ in train)
    found = {"seconds": seconds, "processor": processor, "memory": peak, "tokens": tokens}
    return found | {"recall": recall(model, test, k=TOP_K)}


def train_ours(of: Training) -> dict[str, Any]:
    """As `train_plainly`, by lightning-gr under Lightning's Trainer; in each of its processes."""
    import lightning.pytorch as pl

    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule, WarmupSchedule
    from lightning_gr.plugins import SequenceBalancedStrategy
    from lightning_gr.substrate import require_torchrec

    require_torchrec()
    torch.set_num_threads(of.threads)
    at: list[tuple[float, float]] = []
    tokens = [0] * of.epochs
    peak: list[int] = []

    class Clock(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            at.append((time.perf_counter(), time.process_time()))

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            tokens[trainer.current_epoch] += batch.num_tokens

        def on_train_epoch_end(self, *_: Any) -> None:
            at.append((time.perf_counter(), time.process_time()))
            peak[:] = [memory("VmHWM")]

    pl.seed_everything(of.seed)
    data = SequenceDataModule(
        path=of.path, global_tokens=of.tokens, eval_global_tokens=16_384, max_length=MODEL["max_length"]
    )
    data.setup()
    before = memory_now()
    module = RetrievalModule(
        encoder=HSTUEncoder(**MODEL, time_bias=False, position_bias="recency"),
        loss="full_softmax",
        similarity="cosine",
        temperature=TEMPERATURE,
        top_k=[TOP_K],
        optimizer=lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=WARM_UP),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=of.processes,
        strategy=SequenceBalancedStrategy(sparse_lr=ADAGRAD_LR),
        max_epochs=of.epochs,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    stamps = torch.tensor(at, dtype=torch.float64).diff(dim=0)
    return {
        "seconds": stamps[:, 0].tolist(),
        "processor": stamps[:, 1].tolist(),
        "memory": peak[0] - before,
        "tokens": tokens[-1],
        "recall": tested[f"test/HR@{TOP_K}"],
    }


def quiet(function: Any, of: Training) -> dict[str, Any]:
    """Calls it without warnings and log lines."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    result: dict[str, Any] = function(of)
    return result


def run(side: str, of: Training) -> dict[str, Any]:
    """Trains one side in processes of its own; ``plain`` or ``ours``."""
    function = train_plainly if side == "plain" else train_ours
    if of.processes == 2:
        world = World(cores_of_two(), train_ours)
        ranks = world.train(of)
        world.close()
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            ranks = [pool.submit(quiet, function, of).result()]
    epochs = [max(x) for x in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    processor = [sum(x) for x in zip(*(rank["processor"] for rank in ranks), strict=True)]
    return {
        "epochs": epochs[1:],
        "epoch_s": sum(epochs[1:]) / len(epochs[1:]),
        "processor_s": sum(processor[1:]) / len(processor[1:]),
        "peak_mb": sum(rank["memory"] for rank in ranks) / 1e6,
        "tokens": sum(rank["tokens"] for rank in ranks),
        "recall": ranks[0]["recall"],
    }


# ---- what is compared ------------------------------------------------------------------------------------------------


def compare(path: str, *, tokens: int, epochs: int, repeats: int, thorough: bool) -> dict[str, Any]:
    """Figures of both sides, which take turns.

    Args:
        path: the log.
        tokens: of a batch.
        epochs: that each training has.
        repeats: trainings of each side, each with a seed of its own.
        thorough: whether other ways of each side are tried first, of which the quickest is taken; and other batches
            are looked at at the end.
    """
    from lightning_gr.cli.compare_statistics import interval

    plain = {table: Training(path, tokens, epochs, table=table) for table in get_args(TableOptimizer)}
    ours = {
        f"{processes} x {threads}": Training(path, tokens, epochs, processes, threads)
        for processes, threads in ((1, 2), (2, 1))
    }
    found: dict[str, list[dict[str, Any]]] = {}

    def one(side: str, name: str, of: Training) -> dict[str, Any]:
        result = run(side, of)
        found.setdefault(f"{side} {name}", []).append(result)
        print(
            f"  {side:<6}{name:<14}{of.tokens:>7,} tokens{result['epoch_s']:>9.2f} s an epoch"
            f"{result['processor_s']:>9.2f} of the processors{result['peak_mb']:>8.0f} MB{result['recall']:>9.4f} "
            f"Recall@{TOP_K}",
            flush=True,
        )
        return result

    print(f"\nan epoch by each side, {epochs} epochs a training, {repeats} times; both d = {MODEL['dim']}")
    choices = {"plain": plain, "ours": ours}
    chosen = {"plain": "adamw", "ours": "1 x 2"}
    if thorough:
        for side, ways in choices.items():
            chosen[side] = min(ways, key=lambda name: one(side, name, ways[name])["epoch_s"])
        found.clear()
    for seed in range(1, repeats + 1):
        for side, name in chosen.items():
            one(side, name, replace(choices[side][name], seed=seed))
    sides = {side: found[f"{side} {name}"] for side, name in chosen.items()}
    epochs_of = {side: [x for each in runs for x in each["epochs"]] for side, runs in sides.items()}
    speedup = interval([a / b for a, b in zip(epochs_of["plain"], epochs_of["ours"], strict=True)])
    result: dict[str, Any] = {
        "speedup_vs_plain_loop": round(speedup.mean, 3),
        "speedup_vs_plain_loop_half_width": round(speedup.half_width or 0.0, 3),
        "retrieval_tokens": tokens,
        "retrieval_epochs": epochs,
        "retrieval_seeds": repeats,
        "plain_table_optimizer": chosen["plain"],
        "ours_processes_x_threads": chosen["ours"],
    }
    gain = interval([b["recall"] - a["recall"] for a, b in zip(sides["plain"], sides["ours"], strict=True)])
    result |= {"recall_gain": round(gain.mean, 5), "recall_gain_half_width": round(gain.half_width or 0.0, 5)}
    for side, runs in sides.items():
        for name, digits in (("epoch_s", 2), ("processor_s", 2), ("peak_mb", 1), ("recall", 4)):
            result[f"{side}_{name}"] = round(sum(x[name] for x in runs) / len(runs), digits)
    if len({x["tokens"] for runs in sides.values() for x in runs}) != 1:
        raise SystemExit("the two sides do not train the same tokens")
    if thorough:
        for others in (2_048, 4_096, 8_192):
            both = {side: choices[side][name] for side, name in chosen.items()}
            took = {
                side: one(side, chosen[side], replace(of, tokens=others, epochs=2))["epoch_s"]
                for side, of in both.items()
            }
            result |= {f"{side}_epoch_s_{others}": round(x, 2) for side, x in took.items()}
    return result
