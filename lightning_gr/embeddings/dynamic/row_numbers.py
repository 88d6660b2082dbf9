"""RowNumbers: which rows of some chunked arrays are in use, and the arrays' growth by whole chunks.

Shape suffixes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.chunked_rows import ChunkedRows

_CHUNKS_KEPT = 2
"""Of arrays without a row in use: the one to fill next, and the one after it."""


class RowNumbers:
    """Hands out row numbers of arrays that grow together; one chunk more than they need is there in advance.

    Args:
        arrays: of equal chunk size, without chunks.
        device: where row numbers are wanted.
    """

    def __init__(self, arrays: Sequence[ChunkedRows], device: torch.device) -> None:
        self.arrays = tuple(arrays)
        self._chunk_rows = 1 << self.arrays[0].shift
        self._next = 0  # all rows from here on were never in use
        self._num_freed = 0
        self._freed = torch.empty(0, dtype=torch.int64, device=device)  # a stack, with room at its end
        self._is_reserved = False

    @property
    def num_used(self) -> int:
        """Rows in use."""
        return self._next - self._num_freed

    @property
    def end(self) -> int:
        """All rows from here on were never in use."""
        return self._next

    def reserve(self, n: int) -> None:
        """Makes room for `n` more rows, which is kept until the next `take`.

        Raises:
            MemoryError: there is none; nothing has changed.
        """
        if n == 0:
            return
        have = len(self.arrays[0].chunks)
        need = -(-(self._next + max(n - self._num_freed, 0)) // self._chunk_rows)
        new: list[list[Tensor]] = []
        while have + len(new) < need + 1:
            try:
                new.append([array.new_chunk() for array in self.arrays])
            except (RuntimeError, MemoryError) as error:
                if have + len(new) >= need:
                    break  # the one in advance can wait
                row_bytes = sum(array.row_bytes for array in self.arrays)
                rows = (need - have) * self._chunk_rows
                raise MemoryError(
                    f"no room for {n:,} more rows beside {self.num_used:,}: {rows * row_bytes:,} bytes are wanted"
                ) from error
        if new:
            for array, chunks in zip(self.arrays, zip(*new, strict=True), strict=True):
                array.set_chunks([*array.chunks, *chunks])
        self._is_reserved = True

    def take(self, n: int) -> Tensor:
        """Numbers of `n` rows, int64: those freed last first, then new ones in ascending order.

        Raises:
            MemoryError: there is no room; nothing has changed.
        """
        self.reserve(n)
        again = min(n, self._num_freed)
        new = torch.arange(self._next, self._next + n - again, device=self._freed.device)
        rows_N = torch.cat([self._freed[self._num_freed - again : self._num_freed].flip(0), new])
        self._num_freed -= again
        self._next += n - again
        self._is_reserved = False
        return rows_N

    def give_back(self, rows_N: Tensor) -> None:
        """Rows that may be handed out again; without any in use, all chunks but two are released."""
        total = self._num_freed + len(rows_N)
        assert total <= self._next, "rows are freed that are not in use"
        if total > len(self._freed):
            grown = self._freed.new_empty(max(2 * len(self._freed), total))
            grown[: self._num_freed] = self._freed[: self._num_freed]
            self._freed = grown
        self._freed[self._num_freed : total] = rows_N
        self._num_freed = total
        if self.num_used == 0 and not self._is_reserved:
            self._next = self._num_freed = 0
            self._freed = self._freed[:0].clone()
            for array in self.arrays:
                array.set_chunks(array.chunks[:_CHUNKS_KEPT])
