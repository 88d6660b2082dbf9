"""Uniform negatives: uniform, and the same whoever draws them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.negatives import UniformNegatives


def draw(ids: Tensor, positions: Tensor, *, items: int = 1000, count: int = 8, seed: int = 5, epoch: int = 2) -> Tensor:
    negatives = UniformNegatives(num_negatives=count)
    return negatives.sample(num_items=items, seed=seed, epoch=epoch, sample_ids_N=ids, positions_N=positions)


def grid(samples: int, positions: int) -> tuple[Tensor, Tensor]:
    return torch.arange(samples).repeat_interleave(positions), torch.arange(positions).repeat(samples)


def test_items_are_drawn_equally_often() -> None:
    ids, positions = grid(100, 20)
    negatives = draw(ids, positions, items=41, count=16)
    assert negatives.shape == (2000, 16)
    assert negatives.dtype == torch.int64
    counts = torch.bincount(negatives.flatten(), minlength=41).double()
    assert counts.shape == (41,)
    expected = negatives.numel() / 41
    assert ((counts - expected) ** 2 / expected).sum() < 73.4  # chi-square, 40 degrees of freedom, p = 0.001


def test_pairs_of_negatives_of_a_label_are_drawn_equally_often() -> None:
    ids, positions = grid(200, 20)
    negatives = draw(ids, positions, items=6, count=6)
    counts = torch.bincount((negatives[:, 0] * 6 + negatives[:, 5]).flatten(), minlength=36).double()
    expected = len(ids) / 36
    assert ((counts - expected) ** 2 / expected).sum() < 66.6  # chi-square, 35 degrees of freedom, p = 0.001


@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 200)), min_size=1, max_size=12), st.integers(0, 99))
def test_a_label_draws_the_same_in_any_batch_and_order(labels: list[tuple[int, int]], seed: int) -> None:
    ids, positions = torch.tensor(labels).T
    together = draw(ids, positions)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(ids[order], positions[order]), together[order])
    for index in range(len(labels)):
        assert torch.equal(draw(ids[index : index + 1], positions[index : index + 1])[0], together[index])


def test_more_negatives_begin_with_the_fewer() -> None:
    ids, positions = grid(3, 3)
    assert torch.equal(draw(ids, positions, count=9)[:, :4], draw(ids, positions, count=4))


def test_seed_epoch_sample_and_position_each_draw_others() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    draws = [
        draw(one, two, items=10**9),
        draw(one, two, items=10**9, seed=6),
        draw(one, two, items=10**9, epoch=3),
        draw(two, two, items=10**9),
        draw(one, one, items=10**9),
        draw(two, one, items=10**9),
    ]
    assert len({tuple(x.flatten().tolist()) for x in draws}) == len(draws)


def test_no_labels_draw_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert draw(nothing, nothing).shape == (0, 8)


def test_as_many_negatives_as_items_are_allowed_and_more_are_an_error() -> None:
    one = torch.tensor([1])
    assert draw(one, one, items=8).max() < 8
    with pytest.raises(ValueError, match=r"num_negatives=8: .* num_items=7;"):
        draw(one, one, items=7)


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_negative_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_negatives={count}: expected at least 1"):
        UniformNegatives(num_negatives=count)


def test_ids_and_positions_of_different_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(1,\)"):
        draw(torch.arange(3), torch.arange(1))
