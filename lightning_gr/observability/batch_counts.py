"""BatchCounts: how much a batch holds, from what its host knows; nothing is read from a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral
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
    return int(count) if isinstance(count, Integral) else None


def _rows(batch: Any) -> int:
    """Of the first tensor inside; 1 where there is none, and 0 of no batch."""
    return 0 if batch is None else next(_all_rows(batch), 1)


def _all_rows(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch.shape[0]
    elif callable(stride := getattr(batch, "stride", None)):  # a keyed jagged tensor's is its number of rows
        yield int(stride())
    elif is_dataclass(batch):
        for part in fields(batch):
            yield from _all_rows(getattr(batch, part.name))
    elif isinstance(batch, Mapping | Sequence) and not isinstance(batch, str | bytes):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _all_rows(part)
