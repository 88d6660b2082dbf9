"""TablesByWidth: static tables of several widths as one collection, since TorchRec's have one width each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from typing_extensions import override

from lightning_gr.embeddings.static_tables import embedding_collection

if TYPE_CHECKING:
    from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor


class TablesByWidth(nn.Module):
    """Looks up each feature in the collection of its width; a strategy shards each collection as ever.

    Args:
        collections: by width.
    """

    def __init__(self, collections: dict[int, EmbeddingCollection]) -> None:
        super().__init__()
        self.widths = nn.ModuleDict({str(width): collections[width] for width in sorted(collections)})

    @override
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """By feature, a row for each of its ids."""
        # Sharded collections answer later: all are asked before any is waited for.
        asked: list[Any] = [collection(features) for collection in self.widths.values()]
        return {name: rows for of_width in asked for name, rows in of_width.items()}


def static_tables(tables: Sequence[EmbeddingConfig]) -> EmbeddingCollection | TablesByWidth:
    """Static tables of any widths; see `embedding_collection`.

    Args:
        tables: one config a table.

    Returns:
        TorchRec's collection itself where all have one width.
    """
    by_width: dict[int, list[EmbeddingConfig]] = {}
    for table in tables:
        by_width.setdefault(table.embedding_dim, []).append(table)
    if len(by_width) == 1:
        return embedding_collection(tables)
    return TablesByWidth({width: embedding_collection(own) for width, own in by_width.items()})
