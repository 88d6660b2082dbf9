"""Copy on write: rows as they were at one moment, read in one thread while others change them.

A row that is about to change, is wanted and was not read yet is copied aside first. Counters and clocks, which every
lookup changes, are copied all at once when a snapshot begins, and so is optimiser state of a few numbers a row.
All that is small beside values.

Shape suffixes: N rows asked for, M those of them that are copied, R rows of an array, W width of a row.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.chunked_rows import ChunkedRows
from lightning_gr.embeddings.dynamic.row_numbers import RowNumbers

NARROW_BYTES = 16
"""Rows of no more bytes are copied all at once."""
_ASIDE_BYTES = 1 << 20  # of a chunk of rows aside


class CopyLimit:
    """How much may be aside at a time, and what copying has cost those who change rows.

    Args:
        max_bytes: beyond it they wait until rows were read.

    Attributes:
        condition: held by whoever reads rows or copies them.
        copied_bytes: all that was copied.
        waited_seconds: how long those who change rows were held up, by copying too.
    """

    def __init__(self, max_bytes: int) -> None:
        self.condition = threading.Condition()
        self.max_bytes = max_bytes
        self.held_bytes = self.copied_bytes = 0
        self.waited_seconds = 0.0


class RowsSnapshot:
    """The rows of an array as they are now; others may change them from now on, by way of the array.

    Args:
        rows: the array.
        num_rows: of its rows the first ones, which are in use or were.
        limit: of all arrays of a save together.

    Attributes:
        rows: the array with its chunks of the beginning, which may be released there and other ones come.
    """

    def __init__(self, rows: ChunkedRows, num_rows: int, limit: CopyLimit) -> None:
        assert rows.snapshot is None
        self._array = rows
        self.rows = copy.copy(rows)
        self._limit = limit
        # 0: not read yet. -1: read, or not wanted. Else its place aside, plus 1.
        self._places_R = torch.zeros(num_rows, dtype=torch.int32, device=rows.device)
        chunk_rows = 1 << max(_ASIDE_BYTES // max(rows.row_bytes, 1), 1).bit_length() - 1
        self._aside = ChunkedRows(width=rows.width, dtype=rows.dtype, chunk_rows=chunk_rows, device=rows.device)
        self._numbers = RowNumbers([self._aside], rows.device)
        # Fresh memory would cost more than the copies.
        self._read_NW = self._kept_NW = torch.empty(0, rows.width, dtype=rows.dtype, device=rows.device)
        if rows.width:
            rows.snapshot = self

    def keep(self, rows_N: Tensor) -> None:
        """Called before rows change: copies those that are still wanted; waits where too much is aside."""
        start = time.perf_counter()
        with self._limit.condition:
            while len(rows_M := self._wanted(rows_N)) and not self._copy(rows_M):
                self._limit.condition.wait()
            self._limit.waited_seconds += time.perf_counter() - start

    def _wanted(self, rows_N: Tensor) -> Tensor:
        if self._array.snapshot is not self:
            return rows_N[:0]
        rows_N = rows_N.to(self.rows.device)
        rows_N = rows_N[(rows_N >= 0) & (rows_N < len(self._places_R))]
        return rows_N[self._places_R[rows_N] == 0]

    def _copy(self, rows_M: Tensor) -> bool:
        limit, num_bytes = self._limit, len(rows_M) * self.rows.row_bytes
        if limit.held_bytes + num_bytes > limit.max_bytes:
            return False
        try:
            places_M = self._numbers.take(len(rows_M))
        except MemoryError:  # what is aside goes when it was read
            return False
        self._kept_NW = _room(self._kept_NW, len(rows_M))
        self._aside.scatter(places_M, self.rows.gather(rows_M, self._kept_NW[: len(rows_M)]))
        self._places_R[rows_M] = (places_M + 1).to(torch.int32)
        if self.rows.device.type == "cuda":
            torch.cuda.current_stream(self.rows.device).synchronize()  # it is read in another stream
        limit.held_bytes += num_bytes
        limit.copied_bytes += num_bytes
        return True

    def want_only(self, rows_N: Tensor) -> None:
        """Others need not be copied any more."""
        wanted_R = torch.zeros(len(self._places_R), dtype=torch.bool, device=self.rows.device)
        wanted_R[rows_N.to(self.rows.device)] = True
        with self._limit.condition:
            self._places_R[~wanted_R & (self._places_R == 0)] = -1
            self._limit.condition.notify_all()

    def take(self, rows_N: Tensor, out_NW: Tensor | None = None) -> Tensor:
        """Rows as they were, each asked for once; from now on they are not copied any more.

        Args:
            rows_N: int64, distinct; -1 is passed over.
            out_NW: where to put them, of the array's dtype; None for memory that the next call overwrites.

        Raises:
            RuntimeError: it was closed, so that rows may have changed since.
        """
        rows_N = rows_N.to(self.rows.device)
        if out_NW is None:
            self._read_NW = _room(self._read_NW, len(rows_N))
            out_NW = self._read_NW[: len(rows_N)]
        with self._limit.condition:
            if self.rows.width and self._array.snapshot is not self:
                raise RuntimeError("dynamic tables: the save was closed before all rows were written")
            self.rows.gather(rows_N, out_NW)
            is_asked_N = rows_N >= 0
            asked_M = rows_N[is_asked_N]
            places_M = self._places_R[asked_M].to(torch.int64) - 1
            if bool((places_M >= 0).any()):
                places_N = torch.full_like(rows_N, -1)
                places_N[is_asked_N] = places_M
                self._aside.gather(places_N, out_NW)
                places_M = places_M[places_M >= 0]
                self._numbers.give_back(places_M)
                self._limit.held_bytes -= len(places_M) * self.rows.row_bytes
            self._places_R[asked_M] = -1
            if out_NW.is_cuda:
                torch.cuda.current_stream(out_NW.device).synchronize()  # before others write there
            self._limit.condition.notify_all()
        return out_NW

    def close(self) -> None:
        """Nothing is copied any more, and copies are freed."""
        with self._limit.condition:
            if self._array.snapshot is self:
                self._array.snapshot = None
            self._limit.held_bytes -= self._numbers.num_used * self.rows.row_bytes
            self._numbers = RowNumbers([self._aside], self.rows.device)
            self._aside.set_chunks([])
            self._limit.condition.notify_all()


class CopiedRows:
    """Narrow rows, all copied at once, in the place of a `RowsSnapshot`: looking after each would cost more.

    Args:
        rows: the array.
        num_rows: of its rows the first ones.
    """

    def __init__(self, rows: ChunkedRows, num_rows: int) -> None:
        self.rows = rows
        self._copy_RW = rows.head(num_rows)

    def want_only(self, rows_N: Tensor) -> None:
        """Nothing to do."""

    def take(self, rows_N: Tensor) -> Tensor:
        """Rows as they were."""
        return self._copy_RW[rows_N.to(self._copy_RW.device)]

    def close(self) -> None:
        """Frees them."""
        self._copy_RW = self._copy_RW[:0]


def _room(buffer_NW: Tensor, num: int) -> Tensor:
    return buffer_NW if len(buffer_NW) >= num else buffer_NW.new_empty(num, buffer_NW.shape[1])


class SavedColumn(NamedTuple):
    """What is kept of rows under one name.

    Args:
        name: in files.
        dtype: of each number.
        shape: of a row's.
        take: the rows of some numbers, each asked for once, on the host.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor]


class StorageSnapshot:
    """Rows of a `RowStorage` as they were: `values` and `state` by copy on write, all else copied.

    Args:
        values: of rows.
        state: of rows.
        hot_values: fp32 values of hot rows, by numbers of their own; None where the precision is not mixed.
        metadata_R3: counters, last steps, last times.
        scores_R1: None without.
        hot_places_R1: number of each hot row's values plus 1, 0 of a cold one; None where the precision is not mixed.
        limit: of copies.
    """

    def __init__(
        self,
        *,
        values: RowsSnapshot,
        state: RowsSnapshot | CopiedRows,
        hot_values: RowsSnapshot | None,
        metadata_R3: Tensor,
        scores_R1: Tensor | None,
        hot_places_R1: Tensor | None,
    ) -> None:
        self._values, self._state, self._hot_values = values, state, hot_values
        self._metadata_R3, self._scores_R1, self._hot_places_R1 = metadata_R3, scores_R1, hot_places_R1

    def last_steps(self, rows_N: Tensor) -> Tensor:
        """Step of the last use, on the host."""
        return self._metadata_R3[:, 1][rows_N].cpu()

    @property
    def columns(self) -> list[SavedColumn]:
        """All that is kept of rows."""
        values, state = self._values.rows, self._state.rows
        dtype = values.dtype if self._hot_values is None else torch.float32
        columns = [
            SavedColumn("values", dtype, (values.width,), self._take_values),
            SavedColumn("state", state.dtype, (state.width,), lambda rows_N: self._state.take(rows_N).cpu()),
        ]
        for name, of_R in zip(("counts", "last_steps", "last_times"), self._metadata_R3.unbind(1), strict=True):
            columns.append(SavedColumn(name, of_R.dtype, (), lambda rows_N, of_R=of_R: of_R[rows_N].cpu()))  # type: ignore[misc]
        if (scores_R1 := self._scores_R1) is not None:
            columns.append(SavedColumn("scores", torch.float32, (), lambda rows_N: scores_R1[rows_N, 0].cpu()))
        if self._hot_places_R1 is not None:
            columns.append(
                SavedColumn("hot", torch.uint8, (), lambda rows_N: (self._hot_slots(rows_N) >= 0).byte().cpu())
            )
        return columns

    def _hot_slots(self, rows_N: Tensor) -> Tensor:
        assert self._hot_places_R1 is not None
        return self._hot_places_R1[rows_N, 0].to(torch.int64) - 1

    def want_only(self, rows_N: Tensor) -> None:
        """Others are not asked for."""
        self._state.want_only(rows_N)
        if self._hot_values is None:
            self._values.want_only(rows_N)
            return
        slots_N = self._hot_slots(rows_N)
        self._values.want_only(rows_N[slots_N < 0])
        self._hot_values.want_only(slots_N[slots_N >= 0])

    def _take_values(self, rows_N: Tensor) -> Tensor:
        if self._hot_values is None:
            return self._values.take(rows_N).cpu()
        slots_N = self._hot_slots(rows_N)
        values_ND = self._values.take(rows_N.masked_fill(slots_N >= 0, -1)).float()
        return self._hot_values.take(slots_N, values_ND).cpu()

    def close(self) -> None:
        """Nothing is copied any more."""
        for rows in (self._values, self._state, self._hot_values):
            if rows is not None:
                rows.close()
