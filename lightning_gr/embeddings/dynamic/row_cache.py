"""RowCache: rows of host memory of which the device holds those used last.

Shape suffixes: N rows asked for, W width of a row, K slots of the cache, M rows that are missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.chunked_rows import ChunkedRows


class RowCache:
    """Reads and writes the rows of a `ChunkedRows` through a cache; every read gives what was written last.

    Misses are fetched, and the least recently used rows make room, written back where they were changed. A call with
    more distinct rows than the cache has goes around it.

    Args:
        rows: the array behind it, on the host.
        cache_rows: rows that the device holds.
        device: where they are, and where rows are wanted.
    """

    def __init__(self, rows: ChunkedRows, *, cache_rows: int, device: torch.device) -> None:
        assert cache_rows >= 1
        self.rows, self.device, self.dtype, self.width = rows, device, rows.dtype, rows.width
        self._values_KW = torch.empty(cache_rows, rows.width, dtype=rows.dtype, device=device)
        self._row_K = torch.full((cache_rows,), -1, dtype=torch.int64, device=device)
        self._used_K = torch.zeros(cache_rows, dtype=torch.int64, device=device)
        self._is_dirty_K = torch.zeros(cache_rows, dtype=torch.bool, device=device)
        self._slot_of_row = torch.empty(0, dtype=torch.int32, device=device)
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self._values_KW, self._row_K, self._used_K, self._is_dirty_K, self._slot_of_row)
        return sum(tensor.nbytes for tensor in tensors)

    def gather(self, rows_N: Tensor, out_NW: Tensor | None = None) -> Tensor:
        """As `ChunkedRows.gather`, on the device."""
        if out_NW is None:
            out_NW = torch.zeros(len(rows_N), self.width, dtype=self.dtype, device=self.device)
        present_N = (rows_N >= 0).nonzero()[:, 0]
        rows_N = rows_N[present_N]
        slots_N = self._enter(rows_N, fetches=True)
        if slots_N is None:
            slots_N = self._slots(rows_N)
            # What is cached may be newer than the host's.
            values_NW = torch.where(
                (slots_N >= 0)[:, None], self._values_KW[slots_N.clamp(min=0)], self.rows.gather(rows_N).to(self.device)
            )
        else:
            values_NW = self._values_KW[slots_N]
        out_NW[present_N] = values_NW
        return out_NW

    def scatter(self, rows_N: Tensor, values_NW: Tensor | None) -> None:
        """As `ChunkedRows.scatter`; zeros are written past the cache."""
        if values_NW is None:
            self.forget(rows_N)
            self.rows.scatter(rows_N, None)
            return
        assert values_NW.dtype == self.dtype, (values_NW.dtype, self.dtype)
        present_N = (rows_N >= 0).nonzero()[:, 0]
        rows_N, values_NW = rows_N[present_N], values_NW[present_N]
        slots_N = self._enter(rows_N, fetches=False)
        if slots_N is None:
            self.forget(rows_N)
            self.rows.scatter(rows_N, values_NW)
            return
        self._values_KW[slots_N] = values_NW
        self._is_dirty_K[slots_N] = True

    def forget(self, rows_N: Tensor) -> None:
        """Drops rows whose values no one wants any more, without writing them back."""
        slots_N = self._slots(rows_N[rows_N >= 0])
        slots_N = slots_N[slots_N >= 0]
        self._slot_of_row[self._row_K[slots_N]] = -1
        self._row_K[slots_N] = -1
        self._used_K[slots_N] = 0
        self._is_dirty_K[slots_N] = False

    def flush(self) -> None:
        """Writes what was changed back, so that the array behind has it all."""
        self._write_back(self._is_dirty_K.nonzero()[:, 0])

    def _slots(self, rows_N: Tensor) -> Tensor:
        if self.rows.size > len(self._slot_of_row):
            grown = self._slot_of_row.new_full((max(self.rows.size, 2 * len(self._slot_of_row)),), -1)
            grown[: len(self._slot_of_row)] = self._slot_of_row
            self._slot_of_row = grown
        return self._slot_of_row[rows_N].to(torch.int64)

    def _enter(self, rows_N: Tensor, *, fetches: bool) -> Tensor | None:
        """The slots of rows, all of them in the cache afterwards; None where they do not fit."""
        slots_N = self._slots(rows_N)
        missing_M = rows_N[slots_N < 0].unique()
        hits = slots_N[slots_N >= 0]
        is_kept_K = torch.zeros_like(self._is_dirty_K)
        is_kept_K[hits] = True
        if int(is_kept_K.sum()) + len(missing_M) > len(self._row_K):
            return None
        self._clock += 1
        self._used_K[hits] = self._clock
        if len(missing_M):
            victims_M = self._used_K.topk(len(missing_M), largest=False).indices
            self._write_back(victims_M)
            self._slot_of_row[self._row_K[victims_M][self._row_K[victims_M] >= 0]] = -1
            self._slot_of_row[missing_M] = victims_M.to(torch.int32)
            self._row_K[victims_M] = missing_M
            self._used_K[victims_M] = self._clock
            if fetches:
                self._values_KW[victims_M] = self.rows.gather(missing_M).to(self.device)
            slots_N = self._slots(rows_N)
        return slots_N

    def _write_back(self, slots: Tensor) -> None:
        slots = slots[self._is_dirty_K[slots]]
        self.rows.scatter(self._row_K[slots], self._values_KW[slots])
        self._is_dirty_K[slots] = False
