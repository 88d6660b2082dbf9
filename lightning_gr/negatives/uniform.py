"""Uniform negatives as a pure function of (seed, epoch, sample id, position).

Shape suffixes: N labelled tokens, R negatives a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.counter_random import counter_integers, name_key


class UniformNegatives:
    """Draws negatives uniformly from the corpus, with replacement; collisions are left to the loss.

    Args:
        num_negatives: negatives a label, R.

    Raises:
        ValueError: `num_negatives` is below 1.
    """

    def __init__(self, *, num_negatives: int = 128) -> None:
        if num_negatives < 1:
            raise ValueError(f"num_negatives={num_negatives}: expected at least 1")
        self.num_negatives = num_negatives

    def sample(
        self, *, num_items: int, seed: int, epoch: int, sample_ids_N: Tensor, positions_N: Tensor
    ) -> Tensor:
        """Item rows (N, R), int64, the same on any number of ranks and in any order.

        Args:
            num_items: size of the corpus.
            seed: seed of the run.
            epoch: draws differ from epoch to epoch.
            sample_ids_N: int64 sample of each label.
            positions_N: int64 position of the labelled token in its sequence.

        Raises:
            ValueError: more negatives are asked for than there are items.
        """
        if self.num_negatives > num_items:
            raise ValueError(
                f"num_negatives={self.num_negatives}: the corpus has only {num_items} items; lower it, or use the full "
                "softmax"
            )
        draws_R = torch.arange(self.num_negatives, device=sample_ids_N.device)
        return counter_integers(
            num_items, seed, name_key("negatives"), epoch, sample_ids_N[:, None], positions_N[:, None], draws_R
        )
