"""The simulator beside trainings that really ran: two and four processes over an injected network (bench_overlap.py).

Nothing of the network is fitted: links, keys and collisions are those of that benchmark, the dense part is 300 ms.
Calibrated is the host's own work beside it, from `semi_async` alone, whose step waits for no exchange.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import bench_overlap as measured
import numpy as np
from scale_figures import Figure
from scale_ids import LogNormalLengths, ZipfIds
from scale_network import Machine
from scale_step import Schedule, Training, simulate

from lightning_gr.balancing import SequenceCost

RESULTS = Path(__file__).parent / "results" / "overlap.csv"
TOPOLOGIES = {"": (2, 1, 2), "_2x1": (2, 2, 1), "_1x4": (4, 1, 2), "_2x2": (4, 2, 2)}
"""Ranks, groups, ranks of a node."""
MODES: dict[str, Schedule] = {
    "sync": "plain",
    "pipelined": "ids_ahead",
    "semi_async": "semi_async",
    "exact": "exact_async",
}


@dataclass(frozen=True)
class DrawnIds(ZipfIds):
    """Distinct ids as they were drawn there, by the number of ranks whose batches are put together."""

    by_ranks: tuple[float, ...] = ()

    def distinct(self, draws: float) -> float:
        """Of as many whole batches."""
        return self.by_ranks[round(draws / measured.KEYS) - 1]


@cache
def drawn(ranks: int) -> tuple[tuple[float, ...], float]:
    """Distinct ids of one rank, two and so on; and the share of a rank's keys that some rank had in the step before."""
    popularity, share = measured.zipf(), measured.zipf_share(measured.ALPHA, ranks)
    generators = [np.random.default_rng([rank, 1]) for rank in range(ranks)]
    steps = [[set(measured.draws(x, share, popularity).tolist()) for x in generators] for _ in range(4)]
    unions = tuple(float(np.mean([len(set().union(*step[: n + 1])) for step in steps])) for n in range(ranks))
    late = np.mean(
        [
            len(keys & set().union(*before)) / len(keys)
            for before, now in zip(steps, steps[1:], strict=False)
            for keys in now
        ]
    )
    return unions, float(late)


def training(ranks: int, groups: int, node: int, schedule: Schedule, seconds: float) -> Training:
    """A training of that benchmark, with so many seconds of dense layers and host in a step."""
    unions, late = drawn(ranks)
    near, far = measured.LINKS
    return Training(
        machine=Machine(
            ranks=node,
            cards=node,
            near=near.bandwidth,
            far=far.bandwidth,
            near_start=near.latency,
            far_start=far.latency,
            efficiency=1.0,
        ),
        ranks=ranks,
        lengths=LogNormalLengths(mean=measured.KEYS, longest=2 * measured.KEYS, sigma=0.0),
        samples=1,
        deal="as_they_come",
        cost=SequenceCost(seconds / measured.KEYS, 0.0),
        ids=DrawnIds(measured.VOCABULARY, measured.EXPONENT, by_ranks=unions),
        row_bytes=measured.DIM * 4,
        memory=1e15,
        table_groups=groups,
        schedule=schedule,
        late=late,
    )


def figures(results: Path = RESULTS) -> list[Figure]:
    """Milliseconds of a step and of waiting, of the benchmark's last row and simulated."""
    with results.open(newline="") as file:
        row: dict[str, Any] = list(csv.DictReader(file))[-1]
    found = []
    for suffix, (ranks, groups, node) in TOPOLOGIES.items():
        seconds = (
            float(row[f"step_ms_semi_async{suffix}"]) * (1 - float(row[f"exposed_share_semi_async{suffix}"])) / 1e3
        )
        for mode, schedule in MODES.items():
            if not row.get(f"step_ms_{mode}{suffix}"):
                continue
            outcome = simulate(training(ranks, groups, node, schedule, seconds), steps=6)
            step = float(row[f"step_ms_{mode}{suffix}"])
            waited = step * float(row[f"exposed_share_{mode}{suffix}"])
            name = f"{mode}, {groups} x {ranks // groups}"
            kind: Any = "calibrated" if mode == "semi_async" else "predicted"
            found.append(Figure("measured here, ms a step", name, step, outcome.step * 1e3, kind))
            if mode != "semi_async":
                found.append(Figure("measured here, ms waited", name, waited, outcome.exposed * 1e3))
    return found
