"""Into how many groups of ranks, each with a full set of dynamic tables, a run is best cut: what a step exchanges.

Hierarchical sparse parallelism (TurboGR, arXiv 2605.13433, section 4.2.1): N ranks are M groups of I = N / M
consecutive ones. All-to-alls stay in a group; ranks with the same place in their groups send each other the keys and
gradients of activated rows.

Shape suffixes: N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.cli.errors import UserError
from lightning_gr.cli.plan_memory import ID_BYTES, Memory, Scores, Table, distinct_ids, gib, table_bytes
from lightning_gr.cli.plan_network import CORPUS, MOST_TOKENS_COLLATED, collated, first_samples

if TYPE_CHECKING:
    from lightning_gr.batch import SequenceBatch
    from lightning_gr.cli.plan_balance import Deal
    from lightning_gr.cli.plan_recipe import Recipe


@dataclass(frozen=True)
class Link:
    """What a rank has to send by.

    Args:
        bandwidth: bytes a second.
        latency: seconds for each message.
    """

    bandwidth: float
    latency: float

    def seconds(self, messages: int, size: float) -> float:
        """Of messages of so many bytes each, one after the other."""
        return messages * (self.latency + size / self.bandwidth)


@dataclass(frozen=True)
class Network:
    """How ranks are joined; by default as on MTGenRec's A100 nodes (arXiv 2505.12663), by NVLink and InfiniBand.

    Args:
        ranks_per_node: consecutive ranks that are on a node.
        inside: between ranks of a node.
        between: between nodes, of one rank.
    """

    ranks_per_node: int = 8
    inside: Link = Link(300e9, 5e-6)
    between: Link = Link(25e9, 10e-6)

    def seconds(self, sets_N: np.ndarray[Any, Any], size: float) -> float:
        """Of a collective of sets of ranks in which a rank sends so many bytes to each other one of its set.

        Of the rank with the fewest of its set on its own node; both kinds of links work at once.

        Args:
            sets_N: number of each rank's set; all sets are equally large.
            size: bytes.
        """
        peers = int((sets_N == sets_N[0]).sum()) - 1
        nodes_N = np.arange(len(sets_N)) // self.ranks_per_node
        together = np.unique(sets_N * len(sets_N) + nodes_N, return_counts=True)[1]
        near = int(together.min()) - 1
        return max(self.inside.seconds(near, size), self.between.seconds(peers - near, size))


@dataclass(frozen=True)
class GroupChoice:
    """What a number of groups would mean for a rank.

    Args:
        table_groups: M.
        group_bytes: that it sends inside its group in a step.
        replica_bytes: that it sends to other groups in a step.
        group_seconds: of exchange inside its group in a step, none of it hidden.
        replica_seconds: of exchange between groups.
        table_bytes: of tables with optimiser state, metadata and key index.
        total_bytes: of all that it holds.
        fits: whether that is within the memory of a rank.
    """

    table_groups: int
    group_bytes: float
    replica_bytes: float
    group_seconds: float
    replica_seconds: float
    table_bytes: float
    total_bytes: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Of all exchange in a step."""
        return self.group_seconds + self.replica_seconds


@dataclass(frozen=True)
class GroupAdvice:
    """The recommended number of groups, why, and what was weighed."""

    ranks: int
    table_groups: int
    reason: str
    choices: tuple[GroupChoice, ...] = ()


def recommend(
    tables: Sequence[Table],
    distinct: Callable[[int], Sequence[float]],
    *,
    ranks: int,
    network: Network,
    held: Callable[[int], tuple[float, float]],
    limit: int | None = None,
    micro_steps: int = 1,
    scores: Scores | None = None,
    tokens: float = 0.0,
) -> GroupAdvice:
    """The number of groups whose exchange takes least time among those that fit; of equal ones the least.

    Args:
        tables: all of them dynamic.
        distinct: for each table, the distinct ids in the micro-batches of so many ranks together.
        ranks: N.
        network: how they are joined.
        held: bytes of tables and of all that a rank holds, where so many ranks share a full set of tables.
        limit: bytes of a rank's memory; None asks for none.
        micro_steps: micro-batches of a step.
        scores: against a corpus, whose rows then all are activated in every micro-batch, and whose queries stay in a
            group; those against labels of all ranks are the same whatever the groups, and left out.
        tokens: of a rank's micro-batch.
    """
    row_bytes = [table.dim * table.exchange_bytes for table in tables]
    ranks_N = np.arange(ranks)
    choices = []
    for groups in (m for m in range(1, ranks + 1) if ranks % m == 0):
        size = ranks // groups
        # To each rank of the group goes an equal share of what one rank looks up.
        own = [n / size for n in distinct(1)]
        keys, rows = ID_BYTES * sum(own), sum(n * b for n, b in zip(own, row_bytes, strict=True))
        # To each replica goes what the group activates of the rows that this rank holds.
        active = [n / size for n in distinct(size)]
        in_group = [0.0, keys, rows, rows]  # sizes, keys, rows, gradients: bytes to each
        if scores is not None and scores.candidates is not None:
            queries = scores.exchanged_bytes(tokens, size) / (2 * max(size - 1, 1))
            in_group += [queries, queries]  # and their gradients
            whole = [table.rows if CORPUS in table.features else None for table in tables]
            active = [n if rows_of is None else rows_of / size for n, rows_of in zip(active, whole, strict=True)]
        new_keys, gradients = ID_BYTES * sum(active), sum(n * b for n, b in zip(active, row_bytes, strict=True))
        between = [0.0, new_keys, gradients]  # with sizes
        own_tables, total = held(size)
        choices.append(
            GroupChoice(
                table_groups=groups,
                group_bytes=micro_steps * (size - 1) * sum(in_group),
                replica_bytes=micro_steps * (groups - 1) * sum(between),
                group_seconds=micro_steps * sum(network.seconds(ranks_N // size, x) for x in in_group),
                replica_seconds=micro_steps * sum(network.seconds(ranks_N % size, x) for x in between),
                table_bytes=own_tables,
                total_bytes=total,
                fits=limit is None or total <= limit,
            )
        )
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return GroupAdvice(ranks, 1, f"none fits in {gib(limit or 0)}, and this one takes least", tuple(choices))
    best = min(fitting, key=lambda choice: (choice.seconds, choice.table_groups))
    reason = "the quickest" if limit is None else f"the quickest that fits in {gib(limit)}"
    return GroupAdvice(ranks, best.table_groups, reason, tuple(choices))


def distinct_of_ranks(
    tables: Sequence[Table], tokens: float, few: tuple[int, Sequence[int]], many: tuple[int, Sequence[int]]
) -> Callable[[int], list[float]]:
    """How many distinct ids the micro-batches of some ranks have together, by a power law through two batches.

    Args:
        tables: none has more distinct ids than rows.
        tokens: of one rank's micro-batch.
        few: tokens of a small batch, and for each table its distinct ids.
        many: the same of a larger batch; if it is not larger, no id is taken to be shared.
    """
    more = math.log(many[0] / few[0]) if many[0] > few[0] > 0 else 0.0
    exponents = [
        min(math.log(b / a) / more, 1.0) if more and min(a, b) > 0 else 1.0
        for a, b in zip(few[1], many[1], strict=True)
    ]

    def of(ranks: int) -> list[float]:
        return [
            min(n * (ranks * tokens / few[0]) ** power, math.inf if table.rows is None else table.rows)
            for n, power, table in zip(few[1], exponents, tables, strict=True)
        ]

    return of


def parse_link(option: str, text: str) -> Link:
    """The link of ``300,5``: gigabytes a second, and microseconds a message.

    Raises:
        UserError: something else.
    """
    try:
        bandwidth, latency = (float(word) for word in text.split(","))
    except ValueError:
        bandwidth = latency = math.nan
    if not (0 < bandwidth < math.inf and 0 <= latency < math.inf):
        raise UserError(f"{option} {text}: expected GB/s and microseconds a message, such as 300,5")
    return Link(bandwidth * 1e9, latency * 1e-6)


def advise(
    recipe: Recipe, memory: Memory, samples: SequenceBatch | None, *, dealt: Deal, network: Network, limit: int | None
) -> GroupAdvice:
    """What is recommended for a recipe.

    Args:
        recipe: the run.
        memory: what there is to hold.
        samples: as many of the first global batch as one rank has, or some of them; None where its network cannot run.
        dealt: on how many ranks, and in which batches.
        network: how ranks are joined.
        limit: bytes of a rank's memory.

    Raises:
        UserError: the recipe has a number of groups that does not fit.
    """
    from lightning_gr.plugins.sharding import static_collections, table_configs

    static = [config.name for x in static_collections(recipe.model).values() for config in table_configs(x)]
    reasons = {
        "there is one rank": dealt.ranks == 1,
        "the model has no tables": not memory.tables,
        f"table {' and '.join(static)} is static: only dynamic ones can be held by every group": bool(static),
        "what a step looks up cannot be measured": samples is None,
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        return GroupAdvice(dealt.ranks, 1, why[0])
    assert samples is not None
    tables, tokens = memory.tables, dealt.batch_tokens / dealt.ranks / dealt.micro_steps
    more = collated(
        recipe.model, recipe.plan, first_samples(recipe.plan, min(int(dealt.ranks * tokens), MOST_TOKENS_COLLATED))
    )
    few, many = ((batch.num_tokens, [distinct_ids(batch, table) for table in tables]) for batch in (samples, more))

    spread = memory.scores is not None and memory.scores.candidates is not None

    def held(ranks: int) -> tuple[float, float]:
        own_tables = table_bytes(tables, ranks)
        rest = memory.on(ranks if spread else dealt.ranks, dealt.most_tokens)
        return own_tables, own_tables + rest.total - rest.tables

    advice = recommend(
        tables,
        distinct_of_ranks(tables, tokens, few, many),
        ranks=dealt.ranks,
        network=network,
        held=held,
        limit=limit,
        micro_steps=dealt.micro_steps,
        scores=memory.scores,
        tokens=tokens,
    )
    for choice in advice.choices:
        if choice.table_groups == recipe.table_groups and not choice.fits:
            raise UserError(
                f"table_groups={choice.table_groups}: a rank would hold tables of {gib(choice.table_bytes)} and "
                f"{gib(choice.total_bytes - choice.table_bytes)} of other things, where it has {gib(limit or 0)}; use "
                f"{advice.table_groups}"
            )
    return advice
