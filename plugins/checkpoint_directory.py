"""A checkpoint directory in Lightning's own sharded format: DCP shards, then ``meta.pt`` as the commit mark.

``meta.pt`` is written last, under a temporary name that is then renamed, so a torn save is never taken for a
checkpoint. Nothing is unpickled without an allow-list: ``meta.pt`` is read with ``weights_only=True`` and DCP's
``.metadata``, a plain pickle, by an unpickler that admits only the classes DCP writes.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_gr.embeddings.dynamic import table_files

META_FILENAME = "meta.pt"
"""Name of the commit mark, the one that Lightning's own sharded checkpoints use."""

_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharding_spec",
    "torch.distributed._shard.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",
)
_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("torch._utils", "_rebuild_device"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's ``.metadata`` and refuses every class that DCP does not write there."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_NAMES or (module in _METADATA_MODULES and "." not in name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint metadata contains")


class _CheckedReader(FileSystemReader):
    """DCP's reader with the restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not the metadata of a checkpoint ({error}); use another checkpoint") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path}: not the metadata of a checkpoint; use another checkpoint")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{path}: entry {key!r} is not a tensor and will not be unpickled")
        self.storage_data = metadata.storage_data
        return metadata


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint directory whose save was finished."""
    return path.is_dir() and (path / META_FILENAME).is_file() and (path / ".metadata").is_file()


def check_complete(path: Path) -> None:
    """Refuses what is not a finished checkpoint directory.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file, a foreign directory, or a save that was cut off.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path}: no such directory; give the path of a saved checkpoint")
    if path.is_file():
        raise ValueError(
            f"checkpoint {path}: a single file; SequenceBalancedStrategy reads the checkpoint directories it writes"
        )
    if not is_complete(path):
        raise ValueError(
            f"checkpoint {path}: {META_FILENAME} or .metadata is missing, so the save was cut off or the directory "
            "is something else; use another checkpoint"
        )


def write(
    path: Path,
    tensors: dict[str, Any],
    meta: dict[str, Any],
    *,
    is_global_zero: bool,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Saves the directory; a collective call, after which rank 0 alone writes the commit mark.

    Args:
        path: the same on every rank.
        tensors: nested dictionaries of tensors, sharded or replicated.
        meta: everything else; plain containers and tensors, readable with ``weights_only=True``.
        is_global_zero: whether this process writes the commit mark.
        write_more: writes further files of every rank into the directory.
    """
    if is_global_zero:
        if path.is_file():
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)
        # An earlier checkpoint of this name stops being one before its first shard is overwritten.
        (path / META_FILENAME).unlink(missing_ok=True)
        shutil.rmtree(path / table_files.FOLDER, ignore_errors=True)
    save(tensors, checkpoint_id=path)
    if write_more is not None:
        # `save` has waited for rank 0, so what it has just removed is gone.
        write_more(path)
        dist.barrier()
    if is_global_zero:
        temporary = path / f".{META_FILENAME}.tmp"
        with temporary.open("wb") as file:
            torch.save(meta, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path / META_FILENAME)


def read_meta(path: Path) -> dict[str, Any]:
    """Reads ``meta.pt`` without unpickling anything but tensors and plain containers.

    Raises:
        ValueError: the file is torn or holds other objects.
    """
    check_complete(path)
    try:
        meta = torch.load(path / META_FILENAME, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, IndexError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path / META_FILENAME}: cannot be read ({reason}); use another checkpoint") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path / META_FILENAME}: holds no checkpoint; use another checkpoint")
    return meta


def tensor_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in the directory, by its flattened key."""
    entries = _CheckedReader(path).read_metadata().state_dict_metadata
    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(path: Path, into: dict[str, Any]) -> None:
    """Reads into the given tensors in place, resharding as they ask; a collective call.

    Raises:
        ValueError: a key is missing or a shape differs.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        load(into, storage_reader=_CheckedReader(path))
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        reason = str(failure[0]).splitlines()[0]
        raise ValueError(f"checkpoint {path}: cannot be loaded on rank {rank} ({reason})") from error
