"""Batches of about as many tokens: MTGenRec's dynamic sequence batching, which moves nothing between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from lightning_gr.batch import SequenceBatch
from lightning_gr.batch_samples import concatenate, take

Array = np.ndarray[Any, Any]


def closest_prefix(tokens: Array, budget: int) -> int:
    """How many leading sequences come closest to a token budget (MTGenRec, arXiv 2505.12663, algorithm 1).

    Args:
        tokens: int64 tokens of each sequence.
        budget: tokens wanted.

    Returns:
        A count of at least 1 where there is a sequence, so that one longer than the budget is alone. Of two counts
        equally close the one within the budget. All of them say nothing of sequences to come.
    """
    sums = np.cumsum(tokens)
    within = int(np.searchsorted(sums, budget, side="right"))
    if within == len(sums):
        return within
    below = int(sums[within - 1]) if within else 0
    return within + 1 if within == 0 or sums[within] - budget < budget - below else within


def token_budget_batches(chunks: Iterable[SequenceBatch], budget: int) -> Iterator[SequenceBatch]:
    """Cuts a stream of sequences anew, into batches whose tokens are closest to a budget.

    A batch is cut as soon as something stays behind it; what is left at the end is the last batch. So every sequence
    comes out once, in order, one longer than the budget alone or before any other.

    Args:
        chunks: the stream, in batches of any size, on the host.
        budget: tokens wanted in each batch, e.g. the mean length times the wanted number of sequences.

    Yields:
        Batches with the denominators and the divisor of the chunk in which they begin.

    Raises:
        ValueError: the budget is below 1, or chunks do not fit together, see `concatenate`.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: expected at least 1 token")
    waiting: list[SequenceBatch] = []
    tokens = 0
    for chunk in chunks:
        if not chunk.num_sequences:
            continue
        waiting.append(chunk)
        tokens += chunk.num_tokens
        if tokens <= budget:
            continue
        queue = concatenate(waiting)
        lengths, start = queue.layout.lengths_B.numpy(), 0
        while start + (count := closest_prefix(lengths[start:], budget)) < len(lengths):
            yield take(queue, torch.arange(start, start + count))
            start += count
        waiting = [take(queue, torch.arange(start, len(lengths)))]
        tokens = waiting[0].num_tokens
    if waiting:
        yield concatenate(waiting)
