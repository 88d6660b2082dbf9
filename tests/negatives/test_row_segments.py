"""Rows brought segment by segment: which, and in an order that a lazy stream of copies cannot spoil.

Shape suffixes: N labels, K places a label, U rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_gr.negatives import kept_rows, row_segments
from lightning_gr.negatives.kept_rows import keep_rows
from lightning_gr.negatives.offload import Offload
from lightning_gr.negatives.row_segments import RowSegments
from lightning_gr.ops.sampled_softmax import sampled_logits

CPU = torch.device("cpu")


def places(num_labels: int, num_rows: int, *, num_places: int = 5) -> Tensor:
    return torch.randint(num_rows, (num_labels, num_places), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("length", [1, 3, 7, 20, 50])
def test_a_segment_brings_each_row_that_it_names_once_and_no_other(length: int) -> None:
    places_NK, host_UD = places(20, 30), torch.arange(30.0)[:, None].repeat(1, 2)
    segments, local_NK = RowSegments.of(places_NK, 30, length)
    seen = []
    for labels, rows in segments.fetch(host_UD, None, CPU):
        assert rows[:, 0].tolist() == sorted(set(places_NK[labels].flatten().tolist()))
        assert torch.equal(rows[local_NK[labels].long()][..., 0], places_NK[labels].float())
        seen += list(range(20))[labels]
    assert seen == list(range(20))
    assert local_NK.dtype == torch.int32


def test_no_labels_are_no_segments() -> None:
    segments, local_NK = RowSegments.of(places(0, 3), 3, 7)
    assert list(segments.fetch(torch.zeros(3, 2), None, CPU)) == []
    assert local_NK.shape == (0, 5)


def test_two_buffers_serve_any_number_of_segments() -> None:
    segments, _ = RowSegments.of(places(40, 9), 9, 4)
    addresses = [rows.data_ptr() for _, rows in segments.fetch(torch.zeros(9, 2), None, CPU)]
    assert len(addresses) == 10
    assert addresses == addresses[:2] * 5
    assert len(set(addresses)) == 2


# ---- streams -------------------------------------------------------------------------------------------------------


class LazyStream:
    """Copies as late as events allow, and notes for each what the current stream had done when it was allowed to."""

    class Event:
        def __init__(self, run: Callable[[], None], moment: int) -> None:
            self.run, self.moment, self.host_waited = run, moment, False

        def synchronize(self) -> None:
            self.run()
            self.host_waited = True

    class _Deferred(TorchFunctionMode):
        def __init__(self, queue: list[Callable[[], Any]]) -> None:
            super().__init__()
            self.queue = queue

        @override
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.copy_:
                assert kwargs == {"non_blocking": True}
                self.queue.append(lambda: args[0].data.copy_(args[1]))  # its version is that of the call
                return args[0]
            return func(*args, **(kwargs or {}))

    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.done, self.inside, self.moment = 0, False, 0
        self.waited: list[int] = []
        self.copied: list[LazyStream.Event] = []
        self.kept: list[Tensor] = []

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.inside = True
        with self._Deferred(self.queue):
            yield
        self.inside = False

    def mark(self) -> Event:
        self.moment += 1
        end = len(self.queue)
        event = self.Event((lambda: self._run(end)) if self.inside else (lambda: None), self.moment)
        if self.inside:
            self.copied.append(event)
        return event

    def wait(self, event: Event | None) -> None:
        if event is None:
            return
        if self.inside:
            self.waited.append(event.moment)
        else:
            event.run()

    def keep_until_copied(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def _run(self, end: int) -> None:
        while self.done < end:
            self.queue[self.done]()
            self.done += 1


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> LazyStream:
    stream = LazyStream()
    for module in (row_segments, kept_rows):
        monkeypatch.setattr(module, "copy_stream", lambda device: stream)
    return stream


@pytest.mark.parametrize("segment", [1, 7, 100])
def test_copies_that_come_as_late_as_they_may_change_nothing(lazy: LazyStream, segment: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (40, 25))
    places_NK = places(40, 25)
    kept = keep_rows(rows * 1, offload=Offload(segment=segment), normalise=True)
    assert lazy.done == 0 < len(lazy.queue)
    assert len(lazy.kept) == 1
    found = kept.logits(queries, places_NK)
    wanted = sampled_logits(queries, F.normalize(rows, dim=-1, eps=1e-6), places_NK)
    assert torch.equal(found, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), [queries, rows]),
        torch.autograd.grad(wanted.square().sum(), [queries, rows]),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert lazy.done == len(lazy.queue)


def test_a_buffer_is_written_after_the_segment_that_used_it_last(lazy: LazyStream) -> None:
    segments, _ = RowSegments.of(places(12, 9), 9, 2)
    moments = []
    for _ in segments.fetch(torch.zeros(9, 2), None, CPU):
        moments.append(lazy.moment)  # what is marked later is after the use of this segment's rows
    # The first two buffers are fresh; then the copy of segment s waits for a mark made after segment s - 2.
    for number in range(2, 6):
        assert lazy.waited[number] > moments[number - 2]


def test_the_host_fills_a_buffer_after_its_last_copy_left(lazy: LazyStream, monkeypatch: pytest.MonkeyPatch) -> None:
    segments, _ = RowSegments.of(places(12, 9), 9, 2)
    true, left = torch.index_select, []

    def fill(*args: Any, **kwargs: Any) -> Tensor:
        left.append([event.host_waited for event in lazy.copied])
        return true(*args, **kwargs)

    monkeypatch.setattr(torch, "index_select", fill)
    list(segments.fetch(torch.zeros(9, 2), None, CPU))
    assert len(left) == 6
    for number in range(2, 6):
        assert left[number][number - 2]


def test_a_consumer_that_stops_early_leaves_no_copy_behind(lazy: LazyStream) -> None:
    segments, _ = RowSegments.of(places(12, 9), 9, 2)
    fetched = segments.fetch(torch.zeros(9, 2), None, CPU)
    next(fetched)
    assert lazy.done < len(lazy.queue)
    fetched.close()
    assert lazy.done == len(lazy.queue)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("late", ["copies", "products", None])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_streams_of_a_gpu_in_any_order(
    dtype: torch.dtype | None, late: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, 64, generator=generator).to(device).requires_grad_() for n in (700, 5000))
    places_NK = places(700, 5000, num_places=40).to(device)
    cycles = 2_000_000  # about a millisecond
    stream = row_segments.copy_stream(device)
    true = stream.copying

    @contextmanager
    def delayed() -> Iterator[None]:
        with true():
            torch.cuda._sleep(cycles)
            yield

    if late == "copies":
        monkeypatch.setattr(stream, "copying", delayed)
    fetch = RowSegments.fetch

    def slow(*args: Any) -> Iterator[tuple[slice, Tensor]]:
        for labels, came in fetch(*args):
            torch.cuda._sleep(cycles)
            yield labels, came

    if late == "products":
        monkeypatch.setattr(RowSegments, "fetch", slow)
    rounded = rows if dtype is None else rows.detach().to(dtype).float().requires_grad_()
    wanted = sampled_logits(queries, rounded, places_NK)
    cotangent = torch.randn(wanted.shape, generator=generator).to(device)
    gradients = torch.autograd.grad(wanted, [queries, rounded], cotangent)
    for segment in (50, 7, 10_000):
        for _ in range(3):  # memory of the last round is taken again
            kept = keep_rows(rows * 1, offload=Offload(segment=segment), dtype=dtype)
            noise = [torch.full_like(rows, torch.nan) for _ in range(4)]  # takes what was freed too early
            found = kept.logits(queries, places_NK)
            del noise
            assert torch.equal(found, wanted)
            for mine, theirs in zip(torch.autograd.grad(found, [queries, rows], cotangent), gradients, strict=True):
                assert torch.equal(mine, theirs)
