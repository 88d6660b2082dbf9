"""Nested dictionaries of tensors, as checkpoints take them: their tensors alone, and copies of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def tensors_only(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same without empty branches and without what is not a tensor."""
    kept: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            branch = tensors_only(value)
            if branch:
                kept[key] = branch
        elif isinstance(value, Tensor) or hasattr(value, "local_shards"):
            kept[key] = value
    return kept


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors of their own in host memory, of sharded ones the shards of this process."""
    return {key: copied(value) if isinstance(value, Mapping) else _copy_of(value) for key, value in state.items()}


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
        return value.detach().to("cpu", copy=True)
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

    shards = [Shard(x.tensor.detach().to("cpu", copy=True), x.metadata) for x in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=value.metadata(), process_group=value._process_group
    )
