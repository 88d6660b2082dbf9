"""Logit sharing against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.negatives.logit_sharing import (
    auxiliary_places,
    equals_positive,
    of_other_tokens,
    sharing_sources,
    sharing_words,
)


def words(count: int, *, seed: int = 1, epoch: int = 0) -> torch.Tensor:
    ids = torch.arange(count)
    return sharing_words(seed=seed, epoch=epoch, sample_ids_N=ids // 3, positions_N=ids % 3)


@settings(max_examples=80, deadline=None)
@given(count=st.integers(0, 12), k=st.integers(1, 15), seed=st.integers(0, 1 << 40), equal=st.booleans())
def test_a_token_takes_over_from_other_tokens_none_twice_and_each_as_often(
    count: int, k: int, seed: int, equal: bool
) -> None:
    sources = sharing_sources(torch.zeros(count, dtype=torch.int64) if equal else words(count, seed=seed), k)
    assert sources.shape == (count, max(0, min(k - 1, count - 1)))
    for token, others in enumerate(sources.tolist()):
        assert token not in others
        assert len(set(others)) == len(others)
        assert set(others) <= set(range(count))
    assert torch.bincount(sources.flatten(), minlength=count).tolist() == [sources.shape[1]] * count


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 8),
    num_negatives=st.integers(1, 4),
    k=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_auxiliary_negatives_are_all_own_negatives_of_k_minus_1_other_tokens(
    count: int, num_negatives: int, k: int, seed: int
) -> None:
    # Each place says whose it is, so that it shows where it went.
    own = torch.arange(count * num_negatives).view(count, num_negatives)
    auxiliary = auxiliary_places(own, k=k, words_N=words(count, seed=seed))
    assert auxiliary.shape == (count, min(k - 1, count - 1) * num_negatives)
    for token, taken in enumerate(auxiliary.tolist()):
        owners = {place // num_negatives for place in taken}
        assert token not in owners
        assert sorted(taken) == sorted(x * num_negatives + r for x in owners for r in range(num_negatives))


def test_a_factor_of_1_shares_nothing_and_a_single_token_has_none_to_share_with() -> None:
    own = torch.arange(12).view(4, 3)
    assert auxiliary_places(own, k=1, words_N=words(4)).shape == (4, 0)
    assert auxiliary_places(own[:1], k=3, words_N=words(1)).shape == (1, 0)
    assert auxiliary_places(own[:2], k=4, words_N=words(2)).tolist() == [[3, 4, 5], [0, 1, 2]]
    assert auxiliary_places(own[:0], k=4, words_N=words(0)).shape == (0, 0)


def test_the_shuffle_does_not_depend_on_the_order_of_tokens() -> None:
    count = 30
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    one, other = sharing_sources(words(count), 4), sharing_sources(words(count)[order], 4)
    assert torch.equal(order[other], one[order])


def test_seed_and_epoch_each_shuffle_anew() -> None:
    first = sharing_sources(words(40), 2)
    assert torch.equal(first, sharing_sources(words(40), 2))
    for changed in (words(40, seed=2), words(40, epoch=1)):
        assert not torch.equal(first, sharing_sources(changed, 2))


def test_every_other_token_comes_equally_often_over_many_shuffles() -> None:
    counts = torch.zeros(5, 5)
    for epoch in range(2000):
        counts[torch.arange(5), sharing_sources(words(5, epoch=epoch), 2)[:, 0]] += 1
    assert not counts.diagonal().any()
    # 500 of 2,000 with a deviation of 19.4
    assert bool(((counts - 500).abs() < 90)[~torch.eye(5, dtype=torch.bool)].all())


def test_scalar_logits_are_taken_over_with_their_gradient() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    sources = sharing_sources(words(6), 3)
    taken = of_other_tokens(logits, sources)
    for token in range(6):
        wanted = torch.cat([logits[int(other)] for other in sources[token]])
        assert torch.equal(taken[token], wanted)
    weights = torch.randn(6, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad((taken * weights).sum(), logits)
    wanted = torch.zeros(6, 3, dtype=torch.float64)
    for token in range(6):
        for j, other in enumerate(sources[token].tolist()):
            wanted[other] += weights[token, 3 * j : 3 * j + 3]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_the_positive_is_marked() -> None:
    marked = equals_positive(torch.tensor([[1, 2], [2, 2], [0, 1]]), torch.tensor([1, 2, 3]))
    assert marked.tolist() == [[True, False], [True, True], [False, False]]


def test_what_cannot_be_meant_is_named() -> None:
    with pytest.raises(ValueError, match=r"^logit_sharing=0: expected a factor of at least 1"):
        sharing_sources(words(3), 0)
    with pytest.raises(ValueError, match=r"^words_N: expected int64 of shape \(N,\), got torch.float32 \(3,\)"):
        sharing_sources(torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"^of_other_tokens: .* got \(4, 2\) and \(3, 1\)"):
        of_other_tokens(torch.zeros(4, 2), sharing_sources(words(3), 2))
    with pytest.raises(ValueError, match=r"^equals_positive: .* got \(4, 2\) and \(3,\)"):
        equals_positive(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^sharing_words: .* got \(3,\) and \(2,\)"):
        sharing_words(seed=0, epoch=0, sample_ids_N=torch.arange(3), positions_N=torch.arange(2))
