"""Hard negatives: of those drawn, the ones that the model scores highest.

Shape suffixes: N labelled tokens, R negatives a label.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_gr.negatives.sampler import ItemCounts, NegativeSampler, at_least_one


class HardNegatives(NegativeSampler):
    """Keeps the best of another sampler's negatives by their present score; no gradient goes through the choice.

    A negative that is the target is not chosen while there are others. Of auxiliary negatives that tokens share, too,
    the best are kept.

    Args:
        of: draws the negatives to choose from; takes no labels of the batch and has no `log_q`, since how often an item
            is chosen by score is not known.
        num_negatives: how many are kept, at most as many as `of` draws.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(self, *, of: NegativeSampler, num_negatives: int = 16) -> None:
        self.num_kept = at_least_one(num_negatives)
        name = type(of).__name__
        if of.num_kept is not None:
            raise ValueError(f"of: {name} keeps by score itself; give the sampler that it chooses from")
        if of.scope is not None:
            raise ValueError(f"of: {name} takes the labels of the batch; HardNegatives chooses from drawn negatives")
        if of.log_q:
            raise ValueError(
                f"of: {name} has log_q, but how often an item is chosen by score is not known; set its log_q to false"
            )
        if num_negatives > of.num_drawn:
            raise ValueError(
                f"num_negatives={num_negatives}: {name} draws only {of.num_drawn}; keep at most that, or draw more"
            )
        self.of = of
        self.num_drawn = of.num_drawn

    @override
    def prepare(self, *, num_items: int | None, item_counts: ItemCounts | None, log_q: bool | None = None) -> None:
        self.of.prepare(num_items=num_items, item_counts=item_counts)

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
        return self.of.sample(
            num_items=num_items,
            seed=seed,
            epoch=epoch,
            sample_ids_N=sample_ids_N,
            positions_N=positions_N,
            first_number=first_number,
        )

    @override
    def log_drawn(self, rows: Tensor, *, num_items: int) -> Tensor:
        return self.of.log_drawn(rows, num_items=num_items)
