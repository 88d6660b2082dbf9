"""What the simulator says of 8 to 1,024 processors with each switch of this package on and off.

Stalls and TurboGR's host work are left out, so that what is seen is the switches. The host's work for each sample is
the measured one of this package's deal (benchmarks/results/balance.csv).
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import scale_mtgenrec
import scale_turbogr
from scale_step import Outcome, Training, simulate

RESULTS = Path(__file__).parent / "results" / "balance.csv"
RANKS = (8, 64, 256, 1024)
GROUP_RANKS = (16, 64, 1024)
SWITCHES: dict[str, dict[str, Any]] = {
    "all on": {},
    "as they come": {"deal": "as_they_come"},
    "ids not made distinct": {"dedup": "none"},
    "exact_async": {"schedule": "exact_async"},
    "sync, ids ahead": {"schedule": "ids_ahead"},
}
"""What is changed of a run in which all is on: balanced, distinct ids, `semi_async`, one group of tables."""


@dataclass(frozen=True)
class Row:
    """A simulated training.

    Args:
        system: which one.
        setting: what of it was changed.
        ranks: processors.
        outcome: of a step.
        efficiency: throughput over that of as many processors, were each as fast as one of 8 with all on.
    """

    system: str
    setting: str
    ranks: int
    outcome: Outcome
    efficiency: float


def host_per_sample(results: Path = RESULTS) -> float:
    """Seconds of dealing out one sample, as measured."""
    with results.open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["plan_ms_per_1k"]) * 1e-6


def grm(ranks: int) -> Training:
    """MTGenRec's 4G with tables of 64D."""
    return scale_mtgenrec.published_size("4G", 64, 0.0, ranks=ranks)


def hstu(ranks: int) -> Training:
    """TurboGR's HSTU-large."""
    return scale_turbogr.of_table_1("HSTU-large", scale_turbogr.sample_seconds("HSTU-large"), ranks=ranks)


SYSTEMS: dict[str, Callable[[int], Training]] = {"GRM 4G 64D, A100": grm, "HSTU-large, 910B": hstu}


def run(made: Training) -> Outcome:
    """Fewer steps of more ranks."""
    return simulate(replace(made, buckets=2), steps=max(min(1024 // made.ranks, 16), 4), warm_up=2)


def switches() -> list[Row]:
    """Every switch on every number of processors."""
    rows, host = [], host_per_sample()
    for system, make in SYSTEMS.items():
        base = 0.0
        for ranks in RANKS:
            for setting, changes in SWITCHES.items():
                all_on = replace(make(ranks), schedule="semi_async", host_per_sample=host)
                outcome = run(replace(all_on, **changes))
                base = base or outcome.throughput / ranks
                rows.append(Row(system, setting, ranks, outcome, outcome.throughput / ranks / base))
    return rows


def groups() -> list[Row]:
    """Groups of tables: one for all, two, one a node; with rows exchanged in sync, which shows what they take."""
    rows = []
    for system, make in SYSTEMS.items():
        for ranks in GROUP_RANKS:
            base = 0.0
            for count in sorted({1, 2, ranks // 32 or 1, ranks // 8}):
                outcome = run(replace(make(ranks), schedule="ids_ahead", table_groups=count))
                base = base or outcome.throughput
                rows.append(Row(system, f"{count} x {ranks // count}", ranks, outcome, outcome.throughput / base))
    return rows
