"""ChunkedRows: an array of rows in chunks that never move, read and written by number.

A row's number is its chunk (the high bits) and its place in there (the low bits).

Shape suffixes: N rows asked for, W width of a row, M rows of one chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.native import load_native

_SOURCE = Path(__file__).with_name("row_storage.cpp")

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.row_snapshot import RowsSnapshot


class ChunkedRows:
    """Rows of equal width and dtype; rows of -1 are read as zeros and never written.

    Args:
        width: elements of a row.
        dtype: of an element.
        chunk_rows: rows of a chunk, a power of two.
        device: where the chunks are.

    Attributes:
        snapshot: asked before rows change; None while no save is under way.
    """

    def __init__(self, *, width: int, dtype: torch.dtype, chunk_rows: int, device: torch.device) -> None:
        assert chunk_rows & (chunk_rows - 1) == 0
        self.width, self.dtype, self.device = width, dtype, device
        self.shift = chunk_rows.bit_length() - 1
        self.chunks: list[Tensor] = []
        self.pointers = torch.zeros(0, dtype=torch.int64)
        self.snapshot: RowsSnapshot | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Rows in all chunks."""
        return len(self.chunks) << self.shift

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return self.size * self.row_bytes

    def new_chunk(self) -> Tensor:
        """A chunk that is not one of the array's yet; its contents are arbitrary."""
        if self.device.type == "cpu" and torch.cuda.is_available():  # copies to and from the device are quicker
            return torch.empty(1 << self.shift, self.width, dtype=self.dtype, pin_memory=True)
        return self._empty(1 << self.shift)

    def set_chunks(self, chunks: list[Tensor]) -> None:
        """The array is these chunks from now on."""
        self.pointers = torch.tensor([chunk.data_ptr() for chunk in chunks], dtype=torch.int64)
        self.chunks = chunks

    def gather(self, rows_N: Tensor, out_NW: Tensor | None = None) -> Tensor:
        """Rows by number, on the array's device.

        Args:
            rows_N: int64; they may repeat.
            out_NW: where to put them, of the array's dtype; there rows of -1 are left as they are.
        """
        rows_N = rows_N.to(self.device)
        keeps = out_NW is not None
        if out_NW is None:
            out_NW = self._empty(len(rows_N))
        assert out_NW.dtype == self.dtype
        assert out_NW.is_contiguous()
        if not self.width or self._native("gather", rows_N, out_NW, int(keeps)):
            return out_NW
        if not keeps:
            out_NW.zero_()
        for chunk, at_M, local_M in self._by_chunk(rows_N):
            out_NW[at_M] = chunk[local_M]
        return out_NW

    def scatter(self, rows_N: Tensor, values_NW: Tensor | None) -> None:
        """Writes distinct rows: values of the array's dtype, or zeros for None."""
        rows_N = rows_N.to(self.device)
        self.before_change(rows_N)
        if values_NW is not None:
            assert values_NW.dtype == self.dtype, (values_NW.dtype, self.dtype)
            assert values_NW.shape == (len(rows_N), self.width), (values_NW.shape, len(rows_N), self.width)
            values_NW = values_NW.to(self.device).contiguous()
        if not self.width or self._native("scatter", rows_N, values_NW):
            return
        for chunk, at_M, local_M in self._by_chunk(rows_N):
            chunk[local_M] = 0 if values_NW is None else values_NW[at_M]

    def before_change(self, rows_N: Tensor) -> None:
        """Called by whoever writes rows where they lie."""
        if (snapshot := self.snapshot) is not None:  # read once: another thread may end it
            snapshot.keep(rows_N)

    def head(self, num: int) -> Tensor:
        """A copy of the first rows."""
        out_NW = self._empty(num)
        for start, chunk in zip(range(0, num, 1 << self.shift), self.chunks, strict=False):
            out_NW[start : start + len(chunk)] = chunk[: num - start]
        return out_NW

    def _empty(self, num: int) -> Tensor:
        if self.device.type == "cpu":
            return empty_in_huge_pages(num, self.width, dtype=self.dtype)
        return torch.empty(num, self.width, dtype=self.dtype, device=self.device)

    def _native(self, name: str, rows_N: Tensor, *rest: Tensor | int | None) -> bool:
        if self.device.type != "cpu":
            return False
        head = (self.pointers, self.size, self.shift, self.row_bytes)
        return run_native(name, *head, rows_N.contiguous(), len(rows_N), *rest)

    def _by_chunk(self, rows_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each chunk that occurs, with the places in `rows_N` and in the chunk."""
        order_N = rows_N.argsort(stable=True)
        sorted_N = rows_N[order_N]
        chunks, sizes = (sorted_N >> self.shift).unique_consecutive(return_counts=True)
        start = 0
        for chunk, size in zip(chunks.tolist(), sizes.tolist(), strict=True):
            here = slice(start, start + size)
            start += size
            if chunk < 0:
                assert int(sorted_N[0]) == -1, f"row {int(sorted_N[0])}"
                continue
            assert chunk < len(self.chunks), f"row {int(sorted_N[-1])} of {self.size}"
            yield self.chunks[chunk], order_N[here], sorted_N[here] & ((1 << self.shift) - 1)


def run_native(name: str, *arguments: Tensor | int | float | None) -> bool:
    """Runs a function of the C++ file on contiguous host tensors; False where there is no compiler."""
    native = load_native(_SOURCE)
    if native is None:
        return False
    function = getattr(native, name)
    function.restype = ctypes.c_int64
    wrong = function(*(_argument(x) for x in arguments))
    assert wrong == 0, f"{name}: {wrong} rows are out of range"
    return True


def _argument(x: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(x, float):
        return ctypes.c_double(x)
    if isinstance(x, int):
        return ctypes.c_int64(x)
    return ctypes.c_void_p(None if x is None else x.data_ptr())
