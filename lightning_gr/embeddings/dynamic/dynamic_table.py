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

from lightning_gr.embeddings.dynamic.admission import AdmissionCounter, ExactCounter, SketchCounter, salts_of
from lightning_gr.embeddings.dynamic.first_values import first_values
from lightning_gr.embeddings.dynamic.id_encoding import decode_ids, encode_ids
from lightning_gr.embeddings.dynamic.key_index import KeyIndex, key_hash, top_bits
from lightning_gr.embeddings.dynamic.policies import Eviction, group_bits, row_budget
from lightning_gr.embeddings.dynamic.row_storage import Metadata, RowStorage
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig, update_rows
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig
from lightning_gr.embeddings.dynamic.table_statistics import TableStatistics
from lightning_gr.embeddings.dynamic.unique_keys import unique_keys

_INDEX_BYTES_PER_KEY = 38
"""Of a key in the index at its emptiest, just after it doubled: 14 bytes a slot at a load of .375."""
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


@dataclass
class KeyRows:
    """Keys of one table with all that is kept of them, for checkpoints and tools; on the host.

    Args:
        ids_N: int64.
        values_ND: float32.
        state_NS: float32 optimiser state.
        metadata: counters, clocks and scores.
        hot_N: which rows of mixed precision are in fp32; None elsewhere.
    """

    ids_N: Tensor
    values_ND: Tensor
    state_NS: Tensor
    metadata: Metadata
    hot_N: Tensor | None = None


class DynamicTable:
    """Some tables of equal width and optimiser, in one key index and one row storage.

    Args:
        configs: the tables.
        optimizer: of all of them.
        seed: seed of the run, from which first values are drawn.
        virtual_shards: into how many shards hash bits cut keys; a power of two that never changes.
        device: where keys and rows are.
        encode_ids: whether the index holds bit-encoded ids (section 3.2, equation 8) instead of pairs of id and table.

    Raises:
        ValueError: a setting that cannot work, with the table's name.
    """

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
        first = configs[0]
        self.configs, self.optimizer, self.seed, self.device = tuple(configs), optimizer, seed, device
        self.names = [config.name for config in configs]
        self.dim = first.embedding_dim
        self.shard_bits = virtual_shards.bit_length() - 1
        self._encodes = encode_ids
        self._bucket_table: dict[int, int] = {}
        for table, config in enumerate(configs):
            if config.policy.on_missing == "bucket":
                self._bucket_table[table] = len(configs) + len(self._bucket_table)
        self.key_names = self.names + [f"{self.names[table]}#bucket" for table in self._bucket_table]
        self.salts = salts_of(self.key_names)
        self.index = KeyIndex(salts=[0] if encode_ids else self.salts, device=device)
        self.storage = RowStorage(
            dim=self.dim,
            state_width=optimizer.state_width(self.dim),
            precision=first.precision,
            hot_count=first.hot_count,
            device=device,
            placement=first.placement,
            cache_rows=first.cache_rows,
            scores=any(config.policy.eviction.policy == "score" for config in configs),
        )
        # Any row of mixed precision may become hot.
        hot_bytes = 4 * self.dim if first.precision == "mixed" else 0
        bytes_per_row = self.storage.row_bytes + hot_bytes + _INDEX_BYTES_PER_KEY
        self.budgets = [row_budget(config.policy, bytes_per_row=bytes_per_row, name=config.name) for config in configs]
        self.group_bits = [group_bits(budget, virtual_shards) for budget in self.budgets]
        self._group_rows = [torch.zeros(1 << bits, dtype=torch.int64) for bits in self.group_bits]
        self._group_budgets = [self._budgets_of_groups(table) for table in range(len(configs))]
        self._counters = [self._counter(table) for table in range(len(configs))]
        self.statistics = [TableStatistics() for _ in configs]

    def _budgets_of_groups(self, table: int) -> Tensor | None:
        """Rows that each group may have beside its shared ones, int64 (G,) on the host."""
        budget, groups = self.budgets[table], 1 << self.group_bits[table]
        if budget is None:
            return None
        share_G = torch.full((groups,), budget // groups) + (torch.arange(groups) < budget % groups)
        if table in self._bucket_table:
            share_G -= self.configs[table].policy.buckets_per_group
            if int(share_G.min()) < 1:
                raise ValueError(
                    f"table {self.names[table]}: a budget of {budget} rows has no room beside its shared rows; raise "
                    "max_rows, or lower buckets_per_group"
                )
        return share_G

    def _counter(self, table: int) -> AdmissionCounter | None:
        admission = self.configs[table].policy.admission
        if admission.min_count == 1:
            return None
        salt = self.salts[table]
        if admission.counter == "exact":
            return ExactCounter(salt=salt, forget_after_steps=admission.forget_after_steps, device=self.device)
        return SketchCounter(salt=salt, shard_bits=self.shard_bits, width=admission.sketch_width, device=self.device)

    # ---- keys --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.index)

    def num_rows(self, table: int) -> int:
        """Rows of a table on this process, its shared ones left out."""
        return int(self._group_rows[table].sum())

    def _index_keys(self, ids_N: Tensor, tables_N: Tensor | int) -> tuple[Tensor, Tensor | int]:
        """What the index knows some keys by."""
        if not self._encodes:
            return ids_N, tables_N
        if isinstance(tables_N, int):
            return encode_ids(ids_N, tables_N, len(self.key_names)), 0
        keys_N = torch.empty_like(ids_N)
        for table in range(len(self.key_names)):
            own_N = tables_N == table
            keys_N[own_N] = encode_ids(ids_N[own_N], table, len(self.key_names))
        return keys_N, 0

    def _groups(self, table: int, ids_N: Tensor) -> Tensor:
        return top_bits(key_hash(ids_N, self.salts[table]), self.group_bits[table])

    def shards(self, table: int, ids_N: Tensor) -> Tensor:
        """Virtual shard of each key; a table of shared rows has its own numbering."""
        if table < len(self.configs):
            return top_bits(key_hash(ids_N, self.salts[table]), self.shard_bits)
        owner = next(t for t, bucket in self._bucket_table.items() if bucket == table)
        groups = ids_N // self.configs[owner].policy.buckets_per_group
        return groups << (self.shard_bits - self.group_bits[owner])

    def find(self, ids_N: Tensor, table: int) -> Tensor:
        """Rows of keys, -1 where absent; changes nothing."""
        return self.index.find(*self._index_keys(ids_N, table))

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
        rows_U = self.index.find(*self._index_keys(ids_U, tables_U))
        metadata = self.storage.read_metadata(rows_U)
        if any(config.policy.expires for config in self.configs):
            rows_U = self._without_expired(ids_U, tables_U, offsets_T1, rows_U, metadata, step, time, training)
        if training:
            self._count_collisions(rows_U, metadata, offsets_T1, step)
            if bool((rows_U < 0).any()):
                if distinct:
                    rows_U = self._insert(ids_U, tables_U, offsets_T1, counts_U, rows_U, step, time)
                else:
                    unique = unique_keys(ids_U, offsets_T1, counts_U)
                    keys = (unique.ids_U, _tables_of(unique.offsets_T1, ids_U.device), unique.offsets_T1)
                    # What expired is gone from the index too.
                    rows = self.index.find(*self._index_keys(*keys[:2]))
                    rows_U = self._insert(*keys, unique.counts_U, rows, step, time)[unique.inverse_N]
            present_U = rows_U >= 0
            self.storage.touch(rows_U[present_U], counts_U[present_U], step=step, time=time)
        values_UD = self.storage.read(rows_U)
        if bool((rows_U < 0).any()):
            rows_U = self._fill_missing(ids_U, offsets_T1, counts_U, rows_U, values_UD, step, time, training)
        return Lookup(rows_U, values_UD)

    def _count_collisions(self, rows_U: Tensor, metadata: Metadata, offsets_T1: Sequence[int], step: int) -> None:
        again_U = (rows_U >= 0) & (metadata.last_steps == step - 1)
        for table, statistics in enumerate(self.statistics):
            own = slice(offsets_T1[table], offsets_T1[table + 1])
            statistics.looked_up += own.stop - own.start
            statistics.found += int((rows_U[own] >= 0).sum())
            statistics.collided += int(again_U[own].sum())

    # ---- expiry ------------------------------------------------------------------------------------------------

    def _is_expired(self, table: int, metadata: Metadata, step: int, time: int) -> Tensor:
        policy = self.configs[table].policy
        expired_N = torch.zeros_like(metadata.last_steps, dtype=torch.bool)
        if policy.ttl_steps is not None:
            expired_N |= metadata.last_steps < step - policy.ttl_steps
        if policy.ttl_seconds is not None:
            expired_N |= metadata.last_times < time - policy.ttl_seconds
        # What this step has looked up is in flight.
        return expired_N & (metadata.last_steps < step)

    def _without_expired(
        self,
        ids_U: Tensor,
        tables_U: Tensor,
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
            expired_N = self._is_expired(table, of_table, step, time) & (rows_U[own] >= 0)
            if training and bool(expired_N.any()):
                self.statistics[table].expired += self._remove(ids_U[own][expired_N].unique(), table)
            rows_U[own] = rows_U[own].masked_fill(expired_N, -1)
        return rows_U

    def _sweep(self, step: int, time: int) -> None:
        """Frees the rows of expired keys that nobody has looked up since."""
        expiring = [table for table, config in enumerate(self.configs) if config.policy.expires]
        if not expiring or not len(self.index):
            return
        for table in expiring:
            ids_N, rows_N = self._entries(table)
            expired_N = self._is_expired(table, self.storage.read_metadata(rows_N), step, time)
            self.statistics[table].expired += self._remove(ids_N[expired_N], table)

    def _entries(self, table: int, groups_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids and rows of a table's keys, of all groups or of those flagged."""
        if self._encodes:
            keys_N, _, rows_N = self.index.entries()
            tables_N, ids_N = decode_ids(keys_N, len(self.key_names))
        elif groups_G is not None:
            flags_TG = torch.zeros(len(self.key_names), len(groups_G), dtype=torch.bool)
            flags_TG[table] = groups_G
            ids_N, tables_N, rows_N = self.index.entries_of(flags_TG.to(self.device))
        else:
            ids_N, tables_N, rows_N = self.index.entries()
        own_N = tables_N == table
        ids_N, rows_N = ids_N[own_N], rows_N[own_N]
        if self._encodes and groups_G is not None:
            flagged_N = groups_G.to(self.device)[self._groups(table, ids_N)]
            ids_N, rows_N = ids_N[flagged_N], rows_N[flagged_N]
        return ids_N, rows_N

    def _remove(self, ids_N: Tensor, table: int) -> int:
        """Drops keys with their rows; distinct, absent ones are passed over. Returns how many there were."""
        rows_N = self.index.delete(*self._index_keys(ids_N, table))
        present_N = rows_N >= 0
        self.storage.free(rows_N[present_N])
        if table < len(self.configs):
            groups_N = self._groups(table, ids_N[present_N]).cpu()
            self._group_rows[table] -= torch.bincount(groups_N, minlength=len(self._group_rows[table]))
        return int(present_N.sum())

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
            if self._group_budgets[table] is not None and len(new_N):
                hits = rows_U[start:stop]
                kept_N, gone_N = self._make_room(table, ids_U[new_N], counts_U[new_N], hits[hits >= 0], step, time)
                victims.append((table, gone_N))
                failed.append((table, new_N[~kept_N]))
                new_N = new_N[kept_N]
            if len(new_N) < len(absent_N) and self.configs[table].policy.on_missing == "error":
                raise self._no_row(table, ids_U[absent_N[~torch.isin(absent_N, new_N)]])
            if table in self._bucket_table:
                shared = self.configs[table].policy.buckets_per_group << self.group_bits[table]
                num_shared += min(len(absent_N) - len(new_N), shared)
            inserted.append(new_N)
        new_M = torch.cat(inserted)
        self._reserve(len(new_M) + num_shared, sum(len(gone_N) for _, gone_N in victims))

        for table, gone_N in victims:
            self.statistics[table].evicted += self._remove(gone_N, table)
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
        rows_U[new_M] = self._add(ids_U[new_M], tables_U[new_M])
        for table, new_N in enumerate(inserted):
            self.statistics[table].inserted += len(new_N)
            counter = self._counters[table]
            if counter is not None:
                counter.forget(ids_U[new_N])
        return rows_U

    def _reserve(self, num_new: int, num_freed: int) -> None:
        """Room for new keys, before anything changes.

        Raises:
            MemoryError: names the tables and what to do.
        """
        try:
            self.storage.reserve(max(num_new - num_freed, 0))
            self.index.reserve(len(self.index) + max(num_new - num_freed, 0))
        except MemoryError as error:
            raise MemoryError(
                f"table {', '.join(self.names)}: no memory for {num_new:,} more rows beside {len(self.index):,} "
                f"({error}); set max_rows or max_bytes, use more processes, or placement=host"
            ) from error

    def _add(self, ids_M: Tensor, tables_M: Tensor) -> Tensor:
        """New rows with first values for absent keys; distinct ones."""
        rows_M = self.storage.allocate(len(ids_M))
        self.index.insert(*self._index_keys(ids_M, tables_M), rows_M)
        values_MD = self._first_values(ids_M, tables_M)
        self.storage.write(rows_M, values_MD)
        for table in range(len(self.configs)):
            groups_N = self._groups(table, ids_M[tables_M == table]).cpu()
            self._group_rows[table] += torch.bincount(groups_N, minlength=len(self._group_rows[table]))
        return rows_M

    def _first_values(self, ids_N: Tensor, tables_N: Tensor) -> Tensor:
        values_ND = torch.empty(len(ids_N), self.dim, device=self.device)
        for table in range(len(self.key_names)):
            own_N = (tables_N == table).nonzero()[:, 0]
            if len(own_N):
                config = self._config_of(table)
                name = self.key_names[table]
                values_ND[own_N] = first_values(config.first_values, self.seed, name, ids_N[own_N], self.dim)
        return values_ND

    def _config_of(self, table: int) -> DynamicTableConfig:
        if table < len(self.configs):
            return self.configs[table]
        return self.configs[next(t for t, bucket in self._bucket_table.items() if bucket == table)]

    # ---- budget and eviction -----------------------------------------------------------------------------------

    def _make_room(
        self, table: int, ids_N: Tensor, counts_N: Tensor, hit_rows: Tensor, step: int, time: int
    ) -> tuple[Tensor, Tensor]:
        """Which new keys of a table fit into its budget, and the ids of those that go for them; changes nothing.

        Args:
            table: with a budget.
            ids_N: new keys.
            counts_N: how often each occurs; where not all fit, the most frequent do, of equal ones the least id.
            hit_rows: rows that this lookup uses.
            step: of the lookup.
            time: of the lookup.

        Returns:
            ``(kept_N, gone_ids)``.
        """
        budget_G, have_G = self._group_budgets[table], self._group_rows[table]
        assert budget_G is not None
        groups_N = self._groups(table, ids_N)
        need_G = torch.bincount(groups_N.cpu(), minlength=len(have_G))
        over_G = have_G + need_G > budget_G
        gone_ids = ids_N[:0]
        free_G = budget_G - have_G
        if bool(over_G.any()):
            eviction = self.configs[table].policy.eviction
            wanted_G = have_G + need_G - budget_G + (budget_G * eviction.slack).to(torch.int64)
            gone_ids = self._victims(table, over_G, torch.where(over_G, wanted_G, 0), hit_rows, step, time)
            free_G = free_G + torch.bincount(self._groups(table, gone_ids).cpu(), minlength=len(have_G))
        if bool((need_G <= free_G).all()):
            return torch.ones_like(ids_N, dtype=torch.bool), gone_ids
        order = _sorted_by(ids_N, -counts_N, groups_N)
        place_N = torch.empty_like(order)
        place_N[order] = _place_in_group(groups_N[order])
        return place_N < free_G.to(self.device)[groups_N], gone_ids

    def _victims(self, table: int, over_G: Tensor, wanted_G: Tensor, hit_rows: Tensor, step: int, time: int) -> Tensor:
        """Ids of the keys that each group over its budget loses: expired ones, then the least by its policy."""
        ids_N, rows_N = self._entries(table, over_G)
        metadata = self.storage.read_metadata(rows_N)
        free_N = (metadata.last_steps < step) & ~torch.isin(rows_N, hit_rows)
        ids_N, rows_N = ids_N[free_N], rows_N[free_N]
        metadata = self.storage.read_metadata(rows_N)
        groups_N = self._groups(table, ids_N)
        keys = _eviction_keys(self.configs[table].policy.eviction, metadata, step)
        alive_N = ~self._is_expired(table, metadata, step, time)
        order = _sorted_by(ids_N, *keys, alive_N.to(torch.int64), groups_N)
        groups_N = groups_N[order]
        return ids_N[order][_place_in_group(groups_N) < wanted_G.to(self.device)[groups_N]]

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
        per_group, bucket_table = self.configs[table].policy.buckets_per_group, self._bucket_table[table]
        hash_N = key_hash(ids_N, self.salts[table])
        buckets_N = top_bits(hash_N, self.group_bits[table]) * per_group + (hash_N & 0x7FFFFFFF) % per_group
        buckets, inverse_N = buckets_N.unique(return_inverse=True)
        tables = torch.full_like(buckets, bucket_table)
        rows = self.index.find(*self._index_keys(buckets, tables))
        if training:
            new = rows < 0
            if bool(new.any()):
                rows[new] = self._add(buckets[new], tables[new])
            counts = counts_N.new_zeros(len(buckets)).index_add_(0, inverse_N, counts_N)
            self.storage.touch(rows, counts, step=step, time=time)
        values = self.storage.read(rows)
        absent = rows < 0
        if bool(absent.any()):
            values[absent] = self._first_values(buckets[absent], tables[absent])
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
        budget_G, have_G = self._group_budgets[table], self._group_rows[table]
        if budget_G is None or not bool((have_G > budget_G).any()):
            return 0
        over_G = (have_G - budget_G).clamp(min=0)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        gone = self._remove(self._victims(table, over_G > 0, over_G, none, step, time), table)
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
        return self._remove(ids_N, table)

    @torch.no_grad()
    def upsert(self, ids_N: Tensor, values_ND: Tensor, table: int, *, step: int, time: int) -> int:
        """Writes values, of new keys too, past admission; returns how many found no room in the budget."""
        ids_N, values_ND = _last_of_each(ids_N, values_ND)
        rows_N = self.find(ids_N, table)
        expired_N = self._is_expired(table, self.storage.read_metadata(rows_N), step, time) & (rows_N >= 0)
        self.statistics[table].expired += self._remove(ids_N[expired_N], table)
        rows_N[expired_N] = -1
        new_N = (rows_N < 0).nonzero()[:, 0]
        gone_ids, refused = ids_N[:0], 0
        if self._group_budgets[table] is not None and len(new_N):
            one_N = torch.ones_like(new_N)
            kept_N, gone_ids = self._make_room(table, ids_N[new_N], one_N, rows_N[rows_N >= 0], step, time)
            refused, new_N = int((~kept_N).sum()), new_N[kept_N]
        self._reserve(len(new_N), len(gone_ids))
        self.statistics[table].evicted += self._remove(gone_ids, table)
        rows_N[new_N] = self._add(ids_N[new_N], torch.full_like(new_N, table))
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
    def rows_of(self, table: int, *, touched_since: int | None = None) -> tuple[KeyRows, list[int]]:
        """All keys of a table (shared rows have a table of their own), by virtual shard and then id.

        Args:
            table: its place in `key_names`.
            touched_since: only rows that were used in this step or later.

        Returns:
            ``(rows, offsets)``: offsets say where each virtual shard's begin.
        """
        ids_N, rows_N = self._entries(table)
        if touched_since is not None:
            recent_N = self.storage.read_metadata(rows_N).last_steps >= touched_since
            ids_N, rows_N = ids_N[recent_N], rows_N[recent_N]
        shards_N = self.shards(table, ids_N)
        order = _sorted_by(ids_N, shards_N)
        ids_N, rows_N, shards_N = ids_N[order], rows_N[order], shards_N[order]
        metadata = self.storage.read_metadata(rows_N)
        rows = KeyRows(
            ids_N.cpu(),
            self.storage.read(rows_N).cpu(),
            self.storage.read_state(rows_N).cpu(),
            Metadata(*(None if x is None else x.cpu() for x in metadata)),  # type: ignore[arg-type]
            None if (hot_N := self.storage.is_hot(rows_N)) is None else hot_N.cpu(),
        )
        counts_V = torch.bincount(shards_N, minlength=1 << self.shard_bits)
        return rows, [0, *counts_V.cumsum(0).tolist()]

    @torch.no_grad()
    def add_rows(self, table: int, rows: KeyRows) -> None:
        """Puts keys with all that is kept of them into the table, where they must be absent."""
        ids_N = rows.ids_N.to(self.device)
        self._reserve(len(ids_N), 0)
        tables_N = torch.full_like(ids_N, table)
        rows_N = self.storage.allocate(len(ids_N))
        self.index.insert(*self._index_keys(ids_N, tables_N), rows_N)
        if table < len(self.configs):
            groups_N = self._groups(table, ids_N).cpu()
            self._group_rows[table] += torch.bincount(groups_N, minlength=len(self._group_rows[table]))
        if rows.hot_N is not None:
            self.storage.promote_hot(rows_N[rows.hot_N.to(self.device)])
        self.storage.write(rows_N, rows.values_ND.to(self.device))
        self.storage.write_state(rows_N, rows.state_NS.to(self.device))
        self.storage.write_metadata(
            rows_N,
            counts=rows.metadata.counts.to(self.device),
            last_steps=rows.metadata.last_steps.to(self.device),
            last_times=rows.metadata.last_times.to(self.device),
            scores=None if rows.metadata.scores is None else rows.metadata.scores.to(self.device),
        )

    @torch.no_grad()
    def forget_history(self) -> None:
        """Keeps keys and values alone: optimiser state, counters and clocks begin anew, and nothing waits."""
        for table in range(len(self.key_names)):
            _, rows_N = self._entries(table)
            zeros_N = torch.zeros_like(rows_N)
            self.storage.write_state(rows_N, torch.zeros(len(rows_N), self.storage.state_width, device=self.device))
            self.storage.write_metadata(rows_N, counts=zeros_N, last_steps=zeros_N, last_times=zeros_N)
        self._counters = [self._counter(table) for table in range(len(self.configs))]

    def clear(self) -> None:
        """Drops all keys."""
        for table in range(len(self.key_names)):
            ids_N, _ = self._entries(table)
            self._remove(ids_N, table)
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


def _eviction_keys(eviction: Eviction, metadata: Metadata, step: int) -> list[Tensor]:
    """What rows are ordered by, the least going first; the last one counts most."""
    match eviction.policy:
        case "lru":
            return [metadata.last_steps]
        case "lfu":
            return [metadata.counts]
        case "lfu_lru":
            return [metadata.last_steps, metadata.counts]
        case "decayed":
            age_N = (step - metadata.last_steps).double()
            return [metadata.counts.double().clamp(min=1).log2() - age_N / eviction.half_life_steps]
        case "score":
            assert metadata.scores is not None
            return [metadata.scores]
    raise AssertionError(eviction.policy)


def _sorted_by(*keys_N: Tensor) -> Tensor:
    """The order by the last key, where that is equal by the one before it, ..."""
    order = keys_N[0].argsort(stable=True)
    for key_N in keys_N[1:]:
        order = order[key_N[order].argsort(stable=True)]
    return order


def _place_in_group(groups_N: Tensor) -> Tensor:
    """How many before each belong to its group; groups stand together."""
    if not len(groups_N):
        return groups_N
    at_N = torch.arange(len(groups_N), device=groups_N.device)
    starts_N = torch.ones_like(groups_N, dtype=torch.bool)
    starts_N[1:] = groups_N[1:] != groups_N[:-1]
    return at_N - torch.where(starts_N, at_N, 0).cummax(0).values


def _last_of_each(ids_N: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids with the value that was given last."""
    ids_U, inverse_N = ids_N.unique(return_inverse=True)
    last_U = torch.zeros_like(ids_U).scatter_reduce_(
        0, inverse_N, torch.arange(len(ids_N), device=ids_N.device), "amax"
    )
    return ids_U, values.to(ids_N.device)[last_U]
