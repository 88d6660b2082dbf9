"""Negatives by popularity: how often each item is drawn, logQ, and tables that do not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.negatives import PopularityNegatives

COUNTS = torch.tensor([5, 1, 40, 12, 2, 300, 1])


def sampler(counts: Tensor = COUNTS, **changes: Any) -> PopularityNegatives:
    made = PopularityNegatives(**({"num_negatives": 4} | changes))
    made.prepare(num_items=len(counts), item_counts=lambda: counts)
    return made


def draw(
    of: PopularityNegatives, ids: Tensor, positions: Tensor, *, seed: int = 5, epoch: int = 2, **more: Any
) -> Tensor:
    items = len(COUNTS)
    return of.sample(num_items=items, seed=seed, epoch=epoch, sample_ids_N=ids, positions_N=positions, **more)


def shares(power: float, smoothing: float = 0.0) -> list[float]:
    weights = [(count + smoothing) ** power for count in COUNTS.tolist()]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(("power", "smoothing"), [(1.0, 0.0), (0.75, 0.0), (0.5, 3.0), (0.0, 0.0)])
def test_items_are_drawn_by_the_power_of_their_count(power: float, smoothing: float) -> None:
    ids, positions = torch.arange(5000).repeat_interleave(4), torch.arange(4).repeat(5000)
    found = draw(sampler(power=power, smoothing=smoothing), ids, positions)
    assert (found.shape, found.dtype) == ((20_000, 4), torch.int64)
    counts = torch.bincount(found.flatten(), minlength=len(COUNTS)).double()
    expected = found.numel() * torch.tensor(shares(power, smoothing), dtype=torch.float64)
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 200)), min_size=1, max_size=12), st.integers(0, 99))
def test_a_label_draws_the_same_in_any_batch_and_order(labels: list[tuple[int, int]], seed: int) -> None:
    ids, positions = torch.tensor(labels).T
    together = draw(sampler(), ids, positions)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(sampler(), ids[order], positions[order]), together[order])
    for index in range(len(labels)):
        assert torch.equal(draw(sampler(), ids[index : index + 1], positions[index : index + 1])[0], together[index])


def test_seed_epoch_sample_position_and_number_each_draw_others() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    of = sampler(torch.arange(1, 8), num_negatives=7)
    found = [
        draw(of, one, two),
        draw(of, one, two, seed=6),
        draw(of, one, two, epoch=3),
        draw(of, two, two),
        draw(of, one, one),
        draw(of, one, two, first_number=7),
    ]
    assert len({tuple(x.flatten().tolist()) for x in found}) == len(found)


def test_an_item_is_expected_as_often_as_it_is_drawn() -> None:
    log_drawn = sampler(num_negatives=3).log_drawn(torch.tensor([[2, 5], [0, 0]]), num_items=len(COUNTS))
    p = shares(0.75)
    assert (log_drawn.shape, log_drawn.dtype) == ((2, 2), torch.float64)
    assert log_drawn.flatten().tolist() == pytest.approx([math.log(3 * p[i]) for i in (2, 5, 0, 0)])


def test_weighed_by_log_q_a_few_draws_estimate_the_sum_over_all_items() -> None:
    of, logits = sampler(num_negatives=4), torch.linspace(-1.0, 2.0, len(COUNTS), dtype=torch.float64)
    negatives = draw(of, torch.arange(50_000), torch.zeros(50_000, dtype=torch.int64))
    estimates = (logits[negatives] - of.log_drawn(negatives, num_items=len(COUNTS))).exp().sum(1)
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean()) - float(logits.exp().sum())) < 4 * error
    assert error < 0.02 * float(logits.exp().sum())
    uncorrected = logits[negatives].exp().sum(1).mean() * len(COUNTS) / 4
    assert abs(float(uncorrected) - float(logits.exp().sum())) > 10 * error


@pytest.mark.parametrize("suffix", ["npy", "txt"])
def test_counts_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"counts.{suffix}"
    if suffix == "npy":
        np.save(file, COUNTS.numpy())
    else:
        file.write_text("\n".join(str(x) for x in COUNTS.tolist()) + "\n")
    ids = torch.arange(20)
    of = PopularityNegatives(num_negatives=4, counts=str(file))
    assert torch.equal(draw(of, ids, ids), draw(sampler(), ids, ids))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], r"PopularityNegatives: counts=.* cover 3 item\(s\), the corpus has num_items=7"),
        ([1, 2, 3, 0, 5, 0, 7], r"have 2 item\(s\) that do not occur, row 3 the first, .* set smoothing"),
        ([1, 2, 3, -1, 5, 6, 7], r"expected finite numbers of at least 0, got -1"),
        ([1, 2, 3, math.nan, 5, 6, 7], r"expected finite numbers of at least 0"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"expected one number an item row, got int64 of shape \(1, 7\)"),
        (["a"] * 7, r"expected one number an item row, got <U1"),
    ],
)
def test_counts_that_do_not_cover_the_items_are_refused_at_start(content: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.array(content))
    with pytest.raises(ValueError, match=message):
        PopularityNegatives(num_negatives=4, counts=str(tmp_path / "counts.npy")).prepare(num_items=7, item_counts=None)


def test_counts_that_are_not_there_or_are_no_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"counts=nowhere\.npy: no such file"):
        PopularityNegatives(counts="nowhere.npy", num_negatives=4).prepare(num_items=7, item_counts=None)
    (tmp_path / "counts.txt").write_text("1\nmany\n")
    with pytest.raises(ValueError, match=r"counts=.*counts\.txt: cannot be read"):
        PopularityNegatives(counts=str(tmp_path / "counts.txt"), num_negatives=2).prepare(num_items=2, item_counts=None)
    with pytest.raises(ValueError, match=r"nothing counts how often items occur.*PopularityNegatives\(counts=\.\.\.\)"):
        PopularityNegatives(num_negatives=4).prepare(num_items=7, item_counts=None)


def test_smoothing_gives_items_that_do_not_occur_a_share() -> None:
    of = sampler(torch.tensor([0, 3, 0, 1]), smoothing=1.0, power=1.0)
    found = of.log_drawn(torch.arange(4), num_items=4).exp() / 4
    assert found.tolist() == pytest.approx([1 / 8, 4 / 8, 1 / 8, 2 / 8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 0}, "num_negatives=0: expected at least 1"),
        ({"power": -1.0}, r"PopularityNegatives: power=-1\.0: expected a number of at least 0"),
        ({"smoothing": math.inf}, "PopularityNegatives: smoothing=inf: expected a number of at least 0"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PopularityNegatives(**changes)


def test_more_negatives_than_items_are_refused_at_start() -> None:
    with pytest.raises(ValueError, match=r"^num_negatives=8: the corpus has only num_items=7"):
        PopularityNegatives(num_negatives=8).prepare(num_items=7, item_counts=lambda: COUNTS)
