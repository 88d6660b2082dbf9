"""Where time goes: arithmetic of spans, and the classes into which a span of training is divided."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

Span = tuple[float, float]
"""Start and end, in seconds of any clock; a list of them may overlap and be in any order."""

CLASSES = ("compute", "exposed exchange", "copy", "data wait", "idle")
"""What time is divided into; each moment is one of them, so they add up to the whole."""


class StageEvent(Protocol):
    """An event of a `StageLog`."""

    @property
    def stage(self) -> str:
        """Name of the stage."""

    @property
    def batch(self) -> int:
        """Number of the batch."""

    @property
    def start(self) -> float:
        """Start in seconds."""

    @property
    def end(self) -> float:
        """End in seconds."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union: spans in order, none of which touch or are empty."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def total(spans: Iterable[Span]) -> float:
    """How long the union is."""
    return sum(end - start for start, end in merged(spans))


def overlap(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """What lies in both unions."""
    ours, theirs = merged(spans), merged(others)
    found, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        start, end = max(ours[i][0], theirs[j][0]), min(ours[i][1], theirs[j][1])
        if start < end:
            found.append((start, end))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """What of a union is not in the other."""
    others = merged(others)
    edges = [float("-inf"), *(edge for span in others for edge in span), float("inf")]
    return overlap(spans, list(zip(edges[::2], edges[1::2], strict=True)))


def divided(window: Iterable[Span], claims: Sequence[tuple[str, Iterable[Span]]]) -> dict[str, float]:
    """Seconds of a window in each of `CLASSES`.

    Args:
        window: what is divided.
        claims: a class and the spans that are its own, unless a claim before took them; what nobody claims is idle.
    """
    seconds = dict.fromkeys(CLASSES, 0.0)
    left = merged(window)
    for name, spans in claims:
        spans = merged(spans)
        seconds[name] += total(overlap(left, spans))
        left = without(left, spans)
    seconds["idle"] += total(left)
    return seconds


def spans_of(events: Iterable[StageEvent], *stages: str) -> list[Span]:
    """When one of some stages was at work."""
    return [(event.start, event.end) for event in events if event.stage in stages]


def exposed_exchanges(events: Iterable[StageEvent]) -> list[Span]:
    """When the training thread waited for rows or ids of its own batch, as far as a stage log tells.

    It waits for ids before a batch trains. Rows that are read and sent while their own batch trains are waited for too;
    those of another batch are not.
    """
    trained: defaultdict[int, list[Span]] = defaultdict(list)
    embedded: defaultdict[int, list[Span]] = defaultdict(list)
    found: list[Span] = []
    for event in events:
        if event.stage == "await_lookup":
            found.append((event.start, event.end))
        elif event.stage in ("train", "embed"):
            (trained if event.stage == "train" else embedded)[event.batch].append((event.start, event.end))
    for batch, spans in embedded.items():
        found += overlap(spans, trained[batch])
    return merged(found)
