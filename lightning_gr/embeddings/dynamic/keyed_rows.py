"""KeyedRows: a key index and a row storage together, with the rows of each group of keys counted; no policy.

Shape suffixes: N keys, G groups of keys, D width, S width of optimiser state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.admission import salts_of
from lightning_gr.embeddings.dynamic.eviction import sorted_by
from lightning_gr.embeddings.dynamic.first_values import first_values
from lightning_gr.embeddings.dynamic.id_encoding import decode_ids, encode_ids
from lightning_gr.embeddings.dynamic.key_index import KeyIndex, key_hash, top_bits
from lightning_gr.embeddings.dynamic.policies import group_bits, row_budget
from lightning_gr.embeddings.dynamic.row_storage import Metadata, RowStorage
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig
from lightning_gr.embeddings.dynamic.table_journal import TableJournal

INDEX_BYTES_PER_KEY = 38
"""Of a key in the index at its emptiest, just after it doubled: 14 bytes a slot at a load of .375."""


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


class KeyedRows:
    """Rows by id of some tables of equal width and optimiser; shared rows of a table are a table of their own.

    Args:
        configs: the tables.
        optimizer: of all of them.
        seed: seed of the run, from which first values are drawn.
        virtual_shards: into how many shards hash bits cut keys; a power of two that never changes.
        device: where keys and rows are.
        encode_ids: whether the index holds bit-encoded ids (MTGenRec, arXiv 2505.12663, equation 8) instead of pairs of
            id and table.

    Attributes:
        key_names: the tables' names, then those of shared rows.
        bucket_table: by table, the place in `key_names` of its shared rows.
        budgets: most rows of each table; None without limit.
        group_bits: how many hash bits number the groups of each table.
        journal: notes what incremental saves need; None while nobody makes any.
        group_rows: of each table, how many rows each of its groups has here, int64 (G,) on the host.

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
        self.bucket_table: dict[int, int] = {}
        for table, config in enumerate(configs):
            if config.policy.on_missing == "bucket":
                self.bucket_table[table] = len(configs) + len(self.bucket_table)
        self.key_names = self.names + [f"{self.names[table]}#bucket" for table in self.bucket_table]
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
        bytes_per_row = self.storage.row_bytes + hot_bytes + INDEX_BYTES_PER_KEY
        self.budgets = [row_budget(config.policy, bytes_per_row=bytes_per_row, name=config.name) for config in configs]
        self.group_bits = [
            group_bits(budget, virtual_shards, config.policy.rows_per_group)
            for budget, config in zip(self.budgets, configs, strict=True)
        ]
        self.journal: TableJournal | None = None
        self.group_rows = [torch.zeros(1 << bits, dtype=torch.int64) for bits in self.group_bits]

    # ---- keys --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.index)

    def num_rows(self, table: int) -> int:
        """Rows of a table on this process, its shared ones left out."""
        return int(self.group_rows[table].sum())

    def index_keys(self, ids_N: Tensor, tables_N: Tensor | int) -> tuple[Tensor, Tensor | int]:
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

    def groups(self, table: int, ids_N: Tensor) -> Tensor:
        """Group of each key."""
        return top_bits(key_hash(ids_N, self.salts[table]), self.group_bits[table])

    def shards(self, table: int, ids_N: Tensor) -> Tensor:
        """Virtual shard of each key; a table of shared rows has its own numbering."""
        if table < len(self.configs):
            return top_bits(key_hash(ids_N, self.salts[table]), self.shard_bits)
        owner = next(t for t, bucket in self.bucket_table.items() if bucket == table)
        groups = ids_N // self.configs[owner].policy.buckets_per_group
        return groups << (self.shard_bits - self.group_bits[owner])

    def find(self, ids_N: Tensor, table: int) -> Tensor:
        """Rows of keys, -1 where absent; changes nothing."""
        return self.index.find(*self.index_keys(ids_N, table))

    def entries_of(self, index: KeyIndex, num_slots: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, tables and rows of all keys in a copy of the index, or of those in its first slots."""
        keys_N, tables_N, rows_N = index.entries(num_slots)
        if self._encodes:
            tables_N, keys_N = decode_ids(keys_N, len(self.key_names))
        return keys_N, tables_N, rows_N

    def entries(self, table: int, groups_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids and rows of a table's keys, of all groups or of those flagged."""
        if groups_G is not None and not self._encodes:
            flags_TG = torch.zeros(len(self.key_names), len(groups_G), dtype=torch.bool)
            flags_TG[table] = groups_G
            ids_N, tables_N, rows_N = self.index.entries_of(flags_TG.to(self.device))
        else:
            ids_N, tables_N, rows_N = self.entries_of(self.index)
        own_N = tables_N == table
        ids_N, rows_N = ids_N[own_N], rows_N[own_N]
        if self._encodes and groups_G is not None:
            flagged_N = groups_G.to(self.device)[self.groups(table, ids_N)]
            ids_N, rows_N = ids_N[flagged_N], rows_N[flagged_N]
        return ids_N, rows_N

    def sampled_rows(self, *, num_slots: int, most: int) -> list[Tensor]:
        """Of each table the rows of up to `most` of the keys in the index's first slots, shared rows left out."""
        _, tables_N, rows_N = self.entries_of(self.index, num_slots)
        return [rows_N[tables_N == table][:most] for table in range(len(self.configs))]

    # ---- rows come and go --------------------------------------------------------------------------------------

    def reserve(self, num_new: int, num_freed: int) -> None:
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

    def add(self, ids_M: Tensor, tables_M: Tensor) -> Tensor:
        """New rows with first values for absent keys; distinct ones."""
        rows_M = self.storage.allocate(len(ids_M))
        self.index.insert(*self.index_keys(ids_M, tables_M), rows_M)
        values_MD = self.first_values(ids_M, tables_M)
        self.storage.write(rows_M, values_MD)
        for table in range(len(self.configs)):
            self._count(table, ids_M[tables_M == table], 1)
        return rows_M

    def _count(self, table: int, ids_N: Tensor, sign: int) -> None:
        """Notes rows that came or went; shared ones are not counted."""
        if table < len(self.configs) and len(ids_N):
            groups_N = self.groups(table, ids_N).cpu()
            self.group_rows[table] += sign * torch.bincount(groups_N, minlength=len(self.group_rows[table]))

    def first_values(self, ids_N: Tensor, tables_N: Tensor) -> Tensor:
        """First values of keys, float32 (N, D)."""
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
        return self.configs[next(t for t, bucket in self.bucket_table.items() if bucket == table)]

    def remove(self, ids_N: Tensor, table: int) -> int:
        """Drops keys with their rows; distinct, absent ones are passed over. Returns how many there were."""
        rows_N = self.index.delete(*self.index_keys(ids_N, table))
        present_N = rows_N >= 0
        self.storage.free(rows_N[present_N])
        self._count(table, ids_N[present_N], -1)
        if self.journal is not None:
            self.journal.note(table, ids_N[present_N], removed=True)
        return int(present_N.sum())

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
        ids_N, rows_N = self.entries(table)
        if touched_since is not None:
            recent_N = self.storage.read_metadata(rows_N).last_steps >= touched_since
            ids_N, rows_N = ids_N[recent_N], rows_N[recent_N]
        shards_N = self.shards(table, ids_N)
        order = sorted_by(ids_N, shards_N)
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
    def rows_for(self, table: int, ids_N: Tensor) -> Tensor:
        """Rows of distinct keys; those that are absent get new ones with zeros, and arbitrary values."""
        rows_N = self.find(ids_N, table) if len(self.index) else torch.full_like(ids_N, -1)
        new_N = rows_N < 0
        new_ids = ids_N[new_N]
        self.reserve(len(new_ids), 0)
        rows_N[new_N] = self.storage.allocate(len(new_ids))
        self.index.insert(*self.index_keys(new_ids, table), rows_N[new_N])
        self._count(table, new_ids, 1)
        return rows_N

    @torch.no_grad()
    def add_rows(self, table: int, rows: KeyRows) -> None:
        """Puts keys with all that is kept of them into the table, where they must be absent."""
        ids_N = rows.ids_N.to(self.device)
        rows_N = self.rows_for(table, ids_N)
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
