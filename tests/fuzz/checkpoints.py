"""Fuzzed checkpoints: a file changed in any way is refused by its name, and nothing of it is unpickled blindly."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lightning_gr.checkpoint.manifest import MANIFEST_FILENAME, Manifest
from lightning_gr.checkpoint.reader import CheckpointReader
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.embeddings.dynamic.table_files import read_table, table_names
from tests.fuzz.mutations import edited, edits, garbage
from tests.fuzz.outcome import Finding, Target, refusal

NEWEST = "3.ckpt"
"""It adds to 2.ckpt, which adds to 1.ckpt."""

CANARY = "FUZZ_UNPICKLED"


class _Runs:
    """Pickled, it is a command that whoever unpickles it runs."""

    def __init__(self, by: Callable[[str], Any]) -> None:
        self._by = by

    def __reduce__(self) -> Any:
        return self._by, (f"__import__('os').environ.__setitem__({CANARY!r}, '1')",)


_case = st.fixed_dictionaries(
    {
        "file": st.integers(0, 65535),
        "other": st.integers(0, 65535),
        "how": st.sampled_from(["edit", "edit", "edit", "garbage", "swap", "missing", "pickle", "folder"]),
        "changes": edits,
        "garbage": garbage,
        # With a manifest that has been made to fit, as somebody would who means harm.
        "hostile": st.booleans(),
    }
)


@functools.cache
def whole() -> Path:
    """A chain of three checkpoints of two processes, with static and dynamic tables; made once."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / "chain"
    folder.mkdir()
    make(folder)
    return folder


def make(folder: Path) -> None:
    """Trains a few steps on two processes, which save."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from gloo_processes import World

    world = World([0, 0], _save)
    world.train(str(folder))
    world.close()


def _save(folder: str) -> None:
    from tests.checkpoint.test_checkpoint_faults import save_some

    save_some(2, folder)


def _files(folder: Path) -> list[Path]:
    return [x for step in (1, 2, 3) for x in sorted((folder / f"{step}.ckpt").rglob("*")) if x.is_file()]


def _content(folder: Path) -> None:
    """Reads all that there is, as tools and runs do it."""
    reader = CheckpointReader(folder / NEWEST)
    reader.verify()
    _unverified(reader)


def _unverified(reader: CheckpointReader) -> None:
    reader.meta()
    reader.rank_states()
    reader.tensors()
    for folders in reader.collections().values():
        for name in table_names(folders):
            read_table(folders, name)


def _made_to_fit(path: Path, folder: Path) -> None:
    """Gives the manifest the file's present checksum."""
    step = folder / path.relative_to(folder).parts[0]
    manifest = Manifest.read(Storage(step))
    name = path.relative_to(step).as_posix()
    if name in manifest.files:
        files = {**manifest.files, name: FileSum.of(path.read_bytes())}
        (step / MANIFEST_FILENAME).write_bytes(replace(manifest, files=files).to_bytes())


def _is_hostile(path: Path, asked: dict[str, Any]) -> bool:
    """Whether the manifest fits what was changed."""
    return asked["hostile"] and asked["how"] not in ("missing", "folder") and path.name != MANIFEST_FILENAME


class Chain:
    """A copy of the checkpoints that inputs may spoil, one after another.

    Args:
        folder: the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.data = {path: path.read_bytes() for path in self.files}

    def restore(self) -> None:
        """Undoes what an input did."""
        for path, data in self.data.items():
            if path.is_dir():
                shutil.rmtree(path)
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def check(self, asked: dict[str, Any]) -> str:
        """Spoils one file as asked, reads, and undoes it."""
        path = self.files[asked["file"] * len(self.files) // 65536]
        try:
            if not self._spoil(path, asked):
                return "accepted"  # nothing has changed
            os.environ.pop(CANARY, None)
            return self._read(path, asked)
        finally:
            self.restore()

    def _spoil(self, path: Path, asked: dict[str, Any]) -> bool:
        how, data = asked["how"], self.data[path]
        if how in ("missing", "folder"):
            path.unlink()
            if how == "folder":
                path.mkdir()
            return True
        other = self.data[self.files[asked["other"] * len(self.files) // 65536]]
        new = {
            "edit": lambda: edited(data, asked["changes"]),
            "garbage": lambda: asked["garbage"],
            "swap": lambda: other,
            "pickle": lambda: pickle.dumps(_Runs([exec, eval][asked["other"] % 2])),
        }[how]()
        path.write_bytes(new)
        if new != data and _is_hostile(path, asked):
            _made_to_fit(path, self.folder)
        return new != data

    def _read(self, path: Path, asked: dict[str, Any]) -> str:
        said = refusal(lambda: _content(self.folder), refusals=(ValueError, FileNotFoundError))
        if CANARY in os.environ:
            raise Finding("a pickle was run")
        if said is None:
            if _is_hostile(path, asked):
                return "accepted"  # what nobody reads, or another checkpoint, and a valid one
            raise Finding(f"damage was taken in: {path.relative_to(self.folder)}, {asked['how']}")
        if not _is_hostile(path, asked) and str(path) not in said and path.parent.name not in said:
            raise Finding(f"{path.relative_to(self.folder)} is not named: {said}")
        return "refused"


@functools.cache
def _chain() -> Chain:
    return Chain(whole())


def _check(asked: dict[str, Any]) -> str:
    return _chain().check(asked)


CHECKPOINTS = Target("checkpoints", "checkpoints: each file cut, flipped, swapped, foreign, hostile", _case, _check)
