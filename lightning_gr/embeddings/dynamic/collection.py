"""DynamicEmbeddingCollection and its pooled form: TorchRec's interface over tables that take any int64 id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.embeddings.dynamic.dynamic_lookup import DynamicLookup
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.gather_rows import gather_pieces, segment_pool
from lightning_gr.embeddings.dynamic.settings import DynamicTables
from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig, check_configs

if TYPE_CHECKING:
    from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor


class DynamicEmbeddingModule(nn.Module):
    """What both forms share: configs, settings, and an engine for one process that is made at the first lookup.

    Under `SequenceBalancedStrategy` the tables are cut over all processes and stepped with the dense optimiser. In a
    loop of one's own: ``loss.backward()``, then ``collection.engine.step()``.

    Args:
        tables: one config a table.
        settings: of all of them together; those of single tables are the configs' own.

    Raises:
        ValueError: two configs of one name and the like, or a table that lacks a setting of single tables.
    """

    def __init__(self, *, tables: Sequence[DynamicTableConfig], settings: DynamicTables | None = None) -> None:
        super().__init__()
        check_configs(tables)
        self.configs = tuple(tables)
        self.settings = settings or DynamicTables()
        self.settings.check(tables)
        self._engine: DynamicEngine | None = None

    def embedding_configs(self) -> Sequence[DynamicTableConfig]:
        """The tables' configs."""
        return self.configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """Names of the outputs of each table, in the order of the configs."""
        features = [feature for config in self.configs for feature in config.feature_names]
        return [
            [f"{name}@{config.name}" if features.count(name) > 1 else name for name in config.feature_names]
            for config in self.configs
        ]

    @property
    def engine(self) -> DynamicEngine:
        """The tables of this process; made for one process where nothing has sharded the collection."""
        if self._engine is None:
            with torch.inference_mode(False):  # tensors made inside could never be trained
                self._engine = self.settings.engine(self.configs, seed=torch.initial_seed(), device="cpu", group=None)
        return self._engine

    def looked_up(self, features: KeyedJaggedTensor) -> DynamicLookup:
        """A lookup whose rows have arrived; one process."""
        engine = self.engine
        lookup = engine.take(features, training=is_training(self))
        lookup.exchange.send_keys()
        engine.find(lookup)
        return lookup


class DynamicEmbeddingCollection(DynamicEmbeddingModule):
    """Looks up a row for every id of every feature, as TorchRec's ``EmbeddingCollection`` does."""

    @override
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """By feature, a float32 row for each of its ids."""
        return jagged_output(self.engine, self.looked_up(features))


class DynamicEmbeddingBagCollection(DynamicEmbeddingModule):
    """Pools the rows of each sample's ids, as TorchRec's ``EmbeddingBagCollection`` does."""

    def embedding_bag_configs(self) -> Sequence[DynamicTableConfig]:
        """The tables' configs."""
        return self.configs

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """By feature, the pooled rows (B, D); a sample without ids has zeros."""
        return pooled_output(self.engine, self.looked_up(features))


def is_training(module: nn.Module) -> bool:
    """Whether a lookup may change tables: a forward that backward can follow."""
    return module.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _sizes_by_table(engine: DynamicEngine, lookup: DynamicLookup) -> list[list[int]]:
    """Of each physical table, how many ids its features look up; the engine's order is that of physical tables."""
    sizes: list[list[int]] = [[] for _ in lookup.exchange.places]
    for (t, _, _), size in zip(engine.lookups, lookup.sizes, strict=True):
        sizes[engine.logical[t][0]].append(size)
    return sizes


def jagged_output(engine: DynamicEngine, lookup: DynamicLookup) -> dict[str, JaggedTensor]:
    """Rows by feature, one for each id; waits for what is under way."""
    from torchrec import JaggedTensor

    of_tables = zip(engine.received(lookup), lookup.exchange.places, _sizes_by_table(engine, lookup), strict=True)
    pieces = [piece for rows, places, sizes in of_tables for piece in gather_pieces(rows, places, sizes)]
    lengths = _lengths(lookup.features)
    return {
        name: JaggedTensor(values=values, lengths=lengths[feature])
        for (_, feature, name), values in zip(engine.lookups, pieces, strict=True)
    }


def pooled_output(engine: DynamicEngine, lookup: DynamicLookup) -> KeyedTensor:
    """Pooled rows by feature; waits for what is under way."""
    from torchrec import KeyedTensor

    rows = engine.received(lookup)
    lengths, weights = _lengths(lookup.features), _weights(lookup.features)
    pooled = {}
    of_tables = zip(lookup.exchange.places, _sizes_by_table(engine, lookup), strict=True)
    pieces = [piece for places, sizes in of_tables for piece in places.split(sizes)]
    for (t, feature, name), places in zip(engine.lookups, pieces, strict=True):
        offsets_B1 = torch.nn.functional.pad(lengths[feature].to(torch.int64).cumsum(0), (1, 0))
        of_table = rows[engine.logical[t][0]]
        pooled[name] = segment_pool(of_table, places, offsets_B1, engine.configs[t].pooling, weights.get(feature))
    widths = [x.shape[1] for x in pooled.values()]
    return KeyedTensor(keys=list(pooled), length_per_key=widths, values=torch.cat(list(pooled.values()), 1))


def _lengths(features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """Lengths (B,) by feature; TorchRec's own accessor refuses an empty batch."""
    keys = features.keys()
    return dict(zip(keys, features.lengths().view(len(keys), features.stride()), strict=True))


def _weights(features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """Weights of ids by feature, where there are any."""
    weights = features.weights_or_none()
    return {} if weights is None else dict(zip(features.keys(), weights.split(features.length_per_key()), strict=True))
