"""Intra-batch logit sharing: negatives of other tokens as auxiliary negatives (TurboGR, arXiv 2605.13433, equation 2).

With factor k a token has its R own negatives and those of k - 1 other tokens of the batch, R_aux = (k - 1) R of them,
without looking up any row more. The equation multiplies the token's own query with them; the prose of the paper reads
as if the numbers ``o_k . n_kj`` of the other token were taken over. Both come from `of_other_tokens`: given places it
names the rows of the former, given logits it returns the latter.

Shape suffixes: N labelled tokens, R negatives a token, J other tokens, A = J R auxiliary negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.counter_random import counter_bits, name_key


def sharing_words(*, seed: int, epoch: int, sample_ids_N: Tensor, positions_N: Tensor) -> Tensor:
    """A random number for each token by which `sharing_sources` shuffles, whoever draws it and beside whatever.

    Args:
        seed: the run's seed.
        epoch: the epoch, so that every epoch shuffles anew.
        sample_ids_N: int64 stable id of the sample that each token belongs to.
        positions_N: int64 position of the token in its sequence.

    Returns:
        int64 (N,).

    Raises:
        ValueError: the two tensors have different shapes.
    """
    if sample_ids_N.dim() != 1 or sample_ids_N.shape != positions_N.shape:
        raise ValueError(
            "sharing_words: expected sample_ids_N and positions_N of one shape (N,), got "
            f"{tuple(sample_ids_N.shape)} and {tuple(positions_N.shape)}"
        )
    return counter_bits(seed, name_key("logit_sharing"), epoch, sample_ids_N, positions_N)


def sharing_sources(words_N: Tensor, k: int) -> Tensor:
    """The tokens whose negatives each token takes over: the next ones in a shuffled circle of all tokens.

    So no token takes its own, none takes those of another twice, and the negatives of each are taken k - 1 times. The
    circle is a function of the words, not of the order of tokens in the batch, where the words differ. It is of the
    tokens at hand: those of one process, unless the caller gives those of all.

    Args:
        words_N: int64 random numbers, one a token, see `sharing_words`.
        k: the expansion factor (R + R_aux) / R; 1 takes nothing over.

    Returns:
        int64 (N, J) with J = k - 1, or all N - 1 others where the batch has fewer tokens.

    Raises:
        ValueError: k is below 1, or `words_N` is not a vector.
    """
    if k < 1:
        raise ValueError(f"logit_sharing={k}: expected a factor of at least 1; 1 shares nothing")
    if words_N.dim() != 1 or words_N.dtype != torch.int64:
        raise ValueError(f"words_N: expected int64 of shape (N,), got {words_N.dtype} {tuple(words_N.shape)}")
    count = len(words_N)
    num_others = max(0, min(k - 1, count - 1))
    circle_N = words_N.argsort(stable=True)
    steps_J = torch.arange(1, 1 + num_others, device=words_N.device)
    next_NJ = circle_N[(torch.arange(count, device=words_N.device)[:, None] + steps_J) % max(count, 1)]
    return torch.empty_like(next_NJ).index_copy_(0, circle_N, next_NJ)


def of_other_tokens(values_NR: Tensor, sources_NJ: Tensor) -> Tensor:
    """What other tokens have for their negatives: places, items, weights, or logits, whose gradient goes to them.

    Args:
        values_NR: something of each token's negatives.
        sources_NJ: the tokens that each takes over from, see `sharing_sources`.

    Returns:
        (N, J R), the values of the first other token, then of the second, ...

    Raises:
        ValueError: another number of tokens.
    """
    if values_NR.dim() != 2 or sources_NJ.dim() != 2 or len(values_NR) != len(sources_NJ):
        raise ValueError(
            f"of_other_tokens: expected values_NR (N, R) and sources_NJ (N, J) of as many tokens, got "
            f"{tuple(values_NR.shape)} and {tuple(sources_NJ.shape)}"
        )
    # index_select sums its gradient token by token; the gradient of plain indexing sorts first.
    taken = values_NR.index_select(0, sources_NJ.flatten())
    return taken.view(len(values_NR), sources_NJ.shape[1] * values_NR.shape[1])


def auxiliary_places(places_NR: Tensor, *, k: int, words_N: Tensor) -> Tensor:
    """Places of the auxiliary negatives of each token, for the equation's logits ``o_i . n_kj``.

    Args:
        places_NR: places of each token's own negatives.
        k: the expansion factor.
        words_N: int64 random numbers, one a token, see `sharing_words`.

    Returns:
        (N, A) with A = (k - 1) R, or (N - 1) R where the batch has fewer than k tokens.

    Raises:
        ValueError: k is below 1, or the shapes disagree.
    """
    return of_other_tokens(places_NR, sharing_sources(words_N, k))


def equals_positive(auxiliary_NA: Tensor, targets_N: Tensor) -> Tensor:
    """Where an auxiliary negative is the token's positive and must not count; both are items, or both are places.

    Args:
        auxiliary_NA: auxiliary negatives of each token.
        targets_N: its positive.

    Returns:
        bool (N, A).

    Raises:
        ValueError: another number of tokens.
    """
    if targets_N.dim() != 1 or auxiliary_NA.dim() != 2 or len(auxiliary_NA) != len(targets_N):
        raise ValueError(
            f"equals_positive: expected auxiliary_NA (N, A) and targets_N (N,), got {tuple(auxiliary_NA.shape)} and "
            f"{tuple(targets_N.shape)}"
        )
    return auxiliary_NA == targets_N[:, None]
