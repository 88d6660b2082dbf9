"""The demo's table of its balance fits a terminal."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from lightning_gr.balancing import Method, SequenceCost
from lightning_gr.cli.demo_balance import show
from lightning_gr.data.plan import ArraySamples, GlobalBatchPlan
from lightning_gr.report.balance import AS_THEY_COME, by_rank, work


def test_the_table_fits_a_terminal() -> None:
    methods: list[Method] = [AS_THEY_COME, "karmarkar_karp"]
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    plan = GlobalBatchPlan(ArraySamples(lengths, {"task": lengths}), global_tokens=500, seed=3)

    def shown(ranks: int) -> str:
        dealt = {
            way: by_rank(*work(plan, steps=3, ranks=ranks, cost=SequenceCost(1e6, 5e3), method=way)) for way in methods
        }
        times = {name: {"ms": 123.4, "hidden": 1.0} for name in ("fetch", "lookup", "train")}
        found = {"steps": 1000, "partitioner": "karmarkar_karp", "dealt": dealt, "stages": times}
        written = io.StringIO()
        show(found, Console(file=written, width=80))
        return written.getvalue()

    lines = shown(4).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("│" in line for line in lines) == 2 * 4
    assert [line.split()[1:5] for line in lines if "as they come" in line] == [["as", "they", "come", "│"]]
    assert shown(1) == ""
