"""Mixed negatives: some drawn in one way, some in another, and the labels of the batch beside them.

Shape suffixes: N labelled tokens, R negatives a label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.negatives.sampler import ItemCounts, NegativeSampler


class MixedNegatives(NegativeSampler):
    """The negatives of several samplers together (Yang et al., WWW 2020, mix in-batch and uniform ones).

    Args:
        samplers: at least two, of which at most one takes the labels of the batch, and none keeps by score.
        log_q: lowers each logit by the logarithm of how often the item is expected among the negatives of all samplers;
            theirs stay off.

    Raises:
        ValueError: the samplers do not go together.
    """

    def __init__(self, *, samplers: list[NegativeSampler], log_q: bool = False) -> None:
        if len(samplers) < 2:
            raise ValueError(f"samplers: MixedNegatives mixes at least two, got {len(samplers)}")
        for part in samplers:
            name = type(part).__name__
            if isinstance(part, MixedNegatives):
                raise ValueError("samplers: a MixedNegatives in another; list its samplers in the outer one")
            if part.num_kept is not None:
                raise ValueError(f"samplers: {name} keeps by score; wrap the mixture in it, not the other way round")
            if part.log_q:
                raise ValueError(
                    f"samplers: {name} has log_q, which is one for the whole mixture; set log_q of MixedNegatives and "
                    f"leave that of {name} false"
                )
        in_batch = [part.scope for part in samplers if part.scope is not None]
        if len(in_batch) > 1:
            raise ValueError("samplers: more than one takes the labels of the batch; keep one of them")
        self.samplers = list(samplers)
        self.log_q = log_q
        self.scope = in_batch[0] if in_batch else None
        self.num_drawn = sum(part.num_drawn for part in samplers)

    @override
    def prepare(self, *, num_items: int | None, item_counts: ItemCounts | None, log_q: bool | None = None) -> None:
        super().prepare(num_items=num_items, item_counts=item_counts)
        for part in self.samplers:
            part.prepare(num_items=num_items, item_counts=item_counts, log_q=self.log_q)

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
        self._refuse_more_than(num_items)
        parts = []
        for part in self.samplers:
            parts.append(
                part.sample(
                    num_items=num_items,
                    seed=seed,
                    epoch=epoch,
                    sample_ids_N=sample_ids_N,
                    positions_N=positions_N,
                    first_number=first_number,
                )
            )
            first_number += part.num_drawn
        return torch.cat(parts, 1)

    @override
    def log_drawn(self, rows: Tensor, *, num_items: int) -> Tensor:
        return torch.stack([part.log_drawn(rows, num_items=num_items) for part in self.samplers]).logsumexp(0)

    @override
    def log_label_share(self, rows: Tensor) -> Tensor:
        for part in self.samplers:
            if part.scope is not None:
                return part.log_label_share(rows)
        return super().log_label_share(rows)
