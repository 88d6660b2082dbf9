"""How users' events are cut into ranking samples: which are candidates, and what history each sample carries.

Shape suffixes: B samples, X event tokens of all samples together: static history, real-time history, candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.splits import Part, Split

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SampleEvents:
    """The events of some samples, as places among users' events in memory.

    Args:
        at_X: int64 event of each token, sample by sample: static history, real-time history, candidates.
        counts_B3: int64 (B, 3) of each of the three kinds.
    """

    at_X: Array
    counts_B3: Array


class SampleCuts(Protocol):
    """Samples by id. A sample's user is ``id % users``; the rest of the id says which of the user's samples it is."""

    identity: tuple[object, ...]
    """Settings, for fingerprints."""
    columns: tuple[str, ...]
    """Fields of events that `events` looks at, beside items and times."""
    most_history: int
    """Most history events of a sample that the settings allow."""

    def prepare(self) -> None:
        """Does what one process may do for all, by itself nothing."""
        return

    def longest_history(self) -> int | None:
        """History events of the sample that has most of them; None where there is no sample."""

    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        """Ids of the samples of some users, row after row, and how many event tokens each has."""

    def event_counts(self, sample_ids: Array) -> Array:
        """Event tokens of each sample: history and candidates."""

    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        """By task, labelled candidates of each sample."""

    def events(self, sample_ids: Array, rows: UserRows, places_B: Array) -> SampleEvents:
        """The samples' events.

        Args:
            sample_ids: the samples.
            rows: users in memory, with `columns`.
            places_B: each sample's user among them.
        """


class BlockCuts(SampleCuts):
    """Blocks of consecutive events as candidates; all events before a candidate are its history.

    Known from the index alone: a sample's candidates are cut by place. Its history is what lies before its last
    candidate; of that, what happened before its first candidate's time is static.

    Args:
        store: the store.
        part: `train`, `val` or `test`.
        split: what is trained on and what is held out.
        max_history: history tokens before a block.
        block: most candidates of a sample.
        missing: by task, the events without a label, ascending, as places among all events of the store.
    """

    def __init__(
        self, store: EventStore, *, part: Part, split: Split, max_history: int, block: int, missing: dict[str, Array]
    ) -> None:
        if max_history < 1 or block < 1:
            raise ValueError(f"max_history={max_history}, block={block}: expected at least 1")
        self._store, self._part, self._split = store, part, split
        self._max_history, self._block, self._missing = max_history, block, missing
        self._num_rows = max(len(store.lengths), 1)
        self._event_starts = event_starts(store)
        self.identity = (max_history, block)
        self.columns = ()
        # All events of a block but the last are history of a later candidate.
        self.most_history = max_history + block - 1

    def _candidates(self, rows: Array) -> tuple[Array, Array]:
        """First candidate event of each user and the end of its candidates."""
        last_token, asking = self._split.spans(self._store, self._part, rows)
        has = last_token >= asking
        return np.where(has, asking + 1, 0), np.where(has, last_token + 2, 0)

    @override
    def longest_history(self) -> int | None:
        longest = -1
        for first_row in range(0, len(self._store.lengths), 1 << 20):
            ids, _ = self.samples(first_row, min(first_row + (1 << 20), len(self._store.lengths)))
            begin, _, end = self._spans(ids)
            longest = max(longest, int((end - 1 - begin).max(initial=-1)))
        return longest if longest >= 0 else None

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        rows = np.arange(first_row, last_row)
        begin, end = self._candidates(rows)
        blocks = -(-(end - begin) // self._block)
        piece = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        ids = np.repeat(rows, blocks) + piece * self._num_rows
        return ids, self.event_counts(ids)

    def _spans(self, sample_ids: Array) -> tuple[Array, Array, Array]:
        """First history event, first candidate and end of the candidates, as places in the user's history."""
        begin, end = self._candidates(sample_ids % self._num_rows)
        first = begin + sample_ids // self._num_rows * self._block
        return np.maximum(first - self._max_history, 0), first, np.minimum(first + self._block, end)

    @override
    def event_counts(self, sample_ids: Array) -> Array:
        begin, first, end = self._spans(sample_ids)
        # All events but the last one are history of some candidate.
        return (end - 1 - begin) + (end - first)

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        _, first, end = self._spans(sample_ids)
        starts = self._event_starts[sample_ids % self._num_rows]
        counts = {}
        for name, missing in self._missing.items():
            gone = np.searchsorted(missing, starts + end) - np.searchsorted(missing, starts + first)
            counts[name] = end - first - gone
        return counts

    @override
    def events(self, sample_ids: Array, rows: UserRows, places_B: Array) -> SampleEvents:
        begin_B, first_B, end_B = self._spans(sample_ids)
        events_B = rows.offsets[places_B]
        # Events before the first candidate's time are static; of those at its time and later the mask decides.
        static_B = first_B - begin_B
        if rows.timestamps is not None:
            static_B = static_B - _ties_before(rows.timestamps, events_B + begin_B, events_B + first_B)
        history_B, candidates_B = end_B - 1 - begin_B, end_B - first_B
        at_X = interleaved(events_B + begin_B, history_B, events_B + first_B, candidates_B)
        return SampleEvents(at_X, np.stack([static_B, history_B - static_B, candidates_B], 1).astype(np.int64))


def event_starts(store: EventStore) -> Array:
    """int64 (U + 1,): where each user's events begin among all events of the store."""
    return np.concatenate([[0], np.cumsum(store.lengths, dtype=np.int64)])


def interleaved(history: Array, num_history: Array, candidates: Array, num_candidates: Array) -> Array:
    """Events of each sample, its history and then its candidates, from where each run begins and how long it is."""
    starts, counts = np.stack([history, candidates], 1), np.stack([num_history, num_candidates], 1)
    return runs(starts.ravel(), counts.ravel())


def runs(starts: Array, counts: Array) -> Array:
    """The numbers of runs that count up from each of `starts`, one run after the other."""
    ends = np.cumsum(counts)
    at: Array = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return at


def _ties_before(times: Array, begin: Array, first: Array) -> Array:
    """How many events just before each first candidate, from `begin` on, have its time."""
    ties = np.zeros(len(begin), dtype=np.int64)
    open_ = np.flatnonzero(first > begin)
    while len(open_):
        same = times[first[open_] - ties[open_] - 1] == times[first[open_]]
        open_ = open_[same]
        ties[open_] += 1
        open_ = open_[first[open_] - ties[open_] > begin[open_]]
    return ties
