"""NegativeSampler: what every kind of negatives tells a model.

Shape suffixes: N labelled tokens, R negatives a label, I items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "rank"]
ItemCounts = Callable[[], Tensor]
"""How often each item row is a label of the training part, int64 (I,)."""


class NegativeSampler(ABC):
    """Draws items for each label, takes labels of the batch as each other's negatives, or both.

    Attributes:
        num_drawn: negatives that are drawn and looked up for each label; 0 where none are.
        num_kept: how many of them the loss keeps, those of the highest scores; None for all.
        scope: whose labels are each other's negatives beside the drawn ones: those of the `global` batch or of the
            `rank`; None for none.
        log_q: whether a negative's logit is lowered by the logarithm of how often it is expected among the negatives
            (Bengio and Senécal, 2008), so that the sum over negatives estimates the sum over all items without bias.
    """

    num_drawn: int = 0
    num_kept: int | None = None
    scope: Scope | None = None
    log_q: bool = False

    def prepare(self, *, num_items: int | None, item_counts: ItemCounts | None, log_q: bool | None = None) -> None:
        """Refuses what cannot be drawn, and reads what the draw needs; called once, before training.

        Args:
            num_items: items of the corpus; None where nothing says which there are.
            item_counts: labels of the training part by item row; None where nothing knows them.
            log_q: whether logQ is asked for; None takes the sampler's own setting.

        Raises:
            ValueError: a setting does not fit the items, by name.
        """
        if self.num_drawn and num_items is not None:
            self._refuse_more_than(num_items)

    @abstractmethod
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
        """Negatives of each labelled token.

        A negative is a function of (seed, epoch, sample id, position, its number), whoever draws it, beside whatever.

        Args:
            num_items: items of the corpus; negatives are in 0 ... `num_items` - 1.
            seed: the run's seed.
            epoch: the epoch, so that every epoch draws others.
            sample_ids_N: int64 stable id of the sample that each label belongs to.
            positions_N: int64 position of the label in its sequence; with the sample id it names the label.
            first_number: number of the first negative; parts of a mixture count on from each other.

        Returns:
            int64 item rows of shape (N, R), R being `num_drawn`, on the device of `sample_ids_N`.

        Raises:
            ValueError: more negatives than items, or the two tensors have different shapes.
        """

    @abstractmethod
    def log_drawn(self, rows: Tensor, *, num_items: int) -> Tensor:
        """Logarithm of how often each of some item rows is expected among the drawn negatives of one label.

        Args:
            rows: int64 item rows of any shape.
            num_items: items of the corpus.

        Returns:
            float64 of the same shape; minus infinity for what is never drawn.
        """

    def log_label_share(self, rows: Tensor) -> Tensor:
        """Logarithm of the probability that a label of the batch is each of some rows, float64.

        Minus infinity for a sampler whose negatives are not the labels of the batch.
        """
        return torch.full(rows.shape, -torch.inf, dtype=torch.float64)

    def _refuse_more_than(self, num_items: int) -> None:
        if self.num_drawn > num_items:
            raise ValueError(
                f"num_negatives={self.num_drawn}: the corpus has only num_items={num_items}; lower it to at most "
                "that, or use the full softmax"
            )

    def _checked_numbers(
        self, num_items: int, sample_ids_N: Tensor, positions_N: Tensor, first_number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample id, position and number of each negative, which broadcast to (N, R)."""
        self._refuse_more_than(num_items)
        if sample_ids_N.dim() != 1 or sample_ids_N.shape != positions_N.shape:
            raise ValueError(
                f"{type(self).__name__}.sample: expected sample_ids_N and positions_N of one shape (N,), got "
                f"{tuple(sample_ids_N.shape)} and {tuple(positions_N.shape)}"
            )
        numbers_R = torch.arange(first_number, first_number + self.num_drawn, device=sample_ids_N.device)
        return sample_ids_N[:, None], positions_N[:, None], numbers_R


def at_least_one(num_negatives: int) -> int:
    """The number itself.

    Raises:
        ValueError: it is below 1 or no whole number.
    """
    if not isinstance(num_negatives, int) or num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives}: expected at least 1, a whole number")
    return num_negatives
