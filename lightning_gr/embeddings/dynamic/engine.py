"""DynamicEngine: tables, lookups, pending gradients and clocks of one dynamic collection on one process.

It is neither a module nor a parameter: what it holds grows, and no other part of a training step may copy, average or
save it. The strategy, or the user of a plain loop, calls `flush` and `step` where the dense optimiser steps.

Shape suffixes: N looked-up ids, U distinct keys, D width, T tables.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_gr.embeddings.dynamic.dynamic_lookup import DynamicLookup, Jobs
from lightning_gr.embeddings.dynamic.exchange import Dedup, ExchangePrecision
from lightning_gr.embeddings.dynamic.peers import Peers
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig
from lightning_gr.embeddings.dynamic.table_lookups import TableLookups


class DynamicEngine(TableLookups):
    """The tables of a collection, cut over the processes of a group.

    Args:
        configs: the logical tables.
        optimizer: of tables without their own.
        seed: of the run; first values are drawn from it.
        virtual_shards: into how many shards hash bits cut keys: a power of two that stays for the table's life.
        merge: whether tables of equal width, optimiser and storage share a physical table.
        encode_ids: whether the key index holds bit-encoded ids.
        dedup: which stages of deduplication run.
        exchange_precision: of rows and gradients while they travel.
        fused_update: whether rows are updated as soon as backward has reached them all; `step` then has nothing left.
        device: of the tables.
        group: the processes over which the tables are cut; None for one process.
        peers: groups of the engine's own for rows and gradients, with the replicas of hierarchical sparse parallelism
            (TurboGR, arXiv 2605.13433, section 4.2.1); None takes `group`, without replicas.

    Attributes:
        all_processes: those that train together; with replicas more than those over which the tables are cut.
        lr_factor: multiplies the learning rate of every table: the schedule's share.
        next_step: number of the step that is under way.
        time: seconds of the data's clock.
        statistics: what lookups moved.
        traffic: collectives and bytes by what they carry: `keys`, `rows`, `gradients` and `flags` inside the group,
            `replica_keys` and `replica_gradients` between groups.
        jobs: where exchanges and changes of tables run, one after the other; None means where they are asked for.
        before_find: called with each lookup of training that a forward is about to do.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        configs: Sequence[DynamicTableConfig],
        optimizer: SparseOptimizerConfig,
        seed: int,
        virtual_shards: int = 1024,
        merge: bool = True,
        encode_ids: bool = False,
        dedup: Dedup = "two_stage",
        exchange_precision: ExchangePrecision = "fp32",
        fused_update: bool = False,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        peers: Peers | None = None,
    ) -> None:
        super().__init__(
            configs=configs,
            optimizer=optimizer,
            seed=seed,
            virtual_shards=virtual_shards,
            merge=merge,
            encode_ids=encode_ids,
            dedup=dedup,
            exchange_precision=exchange_precision,
            device=device,
            group=group,
            peers=peers,
        )
        self.fused_update = fused_update
        self.all_processes = self.group
        self.lr_factor = 1.0
        self.jobs: Jobs | None = None
        self.before_find: Callable[[DynamicLookup], None] | None = None
        self._unfinished: list[DynamicLookup] = []
        self._limit: float | None = None
        self._open: list[DynamicLookup] = []
        self._ahead: list[DynamicLookup] = []
        self._stepped = False

    # ---- forward -----------------------------------------------------------------------------------------------

    def find(self, lookup: DynamicLookup) -> None:
        """At the owners: finds or inserts the keys that arrived, and sends their rows back.

        An error of a physical table leaves it as it was; tables before it have done their lookup.
        """
        if self.before_find is not None and lookup.training:
            self.before_find(lookup)
        if not lookup.jobs:
            if lookup.training:
                self.settle()
            else:
                self.join()
            self.look_up(lookup)
        if lookup.training:
            # Here, not where the output is used: a rank may leave it unused, and must exchange gradients all the same.
            self._open.append(lookup)

    def received(self, lookup: DynamicLookup) -> list[Tensor]:
        """The rows of each physical table that came back, as leaves whose gradients the engine collects."""
        if lookup.sent:
            raise RuntimeError("dynamic tables: an output was first used after the step; use it before backward")
        lookup.rows = lookup.arrived()
        if lookup.training:
            for rows in lookup.rows:
                rows.requires_grad_()
                rows.register_post_accumulate_grad_hook(lambda _, lookup=lookup: self._on_gradient(lookup))
        return lookup.rows

    # ---- ahead of the step -------------------------------------------------------------------------------------

    def step_later(self) -> Future[None]:
        """As `step`, without waiting: rows are updated in `jobs`, those first that a lookup ahead waits for.

        Returns:
            Done when that lookup's rows are on their way.
        """
        assert self.jobs is not None
        self.flush(wait=False)
        lr_factor, limit = self.lr_factor, self._limit
        self._limit = None
        lookups, self._unfinished = self._unfinished, []
        late: Future[None] = self.jobs.submit(functools.partial(self._send_late, lr_factor, limit))
        self.jobs.submit(functools.partial(self._finish_step, lookups, lr_factor, limit))
        return late

    @torch.no_grad()
    def _send_late(self, lr_factor: float, limit: float | None) -> None:
        """Updates the rows that a lookup ahead waits for, if one does, and sends them."""
        lookup, self._waiting = self._waiting, None
        if lookup is None:
            return
        assert lookup.late is not None
        for p, (table, plan, late_U) in enumerate(zip(self.tables, lookup.plans, lookup.late, strict=True)):
            rows_U = plan.rows_N
            self._update(p, self._pending[p].taken(rows_U[late_U]), lr_factor, limit)
            lookup.values[p][late_U] = table.storage.read(rows_U[late_U])
        lookup.send(lookup.values, late=True)
        lookup.late, lookup.values = None, []

    @torch.no_grad()
    def _finish_step(self, lookups: Sequence[DynamicLookup], lr_factor: float, limit: float | None) -> None:
        for lookup in lookups:
            if lookup.exchange.travel.is_split:
                lookup.exchange.travel.send_gradients(lookup.gradients, urgent=False)
                self._add_gradients(lookup, urgent=False)
            lookup.gradients = []
        for p in range(len(self.tables)):
            self._update(p, self._pending[p].merged(), lr_factor, limit)
        self._end_step()

    @property
    def open_lookups(self) -> list[DynamicLookup]:
        """Lookups of training whose gradients are still to come."""
        return list(self._open)

    def join(self) -> None:
        """Waits until no job is under way."""
        if self.jobs is not None:
            self.jobs.join()

    def settle(self) -> None:
        """As `join`; and rows that were sent ahead are forgotten, since what follows may change the tables."""
        self.join()
        self._waiting = None
        for lookup in self._ahead:
            lookup.forget()

    @property
    def collisions(self) -> tuple[int, int]:
        """Of the present batch's lookups here, the keys that the step before had looked up too, and all of them."""
        plans = [plan for lookup in self._open for plan in lookup.plans]
        return sum(sum(plan.collided_T) for plan in plans), sum(plan.offsets_T1[-1] for plan in plans)

    # ---- prefetch ----------------------------------------------------------------------------------------------

    def prefetch(self, features: Any, *, time: int | None = None, key_peers: Peers | None = None) -> DynamicLookup:
        """Starts the lookup of a later training batch, which a forward with the same object takes up.

        Args:
            features: of the later batch.
            time: the clock of the data at that batch; None means what was observed last.
            key_peers: the engine's peers in groups that nothing else uses at the same time; with them, this may be
                called in another thread. None takes the engine's own, and forwards must keep the order.
        """
        lookup = self.begin(features, training=True, time=time, key_peers=key_peers)
        lookup.keeps_order = key_peers is None
        self._ahead.append(lookup)
        return lookup

    def take(self, features: Any, *, training: bool) -> DynamicLookup:
        """The prefetched lookup of these features, or a new one.

        Raises:
            RuntimeError: other features were prefetched before these, on the same group.
        """
        if training:
            for lookup in list(self._ahead):
                if lookup.features is features:
                    self._ahead.remove(lookup)
                    if self.device.type == "cuda":
                        lookup.record_stream(torch.cuda.current_stream(self.device))
                    return lookup
                if lookup.keeps_order:
                    raise RuntimeError(
                        "dynamic tables: forward got other features than those prefetched; keep the order"
                    )
        self.join()  # it exchanges keys with the processes that jobs exchange rows with
        return self.begin(features, training=training)

    def drop(self, lookup: DynamicLookup) -> None:
        """Forgets a prefetched lookup that no forward took up."""
        if lookup in self._ahead:
            self._ahead.remove(lookup)

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _on_gradient(self, lookup: DynamicLookup) -> None:
        if lookup.sent:
            raise RuntimeError(
                "dynamic tables: backward went through a forward whose gradients are on their way or used up; add the "
                "losses and call backward once, before the step"
            )
        lookup.ready += 1
        # Autograd's order differs from rank to rank; that of forwards does not.
        if all(x.ready == len(self.tables) for x in self._open):
            self._send_gradients()
            if self.fused_update:
                self._stepped = False
                self.step()
                self._stepped = True

    def stepped_in_backward(self) -> bool:
        """Whether backward has updated the rows already; asked once a step."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def _send_gradients(self) -> None:
        """Starts bringing the gradients of all open lookups to their rows."""
        for lookup in self._open:
            if lookup.sent:
                continue
            lookup.sent = True
            # An output that nobody used has rows on their way.
            rows = lookup.rows or lookup.arrived()
            lookup.gradients = [torch.zeros_like(x) if x.grad is None else x.grad.detach() for x in rows]
            lookup.rows = []  # their hooks hold the lookup: a circle that would keep a batch's rows alive
            if self.jobs is None:
                lookup.exchange.travel.send_gradients(lookup.gradients)
            else:
                self.jobs.submit(functools.partial(self._exchange_gradients, lookup))

    @torch.no_grad()
    def _exchange_gradients(self, lookup: DynamicLookup) -> None:
        for grads in lookup.gradients:
            if grads.is_cuda:
                grads.record_stream(torch.cuda.current_stream(grads.device))
        urgent = True if lookup.exchange.travel.is_split else None
        lookup.exchange.travel.send_gradients(lookup.gradients, urgent)
        self._add_gradients(lookup, urgent)
        if urgent is None:
            lookup.gradients = []

    def _add_gradients(self, lookup: DynamicLookup, urgent: bool | None = None) -> None:
        """Waits for gradients, and keeps them for the step."""
        ranks = self.world_size * self.num_groups
        for p, (places, grads) in enumerate(lookup.exchange.travel.gradients(urgent)):
            rows, seeds = lookup.owned[p], lookup.seeds[p]
            if places is not None:
                rows, seeds = rows[places], None if seeds is None else seeds[places]
            # What was exchanged is a sum of its own, which nobody else holds.
            self._pending[p].add(rows, grads.div_(ranks) if ranks > 1 else grads, seeds)

    @torch.no_grad()
    def flush(self, *, wait: bool = True) -> None:
        """Brings the gradients of all finished forwards to their rows; every process calls it at the same point.

        Args:
            wait: whether they are there when this returns; without `jobs` they always are.
        """
        self._send_gradients()
        if self.jobs is None:
            for lookup in self._open:
                self._add_gradients(lookup)
                lookup.gradients = []
        else:
            self._unfinished += self._open
            if wait:
                self.join()
        self._open.clear()

    # ---- the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Sum of squares of all pending gradients of this process's rows, float64; sum it over processes."""
        return torch.stack([pending.squared_norm() for pending in self._pending]).sum()

    @torch.no_grad()
    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiplies all pending gradients."""
        for pending in self._pending:
            pending.scale(factor)

    @torch.no_grad()
    def clamp_gradients(self, limit: float) -> None:
        """Cuts every element of all pending gradients to [-limit, limit]; `step_later` does so when they are there."""
        self._limit = limit

    def _update(self, p: int, of: tuple[Tensor, Tensor, Tensor | None], lr_factor: float, limit: float | None) -> None:
        rows, grads, seeds = of
        table = self.tables[p]
        if len(rows):
            assert table.optimizer.lr is not None
            grads = grads if limit is None else grads.clamp(-limit, limit)
            table.update(rows, grads, lr=table.optimizer.lr * lr_factor, step=self.next_step, seeds_U=seeds)

    @torch.no_grad()
    def gradients_are_finite(self) -> bool:
        """Whether no pending gradient of this process's rows is infinite or not a number."""
        return all(pending.are_finite() for pending in self._pending)

    @torch.no_grad()
    def step(self) -> None:
        """Updates all rows that have gradients, at `lr_factor` times each table's learning rate, and ends the step.

        Where backward has done so already, nothing is left to do.
        """
        if self.stepped_in_backward():
            return
        self.flush()
        for p in range(len(self.tables)):
            self._update(p, self._pending[p].merged(), self.lr_factor, self._limit)
        self.end_step()

    @torch.no_grad()
    def end_step(self) -> None:
        """Ends a step without an update of rows, or after it; pending gradients are dropped."""
        self._limit = None
        self._unfinished.clear()
        self._end_step()

    def _end_step(self) -> None:
        # By a job too, so nothing that belongs to the next step's forward and backward is touched.
        for p, table in enumerate(self.tables):
            self._pending[p].clear()
            table.commit_step(self.next_step)
        self.next_step += 1

    def drop_gradients(self) -> None:
        """Forgets all pending gradients; every process does so at the same point."""
        self.flush()
        for pending in self._pending:
            pending.clear()

    def abandon(self) -> None:
        """Forgets lookups under way, without waiting, as after a failure of another process."""
        for unfinished in (self._open, self._ahead, self._unfinished):
            unfinished.clear()

    def begin_fit(self) -> None:
        """Forgets what an earlier fit has left behind, as a failed one does; nothing is under way."""
        self.abandon()
        self._waiting = self._limit = None
        for pending in self._pending:
            pending.clear()

    # ---- by hand -----------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no forward and no gradient waits for the optimiser's step."""
        return not self._open and not any(self._pending)

    def require_idle(self, what: str) -> None:
        """Refuses what may only be done between two steps.

        Raises:
            RuntimeError: a forward or gradients wait for the optimiser's step.
        """
        self.settle()
        if not self.idle:
            raise RuntimeError(
                f"dynamic tables: {what} between a forward and the optimiser's step; do it after the step"
            )

    def delete(self, ids_N: Tensor, name: str) -> int:
        """Drops keys on the processes that hold them; every process calls it with the same ids.

        Returns:
            How many this process had.
        """
        self.require_idle("delete")
        t = self.table_number(name)
        p, local = self.logical[t]
        ids_N = ids_N.to(self.device, torch.int64)
        return self.tables[p].delete(ids_N[self.owned(t, ids_N)], local)

    @override
    def set_scores(self, ids_N: Tensor, scores_N: Tensor, name: str) -> None:
        self.settle()  # who is evicted next may have been planned by the scores before
        super().set_scores(ids_N, scores_N, name)

    def upsert(self, ids_N: Tensor, values_ND: Tensor, name: str) -> int:
        """Writes rows, of new keys too; every process calls it with the same ids.

        Returns:
            How many keys found no room in the budget on this process.

        Raises:
            ValueError: the values are not of the table's width.
        """
        self.require_idle("upsert")
        t = self.table_number(name)
        p, local = self.logical[t]
        if values_ND.shape != (len(ids_N), self.tables[p].dim):
            raise ValueError(
                f"table {name}: expected values of shape {(len(ids_N), self.tables[p].dim)}, got "
                f"{tuple(values_ND.shape)}"
            )
        ids_N, values_ND = ids_N.to(self.device, torch.int64), values_ND.to(self.device)
        own_N = self.owned(t, ids_N)
        return self.tables[p].upsert(ids_N[own_N], values_ND[own_N], local, step=self.next_step, time=self.time)
