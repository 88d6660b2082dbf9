"""Trains for a long time and watches what the processes hold: memory, files, threads, and disk of checkpoints.

python benchmarks/soak.py [--minutes 60] [--processes 2] [--seed 0] [--json] [--samples FILE]
                          [--allocations FOLDER] [--no-row]

The recipe ``hstu/tiny-dynamic``, with all its callbacks and loggers, through the command line, on a synthetic log whose
items are more than the table's rows, so that rows are admitted and evicted all the time. A background checkpoint every
50 steps, three of four with what has changed alone, old ones removed; a validation every 200 steps; epochs follow each
other until time is over. Each second resident memory, file descriptors and threads of every process are read from
/proc, and the size of the folder of checkpoints.

After the first fifth of the time, which counts as warm-up, memory is averaged over 24 spans of equal length, and a line
is fitted to these. Its slope has a 95 % interval (Student's t; what follows within a span does not count as
independent). Memory counts as constant if the slope's interval has 0 in it, or its upper end is below 1 % of the memory
an hour. The exit code is 1 if memory of a process is not constant, if descriptors or threads grow, if checkpoints take
more than twice their size after warm-up, or if a process does not end with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gloo_processes import free_port
from reporting import commit, device, publish

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WARM_UP, SPANS = 0.2, 24
_T_95 = {22: 2.074}
"""Student's t for a two-sided interval of 95 %, by degrees of freedom: spans less two."""
_SHARE_AN_HOUR = 0.01
_MB = 1e6
USERS, ITEMS, MAX_ROWS = 1500, 4000, 2500


# ---- the run -----------------------------------------------------------------------------------------------------


def settings(log: Path, checkpoints: Path, minutes: float, allocations: Path | None = None) -> list[str]:
    """The command line after ``lightning-gr``."""
    seconds = round(minutes * 60)
    limit = f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    callbacks = [
        {"class_path": "lightning_gr.callbacks.GRProgressBar"},
        {"class_path": "lightning_gr.callbacks.MFUMonitor"},
        {"class_path": "lightning_gr.callbacks.BalanceMonitor"},
        {"class_path": "lightning_gr.callbacks.TableMonitor"},
        {
            "class_path": "lightning_gr.callbacks.ResumeCheckpoint",
            "init_args": {
                "dirpath": str(checkpoints),
                "every_n_steps": 50,
                "full_every": 4,
                "keep_last": 2,
                "monitor": "val/NDCG@10",
                "mode": "max",
            },
        },
    ]
    if allocations is not None:
        folder = {"folder": str(allocations.resolve())}
        callbacks.append({"class_path": "allocation_probe.AllocationProbe", "init_args": folder})
    policy = {
        "max_rows": MAX_ROWS,
        "rows_per_group": 128,
        "ttl_steps": 2000,
        "admission": {"min_count": 2, "forget_after_steps": 500},
        "on_missing": "default_row",
    }
    return [
        "fit",
        "--config=hstu/tiny-dynamic",
        f"--data.init_args.path={log}",
        "--data.init_args.global_tokens=1024",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--model.init_args.dynamic_tables.policy={json.dumps(policy)}",
        "--model.init_args.encoder.init_args.dim=32",
        "--model.init_args.loss=sampled_softmax",
        "--model.init_args.num_negatives=64",
        "--trainer.max_epochs=-1",
        f"--trainer.max_time={limit}",
        "--trainer.val_check_interval=200",
        "--trainer.check_val_every_n_epoch=null",
    ]


def start(folder: Path, arguments: list[str], processes: int) -> list[subprocess.Popen[bytes]]:
    """Starts the processes as torchrun would."""
    port = str(free_port())
    found = []
    for rank in range(processes):
        of_rank = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        of_all = {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        rest = {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "soak"}
        environment = os.environ | of_rank | of_all | rest | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{HERE}"}
        words = [sys.executable, "-m", "lightning_gr", *arguments, f"--trainer.devices={processes}"]
        with (folder / f"rank-{rank}.log").open("wb") as log:
            found.append(subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log))
    return found


# ---- samples -----------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """What a process held, sample by sample.

    Attributes:
        hours: since the start.
        rss: resident bytes.
        anonymous: the part of them that is no file's.
        files: open descriptors.
        threads: of the process.
    """

    hours: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    anonymous: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def read(self, pid: int, hours: float) -> bool:
        """Adds a sample; False where the process has ended."""
        place = Path(f"/proc/{pid}")
        try:
            lines = dict(x.split(":", 1) for x in (place / "status").read_text().splitlines())
            files = len(os.listdir(place / "fd"))
            values = [float(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]
        except (OSError, KeyError):
            return False
        self.hours.append(hours)
        self.rss.append(values[0])
        self.anonymous.append(values[1])
        self.files.append(files)
        self.threads.append(int(lines["Threads"]))
        return True


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes and checkpoints below a folder that changes meanwhile."""
    total, checkpoints = 0, 0
    for place, _, names in os.walk(folder):
        checkpoints += "meta.pt" in names
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # removed by now
                continue
    return total, checkpoints


@dataclass(frozen=True)
class Slope:
    """A line through what was measured.

    Args:
        per_hour: bytes an hour.
        half_width: of the 95 % interval.
        mean: bytes.
    """

    per_hour: float
    half_width: float
    mean: float

    @property
    def is_constant(self) -> bool:
        """Whether the interval has 0 in it, or ends below the share of memory that is let pass."""
        high = self.per_hour + self.half_width
        return self.per_hour - self.half_width <= 0 or high < _SHARE_AN_HOUR * self.mean


def slope(hours: list[float], values: list[float]) -> Slope:
    """The line through the means of equal spans of time.

    Args:
        hours: of the samples.
        values: bytes.

    Raises:
        ValueError: a span has no sample.
    """
    edges = np.linspace(hours[0], hours[-1], SPANS + 1)
    span = np.clip(np.searchsorted(edges, hours, side="right") - 1, 0, SPANS - 1)
    counts = np.bincount(span, minlength=SPANS)
    if not counts.all():
        raise ValueError(f"hours: {len(hours)} samples do not fill {SPANS} spans; run longer")
    x = np.bincount(span, hours, SPANS) / counts
    y = np.bincount(span, values, SPANS) / counts
    x = x - x.mean()
    per_hour = float((x * y).sum() / (x * x).sum())
    residuals = y - y.mean() - per_hour * x
    error = float(np.sqrt((residuals**2).sum() / (SPANS - 2) / (x * x).sum()))
    return Slope(per_hour, _T_95[SPANS - 2] * error, float(y.mean()))


def _grows(values: list[int], first: int) -> bool:
    """Whether the most of the last quarter is above the most of what came after warm-up and before it."""
    last = first + (len(values) - first) * 3 // 4
    return max(values[last:]) > max(values[first:last])


# ---- the report --------------------------------------------------------------------------------------------------


def watch(
    processes: list[subprocess.Popen[bytes]], checkpoints: Path, kept: Path | None
) -> tuple[list[Samples], list[tuple[int, int]]]:
    """Samples until all have ended; they are written down as they come.

    Args:
        processes: by rank.
        checkpoints: their folder.
        kept: a CSV file for the samples; None keeps none.
    """
    began = time.monotonic()
    samples: list[Samples] = [Samples() for _ in processes]
    sizes = []
    if kept is not None:
        kept.write_text("rank,hours,rss,anonymous,files,threads,checkpoint_bytes,checkpoints\n")
    while any(x.poll() is None for x in processes):
        hours = (time.monotonic() - began) / 3600
        sizes.append(size_of(checkpoints))
        for rank, (process, of_it) in enumerate(zip(processes, samples, strict=True)):
            if of_it.read(process.pid, hours) and kept is not None:
                row = [rank, f"{hours:.5f}", int(of_it.rss[-1]), int(of_it.anonymous[-1]), of_it.files[-1]]
                with kept.open("a") as file:
                    file.write(",".join(map(str, [*row, of_it.threads[-1], *sizes[-1]])) + "\n")
        if any(x.poll() not in (None, 0) for x in processes):
            for process in processes:
                process.terminate()
        time.sleep(1.0)
    return samples, sizes


def begin_of_steady(samples: Samples) -> int:
    """The first sample after warm-up."""
    end = samples.hours[-1]
    return next(i for i, hour in enumerate(samples.hours) if hour >= WARM_UP * end)


def steps_of(folder: Path) -> int:
    """The last step that the loggers have."""
    rows = [x.read_text().splitlines() for x in folder.rglob("metrics.csv")]
    if not rows or len(rows[0]) < 2:
        return 0
    place = rows[0][0].split(",").index("step")
    return int(rows[0][-1].split(",")[place])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the log")
    parser.add_argument("--samples", type=Path, help="a CSV file for all samples")
    parser.add_argument("--allocations", type=Path, help="a folder for what the allocators hold, every 100 steps")
    parser.add_argument("--no-row", action="store_true", help="adds no row to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from lightning_gr.data.synthetic import write_synthetic_log

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_log(folder / "events.csv", num_users=USERS, num_items=ITEMS, seed=args.seed)
        words = settings(folder / "events.csv", folder / "checkpoints", args.minutes, args.allocations)
        ranks = start(folder, words, args.processes)
        try:
            samples, sizes = watch(ranks, folder / "checkpoints", args.samples)
        finally:
            for rank in ranks:
                rank.kill()
        codes, steps = [x.wait() for x in ranks], steps_of(folder)
        logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(args.processes)]
    if any(codes):
        print(f"exit codes {codes}", *logs, sep="\n", file=sys.stderr)
        return 1
    return report(args, samples, sizes, steps)


def report(args: argparse.Namespace, samples: list[Samples], sizes: list[tuple[int, int]], steps: int) -> int:
    """Prints what was found and publishes it; the exit code."""
    print(f"{device()}; commit {commit()}; {args.processes} processes, {args.minutes:g} minutes, {steps:,} steps")
    result: dict[str, Any] = {"processes": args.processes, "minutes": args.minutes, "steps": steps}
    bad = []
    for rank, each in enumerate(samples):
        first = begin_of_steady(each)
        found = slope(each.hours[first:], each.rss[first:])
        low, high = (found.per_hour + side * found.half_width for side in (-1, 1))
        print(
            f"rank {rank}: {found.mean / _MB:,.0f} MB resident, slope {found.per_hour / _MB:+.2f} MB/h "
            f"({low / _MB:+.2f} ... {high / _MB:+.2f}), {max(each.files[first:])} descriptors, "
            f"{max(each.threads[first:])} threads at most"
        )
        bad += [f"rank {rank}: memory grows"] if not found.is_constant else []
        bad += [f"rank {rank}: descriptors grow"] if _grows(each.files, first) else []
        bad += [f"rank {rank}: threads grow"] if _grows(each.threads, first) else []
        result |= {
            f"rss_mb_{rank}": round(found.mean / _MB, 1),
            f"slope_mb_h_{rank}": round(found.per_hour / _MB, 2),
            f"slope_low_{rank}": round(low / _MB, 2),
            f"slope_high_{rank}": round(high / _MB, 2),
            f"files_{rank}": max(each.files[first:]),
            f"threads_{rank}": max(each.threads[first:]),
        }
    steady = sizes[int(WARM_UP * len(sizes)) :]
    disk = [size for size, _ in steady]
    early = max(disk[: max(len(disk) // 4, 1)])
    print(
        f"checkpoints: {statistics.median(disk) / _MB:.1f} MB in the median, {max(disk) / _MB:.1f} MB at most, "
        f"{max(count for _, count in steady)} complete ones at most"
    )
    bad += ["checkpoints grow"] if max(disk) > 2 * early else []
    result |= {
        "disk_mb_most": round(max(disk) / _MB, 1),
        "checkpoints_most": max(count for _, count in steady),
        "constant": not bad,
    }
    for line in bad:
        print(line)
    if not args.no_row:
        publish("soak", result, as_json=args.json)
    elif args.json:
        print(json.dumps(result))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
