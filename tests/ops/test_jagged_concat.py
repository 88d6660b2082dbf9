"""Joining and parting jagged tensors against lists of lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.jagged_concat import concat_bytes, concat_layout, jagged_concat, jagged_split


def make(lengths: list[int], device: str = "cpu") -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64), device)


def truth(xs: list[Tensor], lengths: list[list[int]]) -> list[float]:
    """Numbers of the joined tensor, by lists; `lengths` is by part."""
    queues = [x.tolist() for x in xs]
    return [queues[k].pop(0) for b in range(len(lengths[0])) for k in range(len(xs)) for _ in range(lengths[k][b])]


LENGTHS = st.integers(0, 5).flatmap(
    lambda b: st.lists(st.lists(st.integers(0, 4), min_size=b, max_size=b), min_size=1, max_size=4)
)


@settings(deadline=None, max_examples=60)
@given(LENGTHS)
def test_joins_and_parts_as_lists_do(lengths: list[list[int]]) -> None:
    layouts = [make(x) for x in lengths]
    xs = [100.0 * k + torch.arange(sum(x), dtype=torch.float64) for k, x in enumerate(lengths)]
    out, layout = jagged_concat(xs, layouts)
    assert out.tolist() == truth(xs, lengths)
    assert layout.lengths_B.tolist() == [sum(column) for column in zip(*lengths, strict=True)]
    layout.check_values()
    assert [x.tolist() for x in jagged_split(out, layouts)] == [x.tolist() for x in xs]


def test_gradients_of_every_order() -> None:
    layouts = [make([2, 0, 1]), make([0, 0, 3]), make([1, 1, 1])]
    xs = [torch.randn(part.num_tokens, 2, 3, dtype=torch.float64, requires_grad=True) for part in layouts]

    def join(*xs: Tensor) -> Tensor:
        return jagged_concat(xs, layouts)[0]

    def part(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(jagged_split(x, layouts))

    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(join, xs)
    assert torch.autograd.gradgradcheck(join, xs)
    assert torch.autograd.gradcheck(part, x)
    assert torch.autograd.gradgradcheck(part, x)


def test_gradient_of_one_part_only() -> None:
    layouts = [make([1, 2]), make([2, 1])]
    learned = torch.randn(3, 2, requires_grad=True)
    out, _ = jagged_concat([torch.randn(3, 2), learned], layouts)
    jagged_split(out, layouts)[1].sum().backward()
    assert torch.equal(learned.grad, torch.ones(3, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_any_dtype_and_no_copy_for_one_part(dtype: torch.dtype) -> None:
    x, layout = torch.ones(3, dtype=dtype), make([1, 2])
    assert jagged_concat([x, x], [layout, layout])[0].dtype == dtype
    assert jagged_concat([x], [layout])[0] is x
    assert jagged_split(x, [layout])[0] is x


def test_strided_parts() -> None:
    layouts = [make([2, 1]), make([1, 1])]
    wide = torch.randn(5, 4)
    xs = [wide[:3, 1:3], wide.T[2:4, :2]]
    out, _ = jagged_concat(xs, layouts)
    assert torch.equal(out, torch.stack([xs[0][0], xs[0][1], xs[1][0], xs[0][2], xs[1][1]]))


def test_errors_name_the_part() -> None:
    two, three = make([1, 1]), make([1, 1, 1])
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="layouts: expected at least one"):
        concat_layout([])
    with pytest.raises(ValueError, match=r"layouts\[1\]: expected 2 sequences"):
        concat_layout([two, three])
    with pytest.raises(ValueError, match="xs: expected one tensor for each of 2"):
        jagged_concat([x], [two, two])
    with pytest.raises(ValueError, match=r"xs\[1\]: expected shape \(2, 3\), got \(3, 3\)"):
        jagged_concat([x, torch.zeros(3, 3)], [two, two])
    with pytest.raises(ValueError, match=r"xs\[1\]: expected the dtype"):
        jagged_concat([x, x.double()], [two, two])
    with pytest.raises(ValueError, match="x_T: expected 4 tokens"):
        jagged_split(x, [two, two])


def test_bytes() -> None:
    assert concat_bytes(10, width=4, itemsize=2) == 2 * 10 * 4 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_without_waiting() -> None:
    lengths = [[2, 0, 3], [1, 4, 0]]
    xs = [torch.randn(sum(x), 3, device="cuda", requires_grad=True) for x in lengths]
    layouts = [make(x, "cuda") for x in lengths]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = jagged_concat(xs, layouts)
        parts = jagged_split(out, layouts)
        gradients = torch.autograd.grad([x.sum() for x in parts], xs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(parts, xs, strict=True))
    assert all(torch.equal(a, torch.ones_like(a)) for a in gradients)
