"""SequenceBatch: host checks, moving, and the loss over a global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch, TokenKind


def make(lengths: list[int], *, denominator: float = 4.0, divisor: float = 1.0, **changes: Any) -> SequenceBatch:
    counts = torch.zeros(len(lengths), 4, dtype=torch.int64)
    counts[:, TokenKind.REALTIME] = torch.tensor(lengths)
    total = sum(lengths)
    fields: dict[str, Any] = {
        "features": KeyedJaggedTensor(["item_id"], torch.arange(total), lengths=torch.tensor(lengths)),
        "token_counts_B4": counts,
        "sample_ids_B": torch.arange(len(lengths)),
        "labels": {"next_item": Labels(torch.arange(total), torch.arange(total), torch.ones(total))},
        "denominators": {"next_item": denominator},
        "gradient_divisor": divisor,
        "timestamps_T": torch.arange(total),
        "dense": {"price": torch.zeros(total, 2)},
    }
    return SequenceBatch(**(fields | changes))


def test_it_knows_its_sizes_on_the_host() -> None:
    batch = make([2, 0, 3], sample_ids_B=torch.tensor([5, PADDING_SAMPLE_ID, 9]))
    assert (batch.num_sequences, batch.num_tokens, batch.num_samples) == (3, 5, 2)
    assert batch.labels["next_item"].num_labels == 5
    assert batch.layout.offsets_B1.tolist() == [0, 2, 2, 5]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_counts_B4": torch.zeros(2, 4)}, "token_counts_B4"),
        ({"token_counts_B4": torch.full((2, 4), -1)}, "token_counts_B4"),
        ({"sample_ids_B": torch.arange(3)}, "sample_ids_B"),
        ({"shots_B": torch.arange(3)}, "shots_B"),
        ({"shots_B": torch.zeros(2)}, "shots_B"),
        ({"timestamps_T": torch.arange(4)}, "timestamps_T"),
        ({"dense": {"price": torch.zeros(7)}}, "price"),
        ({"denominators": {}}, "denominators"),
        ({"denominators": {"next_item": -1.0}}, "next_item"),
        ({"denominators": {"next_item": float("nan")}}, "next_item"),
        ({"features": KeyedJaggedTensor(["a"], torch.arange(3), lengths=torch.tensor([3]))}, "features"),
    ],
)
def test_host_numbers_that_disagree_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make([2, 3], **changes)


def test_labels_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="values_N"):
        Labels(torch.arange(3), torch.arange(2))


def test_device_values_are_checked_only_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = {"next_item": Labels(torch.arange(1), torch.tensor([99]))}
    make([2, 3], labels=outside)
    monkeypatch.setenv("LIGHTNING_GR_DEBUG", "1")
    with pytest.raises(ValueError, match="tokens_N"):
        make([2, 3], labels=outside)


def test_moving_keeps_everything() -> None:
    batch = make([2, 3], divisor=3.0)
    moved = batch.to("cpu", non_blocking=True)
    assert moved.gradient_divisor == 3.0
    assert moved.num_samples == 2
    torch.testing.assert_close(moved.features.values(), batch.features.values())
    torch.testing.assert_close(moved.dense["price"], batch.dense["price"])
    meta = batch.to("meta")
    assert meta.timestamps_T is not None
    assert meta.timestamps_T.is_meta
    assert meta.labels["next_item"].values_N.is_meta
    assert meta.layout.offsets_B1.is_meta
    assert not meta.token_counts_B4.is_meta


def test_losses_of_uneven_ranks_make_the_gradient_of_the_union() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    (weight * values).mean().backward()
    union = weight.grad
    assert union is not None
    gradients = []
    for mine in (values[:3], values[3:], values[:0]):
        weight.grad = None
        make([1], divisor=3.0).mean_over_global_batch({"next_item": (weight * mine).sum()}).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(torch.stack(gradients).mean(), union)


def test_a_task_nobody_labelled_adds_zero_and_stays_in_the_graph() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    loss = make([1], denominator=0.0).mean_over_global_batch({"next_item": weight * 5})
    loss.backward()
    assert loss.item() == 0
    assert weight.grad == 0


def test_a_task_left_out_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_sums"):
        make([1]).mean_over_global_batch({"click": torch.tensor(1.0)})
