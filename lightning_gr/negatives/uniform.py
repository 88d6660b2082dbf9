"""Uniform negatives as a pure function of what they are drawn for, so that no run depends on its number of processes.

Shape suffixes: N labelled tokens, R negatives a label.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.counter_random import counter_integers, name_key
from lightning_gr.negatives.sampler import NegativeSampler, at_least_one


class UniformNegatives(NegativeSampler):
    """Draws items uniformly and with replacement; the target itself is drawn as often as any other item.

    Args:
        num_negatives: negatives a label, at least 1.
        log_q: lowers each logit by ``log(num_negatives / items)``, so that the loss estimates that of the full softmax.

    Raises:
        ValueError: `num_negatives` is below 1.
    """

    def __init__(self, *, num_negatives: int = 128, log_q: bool = False) -> None:
        self.num_drawn = self.num_negatives = at_least_one(num_negatives)
        self.log_q = log_q

    @override
    def sample(
        self,
        *,
        num_items: int,
        seed: int,
        epoch: int,
        sample_ids_N: Tensor,
        positions_N: Tensor,
        first_number: int = 0,
    ) -> Tensor:
        counters = self._checked_numbers(num_items, sample_ids_N, positions_N, first_number)
        return counter_integers(num_items, seed, name_key("negatives"), epoch, *counters)

    @override
    def log_drawn(self, rows: Tensor, *, num_items: int) -> Tensor:
        return torch.full(rows.shape, math.log(self.num_drawn / num_items), dtype=torch.float64)
