"""Runs the benchmarks one after the other, then makes the pages of their figures: what ``make bench`` calls.

python benchmarks/run_all.py [--list] [--only NAME ...] [--all] [--data amazon_beauty_sequences.txt]

Each part is a script of its own, run as the command that its line names; its output goes to ``outputs/bench/NAME.log``
and its row to ``benchmarks/results``. A part that fails or takes too long does not stop the others; the exit code says
that one did. Nothing else should run on the machine. `--all` adds the parts that take longer than all others together;
`--data` is the log of those that can train on a real one, of which there are synthetic ones else.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from goals import GOALS
from render import RESULTS, measured, rows_of, short
from render import main as render
from reporting import ROOT

KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
LOGS = ROOT / "outputs" / "bench"


@dataclass(frozen=True)
class Part:
    """A script with its arguments; `result` is the file that its row goes to."""

    name: str
    command: str
    result: str
    environment: dict[str, str] = field(default_factory=dict)
    limit_s: float = 900
    on_request: bool = False
    takes_data: bool = False


ONE, TWO = {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}
PARTS = (
    Part("end_to_end", "bench_end_to_end.py --quick --json", "end_to_end", limit_s=1800, takes_data=True),
    Part("attention", "bench_attention.py --json", "attention"),
    Part("layer_ops", "bench_layer_ops.py --repeats 3 --json", "layer_ops"),
    Part("softmax", "bench_softmax.py --json", "softmax"),
    Part("negatives", "bench_negatives.py --threads 1 --rounds 3 --json", "negatives"),
    Part("mfu", "bench_mfu.py --json", "mfu"),
    Part("mfu_keeping_memory", "bench_mfu.py --json", "mfu", KEEPS_MEMORY, on_request=True),
    Part("predict_1", "bench_predict.py --threads 1 --json", "predict"),
    Part("predict_2", "bench_predict.py --threads 2 --json", "predict", on_request=True),
    Part("aggregation", "bench_aggregation.py --json", "aggregation"),
    Part("hash_table", "bench_hash_table.py --json", "hash_table", TWO),
    Part("lookup", "bench_lookup.py --json", "lookup", ONE),
    Part("balance", "bench_balance.py --json", "balance"),
    Part("scaling", "bench_scaling.py --json", "scaling"),
    Part("hsp", "bench_hsp.py --json", "hsp", ONE),
    Part("overlap", "bench_overlap.py --steps 10 --json", "overlap", ONE),
    Part("ablation", "bench_ablation.py --json", "ablation", limit_s=2400, on_request=True),
    Part("meta", "bench_meta.py --repeats 3 --json", "meta"),
    Part("checkpoint", "bench_checkpoint.py --json", "checkpoint"),
    Part("prepare", "bench_prepare.py --json", "prepare"),
    Part("reader", "bench_reader.py --json", "reader"),
    Part("cli", "bench_cli.py --repeats 3 --json", "cli"),
    Part("scale", "bench_scale.py --json", "scale"),
    Part("fault_injection", "fault_injection.py --json", "fault_injection", limit_s=2400, on_request=True),
    Part("end_to_end_whole", "bench_end_to_end.py --json", "end_to_end", {}, 3600, on_request=True, takes_data=True),
)


def run(part: Part, data: Path | None = None) -> str | None:
    """Runs a part, on a real log where it takes one; None where it went well and left a row, else what went wrong."""
    LOGS.mkdir(parents=True, exist_ok=True)
    rows = len(rows_of(RESULTS, part.result))
    command = [sys.executable, *shlex.split(part.command)]
    command[1] = str(ROOT / "benchmarks" / command[1])
    if data is not None and part.takes_data:
        command += ["--data", str(data.resolve())]
    with (LOGS / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | part.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # its ranks, too
                process.wait()
    if code is None:
        return f"took longer than {part.limit_s:.0f} s"
    if code:
        return f"exit code {code}"
    return None if len(rows_of(RESULTS, part.result)) > rows else "left no row"


def figures(part: Part) -> str:
    """The figures with a goal that a part has just measured."""
    found = [(goal, measured(RESULTS, replace(goal, where={}))) for goal in GOALS if goal.result == part.result]
    return ", ".join(
        f"{goal.column} {short(of[1])}{'' if goal.reached(of[1]) else f' (goal {goal.goal:g}, missed)'}"
        for goal, of in found
        if of
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the parts and their commands, and end")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    parser.add_argument("--all", action="store_true", help="those that take long, too")
    parser.add_argument("--data", type=Path, help="a log, `user item item ...` a line")
    args = parser.parse_args()
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data={args.data}: no such file")
    console = Console(highlight=False)
    if args.list:
        table = Table("part", "command", "")
        for part in PARTS:
            table.add_row(part.name, f"python benchmarks/{part.command}", "with --all" if part.on_request else "")
        console.print(table)
        return 0
    names = [part.name for part in PARTS]
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        parser.error(f"--only: no part is named {', '.join(unknown)}; there are {', '.join(names)}")
    parts = [part for part in PARTS if (part.name in args.only if args.only else args.all or not part.on_request)]
    began, failed = time.monotonic(), []
    for place, part in enumerate(parts, 1):
        console.print(f"[dim]{place:>2}/{len(parts)}[/dim] {part.name:<20}", end="")
        start = time.monotonic()
        problem = run(part, args.data)
        seconds = f"{time.monotonic() - start:>5.0f} s  "
        if problem:
            failed.append(part.name)
            log = LOGS / f"{part.name}.log"
            console.print(f"{seconds}[red]failed[/red]: {problem}; {log} ends with")
            lines = log.read_text(errors="replace").splitlines()
            console.print("\n".join(lines[-8:]), markup=False, style="dim")
        else:
            console.print(f"{seconds}{figures(part)}")
    console.print(f"{len(parts) - len(failed)} of {len(parts)} in {(time.monotonic() - began) / 60:.1f} min")
    return int(bool(render([]) or failed))


if __name__ == "__main__":
    raise SystemExit(main())
