"""BatchCounts: samples and tokens of every kind of batch, against lists."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from lightning_gr.batch import SequenceBatch
from lightning_gr.observability.batch_counts import BatchCounts


def batch_of(sequences: list[tuple[bool, list[int]]]) -> SequenceBatch:
    """Sequences by whether they are real and by their tokens of each kind."""
    counts_B4 = torch.tensor([tokens for _, tokens in sequences], dtype=torch.int64).view(-1, 4)
    lengths_B = counts_B4.sum(1)
    return SequenceBatch(
        features=KeyedJaggedTensor(["f"], torch.zeros(int(lengths_B.sum()), dtype=torch.int64), lengths=lengths_B),
        token_counts_B4=counts_B4,
        sample_ids_B=torch.tensor([n if real else -1 for n, (real, _) in enumerate(sequences)], dtype=torch.int64),
    )


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 3), min_size=4, max_size=4)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_sequences_are_counted_one_by_one(sequences: list[tuple[bool, list[int]]]) -> None:
    found = BatchCounts.of(batch_of(sequences))
    lengths = [sum(tokens) for _, tokens in sequences]
    assert found.samples == sum(real for real, _ in sequences)
    assert found.tokens == sum(length for (real, _), length in zip(sequences, lengths, strict=True) if real)
    assert found.padding == sum(lengths) - found.tokens
    assert found.rectangle == max(lengths) * len(lengths)


def test_a_batch_of_padding_alone_has_nothing() -> None:
    assert BatchCounts.of(batch_of([(False, [0, 0, 0, 0])])) == BatchCounts(0, 0, 0, 0)


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Features:
    """As TorchRec's own batches are."""

    dense: torch.Tensor
    labels: torch.Tensor


X, Y = torch.zeros(5, 3), torch.zeros(7)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (X, 5),
        ([X, Y], 5),
        ((Y, X), 7),
        (Pair(Y, X), 7),
        ({"x": X, "y": Y}, 5),
        (OrderedDict(a=[{"y": Y}], b=X), 7),
        ({"name": "run", "names": ["a", "b"], "x": X}, 5),
        ({"empty": [], "x": X}, 5),
        ((torch.tensor(3.0), X), 5),
        (Features(X, Y), 5),
        ((torch.zeros(0, 3), X), 0),
        (KeyedJaggedTensor(["f", "g"], torch.arange(4), lengths=torch.tensor([1, 0, 2, 0, 1, 0])), 3),
        ({"ids": KeyedJaggedTensor(["f"], torch.arange(4), lengths=torch.tensor([1, 0, 3])), "x": X}, 3),
        (torch.tensor(3.0), 1),
        ("text", 1),
        (3, 1),
        ([], 1),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_batches_have_the_rows_of_their_first_tensor(batch: Any, samples: int) -> None:
    assert BatchCounts.of(batch) == BatchCounts(samples)


def test_nothing_is_no_sample() -> None:
    """Lightning hands on a loader's None, which is not trained."""
    assert BatchCounts.of(None) == BatchCounts(0)


@pytest.mark.parametrize("kind", [int, np.int64])
def test_batches_that_say_their_numbers_are_taken_at_their_word(kind: Any) -> None:
    assert BatchCounts.of(SimpleNamespace(num_samples=kind(3), num_tokens=kind(40))) == BatchCounts(3, 40)
    assert BatchCounts.of(SimpleNamespace(num_tokens=kind(40))) == BatchCounts(1, 40)
    # What is not a number says nothing.
    assert BatchCounts.of(SimpleNamespace(num_samples=lambda: 3, num_tokens=None)) == BatchCounts(1)
