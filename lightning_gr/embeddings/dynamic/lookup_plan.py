"""LookupPlan: what a lookup is going to do to a table, decided while the table stays as it is.

A plan may be made, and its values read, before the step of an earlier batch has ended; `DynamicTable.apply` carries it
out in the batch's own step (TurboGR, arXiv 2605.13433, section 4.2.2). An update of rows in between changes none of its
decisions.

Shape suffixes: U distinct keys of a lookup, N keys, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.eviction import is_expired
from lightning_gr.embeddings.dynamic.first_values import first_values
from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
from lightning_gr.embeddings.dynamic.unique_keys import unique_keys

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable


@dataclass
class SharedRows:
    """The rows that keys of one table share for want of their own.

    Args:
        at_N: places of those keys in the plan.
        buckets: numbers of the shared rows, distinct.
        inverse_N: which of them each key has.
        tables: the place of shared rows in `key_names`, one a bucket.
        counts: how often each was asked for.
        rows: of each, -1 where it is still to be made.
    """

    at_N: Tensor
    buckets: Tensor
    inverse_N: Tensor
    tables: Tensor
    counts: Tensor
    rows: Tensor


@dataclass
class LookupPlan:
    """What a lookup is going to do.

    Args:
        ids_U: keys of the first table, then of the second, ...; distinct ones if some have no row.
        tables_U: table of each.
        offsets_T1: where each table's begin.
        counts_U: how often each occurs.
        rows_U: row of each; -1 where it has none yet.
        step: of the lookup.
        time: of the lookup.
        training: whether it changes the table.
        inverse_N: which of them each looked-up key is; None where they are the same.
        found_T: of each table, how many have a row.
        collided_T: of each table, how many the step before looked up too.
        expired: tables, and ids that have lived too long.
        inserted: of each table, places of keys that get a row.
        victims: tables, and ids that go for them.
        waiting: tables, and places of keys that are not admitted.
        failed: tables, and places of keys without room.
        missing: tables, and places of keys that are answered without a row of their own.
        shared: by table, the rows that those share.
        applied: whether it was carried out.
    """

    ids_U: Tensor
    tables_U: Tensor
    offsets_T1: Sequence[int]
    counts_U: Tensor
    rows_U: Tensor
    step: int
    time: int
    training: bool
    inverse_N: Tensor | None = None
    found_T: list[int] = field(default_factory=list)
    collided_T: list[int] = field(default_factory=list)
    expired: list[tuple[int, Tensor]] = field(default_factory=list)
    inserted: list[Tensor] = field(default_factory=list)
    victims: list[tuple[int, Tensor]] = field(default_factory=list)
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)
    failed: list[tuple[int, Tensor]] = field(default_factory=list)
    missing: list[tuple[int, Tensor]] = field(default_factory=list)
    shared: dict[int, SharedRows] = field(default_factory=dict)
    applied: bool = False

    @property
    def rows_N(self) -> Tensor:
        """Row of each looked-up key, shared ones included; -1 where it has none."""
        rows_U = self.rows_U
        if self.shared:
            rows_U = rows_U.clone()
            for shared in self.shared.values():
                rows_U[shared.at_N] = shared.rows[shared.inverse_N]
        return rows_U if self.inverse_N is None else rows_U[self.inverse_N]


def plan_lookup(
    table: DynamicTable,
    ids_U: Tensor,
    offsets_T1: Sequence[int],
    counts_U: Tensor,
    *,
    step: int,
    time: int,
    training: bool,
    distinct: bool,
    ahead: bool,
) -> LookupPlan:
    """Decides what `DynamicTable.lookup` would do; see there. Changes nothing.

    Args:
        table: which stays as it is.
        ids_U: keys.
        offsets_T1: where each table's begin.
        counts_U: how often each occurs.
        step: of the lookup.
        time: of the lookup.
        training: whether it may change the table.
        distinct: whether no key occurs twice in its table.
        ahead: whether the step before is still under way; it counts as ended.

    Raises:
        KeyError: a key without a row in a table whose `on_missing` is `error`.
    """
    tables_U = tables_of(offsets_T1, ids_U.device)
    rows_U = table.index.find(*table.index_keys(ids_U, tables_U))
    plan = LookupPlan(ids_U, tables_U, offsets_T1, counts_U, rows_U, step, time, training)
    gone: dict[int, tuple[Tensor, Tensor]] = {}
    if training or any(config.policy.expires for config in table.configs):
        gone = _find_expired(table, plan)
    if bool((plan.rows_U < 0).any()):
        if training and not distinct:
            unique = unique_keys(ids_U, offsets_T1, counts_U)
            keys = (unique.ids_U, unique.offsets_T1, unique.counts_U)
            merged = plan_lookup(table, *keys, step=step, time=time, training=True, distinct=True, ahead=ahead)
            merged.inverse_N, merged.found_T, merged.collided_T = unique.inverse_N, plan.found_T, plan.collided_T
            return merged
        if training:
            _plan_insertion(table, plan, gone, ahead)
        _plan_missing(table, plan)
    return plan


def _find_expired(table: DynamicTable, plan: LookupPlan) -> dict[int, tuple[Tensor, Tensor]]:
    """Takes rows that have lived too long out of the plan; their ids and rows by table. Counts what was found."""
    gone: dict[int, tuple[Tensor, Tensor]] = {}
    metadata = table.storage.read_metadata(plan.rows_U)
    offsets_T1, rows_U = plan.offsets_T1, plan.rows_U
    for t, config in enumerate(table.configs):
        if not config.policy.expires:
            continue
        own = slice(offsets_T1[t], offsets_T1[t + 1])
        of_table = type(metadata)(*(None if x is None else x[own] for x in metadata))  # type: ignore[arg-type]
        expired_N = is_expired(config.policy, of_table, plan.step, plan.time) & (rows_U[own] >= 0)
        if bool(expired_N.any()):
            ids_N, rows_N = plan.ids_U[own][expired_N], rows_U[own][expired_N]
            gone[t] = ids_N.unique(), rows_N.unique()
            if rows_U is plan.rows_U:
                rows_U = rows_U.clone()
            rows_U[own] = rows_U[own].masked_fill(expired_N, -1)
    plan.rows_U = rows_U
    plan.expired = [(t, ids_N) for t, (ids_N, _) in gone.items()]
    if plan.training:
        found_U = rows_U >= 0
        flags_2U = torch.stack([found_U, found_U & (metadata.last_steps == plan.step - 1)])
        sums_2U = torch.nn.functional.pad(flags_2U.cumsum(1), (1, 0))
        # Of all tables at once, since reading numbers back makes the host wait for a GPU.
        plan.found_T, plan.collided_T = sums_2U[:, torch.tensor(offsets_T1, device=rows_U.device)].diff().tolist()
    return gone


def _plan_insertion(table: DynamicTable, plan: LookupPlan, gone: dict[int, tuple[Tensor, Tensor]], ahead: bool) -> None:
    """Which absent keys are admitted and have room."""
    ids_U, counts_U, offsets_T1 = plan.ids_U, plan.counts_U, plan.offsets_T1
    for t, config in enumerate(table.configs):
        start, stop = offsets_T1[t], offsets_T1[t + 1]
        new_N = absent_N = (plan.rows_U[start:stop] < 0).nonzero()[:, 0] + start
        counter = table.counters[t]
        if counter is not None and len(new_N):
            least = config.policy.admission.min_count - 1
            admitted_N = counter.counts(ids_U[new_N], committing=plan.step - 1 if ahead else None) >= least
            plan.waiting.append((t, new_N[~admitted_N]))
            new_N = new_N[admitted_N]
        if (budget := table.row_budgets[t]) is not None and len(new_N):
            hits = plan.rows_U[start:stop]
            kept_N, victims_N = budget.make_room(
                ids_U[new_N], counts_U[new_N], hits[hits >= 0], plan.step, plan.time, leaving=gone.get(t)
            )
            plan.victims.append((t, victims_N))
            plan.failed.append((t, new_N[~kept_N]))
            new_N = new_N[kept_N]
        if len(new_N) < len(absent_N) and config.policy.on_missing == "error":
            raise table.no_row(t, ids_U[absent_N[~torch.isin(absent_N, new_N)]])
        plan.inserted.append(new_N)


def _plan_missing(table: DynamicTable, plan: LookupPlan) -> None:
    """What keys without a row of their own get."""
    gets_none_U = plan.rows_U < 0
    if plan.inserted:
        gets_none_U[torch.cat(plan.inserted)] = False
    for t, config in enumerate(table.configs):
        start, stop = plan.offsets_T1[t], plan.offsets_T1[t + 1]
        at_N = gets_none_U[start:stop].nonzero()[:, 0] + start
        if not len(at_N):
            continue
        if config.policy.on_missing == "error":
            raise table.no_row(t, plan.ids_U[at_N])
        plan.missing.append((t, at_N))
        if config.policy.on_missing == "bucket":
            plan.shared[t] = _shared_rows(table, t, at_N, plan.ids_U[at_N], plan.counts_U[at_N])


def _shared_rows(table: DynamicTable, t: int, at_N: Tensor, ids_N: Tensor, counts_N: Tensor) -> SharedRows:
    per_group = table.configs[t].policy.buckets_per_group
    hash_N = key_hash(ids_N, table.salts[t])
    buckets_N = top_bits(hash_N, table.group_bits[t]) * per_group + (hash_N & 0x7FFFFFFF) % per_group
    buckets, inverse_N = buckets_N.unique(return_inverse=True)
    tables = torch.full_like(buckets, table.bucket_table[t])
    rows = table.index.find(*table.index_keys(buckets, tables))
    counts = counts_N.new_zeros(len(buckets)).index_add_(0, inverse_N, counts_N)
    return SharedRows(at_N, buckets, inverse_N, tables, counts, rows)


def planned_values(table: DynamicTable, plan: LookupPlan) -> Tensor:
    """What the looked-up keys are answered now, float32 (N, D): rows as they are, and what new ones begin with."""
    values_UD = table.storage.read(plan.rows_U)
    if plan.inserted and not plan.applied:
        new_M = torch.cat(plan.inserted)
        values_UD[new_M] = table.storage.rounded(table.first_values(plan.ids_U[new_M], plan.tables_U[new_M]))
    for t, at_N in plan.missing:
        config = table.configs[t]
        match config.policy.on_missing:
            case "default_row":
                values_UD[at_N] = config.policy.default_value
            case "bucket":
                values_UD[at_N] = _shared_values(table, plan.shared[t])
            case _:
                ids_N = plan.ids_U[at_N]
                values_UD[at_N] = first_values(config.first_values, table.seed, config.name, ids_N, table.dim)
    return values_UD if plan.inverse_N is None else values_UD[plan.inverse_N]


def _shared_values(table: DynamicTable, shared: SharedRows) -> Tensor:
    values = table.storage.read(shared.rows)
    absent = shared.rows < 0
    if bool(absent.any()):
        values[absent] = table.storage.rounded(table.first_values(shared.buckets[absent], shared.tables[absent]))
    return values[shared.inverse_N]


def tables_of(offsets_T1: Sequence[int], device: torch.device) -> Tensor:
    """Table of each key, where `offsets_T1` say where each table's begin."""
    return torch.repeat_interleave(torch.tensor(offsets_T1).diff()).to(device)
