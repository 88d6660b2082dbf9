"""Rows in host memory, brought to the device segment by segment through two buffers.

While the device computes with one segment, the host gathers the rows of the next but one and a stream of its own copies
them. On a CPU the same happens in order, without streams.

Shape suffixes: N labels, K places a label, U rows in host memory, V rows of all segments, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_gr.negatives.host_memory import host_empty


class CopyStream:
    """A stream for copies beside the one that computes; on a CPU it does nothing, as all is in order there.

    Args:
        device: whose stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copying(self) -> AbstractContextManager[object]:
        """What is launched inside runs on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """An event after all that the current stream was given so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """The current stream goes on after `event`."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def keep_until_copied(self, tensor: Tensor) -> None:
        """The memory of `tensor` is not given to others before what this stream was given so far is done."""
        if self._stream is not None:
            tensor.record_stream(self._stream)


@cache
def copy_stream(device: torch.device) -> CopyStream:
    """The stream of a device that offloaded rows go and come on."""
    return CopyStream(device)


def wait_on_host(event: torch.cuda.Event | None) -> None:
    """The host goes on after `event`."""
    if event is not None:
        event.synchronize()


@dataclass(frozen=True)
class RowSegments:
    """Which rows each segment of labels names, each once.

    Args:
        length: labels of a segment; the last may have fewer.
        rows_V: int64 on the host, the distinct rows of the first segment, then of the second, ...
        bounds: where each segment begins in `rows_V`, and the end.
    """

    length: int
    rows_V: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, places_NK: Tensor, num_rows: int, length: int) -> tuple[RowSegments, Tensor]:
        """The segments, and int32 (N, K): for each place, the position among the rows of its own segment."""
        num_labels = len(places_NK)
        count = -(-num_labels // length)
        segment_N1 = torch.arange(num_labels, device=places_NK.device)[:, None] // length
        names_V, inverse_NK = (places_NK + segment_N1 * num_rows).unique(return_inverse=True)
        firsts = torch.arange(count + 1, device=places_NK.device) * num_rows
        bounds_S = torch.searchsorted(names_V, firsts)
        inverse_NK -= bounds_S[segment_N1]
        rows_V = (names_V % max(num_rows, 1)).cpu()
        return cls(length, rows_V, bounds_S.tolist()), inverse_NK.to(torch.int32)

    def fetch(
        self, host_UD: Tensor, arrived: torch.cuda.Event | None, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Brings one segment after the other.

        Args:
            host_UD: rows in host memory.
            arrived: after which they are there.
            device: where they go.

        Yields:
            Which labels, and their rows on the device; the rows are overwritten once the next segment is asked for.
        """
        stream, count, dim = copy_stream(device), len(self.bounds) - 1, host_UD.shape[1]
        most = max((b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)), default=0)
        slots = min(2, count)
        sent = [host_empty(most, dim, dtype=host_UD.dtype, device=device) for _ in range(slots)]
        came = [torch.empty(most, dim, dtype=host_UD.dtype, device=device) for _ in range(slots)]
        # The buffers' memory may still be in use by what was launched before.
        released = [stream.mark() for _ in range(slots)]
        copied: list[torch.cuda.Event | None] = [None] * slots
        wait_on_host(arrived)

        def start(number: int) -> None:
            slot, first, end = number % 2, self.bounds[number], self.bounds[number + 1]
            wait_on_host(copied[slot])
            torch.index_select(host_UD, 0, self.rows_V[first:end], out=sent[slot][: end - first])
            with stream.copying():
                stream.wait(released[slot])
                came[slot][: end - first].copy_(sent[slot][: end - first], non_blocking=True)
                copied[slot] = stream.mark()

        try:
            for number in range(slots):
                start(number)
            for number in range(count):
                slot = number % 2
                stream.wait(copied[slot])
                size = self.bounds[number + 1] - self.bounds[number]
                yield slice(number * self.length, (number + 1) * self.length), came[slot][:size]
                released[slot] = stream.mark()
                if number + 2 < count:
                    start(number + 2)
        finally:
            for event in copied:  # a consumer that stopped early leaves no copy behind that writes freed memory
                stream.wait(event)
