"""The simulator of benchmarks/bench_scale.py: closed forms of small cases, laws, and published numbers it rests on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scale_step as step
from scale_engine import Link, Simulation, Stream
from scale_figures import Figure, mean_error, solve
from scale_ids import LogNormalLengths, ZipfIds
from scale_network import A100, Cluster, Machine, ring_bytes

from lightning_gr.balancing import SequenceCost
from lightning_gr.cli import plan_groups

SLOW = Machine(ranks=2, cards=2, near=1e9, far=1e8, near_start=0.0, far_start=0.0, efficiency=1.0)
BASE = step.Training(
    machine=SLOW,
    ranks=4,
    lengths=LogNormalLengths(mean=100, longest=400),
    samples=8,
    cost=SequenceCost(1e-4, 1e-7),
    dense_bytes=4e6,
    ids=ZipfIds(10_000, 1.05),
    row_bytes=256.0,
    deal="as_they_come",
)

EQUAL = LogNormalLengths(mean=100, longest=400, sigma=0.0)


# ---- streams and links -----------------------------------------------------------------------------------------------


def test_work_on_one_stream_adds_up_and_on_two_overlaps() -> None:
    one, two = Simulation(), Simulation()
    stream = Stream()
    for seconds in (2.0, 3.0):
        one.issue("a", seconds=seconds, stream=stream)
        two.issue("a", seconds=seconds, stream=Stream())
    assert one.run() == 5.0
    assert two.run() == 3.0


def test_two_transfers_on_one_link_take_twice_the_time_and_a_late_one_what_is_left() -> None:
    simulation, link = Simulation(), Link(10.0)
    first, second = (simulation.issue(name, sends=[(link, 100.0)]) for name in "ab")
    simulation.run()
    assert (first.ended, second.ended) == (pytest.approx(20.0), pytest.approx(20.0))
    simulation, link = Simulation(), Link(10.0)
    wait = simulation.issue("wait", seconds=5.0)
    first = simulation.issue("a", sends=[(link, 100.0)])
    second = simulation.issue("b", [wait], sends=[(link, 30.0)])
    simulation.run()
    # Half of the bandwidth each from 5 on: the short one is through at 11, the other has 20 left.
    assert (first.ended, second.ended) == (pytest.approx(13.0), pytest.approx(11.0))
    assert link.sent == 130.0


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_a_shared_link_is_as_an_exact_schedule_of_small_slices(flows: list[tuple[float, float]]) -> None:
    simulation, link = Simulation(), Link(7.0)
    sent = []
    for start, size in flows:
        sent.append(simulation.issue("x", [simulation.issue("wait", seconds=start)], sends=[(link, size)]))
    simulation.run()
    now, left, ended = 0.0, {n: size for n, (_, size) in enumerate(flows)}, {}
    while left:  # from event to event, by hand
        on = [n for n in left if flows[n][0] <= now + 1e-12]
        starts = [flows[n][0] for n in left if flows[n][0] > now + 1e-12]
        if not on:
            now = min(starts)
            continue
        span = min([left[n] * len(on) / 7.0 for n in on] + [s - now for s in starts])
        for n in on:
            left[n] -= span * 7.0 / len(on)
            if left[n] <= 1e-9:
                ended[n] = now + span
                del left[n]
        now += span
    assert [work.ended for work in sent] == pytest.approx([ended[n] for n in range(len(flows))], abs=1e-6)


def test_work_that_waits_for_itself_and_negative_work_are_errors() -> None:
    simulation = Simulation()
    with pytest.raises(ValueError, match="seconds=-1"):
        simulation.issue("a", seconds=-1.0)
    other = Simulation().issue("never run")
    simulation.issue("b", [other])
    with pytest.raises(RuntimeError, match="1 pieces of work"):
        simulation.run()


# ---- collectives -----------------------------------------------------------------------------------------------------


def alone(machine: Machine, ranks: int, collective: Any) -> tuple[float, Cluster]:
    simulation = Simulation()
    cluster = Cluster(machine, ranks, simulation)
    start = simulation.issue("start")
    streams = [Stream() for _ in range(ranks)]
    collective(cluster, [start] * ranks, streams)
    return simulation.run(), cluster


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ring_takes_its_closed_form(ranks: int) -> None:
    machine = replace(SLOW, ranks=8, near_start=0.01)
    seconds, cluster = alone(machine, ranks, lambda c, after, s: c.all_reduce("x", after, 8e6, s))
    assert seconds == pytest.approx(2 * (ranks - 1) / ranks * 8e6 / 1e9 + 2 * (ranks - 1) * 0.01)
    assert sum(link.sent for link in cluster.near) == pytest.approx(ranks * ring_bytes(ranks, 8e6))
    assert sum(link.sent for link in cluster.far) == 0


def test_a_ring_between_nodes_carries_each_ranks_part() -> None:
    seconds, cluster = alone(SLOW, 8, lambda c, after, s: c.all_reduce("x", after, 8e6, s))
    assert seconds == pytest.approx(2 * 3 / 4 * (8e6 / 2) / 1e8)
    assert sum(link.sent for link in cluster.far) == pytest.approx(8 * 2 * 3 / 4 * 4e6)


@pytest.mark.parametrize(("ranks", "node"), [(2, 2), (8, 2), (16, 8), (64, 8)])
def test_an_all_to_all_alone_takes_what_lightning_gr_plan_says(ranks: int, node: int) -> None:
    machine = replace(A100, ranks=node, cards=node, efficiency=1.0)
    near, far = plan_groups.Link(300e9, 5e-6), plan_groups.Link(25e9, 10e-6)
    network = plan_groups.Network(ranks_per_node=node, inside=near, between=far)

    def collective(cluster: Cluster, after: Any, streams: Any) -> None:
        cluster.all_to_all("x", range(ranks), after, [ranks * 1e6] * ranks, streams)

    assert alone(machine, ranks, collective)[0] == pytest.approx(network.seconds(np.zeros(ranks), 1e6), rel=1e-9)


def test_ranks_that_share_a_card_take_turns_on_it() -> None:
    def collective(cluster: Cluster, after: Any, streams: Any) -> None:
        cluster.all_to_all("x", range(4), after, [4e6] * 4, streams)

    own, shared = (alone(replace(SLOW, cards=cards), 4, collective)[0] for cards in (2, 1))
    assert shared == pytest.approx(2 * own)


# ---- ids and lengths -------------------------------------------------------------------------------------------------


@given(st.integers(1, 30_000), st.floats(0, 1.5), st.floats(1, 1e6))
@settings(deadline=None, max_examples=40)
def test_expected_distinct_ids_are_the_sum_over_all_ids(vocabulary: int, exponent: float, draws: float) -> None:
    shares = np.arange(1, vocabulary + 1) ** -exponent
    shares /= shares.sum()
    with np.errstate(divide="ignore"):  # of one id, log 0
        expected = float(-np.expm1(draws * np.log1p(-shares)).sum())
    found = ZipfIds(vocabulary, exponent).distinct(draws)
    assert found == pytest.approx(expected, rel=2e-3)
    assert found <= min(draws, vocabulary) * (1 + 1e-9)


def test_distinct_and_repeated_ids_are_those_of_real_draws() -> None:
    ids, generator = ZipfIds(50_000, 1.05, few=0.5), np.random.default_rng(1)
    shares = np.arange(1, 50_001) ** -1.05
    draws = [set(generator.choice(50_000, 20_000, p=shares / shares.sum()).tolist()) for _ in range(4)]
    assert ids.distinct(40_000) == pytest.approx(np.mean([len(x) for x in draws]), rel=0.02)
    again = [len(a & b) / len(b) for a, b in zip(draws, draws[1:], strict=False)]
    assert ids.again(40_000) == pytest.approx(np.mean(again), rel=0.03)


def test_lengths_have_the_mean_that_was_asked_for_after_the_cut() -> None:
    drawn = LogNormalLengths(mean=600, longest=3000).draw(np.random.default_rng(3), 200_000)
    assert drawn.mean() == pytest.approx(600, rel=0.01)
    assert drawn.min() >= 1
    assert drawn.max() == 3000


# ---- a step ----------------------------------------------------------------------------------------------------------


def test_one_rank_takes_what_it_computes() -> None:
    outcome = step.simulate(replace(BASE, ranks=1, memory=1e30), steps=5)
    assert outcome.step == pytest.approx(outcome.busy)
    assert outcome.imbalance == outcome.exposed == outcome.far_bytes == 0


def test_without_a_network_to_speak_of_a_step_is_its_slowest_rank() -> None:
    fast = replace(SLOW, near=1e30, far=1e30)
    outcome = step.simulate(replace(BASE, machine=fast, memory=1e30), steps=12, warm_up=3, seed=4)
    generator = np.random.default_rng(4)
    works = []
    for _ in range(15):
        drawn = BASE.lengths.draw(generator, 32).reshape(4, 8).astype(float)
        works.append((1e-4 * drawn + 1e-7 * drawn**2).sum(1))
    assert outcome.step == pytest.approx(np.max(works[3:], axis=1).mean())
    assert outcome.busy == pytest.approx(np.mean(works[3:]))
    assert outcome.delay == pytest.approx(np.ptp(works[3:], axis=1).mean())


def test_rows_between_two_equal_ranks_take_their_bytes_time_twice() -> None:
    run = replace(BASE, ranks=2, lengths=EQUAL, dense_bytes=0.0, memory=1e30)
    outcome = step.simulate(run, steps=6)
    rows = 2 * (run.ids.distinct(outcome.tokens / 2) / 2) * 256 / 1e9
    assert rows <= outcome.exposed <= rows * (1 + 8 / 256)  # ids are ahead, on the same wire
    assert step.simulate(replace(run, schedule="semi_async"), steps=6).exposed == pytest.approx(0, abs=1e-12)
    slow = replace(run, schedule="semi_async", row_bytes=256e4)
    # What does not fit beside the dense layers is the step, since the tables' stream is never idle.
    assert step.simulate(slow, steps=6).step == pytest.approx(rows * 1e4, rel=0.01)


def test_exact_async_waits_for_the_share_that_is_late_and_semi_async_for_none() -> None:
    def run(schedule: Any, **changes: Any) -> step.Outcome:
        made = replace(
            BASE, ranks=2, row_bytes=25600.0, schedule=schedule, memory=1e30, lengths=EQUAL, dense_bytes=0.0, **changes
        )
        return step.simulate(made, steps=6)

    sync, semi = run("ids_ahead"), run("semi_async")
    halves = run("exact_async", late=0.5)
    assert run("exact_async", late=0.0).step == pytest.approx(semi.step)
    assert run("exact_async", late=1.0).step == pytest.approx(sync.step, rel=1e-6)
    assert (halves.exposed - semi.exposed) / (sync.exposed - semi.exposed) == pytest.approx(0.5, rel=0.02)


def test_the_host_is_the_step_where_it_has_more_to_do() -> None:
    outcome = step.simulate(replace(BASE, host_per_sample=0.1), steps=8, warm_up=6)
    assert outcome.step == pytest.approx(0.1 * 32, rel=0.005)


def test_a_stall_makes_every_rank_wait() -> None:
    run = replace(BASE, ranks=4, stall_rate=0.05, stall=1.0)
    without, with_stalls = (step.simulate(x, steps=40) for x in (replace(run, stall=0.0), run))
    # Some of it is beside a slower rank's work.
    assert 0.9 < (with_stalls.step - without.step) / (1 - 0.95**4) <= 1


def test_bytes_are_those_of_the_ids_and_deduplication_sends_fewer() -> None:
    run = replace(BASE, lengths=EQUAL, dense_bytes=0.0)
    outcome = {d: step.simulate(replace(run, dedup=d), steps=6) for d in ("none", "both")}
    per_rank = outcome["none"].tokens / 4
    sent = per_rank * (8 + 2 * 256)
    # Of four ranks one is in the same node and two are not.
    assert outcome["none"].near_bytes == pytest.approx(sent / 4)
    assert outcome["none"].far_bytes == pytest.approx(sent / 2)
    assert outcome["both"].far_bytes < 0.8 * outcome["none"].far_bytes


def test_groups_keep_rows_in_their_node_and_send_gradients_of_distinct_rows_between() -> None:
    run = replace(BASE, lengths=EQUAL, dense_bytes=0.0, table_groups=2)
    outcome = step.simulate(run, steps=6)
    draws = outcome.tokens / 4
    # To one replica: keys and gradients of what the group's two ranks look up, half of it.
    assert outcome.far_bytes == pytest.approx(run.ids.distinct(2 * draws) / 2 * (8 + 256), rel=1e-6)
    assert outcome.near_bytes == pytest.approx(run.ids.distinct(draws) / 2 * (8 + 2 * 256), rel=1e-6)


def test_a_run_is_a_function_of_its_seed() -> None:
    run = replace(BASE, stall_rate=0.1, stall=0.1)
    assert step.simulate(run, seed=1, steps=4) == step.simulate(run, seed=1, steps=4)
    assert step.simulate(run, seed=1, steps=4) != step.simulate(run, seed=2, steps=4)


@given(
    st.sampled_from(["plain", "ids_ahead", "semi_async", "exact_async"]), st.sampled_from([1, 2, 4]), st.floats(1, 50)
)
@settings(deadline=None, max_examples=25)
def test_a_faster_network_is_never_slower(schedule: Any, groups: int, faster: float) -> None:
    run = replace(BASE, schedule=schedule, table_groups=groups, row_bytes=25600.0)
    quick = replace(SLOW, near=SLOW.near * faster, far=SLOW.far * faster)
    a, b = (step.simulate(replace(run, machine=x), steps=4, warm_up=2) for x in (SLOW, quick))
    assert b.step <= a.step * (1 + 1e-9)
    assert b.step >= b.busy * (1 - 1e-9)


@pytest.mark.parametrize("deal", ["as_they_come", "token_budget", "greedy", "lpt"])
def test_every_deal_computes_whole_samples_and_better_ones_wait_less(deal: Any) -> None:
    generator = np.random.default_rng(0)
    parts = step.deal_out(replace(BASE, deal=deal), generator)
    assert len(parts) == 4
    if deal in ("greedy", "lpt"):
        drawn = BASE.lengths.draw(np.random.default_rng(0), 32)
        assert sorted(np.concatenate(parts).tolist()) == sorted(drawn.tolist())
    if deal != "as_they_come":
        better, worse = (step.simulate(replace(BASE, deal=d), steps=12).imbalance for d in (deal, "as_they_come"))
        assert better < worse


def test_unequal_groups_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ranks=4, table_groups=3"):
        replace(BASE, table_groups=3)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_errors_are_of_what_is_predicted() -> None:
    rows = [Figure("t", "a", 2.0, 1.0), Figure("t", "b", 2.0, 9.0, "fitted"), Figure("t", "c", 4.0, 5.0)]
    assert mean_error(rows, table="t") == pytest.approx((0.5 + 0.25) / 2)


def test_the_solver_finds_a_root_and_says_where_there_is_none() -> None:
    assert solve(lambda x: x**3, 2.0, 0.0, 10.0, steps=60) == pytest.approx(2 ** (1 / 3), rel=1e-3)
    with pytest.raises(ValueError, match="expected one a side"):
        solve(lambda x: x, 20.0, 0.0, 10.0)


def test_table_4_is_of_one_gpu_as_table_2_says() -> None:
    import scale_mtgenrec

    per_step = (3.2 + 14.0 + 32.6) / 100  # table 2, 4G 1D
    samples = scale_mtgenrec.BATCH["4G"][0]
    assert samples * 600 / per_step == pytest.approx(scale_mtgenrec.TOKENS_A_SECOND["4G", 1], rel=0.01)


def test_trainings_that_really_ran_are_met() -> None:
    import scale_measured

    figures = scale_measured.figures()
    assert mean_error(figures, table="measured here, ms a step") < 0.15
    assert mean_error(figures, table="measured here, ms waited", name="pipelined") < 0.15
