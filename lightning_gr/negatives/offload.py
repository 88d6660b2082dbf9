"""Settings of negatives that wait in host memory (TurboGR, arXiv 2605.13433, section 4.3.1), and what they need there.

Shape suffixes: U distinct rows, D width.
"""

from __future__ import annotations

import torch

from lightning_gr.negatives.host_memory import available_host_memory


class Offload:
    """The looked-up rows of candidates wait in host memory; segments of labels fetch the rows that they name.

    Results do not depend on the segment. A longer one takes more device memory (the rows of two segments at a time)
    and needs fewer copies.

    Args:
        segment: labels whose rows are on the device at a time; more than there are is all of them.

    Raises:
        ValueError: `segment` is below 1.
    """

    def __init__(self, *, segment: int = 100) -> None:
        if not isinstance(segment, int) or segment < 1:
            raise ValueError(f"segment={segment}: expected at least 1 label, a whole number")
        self.segment = segment
        self._pinned = 0

    def refuse_without_memory(
        self,
        num_rows: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        segment_rows: int = 0,
        pinned: bool = False,
        ranks: int = 1,
        available: int | None = None,
    ) -> None:
        """Checks that the rows of a batch fit into the host's memory, before any is copied.

        Args:
            num_rows: distinct rows, U.
            dim: their width, D.
            dtype: in which they wait.
            segment_rows: rows of the largest segment, which passes through two buffers.
            pinned: whether the memory is pinned: torch keeps such for the next step, so only growth is asked for.
            ranks: processes of this host that will each ask for as much.
            available: bytes that are left; None asks the system and the process's control groups.

        Raises:
            ValueError: they do not fit.
        """
        row = dim * dtype.itemsize
        # Of pinned memory torch takes powers of two.
        needed = sum(
            1 << (each * row - 1).bit_length() if pinned and each else each * row
            for each in (num_rows, segment_rows, segment_rows)
        )
        grows = ranks * (needed - self._pinned if pinned else needed)
        if grows <= 0:
            return
        left = available_host_memory() if available is None else available
        if grows > left:
            of_host = f", in each of {ranks} processes of this host," if ranks > 1 else ""
            raise ValueError(
                f"negatives_offload: {num_rows:,} rows of {dim} {dtype} and two segments of {segment_rows:,}{of_host} "
                f"need {grows:,} bytes of host memory, and {left:,} are left; draw fewer negatives, take smaller "
                "batches or negatives_dtype float16, or leave negatives_offload out"
            )
        if pinned:
            self._pinned = needed
