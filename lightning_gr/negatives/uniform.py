"""Uniform negatives as a pure function of what they are drawn for, so that no run depends on its number of processes.

Shape suffixes: N labelled tokens, R negatives a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.counter_random import counter_integers, name_key


class UniformNegatives:
    """Draws items uniformly and with replacement; the target itself is drawn as often as any other item.

    A negative is a function of (seed, epoch, sample id, position, its number), whoever draws it and beside whatever.

    Args:
        num_negatives: negatives a label, at least 1.

    Raises:
        ValueError: `num_negatives` is below 1.
    """

    def __init__(self, *, num_negatives: int = 128) -> None:
        if num_negatives < 1:
            raise ValueError(f"num_negatives={num_negatives}: expected at least 1")
        self.num_negatives = num_negatives

    def sample(self, *, num_items: int, seed: int, epoch: int, sample_ids_N: Tensor, positions_N: Tensor) -> Tensor:
        """Negatives of each labelled token.

        Args:
            num_items: items of the corpus; negatives are in 0 ... `num_items` - 1.
            seed: the run's seed.
            epoch: the epoch, so that every epoch draws others.
            sample_ids_N: int64 stable id of the sample that each label belongs to.
            positions_N: int64 position of the label in its sequence; with the sample id it names the label.

        Returns:
            int64 item rows of shape (N, R), on the device of `sample_ids_N`.

        Raises:
            ValueError: more negatives than items, or the two tensors have different shapes.
        """
        if self.num_negatives > num_items:
            raise ValueError(
                f"num_negatives={self.num_negatives}: the corpus has only num_items={num_items}; lower it to at most "
                "that, or use the full softmax"
            )
        if sample_ids_N.dim() != 1 or sample_ids_N.shape != positions_N.shape:
            raise ValueError(
                f"UniformNegatives.sample: expected sample_ids_N and positions_N of one shape (N,), got "
                f"{tuple(sample_ids_N.shape)} and {tuple(positions_N.shape)}"
            )
        numbers_R = torch.arange(self.num_negatives, device=sample_ids_N.device)
        return counter_integers(
            num_items, seed, name_key("negatives"), epoch, sample_ids_N[:, None], positions_N[:, None], numbers_R
        )
