"""The demo's balance: its figures against plain loops over a loader's batches, and its table in 80 columns."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lightning_gr.balancing import Method, SequenceCost
from lightning_gr.cli.demo_balance import AS_THEY_COME, by_rank, show, stages, work
from lightning_gr.data.plan import ArraySamples, GlobalBatchPlan
from lightning_gr.plugins.stage_log import StageLog

COST = SequenceCost(2.0, 0.5)


@pytest.fixture(scope="module")
def plan() -> GlobalBatchPlan:
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    return GlobalBatchPlan(ArraySamples(lengths, {"task": lengths}), global_tokens=500, seed=3)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_work_of_every_step_is_that_of_its_samples(plan: GlobalBatchPlan, ranks: int) -> None:
    steps = plan.num_batches + 2
    found: dict[str, Any] = {}
    methods: list[Method] = [AS_THEY_COME, "lpt"]
    for method in methods:
        tokens_SR, costs_SR = work(plan, steps=steps, ranks=ranks, cost=COST, method=method)
        for step in range(steps):
            samples = plan.epoch(step // plan.num_batches).samples(step % plan.num_batches)
            lengths = plan.index.token_counts(samples).tolist()
            assert tokens_SR[step].sum() == sum(lengths)
            assert costs_SR[step].sum() == sum(2 * n + n * n / 2 for n in lengths)
        if method == AS_THEY_COME:  # of the last step, the first rank's share of so many samples in their order
            assert tokens_SR[-1, 0] == sum(lengths[: len(lengths) // ranks])
        waits = [[1 - own / max(row) for own in row] for row in costs_SR.tolist()]
        found[method] = by_rank(tokens_SR, costs_SR)
        for rank, row in enumerate(found[method]):
            assert row["waits_mean"] == pytest.approx(sum(x[rank] for x in waits) / steps)
            assert row["waits_most"] == pytest.approx(max(x[rank] for x in waits))
            assert row["tokens_most"] == max(tokens_SR[:, rank])
            assert row["flops_mean"] == pytest.approx(sum(costs_SR[:, rank]) / steps)
    waited = {method: max(row["waits_mean"] for row in rows) for method, rows in found.items()}
    assert waited["lpt"] < 0.3 * waited[AS_THEY_COME]


def test_times_are_those_of_whole_batches() -> None:
    log = StageLog()
    log.add("fetch", 0, 0.0, 0.010)
    log.add("train", 0, 0.010, 0.030)  # with its backward
    log.add("fetch", 1, 0.010, 0.040)
    log.add("train", 0, 0.030, 0.035)  # the optimiser's step
    log.add("train", 1, 0.040, 0.055)
    log.add("fetch", 2, 0.055, 9.0)  # finds the end
    found = stages(log)
    assert found["fetch"] == pytest.approx({"ms": 20.0, "hidden": 25 / 40})
    assert found["train"]["ms"] == pytest.approx(20.0)


def test_the_table_fits_a_terminal(plan: GlobalBatchPlan) -> None:
    methods: list[Method] = [AS_THEY_COME, "karmarkar_karp"]

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
