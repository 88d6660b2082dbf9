"""Static TorchRec tables whose first values are a function of (seed, table, row, column) alone.

TorchRec initialises each shard from its rank's generator, so shards repeat each other and the numbers change with the
number of ranks. Here row r of a table is the same on 1 rank, on 8, row-wise or column-wise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gr.counter_random import counter_uniform, name_key
from lightning_gr.substrate import require_torchrec

if TYPE_CHECKING:
    from torchrec import EmbeddingCollection, EmbeddingConfig

_DEFERRED: ContextVar[bool] = ContextVar("lightning_gr_deferred_tables", default=False)
_ROWS_AT_ONCE = 1 << 16


@contextmanager
def deferred_tables() -> Iterator[None]:
    """Inside, `embedding_collection` allocates nothing; whoever shards the tables initialises the shards."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def embedding_collection(tables: Sequence[EmbeddingConfig]) -> EmbeddingCollection:
    """A TorchRec ``EmbeddingCollection``, on the meta device inside `deferred_tables`, initialised otherwise.

    Args:
        tables: one config a table. ``init_fn`` may be a ``functools.partial`` of ``torch.nn.init.normal_`` or
            ``uniform_``, drawn by counter; another function is called on the whole table with a seeded generator.

    Raises:
        ImportError: torchrec or its binary half is missing; the message says how to get it.
    """
    require_torchrec()
    from torchrec import EmbeddingCollection

    if _DEFERRED.get():
        return EmbeddingCollection(tables=list(tables), device=torch.device("meta"))
    # TorchRec's own first values are overwritten; without the fork they would shift what dense layers draw.
    with torch.random.fork_rng(devices=[]):
        collection = EmbeddingCollection(tables=list(tables), device=torch.get_default_device())
    initialise_tables(collection, seed=torch.initial_seed())
    return collection


def is_static_collection(module: nn.Module) -> bool:
    """Whether `module` is one of TorchRec's unsharded embedding collections, pooled or not.

    Args:
        module: any module.
    """
    from torchrec import EmbeddingBagCollection, EmbeddingCollection

    return isinstance(module, EmbeddingCollection | EmbeddingBagCollection)


@torch.no_grad()
def initialise_tables(collection: nn.Module, *, seed: int, configs: Sequence[EmbeddingConfig] | None = None) -> None:
    """Writes the first values of every local row of a static collection, sharded or not.

    Args:
        collection: an ``EmbeddingCollection``, ``EmbeddingBagCollection`` or their sharded forms.
        seed: seed of the run, equal on all ranks.
        configs: configs of the tables; read from an unsharded collection when None.
    """
    if configs is None:
        read = getattr(collection, "embedding_configs", None) or collection.embedding_bag_configs
        configs = read()  # type: ignore[operator]
    by_name = {config.name: config for config in configs}
    for key, weight in collection.state_dict().items():
        table = key.split(".")[-2]
        if table not in by_name:
            continue
        for shard, row_offset, column_offset in _local_shards(weight):
            _fill(shard, by_name[table], seed, row_offset, column_offset)


def _local_shards(weight: Any) -> Iterator[tuple[Tensor, int, int]]:
    if isinstance(weight, Tensor) and not hasattr(weight, "local_shards"):
        yield weight, 0, 0
        return
    for shard in weight.local_shards():
        yield shard.tensor, shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1]


def _fill(shard: Tensor, config: EmbeddingConfig, seed: int, row_offset: int, column_offset: int) -> None:
    num_rows, num_columns = shard.shape
    columns = torch.arange(column_offset, column_offset + num_columns, device=shard.device)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, num_rows)
        rows = torch.arange(row_offset + start, row_offset + stop, device=shard.device)
        shard[start:stop] = table_values(config, seed=seed, rows=rows, columns=columns).to(shard.dtype)


def table_values(config: EmbeddingConfig, *, seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """First values of some rows and columns of a table, float64 of shape (rows, columns).

    Args:
        config: the table; its ``init_fn`` says which distribution.
        seed: seed of the run.
        rows: int64 row numbers in the whole table.
        columns: int64 column numbers.
    """
    init_fn: Callable[..., Any] | None = config.init_fn
    function, settings = (init_fn.func, init_fn.keywords) if isinstance(init_fn, functools.partial) else (init_fn, {})
    if function in (torch.nn.init.uniform_, torch.Tensor.uniform_, None):
        bound = math.sqrt(1 / config.num_embeddings)
        low, high = settings.get("a", -bound), settings.get("b", bound)
        key = (seed, name_key(config.name), rows[:, None], columns)
        return low + (high - low) * counter_uniform(*key)
    if function is torch.nn.init.normal_:
        key = (seed, name_key(config.name), rows[:, None], columns)
        radius = torch.sqrt(-2 * torch.log(counter_uniform(*key, 0)))
        angle = 2 * math.pi * counter_uniform(*key, 1)
        return settings.get("mean", 0.0) + settings.get("std", 1.0) * radius * torch.cos(angle)
    # A function that is not drawn by counter sees the whole table, so that its result does not depend on the shards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed ^ name_key(config.name)) % (1 << 63))
        whole = torch.empty(config.num_embeddings, config.embedding_dim)
        assert init_fn is not None
        init_fn(whole)
    return whole.to(device=rows.device, dtype=torch.float64)[rows][:, columns]
