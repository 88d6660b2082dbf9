"""The layout of a jagged tensor: host lengths, device offsets, and padding for references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.jagged_dense import dense_to_jagged, jagged_to_dense

LENGTHS = st.lists(st.integers(0, 6), max_size=6)


def make(lengths: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))


@given(LENGTHS)
def test_layout_counts_like_nested_loops(lengths: list[int]) -> None:
    layout = make(lengths)
    tokens = [(b, i) for b, length in enumerate(lengths) for i in range(length)]
    assert layout.num_sequences == len(lengths)
    assert layout.num_tokens == len(tokens)
    assert layout.max_length == max(lengths, default=0)
    assert layout.sequence_T.tolist() == [b for b, _ in tokens]
    assert layout.position_T.tolist() == [i for _, i in tokens]
    assert layout.offsets_B1.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert layout.on_host().offsets_B1.tolist() == layout.offsets_B1.tolist()
    layout.check_values()


def test_a_layout_on_the_host_reads_nothing_back() -> None:
    elsewhere = JaggedLayout(torch.tensor([2, 3]), torch.empty(3, dtype=torch.int64, device="meta"))
    assert elsewhere.on_host().offsets_B1.tolist() == [0, 2, 5]  # a meta tensor has no values that could be read


def test_offsets_that_do_not_fit_the_lengths_are_named_in_debugging() -> None:
    layout = JaggedLayout(torch.tensor([2, 3]), torch.tensor([0, 4, 5]))
    with pytest.raises(ValueError, match=r"k_layout\.offsets_B1\[1\]=4: expected 2"):
        layout.check_values("k_layout")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("tail", [(), (3,), (2, 3)])
def test_padding_puts_each_token_in_its_place_and_zeros_elsewhere(dtype: torch.dtype, tail: tuple[int, ...]) -> None:
    lengths = [2, 0, 3, 1]
    x_T = torch.randint(1, 9, (6, *tail), generator=torch.Generator().manual_seed(0)).to(dtype)
    dense = jagged_to_dense(x_T, make(lengths))
    assert dense.shape == (4, 3, *tail)
    assert dense.dtype == dtype
    start = 0
    for b, length in enumerate(lengths):
        for i in range(3):
            wanted = x_T[start + i] if i < length else torch.zeros(tail, dtype=dtype)
            assert torch.equal(dense[b, i], wanted)
        start += length


@given(LENGTHS)
def test_padding_and_dropping_it_again_changes_nothing(lengths: list[int]) -> None:
    layout = make(lengths)
    x_T = torch.arange(layout.num_tokens * 2, dtype=torch.float64).view(-1, 2).requires_grad_()
    back = dense_to_jagged(jagged_to_dense(x_T, layout), layout)
    assert torch.equal(back, x_T)
    (gradient,) = torch.autograd.grad((back * back).sum(), x_T)
    assert torch.equal(gradient, 2 * x_T)


def test_a_tensor_that_does_not_fit_the_layout_is_refused() -> None:
    layout = make([2, 1])
    with pytest.raises(ValueError, match=r"x_T: expected 3 tokens, got shape \(1, 4\)"):
        jagged_to_dense(torch.zeros(1, 4), layout)
    with pytest.raises(ValueError, match=r"x_BL: expected 2 sequences of 2 places, got shape \(2, 3\)"):
        dense_to_jagged(torch.zeros(2, 3), layout)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, -2]), r"lengths_B: expected lengths >= 0, got -2"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), r"lengths_B: expected host lengths, got a tensor on meta"),
        (torch.ones(1, 1, dtype=torch.int64), r"JaggedLayout\.lengths_B: expected a 1-D int64 tensor"),
    ],
)
def test_wrong_lengths_are_named(lengths: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JaggedLayout.from_lengths(lengths)


def test_wrong_number_of_offsets_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"JaggedLayout\.offsets_B1: expected 3 offsets for 2 lengths, got shape \(2,\)"
    ):
        JaggedLayout(torch.tensor([1, 2]), torch.tensor([0, 1]))
