"""In-batch negatives: the labels of a batch are each other's negatives, and no item is looked up for it.

Shape suffixes: N labelled tokens.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.negatives.item_shares import ItemShares, check_shares, read_shares
from lightning_gr.negatives.sampler import ItemCounts, NegativeSampler, Scope


class InBatchNegatives(NegativeSampler):
    """Takes labels of the batch; a label that is the target itself does not count.

    Without `log_q` each distinct item counts once. With it each label counts as often as it occurs, lowered by the
    logarithm of how often the item is expected among the other labels (Yi et al., RecSys 2019), by its share of the
    labels of the training part.

    Args:
        scope: `global` takes the labels of the global batch, whose losses do not depend on the number of ranks, for one
            exchange of queries; `rank` takes those of this process alone, whose losses do depend on it. Where a step is
            made of several batches, either takes the labels of one of them.
        log_q: corrects for popular items being negatives more often.
        counts: with `log_q`, a file with a count for each item row, ``.npy`` or text with one a line; None takes how
            often each item is a label of the datamodule's training part.
        smoothing: with `log_q`, added to each count.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self, *, scope: Scope = "global", log_q: bool = False, counts: str | None = None, smoothing: float = 0.0
    ) -> None:
        if scope not in get_args(Scope):
            raise ValueError(f"scope={scope!r}: expected global or rank")
        check_shares("InBatchNegatives", power=1.0, smoothing=smoothing)
        self.scope, self.log_q, self.counts, self.smoothing = scope, log_q, counts, smoothing
        self._shares: ItemShares | None = None

    @override
    def prepare(self, *, num_items: int | None, item_counts: ItemCounts | None, log_q: bool | None = None) -> None:
        if not (self.log_q if log_q is None else log_q):
            return
        if num_items is None:
            raise ValueError(
                "InBatchNegatives: log_q needs to know how often items occur, and nothing says which there are; leave "
                "log_q out, or give num_items"
            )
        self._shares = read_shares(
            path=self.counts,
            item_counts=item_counts,
            num_items=num_items,
            power=1.0,
            smoothing=self.smoothing,
            # Of counts of labels, no label has 0.
            absent_allowed=self.counts is None,
            owner="InBatchNegatives",
        )

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
        return sample_ids_N.new_zeros(len(sample_ids_N), 0)

    @override
    def log_drawn(self, rows: Tensor, *, num_items: int) -> Tensor:
        return torch.full(rows.shape, -torch.inf, dtype=torch.float64)

    @override
    def log_label_share(self, rows: Tensor) -> Tensor:
        if self._shares is None:
            raise ValueError("InBatchNegatives: log_q was asked for before prepare() read how often items occur")
        num_items = len(self._shares)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_items:
            raise ValueError(
                f"InBatchNegatives: item rows {int(rows.min())} ... {int(rows.max())} and counts of {num_items} items; "
                "log_q needs a count for each item"
            )
        return self._shares.log_share(rows)
