"""The balance of a plan, against plain loops over its batches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from lightning_gr.balancing import Method, SequenceCost
from lightning_gr.data.plan import ArraySamples, GlobalBatchPlan
from lightning_gr.report.balance import AS_THEY_COME, by_rank, work

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


def test_it_ends_when_its_time_is_up(plan: GlobalBatchPlan) -> None:
    began = time.monotonic()
    tokens_SR, costs_SR = work(plan, steps=10**6, ranks=2, cost=COST, method="lpt", most_seconds=0.05)
    assert time.monotonic() - began < 20
    assert 1 <= len(tokens_SR) == len(costs_SR) < 10**6


def test_a_step_without_work_waits_for_nothing() -> None:
    rows = by_rank(np.zeros((2, 2), dtype=np.int64), np.zeros((2, 2)))
    assert [row["waits_mean"] for row in rows] == [0.0, 0.0]
