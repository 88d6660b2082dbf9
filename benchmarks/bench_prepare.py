"""How long `prepare` takes for a log in CSV, and how much memory.

python benchmarks/bench_prepare.py [--events 10000000] [--repeats 3] [--memory-gb 4] [--json]

`prepare_s`, `prepare_gb`: the median and the worst of runs in processes of their own, the imports left out of the
seconds. The log is in the order of time: log-normal numbers of events a user, items by Zipf's law, a category, a number
and a label. It is made once and stays in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(tempfile.gettempdir()) / "lightning-gr-bench-prepare"
LIMIT_S, LIMIT_GB = 60, 4
NUM_ITEMS, BLOCK_ROWS = 1_000_000, 1_000_000


def make_log(path: Path, num_events: int) -> None:
    """Writes the log block by block; another process's unfinished one is never taken for it."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.4, 1.1, max(num_events // 20, 1)), 1, 5000).astype(np.int64)
    users = np.repeat(np.arange(len(lengths)), lengths)
    assert len(users) >= num_events
    users = rng.permutation(users[:num_events]) * 7 + 1_000_003
    popularity = 1 / np.arange(1, NUM_ITEMS + 1) ** 0.9
    bounds, numbers = np.cumsum(popularity / popularity.sum()), rng.permutation(NUM_ITEMS) * 3 + 10
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    import polars as pl

    with temporary.open("wb") as file:
        for first in range(0, num_events, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, num_events - first)
            block = pl.DataFrame(
                {
                    "user_id": users[first : first + rows],
                    "item_id": numbers[np.minimum(np.searchsorted(bounds, rng.random(rows)), NUM_ITEMS - 1)],
                    "timestamp": 1_650_000_000_000 + (first + np.arange(rows)) * 137 + rng.integers(0, 5000, rows),
                    "tab": rng.integers(0, 15, rows),
                    "play_s": rng.exponential(20, rows).round(2),
                    "is_click": rng.integers(0, 2, rows),
                }
            )
            block.write_csv(file, include_header=first == 0)
    os.replace(temporary, path)


def prepare_once(log: Path, output: Path, memory_gb: float) -> None:
    """Runs in a process of its own, so that its peak memory is prepare's."""
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import PrepareSettings, prepare

    started = time.perf_counter()
    stages: dict[str, float] = {}

    def note(stage: str, done: int, total: int) -> None:
        stages[stage] = round(time.perf_counter() - started, 2)

    columns = Columns(sparse=("tab",), dense=("play_s",), labels=("is_click",))
    store = prepare(
        open_log(log, columns=columns), output, settings=PrepareSettings(memory_gb=memory_gb), progress=note
    )
    seconds = time.perf_counter() - started
    # Not ru_maxrss: a process inherits that of the one which started it.
    status = Path("/proc/self/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    result = {"prepare_s": seconds, "prepare_gb": peak_kib * 1024 / 1e9, "events": store.num_events, "ends": stages}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=4.0, help="the setting of prepare")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once is not None:
        prepare_once(*args.once, args.memory_gb)
        return
    log = CACHE / f"log-{args.events}.csv"
    if not log.is_file():
        make_log(log, args.events)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        folder = Path(tempfile.mkdtemp(dir=CACHE))
        command = [sys.executable, __file__, "--once", str(log), str(folder / "store")]
        command += ["--memory-gb", str(args.memory_gb)]
        try:
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            shutil.rmtree(folder)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = round(statistics.median(run["prepare_s"] for run in runs), 2)
    gigabytes = round(max(run["prepare_gb"] for run in runs), 2)
    events = runs[0]["events"]

    print(f"{device()}; commit {commit()}; {events:,} events, {log.stat().st_size / 1e6:,.0f} MB of CSV")
    print(f"{'':<20}{'measured':>10}{'limit':>8}")
    print(f"{'seconds (median)':<20}{seconds:>10.1f}{LIMIT_S:>8}")
    print(f"{'gigabytes (most)':<20}{gigabytes:>10.2f}{LIMIT_GB:>8}")
    print("stages ended after: " + ", ".join(f"{name} {end} s" for name, end in runs[-1]["ends"].items()))

    result = {"events": events, "prepare_s": seconds, "prepare_gb": gigabytes, "memory_gb": args.memory_gb}
    publish("prepare", result, as_json=args.json)


if __name__ == "__main__":
    main()
