"""LongestSample: how long the samples of a part are, told before the first batch to whoever has a limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LongestSample:
    """The longest sample of a part, for a message.

    Args:
        positions: how long it is; candidates of one sample share a position.
        made_of: which sample that is and what it is made of, in words.
        remedy: which settings of the data make it shorter, in words.
        known: whether there is such a sample; false where the data only says that there may be one.
    """

    positions: int
    made_of: str
    remedy: str
    known: bool = True
