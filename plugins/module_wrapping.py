"""The LightningModule inside TorchRec's DMP: tables cut over the ranks, everything else data parallel."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gr.batch import SequenceBatch
from lightning_gr.embeddings import initialise_tables
from lightning_gr.embeddings.dynamic import SparseOptimizerConfig
from lightning_gr.plugins.sharding import (
    Sharding,
    SparseOptimizer,
    attach_sparse_optimizer,
    make_plan,
    static_collections,
    table_configs,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torchrec.distributed.model_parallel import DistributedModelParallel

_ATTRIBUTE = "_lightning_gr_dmp"


class WrappedModule(NamedTuple):
    """A module and how its static tables learn.

    Args:
        dmp: the module, wrapped.
        sparse_lrs: learning rate of each group of `dmp.fused_optimizer`, before a schedule.
        settings: what it was wrapped with.
    """

    dmp: DistributedModelParallel
    sparse_lrs: list[float]
    settings: dict[str, Any]


def wrap_module(
    module: pl.LightningModule,
    *,
    sharding: Sharding,
    sparse_optimizer: SparseOptimizer,
    sparse_lr: float,
    static_dedup: bool,
    find_unused_parameters: bool,
    bucket_cap_mb: int,
    device: torch.device,
    num_local: int,
    seed: int,
    timeout: timedelta,
    table_groups: int,
) -> WrappedModule:
    """Wraps a module once; a later call for the same module gives the same. All ranks call it.

    Args:
        module: with embedding collections, or none.
        sharding: how static tables are cut.
        sparse_optimizer: of the tables that have none.
        sparse_lr: its learning rate.
        static_dedup: whether ids of static tables are made distinct before they travel.
        find_unused_parameters: of DDP.
        bucket_cap_mb: of DDP.
        device: of this rank.
        num_local: ranks of this machine.
        seed: of first values, equal on all ranks.
        timeout: how long a collective may wait.
        table_groups: into how many groups the ranks are cut, each with a full set of dynamic tables.

    Raises:
        MisconfigurationException: a table that could not be trained as it is, by name.
    """
    from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv
    from torchrec.streamable import Pipelineable

    from lightning_gr.plugins.dynamic_sharding import dynamic_collections

    settings: dict[str, Any] = {
        "sharding": sharding,
        "sparse_optimizer": sparse_optimizer,
        "sparse_lr": sparse_lr,
        "static_dedup": static_dedup,
        "find_unused_parameters": find_unused_parameters,
        "bucket_cap_mb": bucket_cap_mb,
        "table_groups": table_groups,
    }
    earlier: WrappedModule | None = module.__dict__.get(_ATTRIBUTE)
    if earlier is not None:
        for name, value in settings.items():
            if value != earlier.settings[name]:
                rank_zero_warn(
                    f"{name}={value!r}: not used, since an earlier strategy has sharded this module with "
                    f"{earlier.settings[name]!r}; make the module anew"
                )
        return earlier
    Pipelineable.register(SequenceBatch)
    group = dist.group.WORLD
    assert group is not None
    collections = static_collections(module)
    if collections and table_groups > 1:
        path = next(iter(collections))
        names = ", ".join(config.name for config in table_configs(collections[path]))
        raise MisconfigurationException(
            f"table_groups={table_groups}: {path} has static tables ({names}), whose rows TorchRec updates inside "
            "backward, before groups could add up their gradients; use dynamic tables, or table_groups=1"
        )
    deferred = {path: table_configs(child) for path, child in collections.items() if next(child.parameters()).is_meta}
    if collections and sparse_optimizer == "adam" and device.type == "cpu":
        raise MisconfigurationException(
            "sparse_optimizer='adam': FBGEMM has no Adam for tables on the CPU; use rowwise_adagrad or adagrad, or "
            "train on a GPU"
        )
    for child in collections.values():
        attach_sparse_optimizer(child, optimizer=sparse_optimizer, lr=sparse_lr)
    plan, sharders = make_plan(
        module,
        sharding=sharding,
        device=device,
        num_local=num_local,
        dynamic_optimizer=SparseOptimizerConfig(name=sparse_optimizer, lr=sparse_lr),
        seed=seed,
        dedup=static_dedup,
        timeout=timeout,
        table_groups=table_groups,
    )
    # Tables that the module built with values keep them: TorchRec copies them into the shards.
    dmp = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=sharders,
        data_parallel_wrapper=DefaultDataParallelWrapper(
            # A static graph asserts when accumulation skips the first synchronisation.
            static_graph=False,
            find_unused_parameters=find_unused_parameters,
            bucket_cap_mb=bucket_cap_mb,
        ),
    )
    left = static_collections(module) | dynamic_collections(module)
    if left:
        raise MisconfigurationException(
            f"{type(module).__name__}.{next(iter(left))}: reached by a second name or from a Python list, so it "
            "would stay unsharded on every rank; keep one attribute a collection, in an nn.ModuleList if many"
        )
    for path, configs in deferred.items():
        initialise_tables(module.get_submodule(path), seed=seed, configs=configs)
    # Modules without dense parameters are not wrapped in DDP, and metrics would stay behind on the host.
    module.to(device)
    wrapped = WrappedModule(dmp, [float(group["lr"]) for group in dmp.fused_optimizer.param_groups], settings)
    module.__dict__[_ATTRIBUTE] = wrapped
    return wrapped
