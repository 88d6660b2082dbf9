"""How the records of tasks are cut into episodes of support and query, for meta learning.

A task is a row of the store, a record one of its events (G-Meta, arXiv 2401.04338).

Shape suffixes: B episodes, Q sequences of an episode, X event tokens of all sequences together, R rows of the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.keyed_shuffle import shuffled
from lightning_gr.data.sample_cuts import SampleCuts, SampleEvents, event_starts, interleaved
from lightning_gr.data.splits import ByUser, Part, part_events

Array = np.ndarray[Any, Any]
Order = Literal["time", "random"]
SmallTasks = Literal["drop", "top_up"]
_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class EpisodeSettings:
    """What an episode is.

    Args:
        support: records of a training support.
        query: records of a training query.
        shots: records of the supports that evaluation adapts to; 0 is none.
        order: by `time`, or in a `random` order of each task's records.
        history: records before the episode that all its sequences have as history.
        small_tasks: whether training tasks with fewer than `min_records` are dropped, or their records repeated.
        min_records: fewest records of a training task.
        eval_query: most records of an evaluation's query; None for any number.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    support: int = 10
    query: int = 10
    shots: tuple[int, ...] = (0, 1, 5, 10)
    order: Order = "time"
    history: int = 0
    small_tasks: SmallTasks = "drop"
    min_records: int = 2
    eval_query: int | None = None

    def __post_init__(self) -> None:
        least = {"support": 1, "query": 1, "history": 0, "min_records": 2, "eval_query": 1}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"{name}={value}: expected at least {number}")
        if not self.shots or min(self.shots) < 0:
            raise ValueError(
                f"shots={list(self.shots)}: expected numbers of records to adapt to, of at least 0, as [0, 1, 5, 10]"
            )
        for name, known in (("order", ("time", "random")), ("small_tasks", ("drop", "top_up"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.order == "random" and self.history:
            raise ValueError(
                f"history={self.history}: what was before an episode is known by time; set order=time, or history=0"
            )


@dataclass(frozen=True)
class TaskCounts:
    """What becomes of the tasks of a part.

    Args:
        tasks: that have episodes.
        dropped_tasks: that have none for lack of records.
        dropped_records: of these.
        topped_up_tasks: whose records are repeated.
        topped_up_records: that are repetitions.
    """

    tasks: int = 0
    dropped_tasks: int = 0
    dropped_records: int = 0
    topped_up_tasks: int = 0
    topped_up_records: int = 0


class EpisodeCuts(SampleCuts):
    """Pieces of tasks as episodes, each one sample of several sequences: supports by size, then the query.

    Training cuts all records of a task into pieces of near equal size, at most ``support + query``; with one record of
    each, a task with an odd number of records has a piece of three. A smaller piece has its share of support, and at
    least one record on each side. Evaluation makes one episode of a task: its first records are the supports, one for
    each of `shots`, and what comes after the largest is the query of all. All is known from the index alone.

    Args:
        store: the store, whose rows are tasks.
        part: `train`, `val` or `test`.
        split: which tasks are held out; its seed is also that of random orders.
        settings: what an episode is.
        missing: by label, the events without one, ascending, as places among all events of the store.

    Attributes:
        counts: what became of the part's tasks.
        shots_Q: int64 shots of each sequence of an episode; 0 is the query.
    """

    def __init__(
        self, store: EventStore, *, part: Part, split: ByUser, settings: EpisodeSettings, missing: dict[str, Array]
    ) -> None:
        self._settings, self._train = settings, part == "train"
        self._random, self._seed = settings.order == "random", split.seed
        self._lengths = store.lengths
        self._num_rows = max(len(store.lengths), 1)
        supports = [settings.support] if self._train else sorted({k for k in settings.shots if k})
        self.shots_Q = np.array([*supports, 0], dtype=np.int64)
        self.identity = ("episodes", settings)
        self.columns = ()
        self.most_history = settings.history
        counts, self._records_R = TaskCounts(), np.zeros(len(store.lengths), dtype=np.int64)
        for first in range(0, len(store.lengths), _ROWS_AT_ONCE):
            rows = np.arange(first, min(first + _ROWS_AT_ONCE, len(store.lengths)))
            begin, end = part_events(split, store, part, rows)
            own = np.where(end > begin, store.lengths[rows].astype(np.int64), 0)
            self._records_R[rows], of_rows = self._usable(own)
            counts = TaskCounts(**{name: n + getattr(of_rows, name) for name, n in vars(counts).items()})
        self.counts = counts
        self._cut_starts = np.zeros(0, dtype=np.int64)
        if any(map(len, missing.values())):
            self._cut_starts = np.concatenate([[0], np.cumsum(self._records_R)])
        self._missing = {name: self._missing_places(store, events) for name, events in missing.items()}

    def _usable(self, records: Array) -> tuple[Array, TaskCounts]:
        """Records of tasks as they are cut, 0 for tasks without an episode, and what became of the tasks."""
        least = self._settings.min_records if self._train else max(self._settings.shots) + 1
        small = (records > 0) & (records < least)
        num_small, num_records = int(small.sum()), int(records[small].sum())
        tasks = int((records >= least).sum())
        if self._train and self._settings.small_tasks == "top_up":
            return np.where(small, least, records), TaskCounts(
                tasks=tasks + num_small,
                topped_up_tasks=num_small,
                topped_up_records=num_small * least - num_records,
            )
        return np.where(small, 0, records), TaskCounts(
            tasks=tasks, dropped_tasks=num_small, dropped_records=num_records
        )

    # ---- which records -----------------------------------------------------------------------------------------

    def _pieces(self, records: Array) -> Array:
        """Episodes of tasks with so many records."""
        if not self._train:
            return (records > 0).astype(np.int64)
        # No piece has one record, which could not be both support and query.
        most = self._settings.support + self._settings.query
        pieces: Array = np.minimum(-(-records // most), records // 2)
        return pieces

    def _ranges(self, sample_ids: Array) -> tuple[Array, Array, Array]:
        """Places of an episode's first record (B,), and where each sequence begins and ends (B, Q)."""
        records = self._records_R[sample_ids % self._num_rows]
        first = np.zeros_like(sample_ids)
        if self._train:
            pieces, piece = np.maximum(self._pieces(records), 1), sample_ids // self._num_rows
            size, larger = records // pieces, records % pieces
            first, size = piece * size + np.minimum(piece, larger), size + (piece < larger)
            share, whole = self._settings.support, self._settings.support + self._settings.query
            rounded = np.minimum((2 * size * share + whole) // (2 * whole), share)
            middle = first + np.clip(rounded, 1, size - 1)
            return first, np.stack([first, middle], 1), np.stack([middle, first + size], 1)
        begin, end = np.zeros((2, len(sample_ids), len(self.shots_Q)), dtype=np.int64)
        end[:] = self.shots_Q
        most = None if self._settings.eval_query is None else max(self._settings.shots) + self._settings.eval_query
        begin[:, -1] = max(self._settings.shots)
        end[:, -1] = records if most is None else np.minimum(records, most)
        return first, begin, end

    def _missing_places(self, store: EventStore, events: Array) -> Array:
        """Where events stand among the records of all tasks as they are cut, in order; ascending."""
        if not len(events):
            return events
        starts = event_starts(store)
        rows = np.searchsorted(starts, events, side="right") - 1
        used = self._records_R[rows] > 0
        rows, places = rows[used], events[used] - starts[rows[used]]
        lengths = store.lengths[rows].astype(np.int64)
        if self._random:
            places = shuffled(places, lengths, rows, seed=self._seed, inverse=True)
        # A record of a task that was topped up stands at several places.
        times = -(-(self._records_R[rows] - places) // lengths)
        repetition = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
        places = np.repeat(self._cut_starts[rows] + places, times) + repetition * np.repeat(lengths, times)
        return np.sort(places)

    # ---- what a plan asks --------------------------------------------------------------------------------------

    @override
    def longest_history(self) -> int | None:
        longest = -1
        for first_row in range(0, len(self._records_R), _ROWS_AT_ONCE):
            ids, _ = self.samples(first_row, min(first_row + _ROWS_AT_ONCE, len(self._records_R)))
            first, _, _ = self._ranges(ids)
            longest = max(longest, int(np.minimum(first, self._settings.history).max(initial=-1)))
        return longest if longest >= 0 else None

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        rows = np.arange(first_row, last_row)
        pieces = self._pieces(self._records_R[first_row:last_row])
        piece = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        ids = np.repeat(rows, pieces) + piece * self._num_rows
        return ids, self.event_counts(ids)

    @override
    def event_counts(self, sample_ids: Array) -> Array:
        first, begin, end = self._ranges(sample_ids)
        history = np.minimum(first, self._settings.history)
        counts: Array = (end - begin).sum(1) + history * len(self.shots_Q)
        return counts

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        """By label, how many the queries have."""
        return {name: counts[:, -1] for name, counts in self.sequence_labels(sample_ids).items()}

    def sequence_labels(self, sample_ids: Array) -> dict[str, Array]:
        """By label, how many each sequence (B, Q) has."""
        _, begin, end = self._ranges(sample_ids)
        counts = dict.fromkeys(self._missing, end - begin)
        if any(map(len, self._missing.values())):
            starts = self._cut_starts[sample_ids % self._num_rows][:, None]
            for name, missing in self._missing.items():
                counts[name] = counts[name] - (
                    np.searchsorted(missing, starts + end) - np.searchsorted(missing, starts + begin)
                )
        return counts

    def without_support(self) -> tuple[int, int | None]:
        """How many episodes have a support without any label, and the row of the first one."""
        count, found = 0, np.zeros(0, dtype=np.int64)
        labels = any(map(len, self._missing.values())) and len(self.shots_Q) > 1
        for first in range(0, len(self._records_R) if labels else 0, _ROWS_AT_ONCE):
            ids, _ = self.samples(first, min(first + _ROWS_AT_ONCE, len(self._records_R)))
            labelled = [x[:, :-1] > 0 for x in self.sequence_labels(ids).values()]
            without = ids[~np.any(labelled, axis=0).all(1)]
            count, found = count + len(without), found if len(found) else without[:1]
        return count, int(found[0]) % self._num_rows if len(found) else None

    @override
    def events(self, sample_ids: Array, rows: UserRows, places_B: Array) -> SampleEvents:
        """The events of the episodes' sequences, one sequence after the other."""
        first, begin, end = self._ranges(sample_ids)
        sequences = len(self.shots_Q)
        history = np.repeat(np.minimum(first, self._settings.history), sequences)
        candidates = (end - begin).ravel()
        counts = np.stack([history, np.zeros_like(history), candidates], 1).astype(np.int64)
        starts_B = rows.offsets[places_B]
        in_store = not self._random and not self.counts.topped_up_tasks
        shift_B = starts_B if in_store else np.zeros_like(starts_B)
        past = np.repeat(first + shift_B, sequences) - history
        at_X = interleaved(past, history, (begin + shift_B[:, None]).ravel(), candidates)
        if in_store:
            return SampleEvents(at_X, counts)
        sequence_X = np.repeat(np.arange(len(candidates)), history + candidates)
        episode_X = sequence_X // sequences
        task_X = (sample_ids % self._num_rows)[episode_X]
        lengths_X = self._lengths[task_X].astype(np.int64)
        at_X = at_X % lengths_X
        if self._random:
            at_X = shuffled(at_X, lengths_X, task_X, seed=self._seed)
            # Within a sequence, records are in the order of time.
            at_X = at_X[np.lexsort((at_X, sequence_X))]
        return SampleEvents(at_X + starts_B[episode_X], counts)
