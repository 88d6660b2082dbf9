"""Mixed, hard and in-batch negatives: what they are made of, and what does not go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.negatives import (
    HardNegatives,
    InBatchNegatives,
    MixedNegatives,
    NegativeSampler,
    PopularityNegatives,
    UniformNegatives,
)

COUNTS = torch.tensor([1, 2, 3, 4, 90])


def prepared(sampler: NegativeSampler) -> NegativeSampler:
    sampler.prepare(num_items=5, item_counts=lambda: COUNTS)
    return sampler


def draw(sampler: NegativeSampler, labels: int = 6) -> Tensor:
    ids = torch.arange(labels)
    return sampler.sample(num_items=5, seed=1, epoch=0, sample_ids_N=ids, positions_N=ids)


def popularity(count: int, **changes: Any) -> PopularityNegatives:
    return PopularityNegatives(num_negatives=count, **({"log_q": False} | changes))


def test_a_mixture_has_the_negatives_of_its_parts_side_by_side() -> None:
    mixed = prepared(MixedNegatives(samplers=[UniformNegatives(num_negatives=3), popularity(2), InBatchNegatives()]))
    assert (mixed.num_drawn, mixed.scope, mixed.num_kept) == (5, "global", None)
    assert torch.equal(draw(mixed)[:, :3], draw(UniformNegatives(num_negatives=3)))
    # Numbers count on, so that two parts of one kind do not draw the same.
    twice = prepared(MixedNegatives(samplers=[UniformNegatives(num_negatives=2), UniformNegatives(num_negatives=3)]))
    assert torch.equal(draw(twice, 50), draw(UniformNegatives(num_negatives=5), 50))
    assert draw(prepared(MixedNegatives(samplers=[popularity(1), popularity(1)])), 50).unique(dim=1).shape == (50, 2)


def test_the_log_q_of_a_mixture_is_that_of_all_draws_together() -> None:
    parts = [UniformNegatives(num_negatives=3), popularity(2, power=1.0), InBatchNegatives()]
    mixed = prepared(MixedNegatives(samplers=parts, log_q=True))
    rows = torch.arange(5)
    wanted = [3 / 5 + 2 * count / 100 for count in COUNTS.tolist()]
    assert mixed.log_drawn(rows, num_items=5).exp().tolist() == pytest.approx(wanted)
    assert mixed.log_label_share(rows).exp().tolist() == pytest.approx([count / 100 for count in COUNTS.tolist()])
    without = prepared(MixedNegatives(samplers=parts[:2], log_q=True))
    assert without.log_label_share(rows).tolist() == [-math.inf] * 5


def test_in_batch_negatives_draw_nothing() -> None:
    sampler = prepared(InBatchNegatives(scope="rank", log_q=True, smoothing=1.0))
    assert (sampler.num_drawn, sampler.scope) == (0, "rank")
    assert draw(sampler).shape == (6, 0)
    assert sampler.log_drawn(torch.arange(5), num_items=5).tolist() == [-math.inf] * 5
    assert sampler.log_label_share(torch.tensor([0, 4])).exp().tolist() == pytest.approx([2 / 105, 91 / 105])


def test_hard_negatives_choose_from_all_that_are_drawn() -> None:
    hard = prepared(HardNegatives(of=popularity(4), num_negatives=3))
    assert (hard.num_drawn, hard.num_kept, hard.scope, hard.log_q) == (4, 3, None, False)
    assert torch.equal(draw(hard), draw(prepared(popularity(4))))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: MixedNegatives(samplers=[UniformNegatives()]), "samplers: MixedNegatives mixes at least two, got 1"),
    (
        lambda: MixedNegatives(samplers=[UniformNegatives(log_q=True), InBatchNegatives()]),
        "samplers: UniformNegatives has log_q, which is one for the whole mixture",
    ),
    (
        lambda: MixedNegatives(samplers=[InBatchNegatives(), InBatchNegatives(scope="rank")]),
        "samplers: more than one takes the labels of the batch",
    ),
    (
        lambda: MixedNegatives(samplers=[HardNegatives(of=UniformNegatives()), InBatchNegatives()]),
        "samplers: HardNegatives keeps by score",
    ),
    (
        lambda: MixedNegatives(samplers=[MixedNegatives(samplers=[UniformNegatives()] * 2), InBatchNegatives()]),
        "samplers: a MixedNegatives in another",
    ),
    (lambda: HardNegatives(of=UniformNegatives(log_q=True)), "of: UniformNegatives has log_q"),
    (lambda: HardNegatives(of=InBatchNegatives()), "of: InBatchNegatives takes the labels of the batch"),
    (lambda: HardNegatives(of=HardNegatives(of=UniformNegatives())), "of: HardNegatives keeps by score itself"),
    (
        lambda: HardNegatives(of=UniformNegatives(num_negatives=3), num_negatives=4),
        "num_negatives=4: UniformNegatives draws only 3",
    ),
    (lambda: HardNegatives(of=UniformNegatives(), num_negatives=0), "num_negatives=0: expected at least 1"),
    (lambda: InBatchNegatives(scope="node"), "scope='node': expected global or rank"),  # type: ignore[arg-type]
    (
        lambda: InBatchNegatives(log_q=True).prepare(num_items=None, item_counts=None),
        "InBatchNegatives: log_q needs to know how often items occur",
    ),
    (
        lambda: InBatchNegatives(log_q=True).prepare(num_items=4, item_counts=lambda: COUNTS),
        r"the counts of the training part cover 5 item\(s\), the corpus has num_items=4",
    ),
    (
        lambda: MixedNegatives(samplers=[UniformNegatives(num_negatives=3)] * 2).prepare(num_items=5, item_counts=None),
        "num_negatives=6: the corpus has only num_items=5",
    ),
    (
        lambda: HardNegatives(of=UniformNegatives(num_negatives=6), num_negatives=2).prepare(
            num_items=5, item_counts=None
        ),
        "num_negatives=6: the corpus has only num_items=5",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_go_together_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message if message[0] != "t" else message):
        make()
