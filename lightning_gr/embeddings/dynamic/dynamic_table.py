"""DynamicTable: the part of one physical table that a process holds, with the policies of the tables merged in it.

Keys are apart from rows (MTGRBoost / MTGenRec, arXiv 2505.12663, section 3.1): growth rehashes keys and never moves a
row. Tables of equal width and optimiser share it; each keeps its own policy, budget and first values.

Shape suffixes: U distinct keys of a lookup, N keys, T tables, G groups of keys, D width, S width of optimiser state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.admission import AdmissionCounter, ExactCounter, SketchCounter
from lightning_gr.embeddings.dynamic.eviction import RowBudget, is_expired
from lightning_gr.embeddings.dynamic.keyed_rows import KeyedRows
from lightning_gr.embeddings.dynamic.lookup_plan import LookupPlan, plan_lookup, planned_values
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig, update_rows
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig
from lightning_gr.embeddings.dynamic.table_statistics import TableStatistics

_SWEEP_EVERY = 64


@dataclass(frozen=True)
class Lookup:
    """What a table has for some keys.

    Args:
        rows_U: row of each key, int64; -1 where it has none, so that nothing of it is trained.
        values_UD: float32 values.
    """

    rows_U: Tensor
    values_UD: Tensor


class DynamicTable(KeyedRows):
    """Some tables of equal width and optimiser, in one key index and one row storage; see `KeyedRows`."""

    def __init__(
        self,
        *,
        configs: Sequence[DynamicTableConfig],
        optimizer: SparseOptimizerConfig,
        seed: int,
        virtual_shards: int,
        device: torch.device,
        encode_ids: bool = False,
    ) -> None:
        super().__init__(
            configs=configs,
            optimizer=optimizer,
            seed=seed,
            virtual_shards=virtual_shards,
            device=device,
            encode_ids=encode_ids,
        )
        self.row_budgets = [None if limit is None else RowBudget(self, t) for t, limit in enumerate(self.budgets)]
        self.counters = [self._counter(table) for table in range(len(configs))]
        self.statistics = [TableStatistics() for _ in configs]
        self._swept = -1

    def _counter(self, table: int) -> AdmissionCounter | None:
        admission = self.configs[table].policy.admission
        if admission.min_count == 1:
            return None
        salt = self.salts[table]
        if admission.counter == "exact":
            return ExactCounter(salt=salt, forget_after_steps=admission.forget_after_steps, device=self.device)
        return SketchCounter(salt=salt, shard_bits=self.shard_bits, width=admission.sketch_width, device=self.device)

    # ---- lookup ------------------------------------------------------------------------------------------------

    def lookup(
        self,
        ids_U: Tensor,
        offsets_T1: Sequence[int],
        counts_U: Tensor,
        *,
        step: int,
        time: int,
        training: bool,
        distinct: bool = True,
    ) -> Lookup:
        """Rows and values of keys; only in training does it change the table.

        Args:
            ids_U: keys of the first table, then of the second, ...
            offsets_T1: where each table's begin, on the host.
            counts_U: how often each occurs.
            step: number of the optimiser's next step; what it has looked up is not evicted before.
            time: seconds of the data's clock.
            training: whether keys may be inserted, counted and evicted.
            distinct: whether no key occurs twice in its table.

        Raises:
            KeyError: a key without a row in a table whose `on_missing` is `error`; the table is as it was.
            MemoryError: no room to grow; the table is as it was.
        """
        plan = self.plan(ids_U, offsets_T1, counts_U, step=step, time=time, training=training, distinct=distinct)
        if training:
            self.apply(plan)
        else:
            self.count_missing(plan)
        return Lookup(plan.rows_N, self.values(plan))

    @torch.no_grad()
    def plan(
        self,
        ids_U: Tensor,
        offsets_T1: Sequence[int],
        counts_U: Tensor,
        *,
        step: int,
        time: int,
        training: bool,
        distinct: bool = True,
        ahead: bool = False,
    ) -> LookupPlan:
        """What `lookup` would do; changes nothing. With `ahead`, as if the step before had ended."""
        return plan_lookup(
            self,
            ids_U,
            offsets_T1,
            counts_U,
            step=step,
            time=time,
            training=training,
            distinct=distinct,
            ahead=ahead,
        )

    @torch.no_grad()
    def values(self, plan: LookupPlan) -> Tensor:
        """What the keys of a plan are answered, float32 (N, D); before it is carried out or after."""
        return planned_values(self, plan)

    @torch.no_grad()
    def apply(self, plan: LookupPlan) -> None:
        """Carries out a plan of training, between which and now rows may have been updated and nothing else.

        Raises:
            MemoryError: no room to grow; the table is as it was.
        """
        assert plan.training
        assert not plan.applied
        shared_new = [(x, x.rows < 0) for x in plan.shared.values()]
        new_M = torch.cat(plan.inserted) if plan.inserted else plan.rows_U[:0]
        num_new = len(new_M) + sum(int(new.sum()) for _, new in shared_new)
        self.reserve(num_new, sum(len(ids_N) for _, ids_N in (*plan.victims, *plan.expired)))
        plan.applied = True
        for table, ids_N in plan.expired:
            self.statistics[table].expired += self.remove(ids_N, table)
        for table, ids_N in plan.victims:
            self.statistics[table].evicted += self.remove(ids_N, table)
        self._count_admissions(plan)
        if len(new_M):
            plan.rows_U = plan.rows_U.clone()
            plan.rows_U[new_M] = self.add(plan.ids_U[new_M], plan.tables_U[new_M])
        present_U = plan.rows_U >= 0
        self.storage.touch(plan.rows_U[present_U], plan.counts_U[present_U], step=plan.step, time=plan.time)
        for shared, new in shared_new:
            if bool(new.any()):
                shared.rows[new] = self.add(shared.buckets[new], shared.tables[new])
            self.storage.touch(shared.rows, shared.counts, step=plan.step, time=plan.time)
        for table, statistics in enumerate(self.statistics):
            offsets_T1 = plan.offsets_T1
            statistics.looked_up += offsets_T1[table + 1] - offsets_T1[table]
            statistics.found += plan.found_T[table]
            statistics.collided += plan.collided_T[table]
        self.count_missing(plan)
        if plan.step % _SWEEP_EVERY == 0 and plan.step > self._swept:
            self._swept = plan.step
            self._sweep(plan.step, plan.time)

    def _count_admissions(self, plan: LookupPlan) -> None:
        """Tells counters which keys wait, and which do so no longer."""
        for table, waiting_N in plan.waiting:
            counter = self.counters[table]
            assert counter is not None
            counter.add(plan.ids_U[waiting_N], plan.counts_U[waiting_N])
            self.statistics[table].rejected += len(waiting_N)
        for table, failed_N in plan.failed:
            if (counter := self.counters[table]) is not None:  # it goes on waiting
                counter.add(plan.ids_U[failed_N], plan.counts_U[failed_N])
            self.statistics[table].failed += len(failed_N)
        for table, new_N in enumerate(plan.inserted):
            self.statistics[table].inserted += len(new_N)
            if (counter := self.counters[table]) is not None:
                counter.forget(plan.ids_U[new_N])

    def count_missing(self, plan: LookupPlan) -> None:
        """Counts the keys of a plan that are answered without a row of their own."""
        for table, at_N in plan.missing:
            self.statistics[table].missing += len(at_N)

    def _sweep(self, step: int, time: int) -> None:
        """Frees the rows of expired keys that nobody has looked up since."""
        for table, config in enumerate(self.configs):
            if not config.policy.expires:
                continue
            ids_N, rows_N = self.entries(table)
            expired_N = is_expired(config.policy, self.storage.read_metadata(rows_N), step, time)
            self.statistics[table].expired += self.remove(ids_N[expired_N], table)

    def no_row(self, table: int, ids_N: Tensor) -> KeyError:
        """The error of a key without a row where `on_missing` is `error`."""
        return KeyError(
            f"table {self.names[table]}: id {int(ids_N[0])} has no row (not admitted, no room, or never trained); "
            "choose another on_missing, or raise the budget"
        )

    # ---- the optimiser -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, rows_U: Tensor, grads_UD: Tensor, *, lr: float, step: int, seeds_U: Tensor | None = None) -> None:
        """One step of the optimiser on distinct rows."""
        update_rows(self.storage, rows_U, grads_UD, self.optimizer, lr=lr, step=step, seeds_N=seeds_U)

    @torch.no_grad()
    def commit_step(self, step: int) -> None:
        """Ends a step: what waited for admission counts."""
        for counter in self.counters:
            if counter is not None:
                counter.commit(step)

    @torch.no_grad()
    def trim(self, table: int, *, step: int, time: int) -> int:
        """Evicts what exceeds a budget that was lowered; returns how many rows went."""
        budget = self.row_budgets[table]
        if budget is None or not bool((over_G := budget.excess()).any()):
            return 0
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        gone = self.remove(budget.victims(over_G > 0, over_G, none, step, time), table)
        self.statistics[table].evicted += gone
        return gone

    # ---- by hand -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delete(self, ids_N: Tensor, table: int) -> int:
        """Drops keys and what is kept of them; returns how many there were."""
        ids_N = ids_N.unique()
        counter = self.counters[table]
        if counter is not None:
            counter.forget(ids_N)
        return self.remove(ids_N, table)

    @torch.no_grad()
    def upsert(self, ids_N: Tensor, values_ND: Tensor, table: int, *, step: int, time: int) -> int:
        """Writes values, of new keys too, past admission; returns how many found no room in the budget."""
        ids_N, values_ND = _last_of_each(ids_N, values_ND)
        rows_N = self.find(ids_N, table)
        expired_N = is_expired(self.configs[table].policy, self.storage.read_metadata(rows_N), step, time)
        expired_N &= rows_N >= 0
        self.statistics[table].expired += self.remove(ids_N[expired_N], table)
        rows_N[expired_N] = -1
        new_N = (rows_N < 0).nonzero()[:, 0]
        gone_ids, refused = ids_N[:0], 0
        if (budget := self.row_budgets[table]) is not None and len(new_N):
            one_N = torch.ones_like(new_N)
            kept_N, gone_ids = budget.make_room(ids_N[new_N], one_N, rows_N[rows_N >= 0], step, time)
            refused, new_N = int((~kept_N).sum()), new_N[kept_N]
        self.reserve(len(new_N), len(gone_ids))
        self.statistics[table].evicted += self.remove(gone_ids, table)
        rows_N[new_N] = self.add(ids_N[new_N], torch.full_like(new_N, table))
        self.statistics[table].inserted += len(new_N)
        self.statistics[table].failed += refused
        kept_N = rows_N >= 0
        if (counter := self.counters[table]) is not None:
            counter.forget(ids_N[kept_N])
        self.storage.write(rows_N[kept_N], values_ND[kept_N].to(self.device, torch.float32))
        self.storage.touch(rows_N[kept_N], torch.zeros_like(rows_N[kept_N]), step=step, time=time)
        return refused

    @torch.no_grad()
    def set_scores(self, ids_N: Tensor, scores_N: Tensor, table: int) -> None:
        """Scores by which eviction takes the least; of keys that have a row.

        Raises:
            ValueError: the table does not evict by score.
        """
        policy = self.configs[table].policy.eviction.policy
        if policy != "score":
            raise ValueError(f"table {self.names[table]}: evicts by {policy}; set eviction.policy to score")
        ids_N, scores_N = _last_of_each(ids_N, scores_N)
        rows_N = self.find(ids_N, table)
        present_N = rows_N >= 0
        self.storage.write_metadata(rows_N[present_N], scores=scores_N[present_N].to(self.device, torch.float32))
        if self.journal is not None:
            self.journal.note(table, ids_N[present_N], removed=False)

    # ---- whole contents ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def forget_history(self) -> None:
        """Keeps keys and values alone: optimiser state, counters and clocks begin anew, and nothing waits."""
        for table in range(len(self.key_names)):
            _, rows_N = self.entries(table)
            zeros_N = torch.zeros_like(rows_N)
            self.storage.write_state(rows_N, torch.zeros(len(rows_N), self.storage.state_width, device=self.device))
            self.storage.write_metadata(rows_N, counts=zeros_N, last_steps=zeros_N, last_times=zeros_N)
        self.counters = [self._counter(table) for table in range(len(self.configs))]

    def freeze_counter(self, table: int) -> Callable[[], tuple[dict[str, Tensor], list[int]]] | None:
        """As `counter_state`, of now, to be had later and in another thread."""
        counter = self.counters[table]
        return None if counter is None else counter.freeze(self.shard_bits)

    def counter_state(self, table: int) -> tuple[dict[str, Tensor], list[int]] | None:
        """What waits for admission, and where each virtual shard's rows begin; None without a counter."""
        counter = self.counters[table]
        return None if counter is None else counter.state(self.shard_bits)

    def load_counter_state(self, table: int, state: dict[str, Tensor]) -> None:
        """Adds what waits for admission in some virtual shards."""
        if (counter := self.counters[table]) is not None:
            counter.load(state)


def _last_of_each(ids_N: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids with the value that was given last."""
    ids_U, inverse_N = ids_N.unique(return_inverse=True)
    last_U = torch.zeros_like(ids_U).scatter_reduce_(
        0, inverse_N, torch.arange(len(ids_N), device=ids_N.device), "amax"
    )
    return ids_U, values.to(ids_N.device)[last_U]
