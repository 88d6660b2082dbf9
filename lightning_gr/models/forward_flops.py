"""ForwardFlops: the floating-point operations of a batch's forward pass, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Count = int | Tensor
"""A number of operations; a 0-D tensor where the mask that decides it is on a device, which nothing waits for."""


@dataclass(frozen=True)
class ForwardFlops:
    """What a LightningModule's ``flops(batch)`` returns: work on real tokens and visible pairs; padding is none.

    A multiplication and an addition are two operations. Backward has twice the forward's.

    Args:
        attention: products over the pairs that masks show.
        projections: matrix products of the network's layers, except its head.
        embedding: sums over looked-up rows; a plain look-up has none.
        head: scores against candidates, or task heads, and their loss.
        recomputed: of all these, what backward computes a second time; counted by HFU and not by MFU.
    """

    attention: Count = 0
    projections: Count = 0
    embedding: Count = 0
    head: Count = 0
    recomputed: Count = 0

    @property
    def forward(self) -> Count:
        """All of the forward pass."""
        return self.attention + self.projections + self.embedding + self.head

    @property
    def model(self) -> Count:
        """Forward and backward, each operation once: what MFU counts."""
        return 3 * self.forward

    @property
    def hardware(self) -> Count:
        """With what is computed a second time: what HFU counts."""
        return self.model + self.recomputed
