"""DynamicTableConfig: one logical table of a dynamic collection."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from lightning_gr.embeddings.dynamic.policies import TablePolicy
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig

Precision = Literal["fp32", "bf16", "fp16", "mixed"]
Placement = Literal["device", "host"]
Pooling = Literal["sum", "mean"]


@dataclass(frozen=True)
class DynamicTableConfig:
    """A table that grows with the ids it meets; any int64 is an id.

    Args:
        name: of the table, unique in a collection. First values are drawn by it, so keep it.
        embedding_dim: width of a row.
        feature_names: features that look it up.
        init_fn: distribution of first values: a ``functools.partial`` of ``torch.nn.init.normal_`` or ``uniform_``;
            None is normal with standard deviation .02. They are a function of (seed, name, id, column), as those of
            static tables.
        policy: admission, budget, eviction, expiry.
        optimizer: steps the rows; None takes the strategy's.
        precision: of stored rows; optimiser state is always fp32. bf16 and fp16 round stochastically; `mixed` keeps
            rows that occurred `hot_count` times in fp32 and the others in fp16.
        hot_count: of `mixed`.
        placement: `device`, or `host` for rows in host memory with `cache_rows` of them on the device.
        cache_rows: of `host`.
        pooling: of a `DynamicEmbeddingBagCollection`.
        uncounted_features: those of `feature_names` whose ids do not count as occurrences, for admission, hot rows and
            LFU: drawn negatives, which say nothing of how often an item occurs.

    Raises:
        ValueError: a setting that cannot work, with the table's name.
    """

    name: str
    embedding_dim: int
    feature_names: Sequence[str]
    init_fn: Callable[..., Any] | None = None
    policy: TablePolicy = field(default_factory=TablePolicy)
    optimizer: SparseOptimizerConfig | None = None
    precision: Precision = "fp32"
    hot_count: int = 16
    placement: Placement = "device"
    cache_rows: int = 0
    pooling: Pooling = "sum"
    uncounted_features: Sequence[str] = ()

    def __post_init__(self) -> None:
        where = f"table {self.name}"
        if self.name in ("", ".", "..") or set(self.name) & set("/#"):
            raise ValueError(f"name={self.name!r}: expected a table name without '/' and '#', since it names files")
        if self.embedding_dim < 1:
            raise ValueError(f"{where}: embedding_dim={self.embedding_dim}: expected at least 1")
        if not self.feature_names:
            raise ValueError(f"{where}: feature_names is empty; name the features that look it up")
        for name, choices in (("precision", Precision), ("placement", Placement), ("pooling", Pooling)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{where}: {name}={getattr(self, name)!r}: expected one of {', '.join(get_args(choices))}"
                )
        if unknown := [x for x in self.uncounted_features if x not in self.feature_names]:
            raise ValueError(f"{where}: uncounted_features: {unknown[0]} does not look it up; see feature_names")
        if self.hot_count < 1:
            raise ValueError(f"{where}: hot_count={self.hot_count}: expected at least 1")
        if self.cache_rows < 0:
            raise ValueError(f"{where}: cache_rows={self.cache_rows}: expected at least 0")
        if self.placement == "host" and not self.cache_rows:
            raise ValueError(f"{where}: placement=host needs cache_rows, the rows that the device holds")
        if self.init_fn is not None:
            function = getattr(self.init_fn, "func", None)
            if not isinstance(self.init_fn, functools.partial) or function not in (
                torch.nn.init.normal_,
                torch.nn.init.uniform_,
            ):
                raise ValueError(
                    f"{where}: init_fn must be a functools.partial of torch.nn.init.normal_ or uniform_, since a row's "
                    "first values are drawn by its id"
                )

    @property
    def num_embeddings(self) -> int:
        """As of a static config; first values of None's distribution do not depend on it."""
        return 1

    @property
    def first_values(self) -> functools.partial[Any]:
        """The distribution of first values."""
        if self.init_fn is None:
            return functools.partial(torch.nn.init.normal_, std=0.02)
        assert isinstance(self.init_fn, functools.partial)
        return self.init_fn


def check_configs(configs: Sequence[DynamicTableConfig]) -> None:
    """Refuses names that occur twice and features without a clear table.

    Raises:
        ValueError: names the table or feature.
    """
    if not configs:
        raise ValueError("tables: expected at least one")
    names = [config.name for config in configs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"table {twice[0]}: two configs of this name; give each table one")
    for config in configs:
        features = list(config.feature_names)
        if twice := [feature for feature in features if features.count(feature) > 1]:
            raise ValueError(f"table {config.name}: feature {twice[0]} is named twice")
