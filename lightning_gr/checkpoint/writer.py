"""CheckpointWriter: brings a checkpoint into being, whole or not at all, and never at the cost of an earlier one.

Files are written where nobody takes them for a checkpoint: `meta.pt` is missing until all else is there. On a disk they
are in a directory of the save's own, ``.NAME.ID``, which is given its name at the end; where a complete checkpoint has
that name the two change places, and a process that is killed in between leaves both, of which `newest_complete` finds
one. Behind a URL nothing can be renamed: there files are written where they stay.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gr.checkpoint.manifest import MANIFEST_FILENAME, Base, Manifest
from lightning_gr.checkpoint.reader import META_FILENAME
from lightning_gr.checkpoint.storage import FileSum, Storage

SAVING_FILENAME = "saving.json"
"""Says that a directory without a commit mark is a save that was cut off, or is under way, and may be cleared."""


_UNNAMED = re.compile(r"\.(.+)\.[0-9a-f]{16}(\.old)?")
"""On a disk, a checkpoint that is being saved, and one whose name another takes."""


class CheckpointWriter:
    """One save; one process makes it, all write where it says, the same one commits.

    Args:
        target: the directory that the checkpoint will be.

    Attributes:
        where: the directory to write into.
        id: a random word.

    Raises:
        FileExistsError: something that is no checkpoint of ours is there, or, behind a URL, a complete one.
    """

    def __init__(self, target: Storage) -> None:
        self.target, self.where, self.id = target, target, secrets.token_hex(8)
        self._is_committed = False
        if target.is_link():
            target.remove_all()
        if target.is_file():
            raise FileExistsError(f"checkpoint {target}: a file has this name; remove it, or choose another name")
        if target.is_file(META_FILENAME):
            if not target.is_local:
                raise FileExistsError(
                    f"checkpoint {target}: there is one already, and behind a URL it cannot be replaced in one step; "
                    "choose another name, or remove it before"
                )
        elif target.files():
            if not _is_unfinished(target):
                raise FileExistsError(
                    f"checkpoint {target}: a directory with other files has this name; choose another name"
                )
            _clear(target)
        if target.is_local:
            self.where = target.parent / f".{target.name}.{self.id}"
        self.where.make()
        mark = {"id": self.id, "process": os.getpid(), "host": socket.gethostname()}
        try:
            self.where.publish(SAVING_FILENAME, json.dumps(mark).encode())
        except OSError:
            self.where.remove_all()
            raise

    def commit(
        self,
        meta: bytes,
        files: Mapping[str, FileSum],
        *,
        step: int,
        epoch: int,
        world_size: int,
        attempt: int = 0,
        base: Base | None = None,
        delta_of: Mapping[str, int] | None = None,
        still_ours: Callable[[], None] | None = None,
    ) -> Manifest:
        """Makes the files a checkpoint: the manifest, then the commit mark.

        Args:
            meta: the commit mark's contents, of `pack`.
            files: what all processes have written.
            step: see `Manifest`.
            epoch: see `Manifest`.
            world_size: how many processes these are.
            attempt: see `Manifest`.
            base: what it adds to.
            delta_of: see `Manifest`.
            still_ours: called before the commit mark is written; raises where somebody else has taken the place.
        """
        manifest = Manifest(
            id=self.id,
            step=step,
            epoch=epoch,
            world_size=world_size,
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            attempt=attempt,
            files={**files, META_FILENAME: FileSum.of(meta)},
            base=base,
            delta_of=dict(delta_of or {}),
        )
        self.where.publish(MANIFEST_FILENAME, manifest.to_bytes())
        self.where.flush_directories()
        if still_ours is not None:
            still_ours()
        self.where.publish(META_FILENAME, meta)
        self._is_committed = True
        with contextlib.suppress(OSError):  # it is a checkpoint by now, whatever is left lying about
            self.where.remove(SAVING_FILENAME)
        if self.target.is_local:
            try:
                _rename(self.where, self.target)
            except FileNotFoundError:
                if not self._was_named_by_another():
                    if still_ours is not None:
                        still_ours()
                    raise
        return manifest

    def _was_named_by_another(self) -> bool:
        """Whether a run that goes on from this folder has swept it, and so given this checkpoint its name already."""
        try:
            return Manifest.read(self.target).id == self.id
        except ValueError:
            return False

    def give_up(self) -> None:
        """Removes what was written, unless it is a checkpoint by now; the reason is somebody else's to tell."""
        if self._is_committed or not self._is_ours():
            return
        try:
            remove_checkpoint(self.where)
        except OSError:
            return

    def _is_ours(self) -> bool:
        """Whether the directory is still this save's; behind a URL another one may have taken it."""
        try:
            return json.loads(self.where.read_bytes(SAVING_FILENAME)).get("id") == self.id
        except (OSError, ValueError):
            return False


def _rename(source: Storage, target: Storage) -> None:
    """Gives a complete checkpoint on a disk its name; one that has it goes."""
    if not target.exists():
        source.rename_to(target.name)
        return
    old = f"{source.name}.old"
    target.rename_to(old)
    try:
        source.rename_to(target.name)
    except FileNotFoundError:  # another run was faster, and what has moved aside may be what was to get the name
        (target.parent / old).rename_to(target.name)
        raise
    with contextlib.suppress(OSError):
        remove_checkpoint(target.parent / old)


def pack(content: Mapping[str, Any]) -> bytes:
    """What `reader` reads with ``weights_only=True``: plain containers, numbers, texts and tensors.

    Raises:
        ValueError: something else is in it, which nobody could read back; names its place.
    """
    buffer = io.BytesIO()
    torch.save(_plain(dict(content)), buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        place, value = next(_odd(content, ""), ("", None))
        raise ValueError(
            f"{place or 'a checkpoint'}: a {type(value).__module__}.{type(value).__qualname__} cannot be read back "
            "without unpickling it blindly; keep numbers, texts, tensors, lists and dictionaries in what is saved"
        ) from error
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """The same with NumPy's numbers as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_plain(key): _plain(x) for key, x in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _odd(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """What cannot be read back alone, by its place."""
    if isinstance(value, Mapping) and type(value) in (dict, collections.OrderedDict):
        for key, x in value.items():
            yield from _odd(x, f"{place}.{key}" if place else str(key))
    elif type(value) in (list, tuple):
        for i, x in enumerate(value):
            yield from _odd(x, f"{place}[{i}]")
    else:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="cpu")
        except Exception:
            yield place, value


def remove_checkpoint(storage: Storage) -> None:
    """Removes a checkpoint, its commit mark first, so that what is left of an interrupted removal is none.

    Args:
        storage: its directory.
    """
    if storage.is_link():
        storage.remove_all()
        return
    if storage.is_file(META_FILENAME):
        with contextlib.suppress(OSError):  # the disk may be full
            storage.publish(SAVING_FILENAME, b"{}")
        storage.remove(META_FILENAME)
    _clear(storage)


def remove_unfinished(folder: Storage) -> list[Storage]:
    """Removes the saves of a folder that were cut off, and gives whole ones their names; returns the removed ones.

    Args:
        folder: where one run alone saves.
    """
    for name in folder.names():
        if (match := _UNNAMED.fullmatch(name)) is None or not folder.is_file(f"{name}/{META_FILENAME}"):
            continue
        target = folder / match[1]
        with contextlib.suppress(FileNotFoundError):  # the run that made it has just given it its name
            if match[2] is None:
                _rename(folder / name, target)
            elif target.is_file(META_FILENAME):
                remove_checkpoint(folder / name)
            elif not target.exists():
                (folder / name).rename_to(match[1])
    # What a late writer of another run has made again lacks even the mark.
    found = [
        folder / name
        for name in folder.names()
        if _is_unfinished(folder / name)
        or (_UNNAMED.fullmatch(name) is not None and not folder.is_file(f"{name}/{META_FILENAME}"))
    ]
    for storage in found:
        _clear(storage)
    return found


def named(location: str) -> str:
    """Where a checkpoint is now that was found before `remove_unfinished` gave it its name."""
    storage = Storage(location)
    match = _UNNAMED.fullmatch(storage.name)
    if match is None or storage.exists():
        return location
    return (storage.parent / match[1]).location


def _is_unfinished(storage: Storage) -> bool:
    """Whether a directory is a save, or a removal, that was cut off."""
    marks = (SAVING_FILENAME, f".{SAVING_FILENAME}.tmp")
    return any(storage.is_file(mark) for mark in marks) and not storage.is_file(META_FILENAME)


def _clear(storage: Storage) -> None:
    """Removes a directory, what says that it may be removed last."""
    for name in storage.files():
        if name != SAVING_FILENAME:
            storage.remove(name)
    storage.remove_all()


def recommit(location: str | Path | Storage) -> Manifest:
    """Makes a directory whose files a tool has changed a checkpoint again, with a manifest of its own."""
    storage = Storage(location)
    old = Manifest.read(storage)
    data = storage.read_bytes(META_FILENAME)
    storage.remove(META_FILENAME)
    names = [name for name in storage.files() if name not in (MANIFEST_FILENAME, META_FILENAME, SAVING_FILENAME)]
    files = {name: storage.sum_of(name) for name in names} | {META_FILENAME: FileSum.of(data)}
    manifest = replace(old, id=secrets.token_hex(8), files=files)
    storage.publish(MANIFEST_FILENAME, manifest.to_bytes())
    storage.publish(META_FILENAME, data)
    return manifest
