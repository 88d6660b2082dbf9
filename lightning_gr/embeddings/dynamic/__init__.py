"""Dynamic embedding tables: any int64 id, rows that come and go by policy, spread over processes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.collection import (
        DynamicEmbeddingBagCollection,
        DynamicEmbeddingCollection,
        DynamicEmbeddingModule,
    )
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine
    from lightning_gr.embeddings.dynamic.feature_config import FeatureConfig, tables_of_features
    from lightning_gr.embeddings.dynamic.policies import Admission, Eviction, TablePolicy
    from lightning_gr.embeddings.dynamic.settings import DynamicTables
    from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
    from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig

_MODULES = {
    "Admission": "policies",
    "DynamicEmbeddingBagCollection": "collection",
    "DynamicEmbeddingCollection": "collection",
    "DynamicEmbeddingModule": "collection",
    "DynamicEngine": "engine",
    "DynamicTableConfig": "table_config",
    "DynamicTables": "settings",
    "Eviction": "policies",
    "FeatureConfig": "feature_config",
    "SparseOptimizerConfig": "sparse_optimizers",
    "TablePolicy": "policies",
    "tables_of_features": "feature_config",
}

__all__ = [
    "Admission",
    "DynamicEmbeddingBagCollection",
    "DynamicEmbeddingCollection",
    "DynamicEmbeddingModule",
    "DynamicEngine",
    "DynamicTableConfig",
    "DynamicTables",
    "Eviction",
    "FeatureConfig",
    "SparseOptimizerConfig",
    "TablePolicy",
    "tables_of_features",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
