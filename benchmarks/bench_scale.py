"""Scale on paper: a simulated training on 8 to 1,024 processors, beside the tables of the papers.

python benchmarks/bench_scale.py [--quick] [--json] [--plots DIRECTORY]

A discrete-event simulation (scale_engine.py, scale_network.py, scale_step.py) of ranks with streams and links. What of
it is calibrated on a published figure, what is fitted to several, and what is predicted is said in each row; errors are
means of absolute relative errors of the predicted ones. First it is held against trainings that really ran, over an
injected network (scale_measured.py); then against MTGenRec (scale_mtgenrec.py) and TurboGR (scale_turbogr.py); last it
says what each switch does up to 1,024 processors (scale_outlook.py). The same numbers come on every machine, whatever
else it does. docs/scale.md says what is assumed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scale_measured
import scale_mtgenrec
import scale_outlook
import scale_turbogr
from reporting import commit, device, publish
from scale_figures import Figure, mean_error
from scale_plots import draw_groups, draw_speedups

ERRORS = {
    "measured_wait": ("measured here, ms waited", ""),
    "measured_step": ("measured here, ms a step", ""),
    "mtgenrec_speedup_no_stalls": ("MTGenRec speed-up over 8 GPUs, no stalls", ""),
    "mtgenrec_speedup": ("MTGenRec speed-up over 8 GPUs, stalls", ""),
    "mtgenrec_balance_4g": ("MTGenRec figure 11, balanced over not", "4G"),
    "mtgenrec_balance_110g": ("MTGenRec figure 11, balanced over not", "110G"),
    "mtgenrec_dedup": ("MTGenRec figure 12, distinct ids over all", ""),
    "turbogr_linearity_no_host": ("TurboGR table 1, linearity, no host work", ""),
    "turbogr_linearity": ("TurboGR table 1, linearity, host work", ""),
    "turbogr_balance_step": ("TurboGR balance, 16 processors", "step"),
    "turbogr_groups": ("TurboGR table groups", ""),
}
"""By name of the result: a table, and how its figures' names begin."""


def show(figures: Sequence[Figure]) -> None:
    """Tables, one after the other."""
    for table, rows in groupby(sorted(figures, key=lambda x: x.table), key=lambda x: x.table):
        print(f"\n{table:<56}{'published':>12}{'simulated':>12}{'error':>9}")
        for x in rows:
            print(f"  {x.name:<54}{x.published:>12,.4g}{x.simulated:>12,.4g}{x.error:>9.1%}  {x.kind}")


def show_rows(title: str, rows: Sequence[scale_outlook.Row], share: str) -> None:
    """The outlook's."""
    print(f"\n{title}\n{'':<20}{'':<24}{'ranks':>6}{'ms a step':>11}{share:>12}{'waits, ms':>11}{'MB to nodes':>13}")
    for row in rows:
        of = row.outcome
        times = f"{of.step * 1e3:>11.1f}{row.efficiency:>12.3f}{of.exposed * 1e3:>11.1f}{of.far_bytes / 1e6:>13,.0f}"
        print(f"{row.system:<20}{row.setting:<24}{row.ranks:>6}{times}")


def key(text: str) -> str:
    """Of a column."""
    return "".join(letter if letter.isalnum() else "_" for letter in text.lower()).replace("__", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the outlook; nothing is kept")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--plots", type=Path, help="directory for scale-speedup.png and scale-groups.png")
    args = parser.parse_args()
    began = time.process_time()
    print(f"{device()}; commit {commit()}; simulated, nothing is timed")
    stall = scale_mtgenrec.fit_stall()
    figures = scale_measured.figures() + scale_mtgenrec.figures(stall) + scale_turbogr.figures()
    show(figures)
    result: dict[str, Any] = {"stall_ms": round(stall * 1e3, 1), "stall_rate": scale_mtgenrec.STALL_RATE}
    result["host_ms_per_sample"] = round(scale_turbogr.host_seconds() * 1e3, 4)
    print(f"\nmean absolute error of what is predicted (stalls {result['stall_ms']} ms)")
    for name, (table, begin) in ERRORS.items():
        result[f"error_{name}"] = round(mean_error(figures, table=table, name=begin), 4)
        print(f"  {name:<40}{result[f'error_{name}']:>8.1%}")
    for x in figures:
        result[key(f"{x.table} {x.name}")] = float(f"{x.simulated:.4g}")
    if args.quick:
        return
    switches, groups = scale_outlook.switches(), scale_outlook.groups()
    show_rows("all on: balanced, distinct ids, semi_async, one group of tables", switches, "efficiency")
    show_rows("groups of tables, rows exchanged in sync", groups, "over 1 group")
    for row in [*switches, *groups]:
        result[key(f"outlook {row.system} {row.setting} {row.ranks}")] = round(row.efficiency, 3)
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        draw_speedups(figures, args.plots / "scale-speedup.png")
        draw_groups(groups, args.plots / "scale-groups.png")
    print(f"\n{time.process_time() - began:.0f} s of processor time")
    publish("scale", result, as_json=args.json)


if __name__ == "__main__":
    main()
