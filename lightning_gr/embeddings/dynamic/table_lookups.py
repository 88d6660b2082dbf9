"""TableLookups: lookups in sharded dynamic tables, of the present step and ahead of it; no gradients, no optimiser.

Shape suffixes: N looked-up ids, U distinct keys, T tables, T1 tables + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.embeddings.dynamic.dynamic_lookup import DynamicLookup
from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
from lightning_gr.embeddings.dynamic.exchange import (
    Dedup,
    DedupCounts,
    ExchangePrecision,
    ExchangeStatistics,
    LookupExchange,
)
from lightning_gr.embeddings.dynamic.key_index import key_hash
from lightning_gr.embeddings.dynamic.peers import Peers, Traffic
from lightning_gr.embeddings.dynamic.pending_gradients import PendingGradients
from lightning_gr.embeddings.dynamic.sharded_tables import ShardedTables

_KINDS = ("keys", "rows", "gradients", "flags", "replica_keys", "replica_gradients")


class TableLookups(ShardedTables):
    """Sharded tables that can be looked up.

    Args:
        dedup: which stages of deduplication run.
        exchange_precision: of rows and gradients while they travel.
        peers: with whom rows and gradients are exchanged; None takes `group`, without replicas.
        **tables: of `ShardedTables`.

    Attributes:
        next_step: number of the step that is under way.
        time: seconds of the data's clock.
        statistics: what lookups moved.
        dedup_counts: of each table, what deduplication left of its ids.
        last_keys: of each physical table, table, row and count of the keys of the last lookup of training.
        traffic: collectives and bytes by what they carry.
    """

    def __init__(
        self, *, dedup: Dedup, exchange_precision: ExchangePrecision, peers: Peers | None, **tables: Any
    ) -> None:
        super().__init__(**tables)
        self.peers = peers or Peers(own=self.group)
        assert self.peers.size == self.world_size
        self.dedup, self.exchange_precision = dedup, exchange_precision
        self.next_step = 0
        self.time = self._observed = 0
        self.statistics = ExchangeStatistics()
        self.dedup_counts = [DedupCounts() for _ in self.configs]
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.last_keys = [(none, none, none) for _ in self.tables]
        self.traffic = {kind: Traffic() for kind in _KINDS}
        self._pending = [PendingGradients(dim=table.dim, device=self.device) for table in self.tables]
        self._waiting: DynamicLookup | None = None
        self._first_lookups = [0, *itertools.accumulate(len(config.feature_names) for config in self.configs)]

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The processes that have the same part of the tables in other groups, in the order of groups."""
        return self.peers.replicas

    @property
    def num_groups(self) -> int:
        """How many groups have a full set of tables each."""
        return self.peers.num_groups

    @property
    def is_first_replica(self) -> bool:
        """Whether this process is of the first group; the others have the same tables."""
        return self.replicas is None or self.replicas.rank() == 0

    def observe_time(self, seconds: int) -> None:
        """Tells the clock of the data looked up next; of all processes' the latest counts, and it never goes back."""
        self._observed = max(self._observed, seconds)

    def begin(
        self,
        features: Any,
        *,
        training: bool,
        time: int | None = None,
        key_peers: Peers | None = None,
    ) -> DynamicLookup:
        """Starts a lookup: distinct keys and the exchange of their numbers. Changes no table, so it may run ahead.

        Args:
            features: a KeyedJaggedTensor with the features of the tables.
            training: whether the lookup may change tables.
            time: the clock of the data at this lookup; None means what was observed last.
            key_peers: by which keys travel; None takes the engine's peers.

        Raises:
            ValueError: a feature is missing.
        """
        keys, sizes = list(features.keys()), features.length_per_key()
        if missing := [feature for _, feature, _ in self.lookups if feature not in keys]:
            raise ValueError(f"feature {missing[0]}: not in the batch, which has {', '.join(keys)}")
        values = dict(zip(keys, features.values().split(sizes), strict=True))
        parts = [values[feature] for _, feature, _ in self.lookups]
        ends = [0, *itertools.accumulate(len(part) for part in parts)]
        offsets_T1 = [ends[place] for place in self._first_lookups]
        ids_N = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(torch.int64)
        exchange = LookupExchange(
            self.placement,
            self.peers,
            ids_N,
            offsets_T1,
            training=training,
            time=self._observed if time is None else max(time, self._observed),
            counts_N=self._counts(parts),
            key_peers=key_peers,
            dedup=self.dedup,
            precision=self.exchange_precision,
            traffic=self.traffic,
        )
        return DynamicLookup(features, training, exchange, [len(part) for part in parts])

    def _counts(self, parts: list[Tensor]) -> Tensor | None:
        """How often each id of the looked-up features occurred; None means once each."""
        counted = [feature not in self.configs[t].uncounted_features for t, feature, _ in self.lookups]
        if all(counted):
            return None
        return torch.cat([torch.full_like(x, int(y), dtype=torch.int64) for x, y in zip(parts, counted, strict=True)])

    @torch.no_grad()
    def look_up(self, lookup: DynamicLookup) -> None:
        """Does a lookup whole: tables change if it is one of training, and rows are sent."""
        self._plan(lookup, step=self.next_step, ahead=False)
        if lookup.training:
            self.carry_out(lookup)
        values = [table.values(plan) for table, plan in zip(self.tables, lookup.plans, strict=True)]
        lookup.send(values)

    @torch.no_grad()
    def _plan(self, lookup: DynamicLookup, *, step: int, ahead: bool) -> None:
        keys, bounds = lookup.exchange.received_keys(), self.placement.bounds
        plans = []
        for p, table in enumerate(self.tables):
            offsets = keys.offsets_T1[bounds[p] : bounds[p + 1] + 1]
            own = slice(offsets[0], offsets[-1])
            plan = table.plan(
                keys.ids_U[own],
                [x - offsets[0] for x in offsets],
                keys.counts_U[own],
                step=step,
                time=max(self.time, lookup.exchange.time),
                training=lookup.training,
                distinct=lookup.exchange.distinct,
                ahead=ahead,
            )
            if not lookup.training:
                table.count_missing(plan)
            plans.append(plan)
        lookup.plans = plans

    @torch.no_grad()
    def carry_out(self, lookup: DynamicLookup) -> None:
        """Does to the tables what was planned for a lookup of the present step."""
        keys, bounds = lookup.exchange.received_keys(), self.placement.bounds
        self.time = max(self.time, lookup.exchange.time)
        for p, (table, plan) in enumerate(zip(self.tables, lookup.plans, strict=True)):
            assert plan.step == self.next_step
            table.apply(plan)
            lookup.owned.append(plan.rows_N)
            self.last_keys[p] = plan.tables_U, plan.rows_U, plan.counts_U
            seeds = None
            if table.storage.precision != "fp32":
                offsets = keys.offsets_T1[bounds[p] : bounds[p + 1] + 1]
                ids_U = keys.ids_U[offsets[0] : offsets[-1]]
                seeds = self._seeds(table, ids_U, [x - offsets[0] for x in offsets])
            lookup.seeds.append(seeds)
        lookup.exchange.statistics(self.statistics)
        lookup.exchange.dedup_counts(self.dedup_counts)

    @staticmethod
    def _seeds(table: DynamicTable, ids_U: Tensor, offsets_T1: list[int]) -> Tensor:
        parts = [
            key_hash(ids_U[a:b], salt) for a, b, salt in zip(offsets_T1, offsets_T1[1:], table.salts, strict=False)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def look_ahead(
        self,
        lookup: DynamicLookup,
        present: Sequence[DynamicLookup],
        *,
        step_ends: bool,
        exact: bool,
        split_gradients: bool,
    ) -> None:
        """Reads and sends the rows of the next lookup; the tables stay as they are until it is carried out.

        Args:
            lookup: of the batch behind the present one.
            present: lookups of the present batch, carried out, whose gradients are still to come.
            step_ends: whether the present batch is the last of its step, so that rows are updated in between.
            exact: whether rows that this update changes are left for `step_later` to send; others go now.
            split_gradients: whether their gradients travel before the others.
        """
        self._plan(lookup, step=self.next_step + step_ends, ahead=step_ends)
        values = [table.values(plan) for table, plan in zip(self.tables, lookup.plans, strict=True)]
        if not (exact and step_ends):
            lookup.send(values)
            return
        late: list[Tensor] = []
        urgent: list[list[Tensor]] = [[] for _ in present]
        for p, plan in enumerate(lookup.plans):
            rows_U = plan.rows_N
            in_flight = [self._pending[p].rows, *(x.owned[p] for x in present)]
            late.append((rows_U >= 0) & torch.isin(rows_U, torch.cat(in_flight)))
            for x, marks in zip(present, urgent, strict=True):
                marks.append((x.owned[p] >= 0) & torch.isin(x.owned[p], rows_U))
        if split_gradients:
            for x, marks in zip(present, urgent, strict=True):
                x.exchange.travel.mark_urgent(marks)
        lookup.exchange.travel.mark_late(late)
        lookup.late, lookup.values = late, values
        lookup.send(values, late=False)
        self._waiting = lookup
