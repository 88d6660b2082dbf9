"""Kept rows against the logits of the rows themselves, and who holds memory meanwhile.

Shape suffixes: N labels, K places a label, U rows, D width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_gr.negatives import kept_rows
from lightning_gr.negatives.kept_rows import keep_rows
from lightning_gr.negatives.offload import Offload
from lightning_gr.ops.sampled_softmax import sampled_logits

SEGMENTS = [1, 7, 100, 10_000]


def make(
    num_labels: int = 230, num_places: int = 9, num_rows: int = 60, dim: int = 12, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, rows, places and the gradient of the logits; most rows are named in several segments."""
    generator = torch.Generator().manual_seed(3)
    queries_ND = torch.randn(num_labels, dim, generator=generator, dtype=dtype).requires_grad_()
    rows_UD = torch.randn(num_rows, dim, generator=generator, dtype=dtype).requires_grad_()
    places_NK = torch.randint(num_rows, (num_labels, num_places), generator=generator)
    return queries_ND, rows_UD, places_NK, torch.randn(places_NK.shape, generator=generator, dtype=dtype)


def of_kept(
    queries: Tensor, rows: Tensor, places: Tensor, cotangent: Tensor, backend: str = "auto", **kept: Any
) -> list[Tensor]:
    """Logits and the gradients of queries and rows, by kept rows."""
    logits = keep_rows(rows * 1, **kept).logits(queries, places, backend=backend)  # type: ignore[arg-type]
    return [logits, *torch.autograd.grad(logits, [queries, rows], cotangent)]


def of_loops(
    queries: Tensor, rows: Tensor, places: Tensor, cotangent: Tensor, *, normalise: bool = False
) -> list[Tensor]:
    """The same in float64, label by label and place by place."""
    queries, rows = (x.detach().double().requires_grad_() for x in (queries, rows))
    lengths = [row.square().sum().sqrt().clamp(min=1e-6) if normalise else torch.ones(()) for row in rows]
    logits = torch.stack(
        [
            torch.stack([(q * rows[u]).sum() / lengths[u] for u in named])
            for q, named in zip(queries, places.tolist(), strict=True)
        ]
    )
    return [logits, *torch.autograd.grad(logits, [queries, rows], cotangent.double())]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_segment_gives_the_logits_and_gradients_of_the_rows_bit_for_bit(
    dtype: torch.dtype, normalise: bool, backend: Any
) -> None:
    queries, rows, places, cotangent = make(dtype=dtype)
    whole = F.normalize(rows, dim=-1, eps=1e-6) if normalise else rows
    logits = sampled_logits(queries, whole, places, backend=backend)
    wanted = [logits, *torch.autograd.grad(logits, [queries, rows], cotangent)]
    for offload in [None, *(Offload(segment=x) for x in SEGMENTS)]:
        found = of_kept(queries, rows, places, cotangent, backend, offload=offload, normalise=normalise)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_they_are_the_products_of_each_label_with_what_it_names(
    dtype: torch.dtype, tolerance: float, normalise: bool
) -> None:
    inputs = make(23, 5, 11, 7, dtype=dtype)
    wanted = of_loops(*inputs, normalise=normalise)
    for mine, theirs in zip(of_kept(*inputs, offload=Offload(segment=4), normalise=normalise), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    num_labels=st.integers(0, 9),
    num_places=st.integers(0, 5),
    num_rows=st.integers(1, 6),
    segment=st.integers(1, 12),
    normalise=st.booleans(),
)
def test_any_sizes(num_labels: int, num_places: int, num_rows: int, segment: int, normalise: bool) -> None:
    inputs = make(num_labels, num_places, num_rows, 5)
    found = of_kept(*inputs, offload=Offload(segment=segment), normalise=normalise)
    if not inputs[2].numel():
        assert found[0].shape == (num_labels, num_places)
        assert not any(x.any() for x in found[1:])
        return
    for mine, theirs in zip(found, of_loops(*inputs, normalise=normalise), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offload", [None, Offload(segment=7)])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_16_bit_rounds_the_rows_once_and_nothing_else(dtype: torch.dtype, unit: float, offload: Offload | None) -> None:
    queries, rows, places, cotangent = make()
    found = of_kept(queries, rows, places, cotangent, offload=offload, dtype=dtype)
    rounded = rows.detach().to(dtype).float()
    wanted = of_loops(queries, rounded, places, cotangent)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    # Each number is off by at most half a unit in its last place, so a product of sums by no more than this.
    exact = of_loops(queries, rows, places, cotangent)[0]
    bound = unit * torch.einsum("nd,nkd->nk", queries.abs(), rows.abs()[places]).double()
    error = (found[0].double() - exact).abs().detach()
    assert bool((error <= bound * 1.01 + 1e-6).all())
    assert bool((error > 1e-5).any())  # it did round


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_too_small_for_16_bit_reach_the_32_bit_row(normalise: bool) -> None:
    queries, rows, places, cotangent = make()
    small = 1e-9 * cotangent
    assert not small.to(torch.float16).any()
    found = of_kept(queries, rows, places, small, dtype=torch.float16, normalise=normalise)[2]
    wanted = of_loops(queries, rows.detach().to(torch.float16).float(), places, small, normalise=normalise)[2]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-15)
    assert bool((found != 0).all())


def test_logits_asked_for_twice_add_their_gradients() -> None:
    queries, rows, places, cotangent = make()
    kept = keep_rows(rows * 1, offload=Offload(segment=7), normalise=True)
    whole = F.normalize(rows, dim=-1, eps=1e-6)
    sums = []
    for logits in (
        [kept.logits(queries, places), kept.logits(queries, places.flip(0))],
        [sampled_logits(queries, whole, places), sampled_logits(queries, whole, places.flip(0))],
    ):
        loss = (logits[0] * cotangent).sum() + (logits[1].square() * cotangent).sum()
        sums.append(torch.autograd.grad(loss, [queries, rows]))
    for mine, theirs in zip(*sums, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_backward_pass_for_queries_alone_leaves_nothing_to_the_next() -> None:
    queries, rows, places, cotangent = make()
    logits = keep_rows(rows * 1, offload=Offload(segment=7)).logits(queries, places)
    torch.autograd.grad(logits, queries, 5 * cotangent, retain_graph=True)
    found = torch.autograd.grad(logits, rows, cotangent, retain_graph=True)[0]
    again = torch.autograd.grad(logits, rows, cotangent)[0]
    wanted = torch.autograd.grad(sampled_logits(queries, rows, places), rows, cotangent)[0]
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)


def test_frozen_rows_and_frozen_queries() -> None:
    queries, rows, places, cotangent = make()
    wanted = torch.autograd.grad(sampled_logits(queries, rows, places), [queries, rows], cotangent)
    kept = keep_rows(rows.detach(), offload=Offload(segment=7))
    assert torch.equal(torch.autograd.grad(kept.logits(queries, places), queries, cotangent)[0], wanted[0])
    kept = keep_rows(rows * 1, offload=Offload(segment=7))
    assert torch.equal(torch.autograd.grad(kept.logits(queries.detach(), places), rows, cotangent)[0], wanted[1])
    with torch.no_grad():
        assert not keep_rows(rows * 1, offload=Offload()).logits(queries, places).requires_grad


@pytest.mark.parametrize("kept", [{"offload": Offload(segment=7)}, {"dtype": torch.float16}, {"normalise": True}])
def test_second_derivatives_and_reentrant_checkpoints_are_refused(kept: dict[str, Any]) -> None:
    queries, rows, places, _ = make()
    with pytest.raises(RuntimeError, match=r"^KeptRows.logits: rows that are kept are differentiable once"):
        torch.autograd.grad(keep_rows(rows * 1, **kept).logits(queries, places).sum(), queries, create_graph=True)

    def through_checkpoint(reentrant: bool) -> Tensor:
        rows_kept = keep_rows(rows * 1, **kept)

        def logits(queries: Tensor, handle: Tensor) -> Tensor:
            rows_kept.handle = handle
            return rows_kept.logits(queries, places)

        out = checkpoint(logits, queries, rows_kept.handle, use_reentrant=reentrant)
        return torch.autograd.grad(out.sum(), rows)[0] if not reentrant else out.sum().backward()

    wanted = torch.autograd.grad(keep_rows(rows * 1, **kept).logits(queries, places).sum(), rows)[0]
    assert torch.equal(through_checkpoint(False), wanted)
    with pytest.raises(RuntimeError, match="^KeptRows.logits: its backward pass was not part of the one .*=False"):
        through_checkpoint(True)


# ---- memory --------------------------------------------------------------------------------------------------------


def looked_up(table: nn.Embedding, num_rows: int) -> Tensor:
    return table(torch.arange(num_rows))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kept", [{"offload": Offload(segment=7)}, {"dtype": torch.bfloat16}])
def test_nobody_holds_the_looked_up_rows(kept: dict[str, Any], normalise: bool) -> None:
    queries, rows, places, _ = make()
    table = nn.Embedding.from_pretrained(rows.detach(), freeze=False)
    features = {"sampled": looked_up(table, len(rows))}
    storage = StorageWeakRef(features["sampled"].untyped_storage())
    held = keep_rows(features.pop("sampled"), normalise=normalise, **kept)
    assert storage.expired()
    held.logits(queries, places).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.any()


class LiveOf(TorchDispatchMode):
    """Bytes of live float storages of at least some size, but for those in host memory."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.known, self.host, self.peak = least, {}, False, 0  # type: ignore[var-annotated]

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point():
                storage = x.untyped_storage()
                counts = storage.nbytes() >= self.least and not self.host
                self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() if counts else 0))
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.known = {k: (ref, size) for k, (ref, size) in self.known.items() if not ref.expired()}
        return sum(size for _, size in self.known.values())


def test_while_the_encoder_runs_in_either_direction_no_matrix_of_all_rows_is_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries, rows, places, _ = make(num_rows=900)
    table = nn.Embedding.from_pretrained(rows.detach(), freeze=False)
    whole = rows.numel() * 4
    live, true, seen = LiveOf(least=whole), kept_rows.host_empty, {}
    monkeypatch.setattr(kept_rows, "_NUMBERS_AT_ONCE", 100)

    def on_host(*args: Any, **kwargs: Any) -> Tensor:
        live.host = True
        try:
            return true(*args, **kwargs)
        finally:
            live.host = False

    class Encoder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen["forward"] = live.now()
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen["backward"] = live.now()
            return grad * 2

    monkeypatch.setattr(kept_rows, "host_empty", on_host)
    for offload in (None, Offload(segment=7)):
        table.weight.grad = None
        with live:
            kept = keep_rows(looked_up(table, len(rows)), offload=offload, normalise=True)
            loss = kept.logits(Encoder.apply(queries), places).square().sum()
            del kept
            loss.backward()
        held = whole if offload is None else 0
        assert seen == {"forward": held, "backward": held}
        assert live.peak >= whole  # so that it would be seen


def test_memory_that_the_host_does_not_have_is_refused_before_anything_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    monkeypatch.setattr("lightning_gr.negatives.offload.available_host_memory", lambda: 60 * 12 * 4 - 1)
    monkeypatch.setattr(kept_rows, "host_empty", lambda *args, **kwargs: made.append(args))
    rows = make()[1]
    with pytest.raises(ValueError, match=r"^negatives_offload: 60 rows of 12 .* 2,880 bytes .* 2,879 are left"):
        keep_rows(rows, offload=Offload())
    assert made == []


# ---- what cannot be meant ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_UD": torch.zeros(3)}, r"rows_UD: expected a float matrix, got torch.float32 \(3,\)"),
        ({"rows_UD": torch.zeros(3, 2).long()}, r"rows_UD: expected a float matrix, got torch.int64 \(3, 2\)"),
        ({"dtype": torch.int8}, r"dtype=torch.int8: expected torch.float16, torch.bfloat16 or None"),
        ({"dtype": torch.float64}, r"dtype=torch.float64: expected torch.float16"),
        ({"queries_ND": torch.zeros(4, 3)}, r"queries_ND: expected a float matrix of width 2 .* \(4, 3\)"),
        (
            {"queries_ND": torch.zeros(4, 2, device="meta")},
            r"queries_ND: .* device of the rows, cpu, got meta",
        ),
        ({"places_NK": torch.zeros(4).long()}, r"places_NK: expected shape \(N, K\), got \(4,\)"),
        ({"places_NK": torch.zeros(5, 1).long()}, r"places_NK: expected 4 tokens like queries_TD, got 5"),
        ({"places_NK": torch.zeros(4, 1)}, r"places_NK: expected int64 .* got torch.float32"),
        ({"places_NK": torch.full((4, 1), 3)}, r"places_NK: expected rows of rows_UD, 0 ... 2, got 3 ... 3"),
        ({"places_NK": torch.full((4, 1), -1)}, r"places_NK: expected rows of rows_UD, 0 ... 2, got -1 ... -1"),
        ({"backend": "cuda"}, r"backend: expected one of auto, .* got 'cuda'"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    def call(**changes: Any) -> Tensor:
        given: dict[str, Any] = {
            "rows_UD": torch.zeros(3, 2),
            "dtype": None,
            "queries_ND": torch.zeros(4, 2),
            "places_NK": torch.zeros(4, 1).long(),
            "backend": "auto",
        } | changes
        kept = keep_rows(given["rows_UD"], dtype=given["dtype"], offload=Offload(segment=2))
        return kept.logits(given["queries_ND"], given["places_NK"], backend=given["backend"])

    assert call().shape == (4, 1)
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)
