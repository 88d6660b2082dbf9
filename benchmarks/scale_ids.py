"""How many distinct ids some draws have, and the lengths of sequences: the laws that samples are drawn by.

Legend: V ids of the vocabulary, K bins of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_SINGLE = 4096  # most popular ids, each a bin of its own
_BINS = 2000


@dataclass(frozen=True)
class ZipfIds:
    """Ids by Zipf's law: the k-th most popular is drawn with a probability that goes with ``k ** -exponent``.

    Args:
        vocabulary: V.
        exponent: above 0; 0 is uniform.
        few: share of draws from features of so few values that their distinct ones do not count.
    """

    vocabulary: int
    exponent: float
    few: float = 0.0

    @cached_property
    def _bins(self) -> tuple[Array, Array]:
        """Ids of each bin and the probability of one of them; beyond the most popular a bin's are taken as alike."""
        first = np.arange(min(_SINGLE, self.vocabulary), dtype=np.float64)
        edges_K = np.unique(np.rint(np.geomspace(len(first), self.vocabulary, _BINS + 1)))
        middle_K = np.sqrt(np.maximum(edges_K[:-1], 1) * edges_K[1:]) + 0.5
        count_K = np.concatenate([np.ones(len(first)), np.diff(edges_K)])
        weight_K = np.concatenate([first + 1, middle_K]) ** -self.exponent
        return count_K, weight_K / (count_K @ weight_K)

    def distinct(self, draws: float) -> float:
        """Expected distinct ids of so many draws: the sum over ids of ``1 - (1 - p) ** draws``."""
        return _distinct(self, draws * (1 - self.few))

    def again(self, draws: float) -> float:
        """Expected share of a step's distinct ids that the step before, of as many draws, has too."""
        count_K, share_K = self._bins
        seen_K = -np.expm1(draws * (1 - self.few) * np.log1p(-share_K))
        return float(count_K @ seen_K**2 / (count_K @ seen_K)) if draws > 0 else 0.0


@lru_cache(maxsize=4096)
def _distinct(ids: ZipfIds, draws: float) -> float:
    count_K, share_K = ids._bins
    if ids.vocabulary == 1:
        return float(draws > 0)
    return float(count_K @ -np.expm1(draws * np.log1p(-share_K)))


@dataclass(frozen=True)
class LogNormalLengths:
    """Tokens of sequences: log-normal, cut at the longest, with a mean that holds after the cut.

    Args:
        mean: tokens.
        longest: tokens.
        sigma: of the logarithm.
    """

    mean: float
    longest: int
    sigma: float = 1.0

    def draw(self, generator: np.random.Generator, count: int) -> Array:
        """Int64 tokens of so many sequences."""
        drawn = np.exp(_location(self) + self.sigma * generator.standard_normal(count))
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


@lru_cache(maxsize=256)
def _location(lengths: LogNormalLengths) -> float:
    """Mean of the logarithm before the cut, by bisection over normal quantiles."""
    normal_K = np.sort(np.random.default_rng(0).standard_normal(100_001))
    low, high = 0.0, float(np.log(lengths.longest))
    for _ in range(40):
        middle = (low + high) / 2
        found = np.clip(np.exp(middle + lengths.sigma * normal_K), 1, lengths.longest).mean()
        low, high = (middle, high) if found < lengths.mean else (low, middle)
    return (low + high) / 2
