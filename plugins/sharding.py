"""How embedding collections are cut over the ranks, and which sparse optimiser steps in their backward."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.plugins.static_dedup import register_static_dedup

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic import SparseOptimizerConfig

_DIMENSIONS_OF_KERNELS = 4
_RESERVED_FOR_THE_DENSE_PART = 0.15

Sharding = Literal["row_wise", "table_wise", "column_wise"]
SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "adam", "sgd"]


def static_collections(module: nn.Module) -> dict[str, nn.Module]:
    """The unsharded TorchRec collections inside `module`, by their path."""
    from lightning_gr.embeddings import is_static_collection

    return {name: child for name, child in module.named_modules() if is_static_collection(child)}


def table_configs(collection: nn.Module) -> list[Any]:
    """The configs of a collection's tables, pooled or not."""
    read = getattr(collection, "embedding_configs", None) or collection.embedding_bag_configs
    return list(read())  # type: ignore[operator]


def attach_sparse_optimizer(collection: nn.Module, *, optimizer: SparseOptimizer, lr: float) -> None:
    """Gives every table that has no optimiser of its own the strategy's, to step inside backward."""
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    classes = {
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
    }
    own = [p for p in collection.parameters() if not hasattr(p, "_optimizer_classes")]
    apply_in_backward(classes[optimizer], own, {"lr": lr})


def _leaves_a_rank_empty(rows: int, world_size: int) -> bool:
    """Whether the last rank gets no row where a table is cut by rows, in blocks of equal size."""
    return -(-rows // world_size) * (world_size - 1) >= rows


def make_plan(
    module: nn.Module,
    *,
    sharding: Sharding,
    device: torch.device,
    num_local: int,
    dynamic_optimizer: SparseOptimizerConfig,
    seed: int,
    timeout: timedelta,
    table_groups: int = 1,
    dedup: bool = True,
) -> tuple[Any, list[Any]]:
    """The sharding plan of all collections, static and dynamic, and the sharders; a collective call.

    Args:
        module: the root that is going to be wrapped.
        sharding: how ``EmbeddingCollection`` tables are cut. ``EmbeddingBagCollection`` on the CPU has no row-wise
            form in TorchRec; its tables are then placed whole, and so are those of a collection with too few rows for
            every rank to have one.
        device: compute device of this rank.
        num_local: processes on this node.
        dynamic_optimizer: of dynamic tables without their own.
        seed: of the run, equal on all ranks.
        timeout: how long a collective of dynamic tables may wait.
        table_groups: into how many groups the ranks are cut, each with a full set of dynamic tables.
        dedup: whether ids of ``EmbeddingCollection`` tables are made distinct before they travel.

    Returns:
        ``(ShardingPlan, sharders)``.

    Raises:
        MisconfigurationException: a table has a width that the kernels do not take.
    """
    import torch.distributed as dist
    from torchrec import EmbeddingCollection
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.types import ShardingPlan

    from lightning_gr.plugins.dynamic_sharding import dynamic_collections, dynamic_sharders

    if dedup:
        register_static_dedup()
    sharders: list[Any] = [
        EmbeddingCollectionSharder(use_index_dedup=dedup),
        EmbeddingBagCollectionSharder(),
        *dynamic_sharders(optimizer=dynamic_optimizer, seed=seed, timeout=timeout, num_groups=table_groups),
    ]
    constraints = {}
    for collection in static_collections(module).values():
        whole = sharding == "row_wise" and device.type == "cpu" and not isinstance(collection, EmbeddingCollection)
        # FBGEMM does not look up in a process that has no row of any table of a collection.
        whole |= sharding == "row_wise" and all(
            _leaves_a_rank_empty(config.num_embeddings, dist.get_world_size()) for config in table_configs(collection)
        )
        for config in table_configs(collection):
            if config.embedding_dim % _DIMENSIONS_OF_KERNELS:
                raise MisconfigurationException(
                    f"table {config.name}: embedding_dim={config.embedding_dim}; FBGEMM's kernels for sharded tables "
                    f"take multiples of {_DIMENSIONS_OF_KERNELS}; round it up, or train without sharding on one device"
                )
            constraints[config.name] = ParameterConstraints(
                sharding_types=["table_wise" if whole else sharding],
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            )
    if not constraints and not dynamic_collections(module):
        return ShardingPlan({}), sharders
    # The planner warns of dry runs and topologies that do not concern a user of this strategy.
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=dist.get_world_size(), compute_device=device.type, local_world_size=max(num_local, 1)
        ),
        # The default reservation guesses the dense part's memory and is deprecated for guessing badly.
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED_FOR_THE_DENSE_PART),
        constraints=constraints,
    )
    group = dist.group.WORLD
    assert group is not None
    return planner.collective_plan(module, sharders, group), sharders
