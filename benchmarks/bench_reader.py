"""How fast a store is planned and read: a plan over an index alone, and batches from two worker processes.

python benchmarks/bench_reader.py [--sequences 100000000] [--users 300000] [--json]

`plan_s`, `plan_gb`: a plan over an index of `--sequences` sequences, in a process of its own.
`tokens_per_s`: batches of a store of `--users` users by two workers. `ratio_to_rows`: against the same batches, made by
a reader that goes through the same Parquet files row by row in Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
GLOBAL_TOKENS, MAX_LENGTH = 65_536, 200


class Index:
    """An event table that has nothing but an index."""

    fingerprint, has_timestamps, num_items, fields = "index", False, 1, ()

    def __init__(self, path: Path) -> None:
        self.lengths = np.load(path, mmap_mode="r")
        self.group_bounds = np.append(np.arange(0, len(self.lengths), 1024), len(self.lengths))

    def read_group(self, group: int, columns: Any = ()) -> Any:  # noqa: D102
        raise AssertionError("a plan reads no events")


def lengths_of(num_users: int, seed: int) -> np.ndarray[Any, Any]:
    """Log-normal with a heavy tail, as KuaiRand's."""
    return np.clip(np.random.default_rng(seed).lognormal(3.4, 1.1, num_users), 5, 5000).astype(np.int32)


def plan(path: Path) -> None:
    """Runs in a process of its own, so that its peak memory is the plan's."""
    from lightning_gr.data import GlobalBatchPlan, RetrievalSource

    started = time.perf_counter()
    source = RetrievalSource(Index(path), part="train", max_length=MAX_LENGTH)
    epoch = GlobalBatchPlan(source, global_tokens=GLOBAL_TOKENS).epoch(0)
    for batch in (0, len(epoch) // 2, len(epoch) - 1):
        epoch.rank_samples(batch, rank=0, world_size=8)
    seconds = time.perf_counter() - started
    # Not ru_maxrss: a process inherits that of the one which started it.
    status = Path("/proc/self/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    gigabytes = peak_kib * 1024 / 1e9
    print(json.dumps({"plan_s": round(seconds, 2), "plan_gb": round(gigabytes, 3), "plan_batches": len(epoch)}))


def write_store(folder: Path, num_users: int) -> Path:
    """A store of random items and ascending times."""
    import polars as pl

    from lightning_gr.data import StoreWriter

    rng = np.random.default_rng(1)
    lengths = lengths_of(num_users, 1)
    writer = StoreWriter(path=folder / "store", fields=(), has_timestamps=True, work=folder / "work")
    for first in range(0, num_users, 16_384):
        part = lengths[first : first + 16_384]
        ends = np.cumsum(part)
        items = np.split(rng.integers(0, 1_000_000, int(ends[-1])), ends[:-1])
        times = np.split(1_700_000_000 + rng.integers(0, 3600, int(ends[-1])).cumsum(), ends[:-1])
        users = np.arange(first, first + len(part))
        writer.write_users(pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times}))
    writer.finish(summary={})
    return folder / "store"


def by_rows(store: Any, epoch: Any, batches: int) -> float:
    """Tokens per second of a reader that takes the users of the same batches as Python rows."""
    import pyarrow.parquet as pq
    import torch
    from torchrec import KeyedJaggedTensor

    tokens, started = 0, time.perf_counter()
    rows: dict[int, tuple[list[int], list[int]]] = {}
    held: tuple[int, ...] | None = None
    for batch in range(batches):
        for window in epoch.windows(batch):
            if window != held:
                held = window
                for group in window:
                    part, within, first = store._groups[group].tolist()
                    table = pq.ParquetFile(store.parts[part]).read_row_group(within).to_pylist()
                    for i, row in enumerate(table):
                        rows[first + i] = (row["item_id"], row["timestamp"])
        values: list[int] = []
        times: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for user in epoch.samples(batch).tolist():
            items, stamps = rows[user]
            history = items[:-3][-MAX_LENGTH:]
            values += history
            targets += items[:-2][-len(history) :]
            times += stamps[:-3][-MAX_LENGTH:]
            lengths.append(len(history))
        KeyedJaggedTensor(keys=["item_id"], values=torch.tensor(values), lengths=torch.tensor(lengths))
        torch.tensor(times)
        torch.tensor(targets)
        tokens += len(values)
    return tokens / (time.perf_counter() - started)


def read(folder: Path, num_users: int) -> dict[str, float]:
    """Tokens per second with two workers, and its ratio to a reader by rows."""
    import torch
    import torchrec  # noqa: F401  # loaded in any training run before the first batch is read

    from lightning_gr.data import EventStore, GlobalBatchPlan, PlannedLoader, RetrievalSource

    torch.set_num_threads(1)
    store = EventStore(write_store(folder, num_users))
    source = RetrievalSource(store, part="train", max_length=MAX_LENGTH)
    plan_ = GlobalBatchPlan(source, global_tokens=GLOBAL_TOKENS)
    loader = PlannedLoader(source, plan_, num_workers=2)
    started = time.perf_counter()
    tokens = sum(batch.num_tokens for batch in loader)
    fast = tokens / (time.perf_counter() - started)
    slow = by_rows(store, plan_.epoch(0), len(loader))
    size = sum(part.stat().st_size for part in store.parts)
    return {
        "tokens_per_s": round(fast),
        "rows_tokens_per_s": round(slow),
        "ratio_to_rows": round(fast / slow, 2),
        "store_mb": round(size / 1e6, 1),
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, default=300_000)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        plan(args.plan)
        return
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = folder / "lengths.npy"
        array = np.lib.format.open_memmap(index, mode="w+", dtype=np.int32, shape=(args.sequences,))
        for block, first in enumerate(range(0, args.sequences, 1 << 20)):
            array[first : first + (1 << 20)] = lengths_of(len(array[first : first + (1 << 20)]), block)
        array.flush()
        del array
        command = [sys.executable, __file__, "--plan", str(index)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        result |= read(folder, args.users)
    print(f"{device()}; commit {commit()}; {args.sequences:,} sequences planned, {args.users:,} users read")
    print(f"plan           {result['plan_s']:>14.1f} s    {result['plan_gb']:.2f} GB   (limits 60 s, 1 GB)")
    print(f"two workers    {result['tokens_per_s']:>14,} tokens/s   (limit 2,000,000)")
    print(f"row by row     {result['rows_tokens_per_s']:>14,} tokens/s")
    print(f"ratio          {result['ratio_to_rows']:>14.1f}   (limit 5)")
    publish("reader", result, as_json=args.json)


if __name__ == "__main__":
    main()
