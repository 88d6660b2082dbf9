"""Manifest: what a checkpoint consists of, file by file with checksums, and which checkpoint it adds to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from lightning_gr.checkpoint.checksummed_json import from_json, to_json
from lightning_gr.checkpoint.storage import FileSum, Storage

MANIFEST_FILENAME = "manifest.json"
FORMAT = "lightning-gr checkpoint 2"


@dataclass(frozen=True)
class Base:
    """The checkpoint that one with changed rows alone adds to.

    Args:
        name: of its directory, beside that of the one that adds to it.
        id: of its manifest.
    """

    name: str
    id: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Args:
        id: a random word, another one for each save.
        step: optimizer steps done.
        epoch: epochs done.
        world_size: processes that saved it.
        saved_at: ISO 8601 in UTC, for people: nothing is decided by it.
        attempt: how many runs had begun to save into the folder.
        files: of every other file of the directory, by its path from there, the commit mark included.
        base: what it adds to; None of a full one.
        delta_of: by dynamic collection, the number of the step after its base; empty of a full one.
    """

    id: str
    step: int
    epoch: int
    world_size: int
    saved_at: str
    attempt: int
    files: Mapping[str, FileSum]
    base: Base | None = None
    delta_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def to_bytes(self) -> bytes:
        """The file's contents, with a checksum of themselves."""
        files = {name: [x.size, x.checksum] for name, x in sorted(self.files.items())}
        return to_json({**asdict(self), "files": files}, format=FORMAT)

    @classmethod
    def read(cls, storage: Storage) -> Manifest:
        """That of a checkpoint directory.

        Raises:
            ValueError: it is missing, damaged, or of something else; names the file.
        """
        path = storage.path_of(MANIFEST_FILENAME)
        try:
            content = from_json(storage.read_bytes(MANIFEST_FILENAME), format=FORMAT)
            files = {check_name(name): FileSum(int(size), str(sum_)) for name, (size, sum_) in content["files"].items()}
            base = content["base"]
            if base is not None:
                base = Base(check_name(base["name"]), str(base["id"]))
                if "/" in base.name:
                    raise ValueError(f"its base {base.name!r} is not beside it")
            return cls(
                id=str(content["id"]),
                saved_at=str(content["saved_at"]),
                files=files,
                base=base,
                delta_of={str(path): int(step) for path, step in content["delta_of"].items()},
                **{name: int(content[name]) for name in ("step", "epoch", "world_size", "attempt")},
            )
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing; use another checkpoint") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({error}); use another checkpoint") from error

    def check_sizes(self, storage: Storage) -> None:
        """Looks whether all files are there in their full size.

        Raises:
            ValueError: names the first that is not.
        """
        for name, wanted in self.files.items():
            try:
                size = storage.size(name)
            except FileNotFoundError as error:
                raise ValueError(f"{storage.path_of(name)}: missing; use another checkpoint") from error
            if size != wanted.size:
                raise ValueError(f"{storage.path_of(name)}: has {size} bytes of {wanted.size}; use another checkpoint")

    def check_contents(self, storage: Storage, names: Iterable[str] | None = None) -> None:
        """Reads files through and compares their checksums.

        Args:
            storage: the checkpoint's directory.
            names: of the files; None means all.

        Raises:
            ValueError: names the first file that is missing or damaged.
        """
        for name in self.files if names is None else names:
            try:
                found = storage.sum_of(name)
            except (OSError, FileNotFoundError) as error:
                raise ValueError(
                    f"{storage.path_of(name)}: cannot be read ({error}); use another checkpoint"
                ) from error
            if found != self.files[name]:
                raise ValueError(
                    f"{storage.path_of(name)}: damaged ({found.size} bytes with checksum {found.checksum}, saved were "
                    f"{self.files[name].size} with {self.files[name].checksum}); use another checkpoint"
                )


def check_name(name: str) -> str:
    """The name of a file inside a directory, as a file that may come from anywhere gives it.

    Raises:
        ValueError: it leads out of the directory, or is none.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or "\\" in name:
        raise ValueError(f"{name!r} is no name of a file in it")
    return name
