"""DynamicTable: the part of one physical table that a process holds, with the policies of the tables merged in it.

Keys are apart from rows (MTGRBoost / MTGenRec, arXiv 2505.12663, section 3.1): growth rehashes keys and never moves a
row. Tables of equal width and optimiser share it; each keeps its own policy, budget and first values.

Shape suffixes: U distinct keys of a lookup, N keys, T tables, G groups of keys, D width, S width of optimiser state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.admission import AdmissionCounter, ExactCounter, SketchCounter
from lightning_gr.embeddings.dynamic.eviction import RowBudget, is_expired
from lightning_gr.embeddings.dynamic.first_values import first_values
from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
from lightning_gr.embeddings.dynamic.keyed_rows import KeyedRows
from lightning_gr.embeddings.dynamic.row_storage import Metadata
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig, update_rows
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig
from lightning_gr.embeddings.dynamic.table_statistics import TableStatistics
from lightning_gr.embeddings.dynamic.unique_keys import unique_keys

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
        self._row_budgets = [None if limit is None else RowBudget(self, t) for t, limit in enumerate(self.budgets)]
        self._counters = [self._counter(table) for table in range(len(configs))]
        self.statistics = [TableStatistics() for _ in configs]

    def _counter(self, table: int) -> AdmissionCounter | None:
        admission = self.configs[table].policy.admission
        if admission.min_count == 1:
            return None
        salt = self.salts[table]
        if admission.counter == "exact":
            return ExactCounter(salt=salt, forget_after_steps=admission.forget_after_steps, device=self.device)
        return SketchCounter(salt=salt, shard_bits=self.shard_bits, width=admission.sketch_width, device=self.device)

    # ---- lookup ------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        tables_U = _tables_of(offsets_T1, ids_U.device)
        rows_U = self.index.find(*self.index_keys(ids_U, tables_U))
        expires = any(config.policy.expires for config in self.configs)
        if expires or training:
            metadata = self.storage.read_metadata(rows_U)
        if expires:
            rows_U = self._without_expired(ids_U, offsets_T1, rows_U, metadata, step, time, training)
        if training:
            self._count_collisions(rows_U, metadata, offsets_T1, step)
            if bool((rows_U < 0).any()):
                if distinct:
                    rows_U = self._insert(ids_U, tables_U, offsets_T1, counts_U, rows_U, step, time)
                else:
                    unique = unique_keys(ids_U, offsets_T1, counts_U)
                    keys = (unique.ids_U, _tables_of(unique.offsets_T1, ids_U.device), unique.offsets_T1)
                    # What expired is gone from the index too.
                    rows = self.index.find(*self.index_keys(*keys[:2]))
                    rows_U = self._insert(*keys, unique.counts_U, rows, step, time)[unique.inverse_N]
            present_U = rows_U >= 0
            self.storage.touch(rows_U[present_U], counts_U[present_U], step=step, time=time)
        values_UD = self.storage.read(rows_U)
        if bool((rows_U < 0).any()):
            rows_U = self._fill_missing(ids_U, offsets_T1, counts_U, rows_U, values_UD, step, time, training)
        return Lookup(rows_U, values_UD)

    def _count_collisions(self, rows_U: Tensor, metadata: Metadata, offsets_T1: Sequence[int], step: int) -> None:
        found_U = rows_U >= 0
        flags_2U = torch.stack([found_U, found_U & (metadata.last_steps == step - 1)])
        sums_2U = torch.nn.functional.pad(flags_2U.cumsum(1), (1, 0))
        # Of all tables at once, since reading numbers back makes the host wait for a GPU.
        counts = sums_2U[:, torch.tensor(offsets_T1, device=rows_U.device)].diff().tolist()
        for table, statistics in enumerate(self.statistics):
            statistics.looked_up += offsets_T1[table + 1] - offsets_T1[table]
            statistics.found += counts[0][table]
            statistics.collided += counts[1][table]

    # ---- expiry ------------------------------------------------------------------------------------------------

    def _without_expired(
        self,
        ids_U: Tensor,
        offsets_T1: Sequence[int],
        rows_U: Tensor,
        metadata: Metadata,
        step: int,
        time: int,
        training: bool,
    ) -> Tensor:
        rows_U = rows_U.clone()
        for table, config in enumerate(self.configs):
            if not config.policy.expires:
                continue
            own = slice(offsets_T1[table], offsets_T1[table + 1])
            of_table = Metadata(
                metadata.counts[own], metadata.last_steps[own], metadata.last_times[own], metadata.scores
            )
            expired_N = is_expired(config.policy, of_table, step, time) & (rows_U[own] >= 0)
            if training and bool(expired_N.any()):
                self.statistics[table].expired += self.remove(ids_U[own][expired_N].unique(), table)
            rows_U[own] = rows_U[own].masked_fill(expired_N, -1)
        return rows_U

    def _sweep(self, step: int, time: int) -> None:
        """Frees the rows of expired keys that nobody has looked up since."""
        for table, config in enumerate(self.configs):
            if not config.policy.expires:
                continue
            ids_N, rows_N = self.entries(table)
            expired_N = is_expired(config.policy, self.storage.read_metadata(rows_N), step, time)
            self.statistics[table].expired += self.remove(ids_N[expired_N], table)

    # ---- insertion ---------------------------------------------------------------------------------------------

    def _insert(
        self,
        ids_U: Tensor,
        tables_U: Tensor,
        offsets_T1: Sequence[int],
        counts_U: Tensor,
        rows_U: Tensor,
        step: int,
        time: int,
    ) -> Tensor:
        """Gives rows to the absent keys that are admitted and have room; first all that can fail, then the changes."""
        inserted, victims, failed, waiting, num_shared = [], [], [], [], 0
        for table in range(len(self.configs)):
            start, stop = offsets_T1[table], offsets_T1[table + 1]
            new_N = absent_N = (rows_U[start:stop] < 0).nonzero()[:, 0] + start
            counter = self._counters[table]
            if counter is not None and len(new_N):
                least = self.configs[table].policy.admission.min_count - 1
                admitted_N = counter.counts(ids_U[new_N]) >= least
                waiting.append((table, new_N[~admitted_N]))
                new_N = new_N[admitted_N]
            if (budget := self._row_budgets[table]) is not None and len(new_N):
                hits = rows_U[start:stop]
                kept_N, gone_N = budget.make_room(ids_U[new_N], counts_U[new_N], hits[hits >= 0], step, time)
                victims.append((table, gone_N))
                failed.append((table, new_N[~kept_N]))
                new_N = new_N[kept_N]
            if len(new_N) < len(absent_N) and self.configs[table].policy.on_missing == "error":
                raise self._no_row(table, ids_U[absent_N[~torch.isin(absent_N, new_N)]])
            if table in self.bucket_table:
                shared = self.configs[table].policy.buckets_per_group << self.group_bits[table]
                num_shared += min(len(absent_N) - len(new_N), shared)
            inserted.append(new_N)
        new_M = torch.cat(inserted)
        self.reserve(len(new_M) + num_shared, sum(len(gone_N) for _, gone_N in victims))

        for table, gone_N in victims:
            self.statistics[table].evicted += self.remove(gone_N, table)
        for table, waiting_N in waiting:
            counter = self._counters[table]
            assert counter is not None
            counter.add(ids_U[waiting_N], counts_U[waiting_N])
            self.statistics[table].rejected += len(waiting_N)
        for table, failed_N in failed:
            counter = self._counters[table]
            if counter is not None:  # it goes on waiting
                counter.add(ids_U[failed_N], counts_U[failed_N])
            self.statistics[table].failed += len(failed_N)
        rows_U = rows_U.clone()
        rows_U[new_M] = self.add(ids_U[new_M], tables_U[new_M])
        for table, new_N in enumerate(inserted):
            self.statistics[table].inserted += len(new_N)
            counter = self._counters[table]
            if counter is not None:
                counter.forget(ids_U[new_N])
        return rows_U

    # ---- keys without a row ------------------------------------------------------------------------------------

    def _fill_missing(
        self,
        ids_U: Tensor,
        offsets_T1: Sequence[int],
        counts_U: Tensor,
        rows_U: Tensor,
        values_UD: Tensor,
        step: int,
        time: int,
        training: bool,
    ) -> Tensor:
        """Writes what keys without a row get into `values_UD`; returns rows with those of shared ones."""
        rows_U = rows_U.clone()
        for table, config in enumerate(self.configs):
            start, stop = offsets_T1[table], offsets_T1[table + 1]
            at_N = (rows_U[start:stop] < 0).nonzero()[:, 0] + start
            if not len(at_N):
                continue
            self.statistics[table].missing += len(at_N)
            policy = config.policy
            if policy.on_missing == "error":
                raise self._no_row(table, ids_U[at_N])
            if policy.on_missing == "default_row":
                values_UD[at_N] = policy.default_value
            elif policy.on_missing == "initial":
                values_UD[at_N] = first_values(config.first_values, self.seed, config.name, ids_U[at_N], self.dim)
            else:
                rows_U[at_N], values_UD[at_N] = self._shared_rows(
                    table, ids_U[at_N], counts_U[at_N], step=step, time=time, training=training
                )
        return rows_U

    def _no_row(self, table: int, ids_N: Tensor) -> KeyError:
        return KeyError(
            f"table {self.names[table]}: id {int(ids_N[0])} has no row (not admitted, no room, or never trained); "
            "choose another on_missing, or raise the budget"
        )

    def _shared_rows(
        self, table: int, ids_N: Tensor, counts_N: Tensor, *, step: int, time: int, training: bool
    ) -> tuple[Tensor, Tensor]:
        per_group, bucket_table = self.configs[table].policy.buckets_per_group, self.bucket_table[table]
        hash_N = key_hash(ids_N, self.salts[table])
        buckets_N = top_bits(hash_N, self.group_bits[table]) * per_group + (hash_N & 0x7FFFFFFF) % per_group
        buckets, inverse_N = buckets_N.unique(return_inverse=True)
        tables = torch.full_like(buckets, bucket_table)
        rows = self.index.find(*self.index_keys(buckets, tables))
        if training:
            new = rows < 0
            if bool(new.any()):
                rows[new] = self.add(buckets[new], tables[new])
            counts = counts_N.new_zeros(len(buckets)).index_add_(0, inverse_N, counts_N)
            self.storage.touch(rows, counts, step=step, time=time)
        values = self.storage.read(rows)
        absent = rows < 0
        if bool(absent.any()):
            values[absent] = self.first_values(buckets[absent], tables[absent])
        return rows[inverse_N], values[inverse_N]

    # ---- the optimiser -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, rows_U: Tensor, grads_UD: Tensor, *, lr: float, step: int, seeds_U: Tensor | None = None) -> None:
        """One step of the optimiser on distinct rows."""
        update_rows(self.storage, rows_U, grads_UD, self.optimizer, lr=lr, step=step, seeds_N=seeds_U)

    @torch.no_grad()
    def commit_step(self, step: int, time: int) -> None:
        """Ends a step: what waited for admission counts, and from time to time expired rows are freed."""
        for counter in self._counters:
            if counter is not None:
                counter.commit(step)
        if (step + 1) % _SWEEP_EVERY == 0:
            self._sweep(step + 1, time)

    @torch.no_grad()
    def trim(self, table: int, *, step: int, time: int) -> int:
        """Evicts what exceeds a budget that was lowered; returns how many rows went."""
        budget = self._row_budgets[table]
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
        counter = self._counters[table]
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
        if (budget := self._row_budgets[table]) is not None and len(new_N):
            one_N = torch.ones_like(new_N)
            kept_N, gone_ids = budget.make_room(ids_N[new_N], one_N, rows_N[rows_N >= 0], step, time)
            refused, new_N = int((~kept_N).sum()), new_N[kept_N]
        self.reserve(len(new_N), len(gone_ids))
        self.statistics[table].evicted += self.remove(gone_ids, table)
        rows_N[new_N] = self.add(ids_N[new_N], torch.full_like(new_N, table))
        self.statistics[table].inserted += len(new_N)
        self.statistics[table].failed += refused
        kept_N = rows_N >= 0
        if (counter := self._counters[table]) is not None:
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

    # ---- whole contents ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def forget_history(self) -> None:
        """Keeps keys and values alone: optimiser state, counters and clocks begin anew, and nothing waits."""
        for table in range(len(self.key_names)):
            _, rows_N = self.entries(table)
            zeros_N = torch.zeros_like(rows_N)
            self.storage.write_state(rows_N, torch.zeros(len(rows_N), self.storage.state_width, device=self.device))
            self.storage.write_metadata(rows_N, counts=zeros_N, last_steps=zeros_N, last_times=zeros_N)
        self._counters = [self._counter(table) for table in range(len(self.configs))]

    def counter_state(self, table: int) -> tuple[dict[str, Tensor], list[int]] | None:
        """What waits for admission, and where each virtual shard's rows begin; None without a counter."""
        counter = self._counters[table]
        return None if counter is None else counter.state(self.shard_bits)

    def load_counter_state(self, table: int, state: dict[str, Tensor]) -> None:
        """Adds what waits for admission in some virtual shards."""
        if (counter := self._counters[table]) is not None:
            counter.load(state)


def _tables_of(offsets_T1: Sequence[int], device: torch.device) -> Tensor:
    """Table of each key, where `offsets_T1` say where each table's begin."""
    return torch.repeat_interleave(torch.tensor(offsets_T1).diff()).to(device)


def _last_of_each(ids_N: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids with the value that was given last."""
    ids_U, inverse_N = ids_N.unique(return_inverse=True)
    last_U = torch.zeros_like(ids_U).scatter_reduce_(
        0, inverse_N, torch.arange(len(ids_N), device=ids_N.device), "amax"
    )
    return ids_U, values.to(ids_N.device)[last_U]
