"""``lightning-gr demo``: from an event log to recommendations on two processes, by the commands a user would type."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPE = "hstu/tiny"
TOP_K = 10
_USERS_SHOWN = 3
_HISTORY_SHOWN = 8
_REPORT = "report.html"


def main(argv: Sequence[str]) -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="lightning-gr demo",
        description="Trains a small HSTU retriever on two processes and shows what it recommends.",
    )
    parser.add_argument("--data", type=Path, help="an event log to train on instead of a synthetic one")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="where everything is written")
    parser.add_argument("--devices", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--epochs", type=int, help="epochs (default: the recipe's)")
    args = parser.parse_args(argv)
    started = time.monotonic()

    from rich.console import Console

    console = Console()
    if args.data is not None and not args.data.is_file():
        console.print(
            f"lightning-gr demo: error: --data {args.data}: no such file; give a CSV, S3-Rec or MovieLens log",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    log, oracle = (args.data, None) if args.data else _synthetic_log(args.out, console)
    for part in ("tensorboard", "csv", "test", "predictions"):
        shutil.rmtree(args.out / part, ignore_errors=True)
    for part in ("run.jsonl", "run.json", _REPORT):
        (args.out / part).unlink(missing_ok=True)

    overlay = _overlay(args.out, log, args.devices, args.epochs)
    common = ["--config", RECIPE, "--config", str(overlay)]
    if code := _run(["fit", *common], console):
        return code
    checkpoint = args.out / "tensorboard" / "checkpoints" / "best.ckpt"
    test_logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(args.out), "name": "", "version": "test"}}
    trained = ["--ckpt_path", str(checkpoint)]
    if code := _run(["test", *common, *trained, "--trainer.logger", json.dumps(test_logger)], console):
        return code
    if code := _run(
        ["predict", *common, *trained, "--trainer.logger", "false", "--data.init_args.predict_from", "test"], console
    ):
        return code

    _show_metrics(args.out, log, oracle, console)
    _show_balance(args.out, console)
    _show_users(args.out, log, console)
    console.print(
        f"\ncheckpoint  {checkpoint}\nlogs        {args.out / 'tensorboard'} (TensorBoard), {args.out / 'csv'}"
    )
    console.print(f"top {TOP_K}s     {args.out / 'predictions'} (Parquet)", highlight=False)
    console.print(f"report      {args.out / _REPORT} (open it in a browser)\n", highlight=False, style="bold")
    console.print(f"Done in {time.monotonic() - started:.0f} s.", highlight=False)
    return 0


def _synthetic_log(out: Path, console: Any) -> tuple[Path, dict[str, Any]]:
    from lightning_gr.data.synthetic import write_synthetic_log

    path = out / "events.csv"
    console.print(f"Writing a synthetic event log to {path} ...", highlight=False)
    console.print(f"  {write_synthetic_log(path, num_users=3000, num_items=500, seed=0)}", highlight=False)
    return path, json.loads(path.with_suffix(".oracle.json").read_text())


def _overlay(out: Path, log: Path, devices: int, epochs: int | None) -> Path:
    """The few settings that differ from the recipe, as a file that a user can pass again."""
    trainer: dict[str, Any] = {
        "devices": devices,
        "default_root_dir": str(out),
        "logger": [
            {"class_path": class_path, "init_args": {"save_dir": str(out), "name": "", "version": version}}
            for class_path, version in (
                ("lightning.pytorch.loggers.TensorBoardLogger", "tensorboard"),
                ("lightning_gr.callbacks.ResumableCSVLogger", "csv"),
            )
        ],
        "callbacks+": [
            {"class_path": "lightning_gr.callbacks.ReportCallback", "init_args": {"dirpath": str(out), "name": RECIPE}}
        ],
    }
    if epochs is not None:
        trainer["max_epochs"] = epochs
        trainer["check_val_every_n_epoch"] = 1  # a checkpoint needs a validation, and one epoch must have one
    path = out / "demo.yaml"
    # JSON is YAML; the demo needs no second parser.
    path.write_text(json.dumps({"trainer": trainer, "data": {"init_args": {"path": str(log)}}}, indent=2) + "\n")
    return path


def _run(arguments: list[str], console: Any) -> int:
    shown = " ".join(f"'{x}'" if x.startswith("{") else x for x in arguments)
    console.print(f"\n$ lightning-gr {shown}", style="bold", highlight=False, soft_wrap=True)
    return subprocess.call([sys.executable, "-m", "lightning_gr", *arguments])


def _test_metrics(out: Path) -> dict[str, float]:
    with (out / "test" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: float(value) for row in rows for key, value in row.items() if key.startswith("test/") and value}


def _popularity(log: Path) -> dict[str, float]:
    """HR and NDCG of recommending everybody the most popular training items: what a model has to beat."""
    import numpy as np

    from lightning_gr.data.interactions import Interactions
    from lightning_gr.data.readers import read_events

    events = Interactions.from_events(read_events(log))
    ends, lengths = events.offsets[1:], np.diff(events.offsets)
    evaluated = lengths >= 3
    targets = events.items[ends[evaluated] - 1]
    held_out = np.zeros(len(events.items), dtype=bool)
    held_out[np.concatenate([ends[evaluated] - 1, ends[evaluated] - 2])] = True
    counts = np.bincount(events.items[~held_out], minlength=len(events.item_ids))
    # Ties count against the baseline, as they do against the model.
    ranks = (counts[None, :] >= counts[np.unique(targets), None]).sum(1)
    rank_of = dict(zip(np.unique(targets).tolist(), ranks.tolist(), strict=True))
    rank = np.array([rank_of[target] for target in targets.tolist()])
    hit = rank <= TOP_K
    return {"hr": float(hit.mean()), "ndcg": float((hit / np.log2(rank + 1.0)).mean())}


def _show_metrics(out: Path, log: Path, oracle: dict[str, Any] | None, console: Any) -> None:
    from rich.table import Table

    reached, popular = _test_metrics(out), _popularity(log)
    table = Table(title="Next item, ranked among all items (test)", title_justify="left")
    table.add_column("")
    for column in (f"HR@{TOP_K}", f"NDCG@{TOP_K}"):
        table.add_column(column, justify="right")
    model = (reached[f"test/HR@{TOP_K}"], reached[f"test/NDCG@{TOP_K}"])
    table.add_row("most popular items", f"{popular['hr']:.4f}", f"{popular['ndcg']:.4f}")
    table.add_row(f"{RECIPE}", f"{model[0]:.4f}", f"{model[1]:.4f}", style="bold")
    if oracle is not None:
        best = (oracle["test"][f"HR@{TOP_K}"], oracle["test"][f"NDCG@{TOP_K}"])
        table.add_row("best possible", f"{best[0]:.4f}", f"{best[1]:.4f}")
        table.add_row("share of the best", *(f"{x / y:.1%}" for x, y in zip(model, best, strict=True)))
    console.print()
    console.print(table)


def _show_balance(out: Path, console: Any) -> None:
    from lightning_gr.cli.demo_balance import show

    if (found := json.loads((out / "run.json").read_text()).get("balance")) is not None:
        show(found, console)


def _show_users(out: Path, log: Path, console: Any) -> None:
    import polars as pl

    from lightning_gr.data.readers import read_events

    events = read_events(log)
    top = pl.read_parquet(out / "predictions" / "part-*.parquet").sort("user_id")
    console.print(f"\nTop {TOP_K} of {_USERS_SHOWN} users; the item that came next is marked *", highlight=False)
    step = max(len(top) // _USERS_SHOWN, 1)
    for user, items in top.select("user_id", "item_ids").gather_every(step).head(_USERS_SHOWN).iter_rows():
        history = events.filter(pl.col("user_id") == user)["item_id"].to_list()
        shown, came_next = history[:-1][-_HISTORY_SHOWN:], history[-1]
        dots = "... " if len(history) - 1 > _HISTORY_SHOWN else ""
        console.print(f"  user {user}", style="bold", highlight=False)
        console.print(f"    history  {dots}{' '.join(map(str, shown))}", highlight=False, soft_wrap=True)
        marked = " ".join(f"*{item}*" if item == came_next else str(item) for item in items[:TOP_K])
        console.print(f"    top {TOP_K}   {marked}   (next was {came_next})", highlight=False, soft_wrap=True)
