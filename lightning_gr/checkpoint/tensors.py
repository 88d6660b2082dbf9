"""Tensors of a checkpoint in torch's distributed format (DCP), through a `Storage` and without blind unpickling.

DCP's ``.metadata`` is a plain pickle: it is read by an unpickler that admits only the classes DCP writes there.
"""

from __future__ import annotations

import io
import os
import pickle
import posixpath
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from typing_extensions import override

from lightning_gr.checkpoint.storage import FileSum, Storage

METADATA_FILENAME = ".metadata"
"""Where DCP says which tensor is where."""

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by their flattened keys."""

_CHECKPOINT = "torch.distributed.checkpoint"
_SHARD = "torch.distributed._shard"
_METADATA_CLASSES = {
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_SHARD}.metadata", "ShardMetadata"),
    (f"{_SHARD}.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    (f"{_SHARD}.sharded_tensor.metadata", "TensorProperties"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
}
_METADATA_FUNCTIONS = {("torch.serialization", "_get_layout")}
"""With the classes all that DCP writes into ``.metadata``; the one function looks a layout up by its name."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's ``.metadata`` and refuses every class that DCP does not write there."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_FUNCTIONS:
            return super().find_class(module, name)
        if (module, name) in _METADATA_CLASSES and isinstance(found := super().find_class(module, name), type):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint metadata contains")


class _Files(FileSystemBase):
    """What DCP knows of files: those of one directory, with their checksums."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._waiting: dict[str, bytes] = {}
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    @override
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        name = posixpath.basename(os.fspath(path))
        if mode == "rb":
            with self._storage.open(name) as opened:
                yield opened  # type: ignore[misc]
        elif name.endswith(".tmp"):
            # DCP would rename it, which not every file system can.
            buffer = io.BytesIO()
            yield buffer
            self._waiting[name] = buffer.getvalue()
        else:
            with self._storage.create(name) as file:
                try:
                    yield file
                except RuntimeError:  # torch's own, of a write that failed
                    if file.error is not None:
                        raise file.error from None
                    raise
            self.sums[name] = file.sum

    @override
    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        data = self._waiting.pop(posixpath.basename(os.fspath(path)))
        name = posixpath.basename(os.fspath(new_path))
        self.sums[name] = self._storage.publish(name, data)

    @override
    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return posixpath.join(os.fspath(path), suffix)

    @override
    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    @override
    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._storage.make()

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    @override
    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._storage.exists(posixpath.basename(os.fspath(path)))

    @override
    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._storage.remove(posixpath.basename(os.fspath(path)))


class _Writer(FileSystemWriter):
    """DCP's writer on a `Storage`, which flushes and checksums by itself."""

    def __init__(self, storage: Storage) -> None:
        super().__init__("", sync_files=False)
        self.files = _Files(storage)
        self.fs, self.path = self.files, storage.location  # type: ignore[assignment]


class _Reader(FileSystemReader):
    """DCP's reader on a `Storage`, with the restricted unpickler."""

    def __init__(self, storage: Storage) -> None:
        super().__init__("")
        self._storage = storage
        self.fs, self.path = _Files(storage), storage.location  # type: ignore[assignment]

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._storage.path_of(METADATA_FILENAME)
        try:
            metadata = _MetadataUnpickler(io.BytesIO(self._storage.read_bytes(METADATA_FILENAME))).load()
        except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
            raise ValueError(f"{path}: not the metadata of a checkpoint ({error}); use another checkpoint") from error
        entries = getattr(metadata, "state_dict_metadata", None)
        if not isinstance(metadata, Metadata) or not isinstance(entries, dict):
            raise ValueError(f"{path}: not the metadata of a checkpoint; use another checkpoint")
        for key, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{path}: entry {key!r} is not a tensor and will not be unpickled")
        self.storage_data = metadata.storage_data
        return metadata


def write_tensors(
    storage: Storage, tensors: dict[str, Any], *, group: dist.ProcessGroup | None = None
) -> dict[str, FileSum]:
    """Writes nested dictionaries of tensors, sharded or replicated; a collective call.

    Args:
        storage: the same directory on every process.
        tensors: no lists in them.
        group: processes that save together; None means all.

    Returns:
        The files that this process wrote.

    Raises:
        OSError: some process could not write.
    """
    writer = _Writer(storage)
    try:
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        raise OSError(f"{storage}: process {rank} could not write ({str(failure[0]).splitlines()[0]})") from error
    return writer.files.sums


def read_tensors(storage: Storage, into: dict[str, Any]) -> None:
    """Reads into the given tensors in place, resharding as they ask; a collective call where there are processes.

    Raises:
        ValueError: a key is missing or a shape differs.
    """
    _load(storage, into)


def _load(storage: Storage, into: dict[str, Any], *, alone: bool = False) -> None:
    try:
        load(into, storage_reader=_Reader(storage), no_dist=alone)
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        reason = str(failure[0]).splitlines()[0] if str(failure[0]) else type(failure[0]).__name__
        raise ValueError(f"checkpoint {storage}: cannot be loaded on rank {rank} ({reason})") from error


def tensor_shapes(storage: Storage) -> Shapes:
    """Shape and dtype of every tensor, by its flattened key."""
    entries = _Reader(storage).read_metadata().state_dict_metadata
    try:
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (AttributeError, TypeError) as error:
        path = storage.path_of(METADATA_FILENAME)
        raise ValueError(f"{path}: not the metadata of a checkpoint ({error}); use another checkpoint") from error


def whole_tensors(storage: Storage, prefix: str = "") -> dict[str, Tensor]:
    """Tensors in one piece, by their flattened keys; for tools, and for what one process reads alone."""
    found: Mapping[str, Any] = tensor_shapes(storage)
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in found.items() if key.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant
        if tensors:
            _load(storage, tensors, alone=True)
    return tensors
