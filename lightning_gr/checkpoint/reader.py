"""CheckpointReader: a checkpoint that is complete, or a refusal that names the file; and the newest one of a folder."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gr.checkpoint.manifest import MANIFEST_FILENAME, Base, Manifest
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.checkpoint.tensors import METADATA_FILENAME, Shapes, tensor_shapes, whole_tensors

META_FILENAME = "meta.pt"
"""Name of the commit mark, the one that Lightning's own sharded checkpoints use."""
TABLES_FOLDER = "dynamic"
"""Where a checkpoint has its dynamic collections, a folder each."""


def rank_filename(rank: int, world_size: int) -> str:
    """Of what belongs to one process alone."""
    return f"rank-{rank:05d}-of-{world_size:05d}.pt"


class CheckpointReader:
    """One checkpoint, all files of which are there in their full size; with those that it adds to.

    Args:
        location: of its directory; a path or a URL.

    Attributes:
        storage: the directory.
        manifest: what it consists of.
        chain: the directories of a full checkpoint and of all that add to it, this one last.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file, a foreign directory, a save that was cut off, or files that are missing or cut off.
    """

    def __init__(self, location: str | Path | Storage) -> None:
        self.storage = Storage(location)
        self._manifests = [(self.storage, _complete_manifest(self.storage))]
        while (base := self._manifests[-1][1].base) is not None:
            self._manifests.append(self._base_of(self._manifests[-1][0], base))
        self._manifests.reverse()
        self.manifest = self._manifests[-1][1]
        self.chain: list[Storage] = [storage for storage, _ in self._manifests]

    def _base_of(self, storage: Storage, base: Base) -> tuple[Storage, Manifest]:
        found = storage.parent / base.name
        if any(found == other for other, _ in self._manifests):
            raise ValueError(f"checkpoint {storage}: adds to {base.name}, which adds to it; use another checkpoint")
        try:
            manifest = _complete_manifest(found)
        except FileNotFoundError as error:
            raise ValueError(
                f"checkpoint {storage}: adds to {base.name}, which is not beside it; bring it back, or use another "
                "checkpoint"
            ) from error
        if manifest.id != base.id:
            raise ValueError(
                f"checkpoint {storage}: adds to another save than that which is now in {found}; use another checkpoint"
            )
        return found, manifest

    def files(self) -> list[tuple[Manifest, Storage, str]]:
        """Every file of the whole chain, with the manifest that says what it must be like."""
        return [(manifest, storage, name) for storage, manifest in self._manifests for name in manifest.files]

    def verify(self) -> None:
        """Reads every file of the whole chain and compares its checksum.

        Raises:
            ValueError: names the first file that is damaged.
        """
        for storage, manifest in self._manifests:
            manifest.check_contents(storage)

    # ---- contents ----------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """What Lightning keeps: plain containers and tensors, nothing else is unpickled.

        Raises:
            ValueError: the file is torn or holds other objects.
        """
        return _load(self.storage, META_FILENAME)

    def shapes(self) -> Shapes:
        """Shape and dtype of every tensor, by its flattened key."""
        return tensor_shapes(self.storage)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors in one piece, by their flattened keys."""
        return whole_tensors(self.storage, prefix)

    def rank_states(self) -> list[dict[str, Any]]:
        """What each process kept for itself."""
        world = self.manifest.world_size
        names = [rank_filename(rank, world) for rank in range(world)]
        return [_load(self.storage, name) for name in names if name in self.manifest.files]

    def collections(self) -> dict[str, list[Storage]]:
        """Folders of the dynamic collections along the chain, by the collections' module paths."""
        names = {name.split("/")[1] for name in self.manifest.files if name.startswith(f"{TABLES_FOLDER}/")}
        return {name: [storage / TABLES_FOLDER / name for storage in self.chain] for name in sorted(names)}


def _complete_manifest(storage: Storage) -> Manifest:
    """That of a checkpoint whose files are all there in their full size."""
    if not storage.exists():
        raise FileNotFoundError(f"checkpoint {storage}: no such directory; give the path of a saved checkpoint")
    if storage.is_file():
        raise ValueError(
            f"checkpoint {storage}: a single file; SequenceBalancedStrategy reads the checkpoint directories it writes"
        )
    if storage.is_file("export.json"):
        raise ValueError(f"checkpoint {storage}: an export; give the checkpoint that it was made from")
    for name in (META_FILENAME, METADATA_FILENAME, MANIFEST_FILENAME):
        if not storage.is_file(name):
            raise ValueError(
                f"checkpoint {storage}: {name} is missing, so the save was cut off or the directory is something else; "
                "use another checkpoint"
            )
    manifest = Manifest.read(storage)
    manifest.check_sizes(storage)
    return manifest


def newest_complete(folder: str | Path | Storage) -> CheckpointReader | None:
    """The complete checkpoint with the most steps of the last run that saved into a folder; None without any.

    It goes by what manifests say, since clocks go wrong.

    Args:
        folder: where runs have saved, a directory or a URL.
    """
    found = complete_checkpoints(folder)
    return found[0] if found else None


def complete_checkpoints(folder: str | Path | Storage) -> list[CheckpointReader]:
    """The complete checkpoints of a folder, the newest first, links left out.

    Args:
        folder: where a run has saved, a directory or a URL.
    """
    storage, found = Storage(folder), []
    for name in storage.names():
        if not storage.is_file(f"{name}/{META_FILENAME}") or storage.is_link(name):
            continue
        try:
            found.append(CheckpointReader(storage / name))
        except (ValueError, FileNotFoundError):
            continue
    return sorted(found, key=lambda x: (x.manifest.attempt, x.manifest.step, x.storage.name), reverse=True)


def _load(storage: Storage, name: str) -> dict[str, Any]:
    path = storage.path_of(name)
    try:
        content = torch.load(io.BytesIO(storage.read_bytes(name)), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds other objects than tensors and plain containers, or is damaged; use another checkpoint"
        ) from error
    except (OSError, RuntimeError, EOFError, IndexError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason}); use another checkpoint") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no checkpoint; use another checkpoint")
    return content
