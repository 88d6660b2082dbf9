"""Lengths of sequences in buckets that grow with them, so that a histogram of any data has a fixed size.

Shape suffixes: B sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FIRST_LENGTHS = (0, 1, 2, *(n for power in range(1, 20) for n in (3 << (power - 1), 4 << (power - 1))))
"""The shortest length of each bucket: 0, 1, 2, then 3, 4, 6, 8, 12, 16, ...; the last bucket has no end."""


def count_lengths(lengths_B: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Sequences in each bucket, int64.

    Args:
        lengths_B: tokens of each sequence.
    """
    buckets_B = np.searchsorted(FIRST_LENGTHS, lengths_B, side="right") - 1
    return np.bincount(buckets_B, minlength=len(FIRST_LENGTHS))


def bucket_name(bucket: int) -> str:
    """``5``, ``6-7`` or ``1048576+``."""
    first = FIRST_LENGTHS[bucket]
    if bucket + 1 == len(FIRST_LENGTHS):
        return f"{first}+"
    last = FIRST_LENGTHS[bucket + 1] - 1
    return f"{first}" if first == last else f"{first}-{last}"
