"""Storage: a directory on a disk or behind any fsspec URL, whose files are checksummed as they are written.

Local paths and URLs take one way. No file is renamed where the file system cannot do so, and nothing that another
reader may take for complete is ever written piece by piece: see `Storage.publish`.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem
from typing_extensions import override

_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileSum:
    """What a file must be like.

    Args:
        size: in bytes.
        checksum: XXH3 of 64 bits, in hexadecimal digits.
    """

    size: int
    checksum: str

    @classmethod
    def of(cls, data: bytes) -> FileSum:
        """That of some bytes."""
        return cls(len(data), xxhash.xxh3_64_hexdigest(data))


class SummedFile(io.RawIOBase):
    """A file that is being written from its beginning to its end, with its checksum.

    Args:
        file: where the bytes go.
        path: of it, for messages.

    Attributes:
        error: of the last write, for whoever calls by way of a library that has its own words for it.
    """

    def __init__(self, file: Any, path: str) -> None:
        super().__init__()
        self._file, self.path = file, path
        self._size = 0
        self._hash = xxhash.xxh3_64()
        self.error: OSError | None = None

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        """Appends bytes, or what gives its own as a buffer."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = OSError(error.errno, f"{self.path}: cannot be written ({error.strerror or error})")
            raise self.error from error
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    @override
    def tell(self) -> int:
        return self._size

    @property
    def sum(self) -> FileSum:
        """Of what was written so far."""
        return FileSum(self._size, self._hash.hexdigest())


class Storage:
    """A directory of a checkpoint, or of several.

    Args:
        location: a path, or a URL of a protocol that fsspec knows (``s3://bucket/run``).

    Attributes:
        location: as messages show it; another `Storage` can be made of it.
        is_local: whether it is on a disk of this machine, where files are flushed to the disk and can be renamed.
    """

    def __init__(self, location: str | Path | Storage) -> None:
        self._fs: Any
        self._root: str
        if isinstance(location, Storage):
            self._fs, self._root = location._fs, location._root
        elif "://" not in (text := os.fspath(location)):
            self._fs, self._root = LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
        elif "::" in text.partition("://")[2]:
            raise ValueError(f"{text}: fsspec takes :: for the end of a URL; choose a name without")
        else:
            try:
                self._fs, self._root = fsspec.core.url_to_fs(text)
            except (ValueError, ImportError) as error:  # an unknown protocol, or a package that it needs
                raise ValueError(f"{text}: cannot be opened ({error}); correct the URL, or install that") from error
        self._settle()

    def _settle(self) -> None:
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.location: str = self._root if self.is_local else self._fs.unstrip_protocol(self._root)

    def _elsewhere(self, root: str) -> Storage:
        """Another directory of the same file system."""
        other = object.__new__(Storage)
        other._fs, other._root = self._fs, root
        other._settle()
        return other

    def __truediv__(self, name: str) -> Storage:
        return self._elsewhere(posixpath.join(self._root, name))

    def __str__(self) -> str:
        return self.location

    def __repr__(self) -> str:
        return f"Storage({self.location!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.location == self.location

    def __hash__(self) -> int:
        return hash(self.location)

    @property
    def name(self) -> str:
        """The last part of the location."""
        return posixpath.basename(self._root.rstrip("/"))

    @property
    def parent(self) -> Storage:
        """The directory that this one is in."""
        return self._elsewhere(posixpath.dirname(self._root.rstrip("/")))

    def path_of(self, name: str) -> str:
        """Where a file of it is, for messages."""
        return f"{self.location.rstrip('/')}/{name}"

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name) if name else self._root

    # ---- looking -----------------------------------------------------------------------------------------------

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or a directory; an empty name means the directory itself."""
        return bool(self._fs.exists(self._at(name)))

    def is_file(self, name: str = "") -> bool:
        """Whether there is a file."""
        return bool(self._fs.isfile(self._at(name)))

    def is_directory(self, name: str = "") -> bool:
        """Whether there is a directory."""
        return bool(self._fs.isdir(self._at(name)))

    def is_link(self, name: str = "") -> bool:
        """Whether a local name stands for another one."""
        return self.is_local and os.path.islink(self._at(name))

    def names(self, name: str = "") -> list[str]:
        """What is in a directory, sorted; nothing where there is none."""
        self._fs.invalidate_cache(self._at(name))
        try:
            found = self._fs.ls(self._at(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        own = self._at(name).rstrip("/")
        return sorted({posixpath.basename(str(x).rstrip("/")) for x in found if str(x).rstrip("/") != own})

    def files(self) -> list[str]:
        """Every file below the directory, sorted, by its path from there."""
        self._fs.invalidate_cache(self._root)
        root = self._root.rstrip("/")
        return sorted(posixpath.relpath(str(x), root) for x in self._fs.find(root))

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return int(self._fs.size(self._at(name)))

    # ---- reading -----------------------------------------------------------------------------------------------

    def open(self, name: str) -> BinaryIO:
        """A file to read in any order, unbuffered on a disk.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.is_local:
            return cast("BinaryIO", open(self._at(name), "rb", buffering=0))
        return cast("BinaryIO", self._fs.open(self._at(name), "rb"))

    def read_bytes(self, name: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return bytes(self._fs.cat_file(self._at(name)))

    def sum_of(self, name: str) -> FileSum:
        """Reads a file through for its checksum."""
        buffer = memoryview(bytearray(_READ_BYTES))
        found, size = xxhash.xxh3_64(), 0
        with self.open(name) as file:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                found.update(buffer[:count])
                size += count
        return FileSum(size, found.hexdigest())

    # ---- writing -----------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Makes the directory where the file system has such things."""
        self._fs.makedirs(self._root, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[SummedFile]:
        """A new file to write from its beginning to its end; it is on the disk when the context ends.

        After an error nothing is left of it. Others may see a part of it before: see `publish`.
        """
        path = self._at(name)
        self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
        raw: Any = open(path, "wb", buffering=0) if self.is_local else self._fs.open(path, "wb")  # noqa: SIM115
        try:
            written = SummedFile(_Complete(raw) if self.is_local else raw, self.path_of(name))
            yield written
            if self.is_local:
                try:
                    os.fdatasync(raw.fileno())
                except OSError as error:
                    raise OSError(error.errno, f"{written.path}: cannot be written ({error.strerror})") from error
            raw.close()
        except BaseException:
            _give_up(raw)
            if self._fs.exists(path):
                self._fs.rm_file(path)
            raise

    def publish(self, name: str, data: bytes) -> FileSum:
        """Writes a small file whole or not at all; replaces one of that name.

        On a disk it is written beside and renamed; elsewhere it is put in one request.
        """
        path = self._at(name)
        self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if not self.is_local:
            self._fs.pipe_file(path, data)
            return FileSum.of(data)
        beside = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.tmp")
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            Path(beside).unlink(missing_ok=True)
            raise OSError(error.errno, f"{self.path_of(name)}: cannot be written ({error.strerror})") from error
        _sync_directory(posixpath.dirname(path))
        return FileSum.of(data)

    def flush_directories(self) -> None:
        """Makes the names of all files last through a loss of power."""
        for folder in sorted({posixpath.dirname(name) for name in self.files()} | {""}) if self.is_local else ():
            _sync_directory(self._at(folder))

    def remove(self, name: str) -> None:
        """Removes a file; nothing where there is none."""
        try:
            self._fs.rm_file(self._at(name))
        except FileNotFoundError:
            return

    def remove_all(self) -> None:
        """Removes the directory with everything in it."""
        if self.is_local and os.path.islink(self._root):
            os.unlink(self._root)
            return
        if self.is_local:
            shutil.rmtree(self._root, ignore_errors=not os.path.isdir(self._root))
            return
        self._fs.invalidate_cache(self._root)
        # Name by name: `rm` would take [ and * for patterns.
        for path in self._fs.find(self._root):
            self._fs.rm_file(path)
        for path in sorted(self._fs.find(self._root, withdirs=True), reverse=True) + [self._root]:
            with contextlib.suppress(OSError):
                self._fs.rmdir(path)

    def link(self, name: str, to: str) -> None:
        """On a disk, makes a name stand for another one in the directory; elsewhere there are no links."""
        if not self.is_local or (self.is_link(name) and os.readlink(self._at(name)) == to):
            return
        if self.exists(name) and not self.is_link(name):
            return  # somebody else's
        beside = self._at(f".{name}.tmp")
        Path(beside).unlink(missing_ok=True)
        os.symlink(to, beside)
        os.replace(beside, self._at(name))

    def rename_to(self, name: str) -> None:
        """Gives a local directory another name beside its own, which is free."""
        assert self.is_local
        parent = posixpath.dirname(self._root)
        os.rename(self._root, posixpath.join(parent, name))
        _sync_directory(parent)


class _Complete:
    """An unbuffered file that writes all of what it is given."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def write(self, view: memoryview) -> None:
        while len(view):
            view = view[self._raw.write(view) or 0 :]


def _give_up(raw: Any) -> None:
    """Closes a file without an error of its own; a remote one is not put."""
    try:
        if hasattr(raw, "discard"):
            raw.discard()
        raw.close()
    except Exception:  # the first error is the one that matters
        pass


def _sync_directory(path: str) -> None:
    """Makes a rename last through a loss of power."""
    handle = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
