"""Storage: files that are whole or not there, on a disk and behind a URL."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

from lightning_gr.checkpoint import storage as storage_module
from lightning_gr.checkpoint.storage import FileSum, Storage


@pytest.fixture(params=["disk", "file URL", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty directory of each kind."""
    if request.param == "memory":
        url = f"memory://storage{time.time_ns()}"
        yield Storage(url)
        memory = fsspec.filesystem("memory")
        for name in memory.find(url):
            memory.rm_file(name)
    else:
        yield Storage(f"file://{tmp_path}/run" if request.param == "file URL" else tmp_path / "run")


def sum_of(data: bytes) -> FileSum:
    return FileSum(len(data), xxhash.xxh3_64(data).hexdigest())


def test_what_is_written_is_there_with_its_checksum(place: Storage) -> None:
    place.make()
    pieces = [b"a" * 7, b"", bytes(range(256)) * 40, b"z"]
    data = b"".join(pieces)
    with place.create("deep/er/big") as file:
        for piece in pieces:
            file.write(piece)
            assert file.tell() == file.sum.size
        file.write(memoryview(bytearray(b"12345678")).cast("Q"))
    data += b"12345678"
    assert file.sum == place.sum_of("deep/er/big") == sum_of(data) == FileSum.of(data)
    assert place.read_bytes("deep/er/big") == data
    assert place.publish("small", b"one") == sum_of(b"one")
    assert place.publish("small", b"other") == sum_of(b"other")
    assert place.read_bytes("small") == b"other"
    with place.open("deep/er/big") as opened:
        opened.seek(7)
        assert opened.read(3) == bytes(range(3))
    assert (place.size("small"), place.size("deep/er/big")) == (5, len(data))
    assert place.names() == ["deep", "small"]
    assert place.names("deep") == ["er"]
    assert place.files() == ["deep/er/big", "small"]
    assert (place / "deep").files() == ["er/big"]
    assert place.exists()
    assert place.exists("deep/er")
    assert place.is_directory("deep")
    assert place.is_file("small")
    assert not place.is_file("deep")
    assert not place.exists("other")


def test_an_empty_file_is_a_file(place: Storage) -> None:
    with place.create("empty") as file:
        pass
    assert file.sum == place.sum_of("empty") == sum_of(b"")
    assert place.is_file("empty")


def test_nothing_is_left_of_a_file_that_failed(place: Storage) -> None:
    place.publish("kept", b"1")
    with pytest.raises(RuntimeError, match="broken"), place.create("torn") as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError("broken")
    assert place.names() == ["kept"]
    assert not place.exists("torn")


def test_names_of_places(tmp_path: Path) -> None:
    place = Storage(tmp_path) / "run"
    assert (place.name, place.parent, str(place)) == ("run", Storage(tmp_path), f"{tmp_path}/run")
    assert place.path_of("a/b") == f"{tmp_path}/run/a/b"
    assert Storage(f"file://{tmp_path}/run") == place == Storage(place.location) == Storage(f"{place.location}/")
    assert len({place, Storage(place)}) == 1
    url = Storage("memory://bucket/run/one")
    assert (url.name, url.parent, url.is_local) == ("one", Storage("memory://bucket/run"), False)
    assert url.path_of("x") == (url / "x").location
    assert url.path_of("x").endswith("bucket/run/one/x")


def test_a_relative_path_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Storage("run")
    place.publish("x", b"1")
    monkeypatch.chdir("/")
    assert place.read_bytes("x") == b"1", "it stays where it was"
    assert (tmp_path / "run" / "x").exists()


def test_what_is_not_there(place: Storage) -> None:
    assert not place.exists()
    assert place.names() == place.files() == []
    place.remove("nothing")
    place.remove_all()
    for ask in (place.size, place.open, place.read_bytes, place.sum_of):
        with pytest.raises(FileNotFoundError):
            ask("nothing")


def test_removing(place: Storage) -> None:
    beside = place.parent / "beside"
    for each in (place, beside):
        each.publish("deep/x", b"1")
        each.publish("y", b"2")
    place.remove("y")
    assert place.files() == ["deep/x"]
    place.remove_all()
    assert not place.exists()
    assert beside.files() == ["deep/x", "y"]
    beside.remove_all()


@pytest.mark.parametrize("name", ["run[1]", "run?", "run*", "a b", "epoch=1,step=2", "ü%20#"])
def test_names_that_mean_something_elsewhere(place: Storage, name: str) -> None:
    for each in ("run1", "runs", name):
        (place / each).publish("deep/x", each.encode())
    odd = place / name
    assert odd.name == name
    assert odd.files() == ["deep/x"]
    assert odd.read_bytes("deep/x") == name.encode()
    assert place.names() == sorted(["run1", "runs", name])
    odd.remove_all()
    assert place.names() == ["run1", "runs"]


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    real = Storage(tmp_path / "real")
    real.publish("x", b"1")
    (tmp_path / "link").symlink_to("real")
    link = Storage(tmp_path / "link")
    assert link.is_link()
    assert Storage(tmp_path).is_link("link")
    assert not real.is_link()
    link.remove_all()
    assert real.files() == ["x"]
    assert not os.path.lexists(tmp_path / "link")


def test_a_directory_gets_another_name(tmp_path: Path) -> None:
    place = Storage(tmp_path / "old")
    place.publish("x", b"1")
    place.rename_to("new")
    assert Storage(tmp_path).names() == ["new"]
    assert Storage(tmp_path / "new").read_bytes("x") == b"1"


def test_names_are_those_of_now(place: Storage) -> None:
    place.publish("a", b"1")
    assert place.names() == ["a"]
    stranger = Storage(place.location)
    stranger.publish("b", b"2")
    assert place.names() == ["a", "b"]
    assert place.files() == ["a", "b"]
    stranger.remove("a")
    assert place.names() == ["b"]


class Full:
    """A file of a disk that takes so many bytes more, of each write what still goes in, and then none."""

    left = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = open(*args, **kwargs)  # noqa: SIM115
        self.fileno, self.close, self.flush = self.file.fileno, self.file.close, self.file.flush

    def write(self, data: Any) -> int:
        taken = bytes(data)[: type(self).left]
        if not taken and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        type(self).left -= len(taken)
        return self.file.write(taken)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Storage(tmp_path)
    place.publish("mark", b"old")
    monkeypatch.setattr(storage_module, "open", Full, raising=False)
    for room in (0, 1, 9):
        Full.left = room
        with pytest.raises(OSError, match=f"{tmp_path}/big: cannot be written .No space left") as found:  # noqa: SIM117
            with place.create("big") as file:
                file.write(b"0123456789")
        assert found.value.errno == errno.ENOSPC
        assert place.files() == ["mark"]
    Full.left = 0
    with pytest.raises(OSError, match=f"{tmp_path}/mark: cannot be written .No space left") as found:
        place.publish("mark", b"new")
    assert found.value.errno == errno.ENOSPC
    assert place.files() == ["mark"]
    assert place.read_bytes("mark") == b"old"


def test_a_disk_that_takes_a_part_of_each_write_gets_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Full):
        def write(self, data: Any) -> int:
            return self.file.write(bytes(data)[:3])

    monkeypatch.setattr(storage_module, "open", Slow, raising=False)
    with Storage(tmp_path).create("x") as file:
        file.write(b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert file.sum == sum_of(b"0123456789")


def test_an_error_of_the_disk_at_the_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    place = Storage(tmp_path)
    for name in ("fdatasync", "fsync"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=f"{tmp_path}/x: cannot be written"), place.create("x") as file:
        file.write(b"1")
    with pytest.raises(OSError, match=f"{tmp_path}/y: cannot be written"):
        place.publish("y", b"1")
    assert place.files() == []


def test_a_reader_never_sees_half_of_a_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens in between is looked at by somebody else."""
    place = Storage(tmp_path)
    place.publish("mark", b"old" * 100)
    seen: list[bytes] = []

    class Watched(Full):
        def write(self, data: Any) -> int:
            for place_of in range(0, len(data), 50):
                self.file.write(data[place_of : place_of + 50])
                self.file.flush()
                seen.append((tmp_path / "mark").read_bytes())
            return len(data)

    monkeypatch.setattr(storage_module, "open", Watched, raising=False)
    place.publish("mark", b"new" * 100)
    assert len(seen) == 6
    assert set(seen) == {b"old" * 100}
    assert place.read_bytes("mark") == b"new" * 100
