"""DynamicTables: the settings of dynamic tables, as a model's YAML has them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.exchange import DTYPES, Dedup, ExchangePrecision
from lightning_gr.embeddings.dynamic.peers import Peers
from lightning_gr.embeddings.dynamic.policies import TablePolicy
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig, Placement, Precision

if TYPE_CHECKING:
    import torch.distributed as dist

    from lightning_gr.embeddings.dynamic.collection import DynamicEmbeddingBagCollection, DynamicEmbeddingCollection

IdEncoding = Literal["pair", "bits"]


@dataclass(frozen=True)
class DynamicTables:
    """How tables grow, which rows they keep, and how lookups travel.

    Args:
        policy: admission, budget, eviction and expiry of every table.
        policies: by table, one of its own instead.
        optimizer: of the rows; None takes the strategy's `sparse_optimizer`.
        merge: whether tables of equal width, optimiser and storage share one physical table.
        id_encoding: `pair` keys rows by (id, table) and takes any int64; `bits` packs the table's number into the high
            bits of the id (MTGenRec, arXiv 2505.12663, equation 8), for ids known to fit.
        dedup: `two_stage` makes keys distinct before they travel and where they arrive; or one of these, or `none`.
        exchange_precision: of rows and gradients while they travel.
        update: `step` updates rows where the dense optimiser steps; `backward` as soon as backward has reached them,
            which accumulation, clipping by norm and loss scaling do not allow.
        precision: of stored rows; `mixed` keeps rows that occurred `hot_count` times in fp32 and others in fp16.
        hot_count: of `mixed`.
        placement: `device`, or `host` for rows in host memory with `cache_rows` of them on the device.
        cache_rows: of `host`.
        virtual_shards: into how many shards hash bits cut keys, whatever the number of processes; a power of two that
            stays for the tables' life.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    policy: TablePolicy = field(default_factory=TablePolicy)
    policies: dict[str, TablePolicy] = field(default_factory=dict)
    optimizer: SparseOptimizerConfig | None = None
    merge: bool = True
    id_encoding: IdEncoding = "pair"
    dedup: Dedup = "two_stage"
    exchange_precision: ExchangePrecision = "fp32"
    update: Literal["step", "backward"] = "step"
    precision: Precision = "fp32"
    hot_count: int = 16
    placement: Placement = "device"
    cache_rows: int = 0
    virtual_shards: int = 1024

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, Any], ...] = (
            ("id_encoding", get_args(IdEncoding)),
            ("dedup", get_args(Dedup)),
            ("exchange_precision", tuple(DTYPES)),
            ("update", ("step", "backward")),
            ("precision", get_args(Precision)),
            ("placement", get_args(Placement)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.virtual_shards < 1 or self.virtual_shards & (self.virtual_shards - 1):
            raise ValueError(f"virtual_shards={self.virtual_shards}: expected a power of two")

    def configs(self, tables: Sequence[Any], *, uncounted_features: Sequence[str] = ()) -> list[DynamicTableConfig]:
        """Configs of dynamic tables in place of static ones.

        Args:
            tables: TorchRec's ``EmbeddingConfig`` or ``EmbeddingBagConfig``. The number of rows counts only where they
                leave `init_fn` to TorchRec, which derives it from that number.
            uncounted_features: features whose ids do not count as occurrences.

        Raises:
            ValueError: a policy for a table that there is not.
        """
        names = [table.name for table in tables]
        if unknown := [name for name in self.policies if name not in names]:
            raise ValueError(f"policies.{unknown[0]}: no such table; choose from {', '.join(names)}")
        return [
            DynamicTableConfig(
                name=table.name,
                embedding_dim=table.embedding_dim,
                feature_names=tuple(table.feature_names),
                init_fn=table.init_fn if isinstance(table.init_fn, functools.partial) else None,
                policy=self.policies.get(table.name, self.policy),
                precision=self.precision,
                hot_count=self.hot_count,
                placement=self.placement,
                cache_rows=self.cache_rows,
                pooling="mean" if str(getattr(table, "pooling", "SUM")).endswith("MEAN") else "sum",
                uncounted_features=[x for x in uncounted_features if x in table.feature_names],
            )
            for table in tables
        ]

    def check(self, configs: Sequence[DynamicTableConfig]) -> None:
        """Refuses settings of single tables that configs made by hand do not have.

        Raises:
            ValueError: names the setting and the table.
        """
        default = DynamicTables()
        for config in configs:
            if self.policy != default.policy and config.policy not in (self.policy, *self.policies.values()):
                raise ValueError(f"table {config.name}: has not the policy of the settings; give it to its config too")
            for name in ("precision", "hot_count", "placement", "cache_rows"):
                ours = getattr(self, name)
                if ours not in (getattr(default, name), getattr(config, name)):
                    raise ValueError(
                        f"table {config.name}: {name}={getattr(config, name)!r}, but {ours!r} in the settings, which "
                        "only DynamicTables.collection hands on; give it to the table's config"
                    )

    def collection(
        self, tables: Sequence[Any], *, uncounted_features: Sequence[str] = ()
    ) -> DynamicEmbeddingCollection:
        """A dynamic collection in place of an ``EmbeddingCollection`` of these configs; see `configs`."""
        from lightning_gr.embeddings.dynamic.collection import DynamicEmbeddingCollection

        configs = self.configs(tables, uncounted_features=uncounted_features)
        return DynamicEmbeddingCollection(tables=configs, settings=self)

    def bag_collection(self, tables: Sequence[Any]) -> DynamicEmbeddingBagCollection:
        """A dynamic collection in place of an ``EmbeddingBagCollection`` of these configs."""
        from lightning_gr.embeddings.dynamic.collection import DynamicEmbeddingBagCollection

        return DynamicEmbeddingBagCollection(tables=self.configs(tables), settings=self)

    def engine(
        self,
        configs: Sequence[DynamicTableConfig],
        *,
        seed: int,
        device: torch.device | str,
        group: dist.ProcessGroup | None,
        optimizer: SparseOptimizerConfig | None = None,
        peers: Peers | None = None,
    ) -> DynamicEngine:
        """The engine of a collection on one process of a group; `optimizer` fills in what the settings leave open."""
        default = optimizer or SparseOptimizerConfig()
        own = self.optimizer or default
        return DynamicEngine(
            configs=configs,
            optimizer=own if own.lr is not None else replace(own, lr=default.lr),
            seed=seed,
            virtual_shards=self.virtual_shards,
            merge=self.merge,
            encode_ids=self.id_encoding == "bits",
            dedup=self.dedup,
            exchange_precision=self.exchange_precision,
            fused_update=self.update == "backward",
            device=device,
            group=group,
            peers=peers,
        )
