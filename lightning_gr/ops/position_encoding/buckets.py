"""Time buckets of gaps, the same on every device: gaps are compared with whole numbers, not rounded by the device.

Shape suffixes: T tokens, N buckets.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


def gap_buckets(gaps_T: Tensor, *, num_buckets: int, by: Literal["sqrt", "log"], unit: float, width: float) -> Tensor:
    """``min(floor(g(gap / unit) / width), num_buckets - 1)`` with g the square root, or ``ln(max(1, .))``, int64 (T,).

    Args:
        gaps_T: int64 seconds; what is below 0 counts as 0.
        num_buckets: ``N``.
        by: which function g is.
        unit: seconds of one unit.
        width: width of a bucket.
    """
    first_N = _first_gaps(num_buckets, by, unit, width, gaps_T.device)
    return torch.searchsorted(first_N[1:], gaps_T, right=True)


@lru_cache(maxsize=16)
def _first_gaps(
    num_buckets: int, by: Literal["sqrt", "log"], unit: float, width: float, device: torch.device
) -> Tensor:
    """The smallest whole gap of each bucket, int64 (N,): the first at which the formula, in float64, reaches it."""
    bucket_N1 = torch.arange(num_buckets, dtype=torch.float64)[:, None]
    edge_N1 = (bucket_N1 * width).square() * unit if by == "sqrt" else torch.exp(bucket_N1 * width) * unit
    # Rounding moves an edge by less than two of the numbers that float64 can tell apart there.
    tried_NX = edge_N1.clamp(max=2.0**52).floor().to(torch.int64) + torch.arange(-2, 4)
    x_NX = tried_NX.clamp(min=0).to(torch.float64) / unit
    value_NX = x_NX.sqrt() if by == "sqrt" else x_NX.clamp(min=1).log()
    reached_NX = (value_NX / width).floor() >= bucket_N1
    never = torch.iinfo(torch.int64).max
    first_N = torch.where(reached_NX, tried_NX, never).amin(1)
    return torch.where(edge_N1[:, 0] < 2.0**52, first_N, never).to(device, non_blocking=True)
