"""What a sequence costs by its length alone, out of the FLOPs that layers count by tokens and visible pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_gr.balancing.cost import SequenceCost


def causal(flops: Callable[[int, int], int]) -> SequenceCost:
    """Under a causal mask, where L tokens see ``L (L + 1) / 2`` pairs.

    Args:
        flops: operations of tokens and visible pairs, linear in both.
    """
    token, pair = flops(1, 0), flops(0, 1)
    return SequenceCost(token + pair / 2, pair / 2)


def half_candidates(flops: Callable[[Sequence[int], int], int], *, pairs_share: float) -> SequenceCost:
    """Of ranking samples, half of whose tokens are real-time history and half candidates.

    Args:
        flops: operations of the tokens of each kind and of visible pairs, linear in all.
        pairs_share: visible pairs of L tokens over ``L (L + 1)``.
    """
    token, pair = flops((0, 0, 1, 1), 0) / 2, flops((0, 0, 0, 0), 1)
    return SequenceCost(token + pairs_share * pair, pairs_share * pair)
