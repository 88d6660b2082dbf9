"""Embedding tables: static TorchRec collections with first values that do not depend on the sharding."""

from lightning_gr.embeddings.static_tables import (
    deferred_tables,
    embedding_collection,
    initialise_tables,
    is_static_collection,
    table_values,
)

__all__ = ["deferred_tables", "embedding_collection", "initialise_tables", "is_static_collection", "table_values"]
