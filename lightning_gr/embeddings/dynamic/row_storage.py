"""RowStorage: the rows of dynamic tables with optimiser state, counters and clocks, in chunks that never move.

It is the embedding structure of MTGenRec (arXiv 2505.12663, section 3.1), which knows rows by number; which key has
which row is the key index's.

Shape suffixes: N rows, D width, S width of optimiser state.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.chunked_rows import ChunkedRows, run_native
from lightning_gr.embeddings.dynamic.row_cache import RowCache
from lightning_gr.embeddings.dynamic.row_numbers import RowNumbers
from lightning_gr.embeddings.dynamic.row_snapshot import (
    NARROW_BYTES,
    CopiedRows,
    CopyLimit,
    RowsSnapshot,
    StorageSnapshot,
)
from lightning_gr.embeddings.dynamic.stochastic_rounding import round_stochastically

Precision = Literal["fp32", "bf16", "fp16", "mixed"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.float16}


class Metadata(NamedTuple):
    """What is kept of rows beside their values.

    Args:
        counts: int64, how often each occurred.
        last_steps: int64, step of the last use.
        last_times: int64, time of the last use, in the data's seconds.
        scores: float32, set by the user; None where the storage has none.
    """

    counts: Tensor
    last_steps: Tensor
    last_times: Tensor
    scores: Tensor | None = None


class RowStorage:
    """Rows by number: values, optimiser state, metadata.

    A chunk is allocated ahead of need and stays where it is, so growth copies nothing. Rows of -1 are read as zeros and
    never written; other rows must be in use.

    Args:
        dim: width of a row.
        state_width: float32 numbers of optimiser state of a row.
        precision: of the values; `mixed` keeps rows that occurred `hot_count` times in fp32 and the others in fp16
            (MTGenRec's mixed precision).
        hot_count: of `mixed`.
        chunk_rows: rows of a chunk, a power of two.
        device: where the rows are wanted.
        placement: `device`, or `host` for values and state in host memory, of which the device caches some.
        cache_rows: rows that the device holds, of `host`.
        scores: whether rows have a score.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        dim: int,
        state_width: int,
        precision: Precision = "fp32",
        hot_count: int = 0,
        chunk_rows: int = 16384,
        device: torch.device | str = "cpu",
        placement: Literal["device", "host"] = "device",
        cache_rows: int = 0,
        scores: bool = False,
    ) -> None:
        if dim < 1 or state_width < 0:
            raise ValueError(f"dim={dim}, state_width={state_width}: expected at least 1 and 0")
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(get_args(Precision))}")
        if precision == "mixed" and hot_count < 1:
            raise ValueError(f"hot_count={hot_count}: precision=mixed needs at least 1")
        if chunk_rows < 1 or chunk_rows & (chunk_rows - 1):
            raise ValueError(f"chunk_rows={chunk_rows}: expected a power of two")
        if placement not in ("device", "host"):
            raise ValueError(f"placement={placement!r}: expected device or host")
        if placement == "host" and cache_rows < 1:
            raise ValueError(f"cache_rows={cache_rows}: placement=host needs at least 1")
        self.dim, self.state_width, self.precision, self.hot_count = dim, state_width, precision, hot_count
        self.device = torch.device(device)
        host = torch.device("cpu") if placement == "host" else self.device

        def rows(width: int, dtype: torch.dtype, where: torch.device) -> ChunkedRows:
            return ChunkedRows(width=width, dtype=dtype, chunk_rows=chunk_rows, device=where)

        def cached(rows: ChunkedRows) -> ChunkedRows | RowCache:
            return RowCache(rows, cache_rows=cache_rows, device=self.device) if placement == "host" else rows

        own_values, own_state = rows(dim, _DTYPES[precision], host), rows(state_width, torch.float32, host)
        self._values, self._state = cached(own_values), cached(own_state)
        self._metadata = rows(3, torch.int64, self.device)  # count, last step, last time
        self._scores = rows(1, torch.float32, self.device) if scores else None
        # Where a row's fp32 values are, plus 1; 0 of a cold row.
        self._hot_places = rows(1, torch.int32, self.device) if precision == "mixed" else None
        own_hot_values = rows(dim, torch.float32, host)
        self._hot_values = cached(own_hot_values) if precision == "mixed" else own_hot_values
        self._hot_numbers = RowNumbers([own_hot_values], self.device)
        rest = [x for x in (self._metadata, self._scores, self._hot_places) if x is not None]
        self._numbers = RowNumbers([own_values, own_state, *rest], self.device)
        self._zeroed = [self._state, *rest]

    # ---- sizes -------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return self._numbers.num_used

    @property
    def num_chunks(self) -> int:
        """Chunks of rows; fp32 values of hot rows have their own."""
        return len(self._metadata.chunks)

    @property
    def capacity(self) -> int:
        """Rows in all chunks."""
        return self._metadata.size

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with its state and metadata, a hot row's fp32 values not included."""
        return sum(array.row_bytes for array in self._numbers.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks and caches, in use or not."""
        arrays = (*self._numbers.arrays, *self._hot_numbers.arrays)
        caches = [x for x in (self._values, self._state, self._hot_values) if isinstance(x, RowCache)]
        return sum(array.nbytes for array in arrays) + sum(cache.nbytes for cache in caches)

    @property
    def chunk_pointers(self) -> list[int]:
        """Addresses of the chunks' values, which never change."""
        return self._numbers.arrays[0].pointers.tolist()

    # ---- rows come and go --------------------------------------------------------------------------------------

    def reserve(self, n: int) -> None:
        """Makes room for `n` more rows; the next `allocate` of rows that it covers cannot fail.

        Rows that are freed in between add to the room.

        Raises:
            MemoryError: says how many rows and bytes are wanted; nothing has changed.
        """
        self._numbers.reserve(n)

    def allocate(self, n: int) -> Tensor:
        """Rows with zero state and metadata and arbitrary values.

        Args:
            n: how many.

        Returns:
            Their numbers, int64 (n,): freed rows, the last freed first, then new ones in ascending order.

        Raises:
            MemoryError: says how many rows and bytes are wanted; nothing has changed.
        """
        rows_N = self._numbers.take(n)
        for array in self._zeroed:
            array.scatter(rows_N, None)
        return rows_N

    def free(self, rows_N: Tensor) -> None:
        """Gives up distinct rows in use; when none is left, all chunks but two are released."""
        if self._hot_places is not None:
            places_N = self._hot_slots(rows_N)
            places_N = places_N[places_N >= 0]
            if isinstance(self._hot_values, RowCache):
                self._hot_values.forget(places_N)
            self._hot_numbers.give_back(places_N)
        for array in (self._values, self._state):
            if isinstance(array, RowCache):
                array.forget(rows_N)
        self._numbers.give_back(rows_N)

    # ---- values and state --------------------------------------------------------------------------------------

    def read(self, rows_N: Tensor) -> Tensor:
        """Values, float32 (N, D)."""
        values_ND = self._values.gather(rows_N).float()
        if self._hot_places is not None:
            values_ND = self._hot_values.gather(self._hot_slots(rows_N), values_ND)
        return values_ND

    def write(self, rows_N: Tensor, values_ND: Tensor, *, seeds_N: Tensor | None = None, step: int = 0) -> None:
        """Sets the values of distinct rows.

        Args:
            rows_N: int64.
            values_ND: float32.
            seeds_N: int64, one a row; with them 16-bit rows are rounded stochastically, else to the nearest.
            step: of the draw.
        """
        for array, own_N in self.places(rows_N):
            rounded_ND = values_ND
            if array.dtype != torch.float32:
                rounded_ND = (
                    values_ND.to(array.dtype)
                    if seeds_N is None
                    else round_stochastically(values_ND, array.dtype, seeds_N, step)
                )
            array.scatter(own_N, rounded_ND)

    def rounded(self, values_ND: Tensor) -> Tensor:
        """Values as they are read back once they are written to new rows, float32."""
        return values_ND if self._values.dtype == torch.float32 else values_ND.to(self._values.dtype).float()

    def read_state(self, rows_N: Tensor) -> Tensor:
        """Optimiser state, float32 (N, S)."""
        return self._state.gather(rows_N)

    def write_state(self, rows_N: Tensor, state_NS: Tensor) -> None:
        """Sets the optimiser state of distinct rows, float32 (N, S)."""
        self._state.scatter(rows_N, state_NS)

    def places(self, rows_N: Tensor) -> list[tuple[ChunkedRows | RowCache, Tensor]]:
        """Arrays that hold values, each with the number that every row has in it, -1 where it is in another."""
        if self._hot_places is None:
            return [(self._values, rows_N)]
        slots_N = self._hot_slots(rows_N)
        return [(self._values, rows_N.masked_fill(slots_N >= 0, -1)), (self._hot_values, slots_N)]

    @property
    def state(self) -> ChunkedRows | RowCache:
        """The array of optimiser state."""
        return self._state

    # ---- metadata ----------------------------------------------------------------------------------------------

    def read_metadata(self, rows_N: Tensor) -> Metadata:
        """Counters and clocks of rows."""
        counts_N, last_steps_N, last_times_N = self._metadata.gather(rows_N).unbind(1)
        scores_N = None if self._scores is None else self._scores.gather(rows_N)[:, 0]
        return Metadata(counts_N, last_steps_N, last_times_N, scores_N)

    def write_metadata(
        self,
        rows_N: Tensor,
        *,
        counts: Tensor | None = None,
        last_steps: Tensor | None = None,
        last_times: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Sets some of the metadata of distinct rows; it promotes no row to fp32.

        Raises:
            ValueError: scores for a storage that has none.
        """
        if scores is not None:
            if self._scores is None:
                raise ValueError("scores: this storage has none; make it with scores=True")
            self._scores.scatter(rows_N, scores[:, None].float())
        if any(x is not None for x in (counts, last_steps, last_times)):
            metadata = self._metadata.gather(rows_N)
            for column, values_N in enumerate((counts, last_steps, last_times)):
                if values_N is not None:
                    metadata[:, column] = values_N
            self._metadata.scatter(rows_N, metadata)

    def touch(self, rows_N: Tensor, counts_N: Tensor, *, step: int, time: int) -> None:
        """Notes a use of rows, which may repeat; rows of mixed precision that are now used enough become hot.

        Args:
            rows_N: int64.
            counts_N: int64, added to the rows' counters.
            step: the last use from now on.
            time: the same in seconds, where it is later than before.

        Raises:
            MemoryError: no room for hot rows; nothing has changed.
        """
        if self._hot_places is not None:
            own_U, added_U = _summed(rows_N, counts_N)
            self.promote_hot(own_U[self._metadata.gather(own_U)[:, 0] + added_U >= self.hot_count])
        if self.device.type == "cpu":
            of = self._metadata
            rows_N, counts_N = rows_N.contiguous(), counts_N.contiguous()
            if run_native("touch", of.pointers, of.size, of.shift, rows_N, len(rows_N), counts_N, step, time):
                return
        own_U, added_U = _summed(rows_N, counts_N)
        metadata = self._metadata.gather(own_U)
        metadata[:, 0] += added_U
        metadata[:, 1] = step
        metadata[:, 2].clamp_(min=time)
        self._metadata.scatter(own_U, metadata)

    # ---- saving ------------------------------------------------------------------------------------------------

    def snapshot(self, limit: CopyLimit) -> StorageSnapshot:
        """All rows as they are now, while they change.

        A cache's changed rows are written back, and those behind it are what is read: later changes reach them when
        they are written back in turn.
        """

        def own(array: ChunkedRows | RowCache) -> ChunkedRows:
            if isinstance(array, RowCache):
                array.flush()
                array = array.rows
            return array

        def rows(array: ChunkedRows | RowCache, num: int) -> RowsSnapshot:
            return RowsSnapshot(own(array), num, limit)

        num = self._numbers.end
        is_mixed = self._hot_places is not None
        is_narrow = self.state_width * 4 <= NARROW_BYTES
        return StorageSnapshot(
            values=rows(self._values, num),
            state=CopiedRows(own(self._state), num) if is_narrow else rows(self._state, num),
            hot_values=rows(self._hot_values, self._hot_numbers.end) if is_mixed else None,
            metadata_R3=self.copy_of_metadata(),
            scores_R1=None if self._scores is None else self._scores.head(num),
            hot_places_R1=None if self._hot_places is None else self._hot_places.head(num),
        )

    @property
    def has_scores(self) -> bool:
        """Whether rows have a score."""
        return self._scores is not None

    def copy_of_metadata(self) -> Tensor:
        """Count, last step and last time of all rows by number, int64."""
        return self._metadata.head(self._numbers.end)

    @property
    def is_being_saved(self) -> bool:
        """Whether a snapshot is under way."""
        return any(array.snapshot is not None for array in (*self._numbers.arrays, *self._hot_numbers.arrays))

    # ---- mixed precision ---------------------------------------------------------------------------------------

    def is_hot(self, rows_N: Tensor) -> Tensor | None:
        """Which rows are in fp32, bool (N,); None where the precision is not `mixed`."""
        return None if self._hot_places is None else self._hot_slots(rows_N) >= 0

    def promote_hot(self, rows_N: Tensor) -> None:
        """Gives rows of mixed precision fp32 values, equal to those they have.

        Raises:
            MemoryError: no room; nothing has changed.
        """
        assert self._hot_places is not None, "precision is not mixed"
        rows_N = rows_N.unique()
        rows_N = rows_N[(rows_N >= 0) & (self._hot_slots(rows_N) < 0)]
        slots_N = self._hot_numbers.take(len(rows_N))
        self._hot_values.scatter(slots_N, self._values.gather(rows_N).float())
        self._hot_places.scatter(rows_N, (slots_N + 1).to(torch.int32)[:, None])

    def _hot_slots(self, rows_N: Tensor) -> Tensor:
        assert self._hot_places is not None
        return self._hot_places.gather(rows_N)[:, 0].to(torch.int64) - 1


def _summed(rows_N: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, and the sum of each one's counts."""
    own_U, inverse_N = rows_N.unique(return_inverse=True)
    return own_U, counts_N.new_zeros(len(own_U)).index_add_(0, inverse_N, counts_N)
