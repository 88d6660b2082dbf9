"""Gathered and pooled rows against loops in float64, with every gradient."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.embeddings.dynamic import gather_rows as module
from lightning_gr.embeddings.dynamic.gather_rows import gather_pieces, gather_rows, segment_pool, sum_rows
from lightning_gr.ops.native import load_native

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


def test_the_compiled_functions_are_there() -> None:
    assert load_native(Path(module.__file__).with_name("gather_rows.cpp")) is not None


def problem(num_rows: int, sizes: list[int], dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, places, offsets and weights."""
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    inverse = torch.randint(num_rows, (int(offsets[-1]),), generator=random)
    weights = torch.randn(len(inverse), generator=random)
    return torch.randn(num_rows, dim, generator=random), inverse, offsets, weights


SHAPES = {
    "num_rows": st.integers(1, 200),
    "sizes": st.lists(st.integers(0, 9), max_size=40),
    "dim": st.sampled_from([1, 3, 16, 33, 70]),
    "seed": st.integers(0, 2**31),
    "backend": st.sampled_from(["auto", "reference"]),
}


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_gather(num_rows: int, sizes: list[int], dim: int, seed: int, backend: Any) -> None:
    rows, inverse, _, _ = problem(num_rows, sizes, dim, seed)
    rows.requires_grad_()
    out = gather_rows(rows, inverse, backend=backend)
    assert torch.equal(out, rows.detach()[inverse])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(out, rows, upstream)
    truth = torch.zeros(rows.shape)
    for place, g in zip(inverse.tolist(), upstream, strict=True):
        truth[place] += g
    assert torch.equal(gradient, truth)  # the order of positions, to the last bit
    assert torch.equal(sum_rows(upstream, inverse, num_rows), truth)


@settings(max_examples=40, deadline=None)
@given(**SHAPES, unused=st.integers(0, 3))
def test_pieces(num_rows: int, sizes: list[int], dim: int, seed: int, backend: Any, unused: int) -> None:
    rows, inverse, _, _ = problem(num_rows, sizes, dim, seed)
    rows.requires_grad_()
    pieces = gather_pieces(rows, inverse, sizes, backend=backend)
    assert [*map(len, pieces)] == sizes
    generator = torch.Generator().manual_seed(seed)
    used = pieces[unused:]
    # Every other gradient is one row seen many times, as a sum over positions gives it.
    upstream = [
        torch.randn(1 if k % 2 else len(piece), dim, generator=generator).expand(piece.shape)
        for k, piece in enumerate(used)
    ]
    truth = torch.zeros(rows.shape)
    for place, g in zip(inverse[sum(sizes[:unused]) :].tolist(), [g for gs in upstream for g in gs], strict=True):
        truth[place] += g
    for piece, places in zip(pieces, inverse.split(sizes) if sizes else [], strict=True):
        assert torch.equal(piece, rows.detach()[places])
    if used:
        (gradient,) = torch.autograd.grad(used, rows, upstream)
        assert torch.equal(gradient, truth)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, mode=st.sampled_from(["sum", "mean"]), weighted=st.booleans())
def test_pool(num_rows: int, sizes: list[int], dim: int, seed: int, backend: Any, mode: Any, weighted: bool) -> None:
    rows, inverse, offsets, weights = problem(num_rows, sizes, dim, seed)
    inputs = [rows.requires_grad_(), *([weights.requires_grad_()] if weighted else [])]
    out = segment_pool(rows, inverse, offsets, mode, weights if weighted else None, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    bags = []
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        bag = wide[0][inverse[start:stop]]
        bag = bag * wide[1][start:stop, None] if weighted else bag
        bags.append(bag.sum(0) / (max(stop - start, 1) if mode == "mean" else 1))
    truth = torch.stack(bags) if bags else wide[0][:0] * 1
    assert out.shape == truth.shape
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    got = torch.autograd.grad(out, inputs, upstream, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(truth, wide, upstream.double(), allow_unused=True, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit() -> None:
    rows, inverse, offsets, weights = problem(37, [400, 0, 1700, 900], 70, 0)
    many = problem(5000, [7] * 3000, 20, 1)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            pooled = segment_pool(rows.requires_grad_(), inverse, offsets, "mean", weights)
            (gradient,) = torch.autograd.grad(pooled.square().sum(), rows)
            seen.append((pooled.detach(), gradient, sum_rows(many[0][many[1]], many[1], 5000)))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, backend: Any) -> None:
    rows, inverse, offsets, weights = problem(3, [600, 2], 4, 0)
    rows = rows.to(dtype).requires_grad_()
    out = gather_rows(rows, inverse, backend=backend)
    assert torch.equal(out, rows[inverse])
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert gradient.dtype == dtype
    # Beyond 256 a bf16 sum of ones would stay where it is.
    exact = torch.bincount(inverse, minlength=3)[:, None].expand(3, 4)
    assert torch.equal(gradient, exact.to(dtype))
    assert torch.equal(sum_rows(torch.ones(602, 4, dtype=dtype), inverse, 3), exact.to(dtype))
    pooled = segment_pool(rows, inverse, offsets, weights_N=weights.to(dtype), backend=backend)
    assert pooled.dtype == dtype
    if dtype == torch.float64:
        torch.autograd.gradcheck(lambda r, w: segment_pool(r, inverse, offsets, "mean", w), (rows, weights.double()))


def test_second_derivatives_are_the_references() -> None:
    rows, inverse, offsets, _ = problem(5, [2, 3], 4, 0)
    rows.requires_grad_()
    ways = [gather_rows, lambda r, i, **k: gather_pieces(r, i, [3, 2], **k)[0]]
    for of in [*ways, lambda r, i, **k: segment_pool(r, i, offsets, **k)]:
        with pytest.raises(RuntimeError, match="reference"):
            torch.autograd.grad(of(rows, inverse).square().sum(), rows, create_graph=True)
        (first,) = torch.autograd.grad(of(rows, inverse, backend="reference").square().sum(), rows, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), rows)
        assert second.any()


def test_without_compiler_it_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, inverse, offsets, weights = problem(9, [3, 0, 40], 6, 0)
    compiled = segment_pool(rows, inverse, offsets, "mean", weights), sum_rows(rows[inverse], inverse, 9)
    monkeypatch.setattr(module, "load_native", lambda source: None)
    plain = segment_pool(rows, inverse, offsets, "mean", weights), sum_rows(rows[inverse], inverse, 9)
    torch.testing.assert_close(compiled, plain)


def test_what_does_not_fit_is_named() -> None:
    rows, inverse = torch.zeros(3, 2), torch.tensor([0, 2])
    for place in (3, -1):
        with pytest.raises(ValueError, match="inverse_N: 1 places"):
            gather_rows(rows, torch.tensor([0, place]))
        with pytest.raises(ValueError, match="inverse_N: 1 places"):
            sum_rows(rows[:2], torch.tensor([0, place]), 3)
    with pytest.raises(ValueError, match="rows_UD"):
        gather_rows(rows.long(), inverse)
    with pytest.raises(ValueError, match="inverse_N"):
        gather_rows(rows, inverse.int())
    for sizes in ([1], [3, -1], []):
        with pytest.raises(ValueError, match=re.escape(f"sizes={sizes}")):
            gather_pieces(rows, inverse, sizes)
    with pytest.raises(ValueError, match="2 places for 3 gradients"):
        sum_rows(rows, inverse, 3)
    for offsets in ([0, 1], [0, 2, 1, 2], [1, 2]):
        with pytest.raises(ValueError, match="offsets_B1"):
            segment_pool(rows, inverse, torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets_B1"):
        segment_pool(rows, inverse, torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match="mode='max'"):
        segment_pool(rows, inverse, torch.tensor([0, 2]), "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights_N"):
        segment_pool(rows, inverse, torch.tensor([0, 2]), weights_N=torch.ones(3))


def test_nothing_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert gather_rows(torch.zeros(0, 4), none).shape == (0, 4)
    assert gather_pieces(torch.zeros(0, 4), none, []) == []
    assert torch.equal(sum_rows(torch.zeros(0, 4), none, 3), torch.zeros(3, 4))
    assert torch.equal(segment_pool(torch.zeros(0, 4), none, torch.tensor([0, 0, 0])), torch.zeros(2, 4))
