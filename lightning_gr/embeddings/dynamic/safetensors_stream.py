"""Safetensors files written and read piece by piece, on a disk or behind a URL, in the format of any such file.

Shape suffixes: N rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gr.checkpoint.storage import FileSum, Storage

PIECE_BYTES = 2 << 20
"""About so much is in memory at a time, and is read under one lock."""

DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Those that saved tables have, by the format's names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 << 20

Ranges = Sequence[tuple[int, int]]
"""Rows from the first number to the one before the second."""


@dataclass(frozen=True)
class Column:
    """A tensor to be written.

    Args:
        name: in the file.
        dtype: one of `DTYPES`.
        shape: of all of it.
        pieces: its rows in order, on the host.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Column:
        """One that is in memory whole."""
        return cls(name, tensor.dtype, tuple(tensor.shape), [tensor.cpu()])

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(storage: Storage, name: str, metadata: Mapping[str, str], columns: Sequence[Column]) -> FileSum:
    """Writes a file from its beginning to its end; columns of wide numbers first, so that each number is aligned.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    columns = sorted(columns, key=lambda x: -x.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for column in columns:
        begin, end = end, end + column.num_bytes
        header[column.name] = {
            "dtype": _NAMES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with storage.create(name) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns:
            start = file.tell()
            for piece in column.pieces:
                assert piece.dtype == column.dtype, (column.name, piece.dtype)
                if piece.numel():
                    file.write(_bytes_of(piece.contiguous()))
            assert file.tell() - start == column.num_bytes, (column.name, file.tell() - start, column.num_bytes)
    return file.sum


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class SafetensorsFile:
    """A file that was looked through, and is opened again for each reading.

    Args:
        storage: where it is.
        name: of it.

    Attributes:
        metadata: the texts in its header.
        names: of its tensors.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is torn, or no such file.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        size = storage.size(name)
        with storage.open(name) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            text = bytearray(length)
            _read_into(file, memoryview(text))
        try:
            header = json.loads(text)
            self.metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
            offsets = {key: entry["data_offsets"] for key, entry in header.items()}
            self._tensors = {
                key: _Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + offsets[key][0])
                for key, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"its header cannot be understood ({type(error).__name__}: {error})") from error
        end = 0
        for key, (begin, stop) in sorted(offsets.items(), key=lambda x: x[1]):
            shape = self._tensors[key].shape
            if not all(type(x) is int and x >= 0 for x in (*shape, begin, stop)) or begin != end:
                raise ValueError(f"{key} is of shape {shape} at {begin}, expected it at {end}")
            if stop - begin != (wanted := math.prod(shape) * self._tensors[key].dtype.itemsize):
                raise ValueError(f"{key} of shape {shape} has {stop - begin} bytes of {wanted}")
            end = stop
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes of {8 + length + end}")

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str, ranges: Ranges | None = None) -> Tensor:
        """A tensor's rows of some ranges, or all.

        Raises:
            ValueError: the file ends before them.
        """
        stored = self._tensors[name]
        ranges = [(0, stored.shape[0])] if ranges is None else ranges
        out = torch.empty(sum(stop - start for start, stop in ranges), *stored.shape[1:], dtype=stored.dtype)
        at = 0
        with self._storage.open(self._name) as file:
            for start, stop in ranges:
                piece = out[at : at + stop - start]
                at += stop - start
                if piece.numel():
                    file.seek(stored.begin + start * stored.row_bytes)
                    _read_into(file, _bytes_of(piece))
        return out

    def pieces(self, name: str, ranges: Ranges | None = None) -> Iterator[Tensor]:
        """As `read`, a few rows at a time; the next ones take the place of those before in memory.

        Raises:
            ValueError: the file ends before them.
        """
        stored = self._tensors[name]
        ranges = [(0, stored.shape[0])] if ranges is None else ranges
        num = rows_of_a_piece(stored.row_bytes)
        buffer = torch.empty(num, *stored.shape[1:], dtype=stored.dtype)
        with self._storage.open(self._name) as file:
            for start, stop in ranges:
                file.seek(stored.begin + start * stored.row_bytes)
                for first in range(start, stop, num):
                    piece = buffer[: min(num, stop - first)]
                    if piece.numel():
                        _read_into(file, _bytes_of(piece))
                    yield piece


def rows_of_a_piece(row_bytes: int) -> int:
    """How many rows are written or read at a time."""
    return max(1, PIECE_BYTES // max(row_bytes, 1))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host that is not empty."""
    # Of one element any stride counts as contiguous.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_into(file: Any, view: memoryview) -> None:
    while len(view):
        if not (count := file.readinto(view)):
            raise ValueError(f"it ends {len(view)} bytes too early")
        view = view[count:]
