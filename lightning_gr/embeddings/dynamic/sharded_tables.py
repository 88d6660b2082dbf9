"""ShardedTables: the part of a collection's dynamic tables that one process holds, and which keys those are.

Shape suffixes: N ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
from lightning_gr.embeddings.dynamic.exchange import Placement
from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig, check_configs

_DEFAULT_LR = 0.05


class ShardedTables:
    """The tables of a collection, cut over the processes of a group.

    Args:
        configs: the logical tables.
        optimizer: of tables without their own.
        seed: of the run; first values are drawn from it.
        virtual_shards: into how many shards hash bits cut keys: a power of two that stays for the table's life.
        merge: whether tables of equal width, optimiser and storage share a physical table.
        encode_ids: whether the key index holds bit-encoded ids.
        device: of the tables.
        group: the processes over which they are cut; None for one process.

    Attributes:
        tables: the physical tables.
        configs: the logical ones, in the order of physical ones.
        logical: of each logical table, its physical one and its place in that.
        lookups: table, feature and name of the output of each lookup, in that order.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        configs: Sequence[DynamicTableConfig],
        optimizer: SparseOptimizerConfig,
        seed: int,
        virtual_shards: int,
        merge: bool,
        encode_ids: bool,
        device: torch.device | str,
        group: dist.ProcessGroup | None,
    ) -> None:
        check_configs(configs)
        if virtual_shards < 1 or virtual_shards & (virtual_shards - 1):
            raise ValueError(f"virtual_shards={virtual_shards}: expected a power of two")
        self.group = group if group is not None and group.size() > 1 else None
        self.world_size = 1 if self.group is None else self.group.size()
        self.rank = 0 if self.group is None else self.group.rank()
        if virtual_shards < self.world_size:
            raise ValueError(f"virtual_shards={virtual_shards}: fewer than the {self.world_size} processes; raise it")
        self.device, self.seed, self.virtual_shards = torch.device(device), seed, virtual_shards
        self.merge, self.encode_ids = merge, encode_ids

        grouped: dict[Any, list[DynamicTableConfig]] = {}
        for config in sorted(configs, key=lambda c: c.name):
            own = _with_rate(config.optimizer or optimizer, optimizer.lr)
            # Scores take room in all rows of a physical table, which a budget in bytes would notice.
            scores = config.policy.eviction.policy == "score"
            storage = (config.precision, config.hot_count, config.placement, config.cache_rows, scores)
            key = (config.embedding_dim, own, storage) if merge else config.name
            grouped.setdefault(key, []).append(config)
        self.tables = [
            DynamicTable(
                configs=members,
                optimizer=_with_rate(members[0].optimizer or optimizer, optimizer.lr),
                seed=seed,
                virtual_shards=virtual_shards,
                device=self.device,
                encode_ids=encode_ids,
            )
            for members in grouped.values()
        ]
        self.logical = [(p, local) for p, table in enumerate(self.tables) for local in range(len(table.configs))]
        self.configs = [self.tables[p].configs[local] for p, local in self.logical]
        self.placement = Placement(
            salts=tuple(self.tables[p].salts[local] for p, local in self.logical),
            group_bits=tuple(self.tables[p].group_bits[local] for p, local in self.logical),
            rotations=tuple(self.tables[p].salts[local] & 0x7FFFFFFF for p, local in self.logical),
            dims=tuple(config.embedding_dim for config in self.configs),
            physical=tuple(p for p, _ in self.logical),
            world_size=self.world_size,
        )
        shared = [f for config in self.configs for f in config.feature_names]
        self.lookups = [
            (t, feature, f"{feature}@{config.name}" if shared.count(feature) > 1 else feature)
            for t, config in enumerate(self.configs)
            for feature in config.feature_names
        ]

    def table_number(self, name: str) -> int:
        """Place of a logical table.

        Raises:
            ValueError: there is none of this name.
        """
        names = [config.name for config in self.configs]
        if name not in names:
            raise ValueError(f"table {name}: there is none; choose from {', '.join(names)}")
        return names.index(name)

    def owned(self, table: int, ids_N: Tensor) -> Tensor:
        """Which ids this process holds the rows of, or would; bool (N,)."""
        groups_N = top_bits(key_hash(ids_N, self.placement.salts[table]), self.placement.group_bits[table])
        return self.placement.owners(table, groups_N) == self.rank

    def owned_shards(self, table: int) -> Tensor:
        """Which virtual shards of a table this process holds; bool."""
        bits = self.virtual_shards.bit_length() - 1
        groups = torch.arange(self.virtual_shards) >> (bits - self.placement.group_bits[table])
        return self.placement.owners(table, groups) == self.rank

    def set_scores(self, ids_N: Tensor, scores_N: Tensor, name: str) -> None:
        """Scores for eviction; every process calls it with the same ids."""
        t = self.table_number(name)
        p, local = self.logical[t]
        ids_N = ids_N.to(self.device, torch.int64)
        own_N = self.owned(t, ids_N)
        self.tables[p].set_scores(ids_N[own_N], scores_N.to(self.device)[own_N], local)

    def collision_rate(self, name: str) -> float:
        """Share of a table's keys that the step before had looked up too, on this process (TurboGR's alpha)."""
        p, local = self.logical[self.table_number(name)]
        statistics = self.tables[p].statistics[local]
        return statistics.collided / statistics.looked_up if statistics.looked_up else math.nan


def _with_rate(own: SparseOptimizerConfig, lr: float | None) -> SparseOptimizerConfig:
    """An optimiser that has a learning rate."""
    return own if own.lr is not None else replace(own, lr=_DEFAULT_LR if lr is None else lr)
