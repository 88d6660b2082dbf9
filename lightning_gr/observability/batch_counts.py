"""BatchCounts: how much a batch holds, from what its host knows; nothing is read from a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch


@dataclass(frozen=True)
class BatchCounts:
    """Samples and tokens of one process's batch.

    Args:
        samples: sequences that are not padding, or rows of the first tensor.
        tokens: tokens of real samples; None where batches do not tell.
        padding: tokens of padding sequences, which are computed for nothing; None where batches do not tell.
        rectangle: tokens of the rectangle that a padded batch of the same sequences would fill.
    """

    samples: int
    tokens: int | None = None
    padding: int | None = None
    rectangle: int | None = None

    @classmethod
    def of(cls, batch: Any) -> BatchCounts:
        """Counts a `SequenceBatch`; of any other batch what its ``num_samples``, ``num_tokens`` or shape say."""
        if isinstance(batch, SequenceBatch):
            lengths_B = batch.token_counts_B4.sum(1)
            real = int(lengths_B[batch.sample_ids_B != PADDING_SAMPLE_ID].sum())
            longest = int(lengths_B.max()) if len(lengths_B) else 0
            return cls(batch.num_samples, real, batch.num_tokens - real, longest * len(lengths_B))
        samples, tokens = (_known(batch, f"num_{what}") for what in ("samples", "tokens"))
        return cls(_rows(batch) if samples is None else samples, tokens)


def _known(batch: Any, name: str) -> int | None:
    count = getattr(batch, name, None)
    return count if isinstance(count, int) else None


def _rows(batch: Any) -> int:
    """Of the first tensor inside; 1 where there is none."""
    while isinstance(batch, (Mapping, Sequence)) and not isinstance(batch, str) and len(batch):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return batch.shape[0] if isinstance(batch, Tensor) and batch.dim() else 1
