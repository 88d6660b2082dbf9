"""A training on many ranks, as work on their streams and bytes on their links: what a step takes and waits for.

Every rank has five streams: the host's, which loads; the ids' exchange; the tables', which read, send and update rows;
the dense layers'; and that of the all-reduce. `Training` says what is in a step, `simulate` runs some of them.

Legend: N ranks, M groups of I = N / M ranks with a full set of tables each, S samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scale_engine import Simulation, Stream, Work
from scale_ids import LogNormalLengths, ZipfIds
from scale_network import Cluster, Machine

from lightning_gr.balancing import SequenceCost
from lightning_gr.balancing.partition import partition
from lightning_gr.balancing.token_budget import closest_prefix

Array = np.ndarray[Any, Any]
ID_BYTES = 8
Schedule = Literal["plain", "ids_ahead", "semi_async", "exact_async"]
Deal = Literal["as_they_come", "token_budget", "greedy", "lpt"]
Dedup = Literal["none", "lookup", "exchange", "both"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, on what, and how.

    Args:
        machine: kind of each node.
        ranks: N.
        lengths: of sequences.
        samples: of a rank in a step, before they are dealt out.
        cost: seconds of a sequence's forward and backward together.
        fixed: seconds of a step beside them, on every rank.
        dense_bytes: of gradients that all ranks add up.
        ids: what is looked up.
        ids_per_token: lookups.
        row_bytes: of what they give.
        memory: bytes a second at which rows are read and written on a device.
        row_passes: how often a row passes the memory in an update, and how often in a lookup.
        deal: who computes which sample; `greedy` is `lpt` without its swaps, as TurboGR describes its own.
        dedup: where ids are made distinct: nowhere, before the lookup, before the exchange, or both.
        table_groups: M.
        schedule: what runs beside the dense layers: nothing, ids, or rows too.
        depth: batches loaded ahead, in all schedules but `plain`.
        late: share of rows that `exact_async` sends late; None computes it.
        load: host's seconds of a batch.
        host_per_sample: host's seconds for each sample of all ranks.
        stall_rate: how often a rank stands still, for each step.
        stall: for how many seconds.
        buckets: parts in which gradients are added up during backward.
    """

    machine: Machine
    ranks: int
    lengths: LogNormalLengths
    samples: int
    cost: SequenceCost
    fixed: float = 0.0
    dense_bytes: float = 0.0
    ids: ZipfIds = ZipfIds(1_000_000, 1.05)
    ids_per_token: float = 1.0
    row_bytes: float = 0.0
    memory: float = 1.2e12
    row_passes: tuple[float, float] = (7.0, 2.0)
    deal: Deal = "token_budget"
    dedup: Dedup = "both"
    table_groups: int = 1
    schedule: Schedule = "ids_ahead"
    depth: int = 2
    late: float | None = None
    load: float = 0.0
    host_per_sample: float = 0.0
    stall_rate: float = 0.0
    stall: float = 0.0
    buckets: int = 4

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.table_groups < 1 or self.ranks % self.table_groups:
            raise ValueError(f"ranks={self.ranks}, table_groups={self.table_groups}: expected equal groups")


@dataclass(frozen=True)
class Outcome:
    """Means over steps; seconds and bytes of a step.

    Args:
        step: seconds.
        tokens: of all ranks.
        samples: of all ranks.
        imbalance: (max - mean) / max of what ranks compute.
        delay: seconds between the most and the least that a rank computes.
        token_range: tokens between the fullest rank and the emptiest.
        busy: seconds that the mean rank computes.
        exposed: seconds that the mean rank waits for something other than a slower rank.
        sparse: seconds of exchange of ids, rows and gradients on a rank, hidden or not.
        rows_seconds: of that, all-to-alls in which rows and their gradients travel inside a group.
        near_bytes: that a rank sends in its node.
        far_bytes: that a rank sends to other nodes.
    """

    step: float
    tokens: float
    samples: float
    imbalance: float
    delay: float
    token_range: float
    busy: float
    exposed: float
    sparse: float
    rows_seconds: float
    near_bytes: float
    far_bytes: float

    @property
    def throughput(self) -> float:
        """Tokens a second of all ranks."""
        return self.tokens / self.step


def deal_out(run: Training, generator: np.random.Generator) -> list[Array]:
    """Tokens of the sequences that each rank computes in a step."""
    if run.deal == "token_budget":
        budget = round(run.samples * run.lengths.mean)
        drawn = run.lengths.draw(generator, run.ranks * (2 * run.samples + 16)).reshape(run.ranks, -1)
        return [row[: closest_prefix(row, budget)] for row in drawn]
    drawn = run.lengths.draw(generator, run.ranks * run.samples)
    if run.deal == "as_they_come":
        return list(drawn.reshape(run.ranks, -1))
    if run.deal == "lpt":
        return [drawn[part] for part in partition(run.cost(drawn), run.ranks)]
    parts: list[list[int]] = [[] for _ in range(run.ranks)]
    loads = [(0.0, rank) for rank in range(run.ranks)]
    for length in np.sort(drawn)[::-1].tolist():
        load, rank = loads[0]
        parts[rank].append(length)
        heapq.heapreplace(loads, (load + float(run.cost(np.array(length))), rank))
    return [np.array(part) for part in parts]


@dataclass(frozen=True)
class Exchange:
    """Rows that travel in a step, means of a rank.

    Args:
        keys: that a rank asks for.
        read: that a rank reads for its group.
        active: distinct ones among them, whose gradients go to replicas.
        updated: of all groups.
    """

    keys: float
    read: float
    active: float
    updated: float


def exchange(run: Training, tokens: float) -> Exchange:
    """What is looked up where ranks have so many tokens each."""
    draws, group = tokens * run.ids_per_token, run.ranks // run.table_groups
    keys = run.ids.distinct(draws) if run.dedup in ("exchange", "both") else draws
    active = run.ids.distinct(draws * group) / group
    read = active if run.dedup in ("lookup", "both") else keys
    return Exchange(keys, read, active, run.ids.distinct(draws * run.ranks) / group)


class _Ranks:
    """The streams of all ranks, and the exchange of rows between them."""

    def __init__(self, run: Training, cluster: Cluster) -> None:
        self.run, self.cluster, self.simulation = run, cluster, cluster.simulation
        self.group = run.ranks // run.table_groups
        self.groups = [range(first, first + self.group) for first in range(0, run.ranks, self.group)]
        self.replicas = [range(place, run.ranks, self.group) for place in range(self.group)]
        names = ("host", "ids", "tables", "dense", "reduce")
        self.streams = {name: [Stream() for _ in range(run.ranks)] for name in names}

    def each(
        self, name: str, stream: str, after: Sequence[Sequence[Work | None]], seconds: Sequence[float]
    ) -> list[Work]:
        """The same piece of work on every rank."""
        streams = self.streams[stream]
        return [
            self.simulation.issue(name, after[rank], seconds=seconds[rank], stream=streams[rank])
            for rank in range(self.run.ranks)
        ]

    def swap(
        self, name: str, sets: Sequence[range], stream: str, after: Sequence[Work], sizes: Sequence[float]
    ) -> list[Work]:
        """All-to-alls of sets of ranks; for each rank, what ends it."""
        done: list[Work] = [*after]
        if len(sets[0]) == 1:
            return done
        for ranks in sets:
            streams = [self.streams[stream][rank] for rank in ranks]
            ended = self.cluster.all_to_all(name, ranks, [after[r] for r in ranks], [sizes[r] for r in ranks], streams)
            for rank in ranks:
                done[rank] = ended
        return done


def simulate(run: Training, *, steps: int = 24, warm_up: int = 4, seed: int = 0) -> Outcome:
    """Runs some steps of a training.

    Args:
        run: what is trained.
        steps: that count.
        warm_up: steps before them.
        seed: of lengths and of who stands still.
    """
    generator, total = np.random.default_rng(seed), steps + warm_up
    simulation = Simulation()
    ranks = _Ranks(run, Cluster(run.machine, run.ranks, simulation))
    each, swap, everyone = ranks.each, ranks.swap, range(run.ranks)
    dealt = [deal_out(run, generator) for _ in range(total)]
    tokens_TN = np.array([[float(part.sum()) for part in parts] for parts in dealt])
    work_TN = np.array([[float(run.cost(part).sum()) for part in parts] for parts in dealt]) + run.fixed
    stalls_TN = _stalls(run, generator, total, warm_up)
    late = run.late if run.late is not None else run.ids.again(tokens_TN.mean() * run.ids_per_token * run.ranks)
    late = late if run.schedule == "exact_async" else 0.0
    runs_ahead = run.schedule in ("semi_async", "exact_async")
    depth = 0 if run.schedule == "plain" else run.depth
    ends: list[list[Work]] = []
    ids: list[list[Work]] = []
    rows: dict[int, list[Work]] = {}
    sparse: list[tuple[int, Work, Work]] = []  # step, before, after

    def timed(step: int, call: Any, *args: Any) -> list[Work]:
        done = call(*args)
        if done is not args[3]:
            sparse.append((step, args[3][0], done[0]))
        result: list[Work] = done
        return result

    def prefetch(step: int) -> None:
        host = run.load + run.host_per_sample * sum(len(part) for part in dealt[step])
        before = ends[step - 1 - depth] if step > depth else [None] * run.ranks
        loaded = each("load", "host", [[work] for work in before], [host] * run.ranks)
        what = exchange(run, float(tokens_TN[step].mean()))
        sent = timed(step, swap, "ids", ranks.groups, "ids", loaded, [what.keys * ID_BYTES] * run.ranks)
        if run.table_groups > 1:
            keys = what.active * ID_BYTES * run.table_groups
            sent = timed(step, swap, "replica ids", ranks.replicas, "ids", sent, [keys] * run.ranks)
        ids.append(sent)

    def pass_seconds(count: float, passes: float) -> list[float]:
        return [count * passes * run.row_bytes / run.memory] * run.ranks

    def embed(step: int, share: float, after: Sequence[Work | None]) -> None:
        what = exchange(run, float(tokens_TN[step].mean()))
        needed = [[ids[step][rank], after[rank]] for rank in everyone]
        read = each("lookup", "tables", needed, pass_seconds(share * what.read, run.row_passes[1]))
        size = share * what.keys * run.row_bytes
        sent = timed(step, swap, "rows", ranks.groups, "tables", read, [size] * run.ranks)
        rows[step] = sent

    def take_gradients(step: int, share: float, after: Sequence[Work]) -> None:
        what = exchange(run, float(tokens_TN[step].mean()))
        scale_N = tokens_TN[step] / max(tokens_TN[step].mean(), 1.0)
        sizes = (share * what.keys * run.row_bytes * scale_N).tolist()
        begun = each("gradients", "tables", [[work] for work in after], [0.0] * run.ranks)
        sent = timed(step, swap, "gradients", ranks.groups, "tables", begun, sizes)
        if run.table_groups > 1:
            size = share * what.active * run.row_bytes * run.table_groups
            sent = timed(step, swap, "replica gradients", ranks.replicas, "tables", sent, [size] * run.ranks)
        summed, stepped = (pass_seconds(share * n, k) for n, k in ((what.keys, 2.0), (what.updated, run.row_passes[0])))
        each("update", "tables", [[work] for work in sent], [a + b for a, b in zip(summed, stepped, strict=True)])

    for step in range(total):
        if step == 0:
            prefetch(0)
            embed(0, 1.0, [None] * run.ranks)
        elif not runs_ahead:
            if depth == 0:
                prefetch(step)
            embed(step, 1.0, ends[step - 1] if run.schedule == "plain" else [None] * run.ranks)
        if depth and step + 1 < total:
            prefetch(step + 1)
        previous = ends[step - 1] if step else [None] * run.ranks
        third = [float(x) / 3 + float(y) for x, y in zip(work_TN[step], stalls_TN[step], strict=True)]
        ready = [[rows[step][rank], previous[rank]] for rank in everyone]
        forward = each("forward", "dense", ready, third)
        if runs_ahead and step + 1 < total:
            begins = [simulation.issue("begins", needed) for needed in ready]
            embed(step + 1, 1.0 - late, begins)
        part = (work_TN[step] * 2 / 3 / run.buckets).tolist()
        done, reduced = forward, list[Work]()
        for _ in range(run.buckets):
            done = each("backward", "dense", [[work] for work in done], part)
            reduced.append(
                ranks.cluster.all_reduce("reduce", done, run.dense_bytes / run.buckets, ranks.streams["reduce"])
            )
        if late > 0 and step + 1 < total:
            take_gradients(step, late, done)
            early = rows[step + 1]
            embed(step + 1, late, [None] * run.ranks)
            rows[step + 1] = [simulation.issue("rows", [a, b]) for a, b in zip(early, rows[step + 1], strict=True)]
            take_gradients(step, 1.0 - late, done)
        else:
            take_gradients(step, 1.0, done)
        ends.append(each("optimizer", "dense", [[work, reduced[-1]] for work in done], [0.0] * run.ranks))
    simulation.run()
    return _outcome(run, ranks, ends, sparse, tokens_TN, work_TN + stalls_TN, dealt, warm_up)


def _stalls(run: Training, generator: np.random.Generator, total: int, warm_up: int) -> Array:
    """Seconds for which each rank stands still in each step.

    As many steps as are expected have one, so that few steps are enough; a second one in a step would change nothing.
    """
    stalls_TN = np.zeros((total, run.ranks))
    expected = (total - warm_up) * (1 - (1 - run.stall_rate) ** run.ranks)
    if run.stall > 0 and expected > 0:
        count = max(round(expected), 1)
        steps = warm_up + generator.permutation(total - warm_up)[:count]
        stalls_TN[steps, generator.integers(run.ranks, size=count)] = run.stall * expected / count
    return stalls_TN


def _outcome(
    run: Training,
    ranks: _Ranks,
    ends: list[list[Work]],
    sparse: list[tuple[int, Work, Work]],
    tokens_TN: Array,
    work_TN: Array,
    dealt: list[list[Array]],
    warm_up: int,
) -> Outcome:
    counted, steps = slice(warm_up, None), len(ends) - warm_up
    ended = np.array([np.mean([work.ended for work in step]) for step in ends])
    began = float(ended[warm_up - 1]) if warm_up else 0.0
    work_TN = work_TN[counted]
    most_T, mean_T = work_TN.max(1), work_TN.mean(1)
    step = (float(ended[-1]) - began) / steps
    of_rank_0 = [
        (each.name, after.ended - before.ended)
        for number, before, after in sparse
        if number >= warm_up
        for each in (after,)
    ]
    moved = sum(seconds for _, seconds in of_rank_0) / steps
    in_group = sum(seconds for name, seconds in of_rank_0 if name in ("rows", "gradients")) / steps
    links = ranks.cluster
    return Outcome(
        step=step,
        tokens=float(tokens_TN[counted].sum(1).mean()),
        samples=float(np.mean([sum(len(part) for part in parts) for parts in dealt[counted]])),
        imbalance=float(np.mean((most_T - mean_T) / np.maximum(most_T, 1e-30))),
        delay=float((most_T - work_TN.min(1)).mean()),
        token_range=float(np.ptp(tokens_TN[counted], axis=1).mean()),
        busy=float(mean_T.mean()),
        exposed=step - float(most_T.mean()),
        sparse=moved,
        rows_seconds=in_group,
        near_bytes=sum(link.sent for link in links.near) / run.ranks / len(ends),
        far_bytes=sum(link.sent for link in links.far) / run.ranks / len(ends),
    )
