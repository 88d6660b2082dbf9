"""Negatives by popularity: an item is drawn the more often, the more often it is a label.

Shape suffixes: N labelled tokens, R negatives a label.
"""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from lightning_gr.counter_random import counter_uniform, name_key
from lightning_gr.negatives.item_shares import ItemShares, check_shares, read_shares
from lightning_gr.negatives.sampler import ItemCounts, NegativeSampler, at_least_one


class PopularityNegatives(NegativeSampler):
    """Draws item i with probability proportional to ``(count_i + smoothing) ** power``, with replacement.

    One uniform number a negative, looked up in the cumulative shares: 8 bytes an item twice, on the host of each rank.

    Args:
        num_negatives: negatives a label, at least 1.
        power: 1 draws by occurrence, 0 uniformly; word2vec's .75 lies between (Mikolov et al., 2013).
        log_q: lowers each logit by the logarithm of how often the item is expected among the negatives, without which
            popular items are pushed down.
        counts: file with a count for each item row, ``.npy`` or text with one a line; None takes how often each item is
            a label of the datamodule's training part.
        smoothing: added to each count. Without it every item must occur.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        num_negatives: int = 128,
        power: float = 0.75,
        log_q: bool = True,
        counts: str | None = None,
        smoothing: float = 0.0,
    ) -> None:
        check_shares("PopularityNegatives", power=power, smoothing=smoothing)
        self.num_drawn = self.num_negatives = at_least_one(num_negatives)
        self.power, self.log_q, self.counts, self.smoothing = power, log_q, counts, smoothing
        self._shares: ItemShares | None = None

    @override
    def prepare(self, *, num_items: int | None, item_counts: ItemCounts | None, log_q: bool | None = None) -> None:
        super().prepare(num_items=num_items, item_counts=item_counts)
        if num_items is not None:
            self._shares = read_shares(
                path=self.counts,
                item_counts=item_counts,
                num_items=num_items,
                power=self.power,
                smoothing=self.smoothing,
                absent_allowed=False,
                owner="PopularityNegatives",
            )

    def _shares_of(self, num_items: int) -> ItemShares:
        if self._shares is None or len(self._shares) != num_items:
            self.prepare(num_items=num_items, item_counts=None)
        assert self._shares is not None
        return self._shares

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
        numbers_NR = counter_uniform(seed, name_key("popularity negatives"), epoch, *counters)
        return self._shares_of(num_items).items_at(numbers_NR)

    @override
    def log_drawn(self, rows: Tensor, *, num_items: int) -> Tensor:
        return math.log(self.num_drawn) + self._shares_of(num_items).log_share(rows)
