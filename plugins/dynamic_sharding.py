"""How dynamic collections are cut over the ranks inside TorchRec's DMP, beside static ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ModuleSharder,
    ShardedModule,
    ShardingType,
)
from torchrec.streamable import Multistreamable
from typing_extensions import override

from lightning_gr.embeddings.dynamic.collection import (
    DynamicEmbeddingBagCollection,
    DynamicEmbeddingCollection,
    DynamicEmbeddingModule,
    is_training,
    jagged_output,
    pooled_output,
)
from lightning_gr.embeddings.dynamic.dynamic_lookup import DynamicLookup
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.plugins.process_groups import group_named, peers_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

    from torchrec.distributed.types import ShardingEnv

    from lightning_gr.embeddings.dynamic.peers import Peers
    from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig

_ROWS_OF_STAND_INS = 1024
"""A planner skips modules without parameters; this is what it believes a growing table to hold."""


class _LookupContext(Multistreamable):  # type: ignore[misc]  # TorchRec is untyped here
    """The lookup of one forward, as TorchRec's pipelines carry it from stage to stage."""

    def __init__(self) -> None:
        self.lookup: DynamicLookup | None = None

    @override
    def record_stream(self, stream: torch.Stream) -> None:
        """Nothing: the exchange waits for its own work."""


class _KeysSent(Awaitable[Any]):  # type: ignore[misc]
    """Waits for the sizes and starts the exchange of keys."""

    def __init__(self, context: _LookupContext) -> None:
        super().__init__()
        self._context = context

    @override
    def _wait_impl(self) -> Awaitable[_LookupContext]:
        assert self._context.lookup is not None
        self._context.lookup.exchange.send_keys()
        return _Ready(self._context)


class _Ready(Awaitable[_LookupContext]):  # type: ignore[misc]
    """The keys are on their way; the owner waits for them in `compute`."""

    def __init__(self, context: _LookupContext) -> None:
        super().__init__()
        self._context = context

    @override
    def _wait_impl(self) -> _LookupContext:
        return self._context


class _Output(LazyAwaitable[Any]):  # type: ignore[misc]
    """A collection's output, made when it is first used."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make

    @override
    def _wait_impl(self) -> Any:
        return self._make()

    def __len__(self) -> int:
        return len(LazyAwaitable._wait_async(self))

    def __iter__(self) -> Iterator[Any]:
        return iter(LazyAwaitable._wait_async(self))

    def __contains__(self, key: object) -> bool:
        return key in LazyAwaitable._wait_async(self)


class ShardedDynamicCollection(ShardedModule[_LookupContext, _LookupContext, Any, _LookupContext]):  # type: ignore[misc]
    """A dynamic collection whose rows are spread over the processes of a group of its own.

    Args:
        module: the collection.
        optimizer: of tables without their own.
        seed: of the run, equal on all ranks.
        device: of this rank.
        peers: used by this collection alone, so that the order of its collectives depends on nothing else.
    """

    def __init__(
        self,
        module: DynamicEmbeddingModule,
        *,
        optimizer: SparseOptimizerConfig,
        seed: int,
        device: torch.device,
        peers: Peers,
    ) -> None:
        super().__init__()
        self._kind = type(module)
        self.configs, self.settings = module.configs, module.settings
        self.engine: DynamicEngine = module.settings.engine(
            module.configs, seed=seed, device=device, group=peers.own, peers=peers, optimizer=optimizer
        )

    def embedding_configs(self) -> Any:
        """The tables' configs."""
        return self.configs

    @override
    def create_context(self) -> _LookupContext:
        return _LookupContext()

    @override
    def input_dist(self, ctx: _LookupContext, features: Any) -> Any:
        ctx.lookup = self.engine.take(features, training=is_training(self))
        return KJTListSplitsAwaitable([_KeysSent(ctx)], ctx)

    @override
    def compute(self, ctx: _LookupContext, dist_input: Any) -> _LookupContext:
        assert ctx.lookup is not None
        self.engine.find(ctx.lookup)
        return ctx

    @override
    def output_dist(self, ctx: _LookupContext, output: _LookupContext) -> LazyAwaitable[Any]:
        lookup = ctx.lookup
        assert lookup is not None
        make = pooled_output if issubclass(self._kind, DynamicEmbeddingBagCollection) else jagged_output
        return _Output(lambda: make(self.engine, lookup))

    @property
    @override
    def unsharded_module_type(self) -> type[nn.Module]:
        return self._kind


class _Sharder(ModuleSharder[nn.Module]):  # type: ignore[misc]
    """Makes sharded dynamic collections.

    Args:
        kind: the collection's class.
        optimizer: of tables without their own.
        seed: of the run, equal on all ranks.
        timeout: how long a collective may wait for the slowest rank.
        num_groups: into how many groups the ranks are cut, each with a full set of tables.
    """

    def __init__(
        self,
        *,
        kind: type[DynamicEmbeddingModule],
        optimizer: SparseOptimizerConfig,
        seed: int,
        timeout: timedelta,
        num_groups: int,
    ) -> None:
        super().__init__()
        self._kind, self._optimizer, self._seed, self._timeout = kind, optimizer, seed, timeout
        self._num_groups = num_groups

    @override
    def shard(
        self,
        module: Any,
        params: Any,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedDynamicCollection:
        assert env.process_group is not None
        assert env.process_group.size() == dist.get_world_size()
        peers = peers_named(f"dynamic tables {module_fqn}", num_groups=self._num_groups, timeout=self._timeout)
        sharded = ShardedDynamicCollection(
            module, optimizer=self._optimizer, seed=self._seed, device=device or torch.device("cpu"), peers=peers
        )
        if self._num_groups > 1:
            sharded.engine.all_processes = group_named(f"dynamic tables {module_fqn}, all", timeout=self._timeout)
        return sharded

    @property
    @override
    def module_type(self) -> type[nn.Module]:
        return self._kind

    @override
    def shardable_parameters(self, module: Any) -> dict[str, nn.Parameter]:
        return {
            config.name: nn.Parameter(torch.empty(_ROWS_OF_STAND_INS, config.embedding_dim, device="meta"))
            for config in module.configs
        }

    @override
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    @override
    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]


def dynamic_collections(module: nn.Module) -> dict[str, DynamicEmbeddingModule]:
    """The unsharded dynamic collections inside `module`, by their path."""
    return {name: child for name, child in module.named_modules() if isinstance(child, DynamicEmbeddingModule)}


def sharded_dynamic_collections(module: nn.Module) -> dict[str, ShardedDynamicCollection]:
    """The sharded dynamic collections inside `module`, by their path."""
    return {name: child for name, child in module.named_modules() if isinstance(child, ShardedDynamicCollection)}


def dynamic_sharders(
    *, optimizer: SparseOptimizerConfig, seed: int, timeout: timedelta, num_groups: int
) -> list[ModuleSharder[Any]]:
    """A sharder for each kind of dynamic collection."""
    return [
        _Sharder(kind=kind, optimizer=optimizer, seed=seed, timeout=timeout, num_groups=num_groups)
        for kind in (DynamicEmbeddingCollection, DynamicEmbeddingBagCollection)
    ]
