"""WindowIndex: where the samples of windows of time lie in users' histories, found in one pass and kept with the store.

Shape suffixes: E events of a row group, C candidates among them, S samples, U users, K tasks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from lightning_gr.data.aggregation import Aggregation
from lightning_gr.data.event_checks import check_events, event_place
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import INDEX, WINDOWS
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.exposures import Exposures
from lightning_gr.data.splits import Part, Split, part_events
from lightning_gr.data.task import Task

Array = np.ndarray[Any, Any]
AnyPart = Part | Literal["unlabelled"]
log = logging.getLogger(__name__)
_VERSION = 2
_unkept: WeakKeyDictionary[EventStore, dict[Path, WindowIndex]] = WeakKeyDictionary()
"""Indices of open stores that cannot be written to."""
_ARRAYS = ("starts_U1", "places_S6", "counts_S3", "labels_SK", "passed_3")


@dataclass(frozen=True)
class WindowSettings:
    """What samples of windows are cut by.

    Args:
        tasks: by name, what is predicted.
        split: what is trained on and what is held out.
        aggregation: windows and caps.
    """

    tasks: Mapping[str, Task]
    split: Split
    aggregation: Aggregation

    def identity(self, part: AnyPart, *, requests: bool) -> tuple[object, ...]:
        """What the samples depend on beside the store."""
        split = "" if part == "unlabelled" else self.split.identity()
        found = self.aggregation
        caps = (found.seconds, None if requests else found.max_candidates, found.max_static, found.max_realtime)
        return part, requests, split, *caps, found.history, tuple(sorted(self.tasks.items()))


class WindowIndex:
    """The samples of a part: a user and a window, or a user and a time.

    Args:
        starts_U1: where each user's samples begin, and their number.
        places_S6: begin and end, as places in the user's history, of the spans that hold static history, real-time
            history and candidates; which of a span's events are meant, their fields tell.
        counts_S3: how many of each there are.
        labels_SK: labels of each task, in the order of the tasks' names.
        passed_3: of events of the whole store that have no label although one of their user of that time or later
            has: how many there are, and the row and the place of the first one, -1 without one. Only a store without
            `exposed` has them.
        folder: where the arrays are mapped from; None where they are in memory.
    """

    def __init__(
        self,
        starts_U1: Array,
        places_S6: Array,
        counts_S3: Array,
        labels_SK: Array,
        passed_3: Array,
        *,
        folder: Path | None = None,
    ) -> None:
        self.starts_U1, self.places_S6, self.counts_S3 = starts_U1, places_S6, counts_S3
        self.labels_SK, self.passed_3, self._folder = labels_SK, passed_3, folder

    def __len__(self) -> int:
        return len(self.places_S6)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is not None:
            return WindowIndex.load, (self._folder,)
        return WindowIndex, tuple(getattr(self, name) for name in _ARRAYS)

    @staticmethod
    def load(folder: Path) -> WindowIndex:
        """Maps a kept index.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        arrays = []
        for name in _ARRAYS:
            file = folder / f"{name}.npy"
            try:
                arrays.append(np.asarray(np.load(file, mmap_mode="r")))
            except (ValueError, EOFError) as error:
                raise ValueError(f"{file}: damaged ({error}); remove {folder}, it is made again") from error
        if not int(arrays[0][-1]) == len(arrays[1]) == len(arrays[2]) == len(arrays[3]):
            raise ValueError(f"{folder}: damaged (its arrays are of different lengths); remove it, it is made again")
        return WindowIndex(*arrays, folder=folder)

    def save(self, folder: Path) -> None:
        """Writes the arrays, whole or not at all; where another process was first, its index stays.

        Raises:
            OSError: the folder cannot be written to.
        """
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name))
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def index_folder(store: EventStore, settings: WindowSettings, part: AnyPart, *, requests: bool) -> Path:
    """Where the index of a part is kept."""
    what = repr((_VERSION, store.fingerprint, settings.identity(part, requests=requests)))
    return store.path / INDEX / f"{WINDOWS}{hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}"


def window_index(store: EventStore, settings: WindowSettings, part: AnyPart, *, requests: bool) -> WindowIndex:
    """The index of a part; made and kept with the store where it is not there yet.

    Training, validation and test are found in one pass, so that what is wrong with any of them is said at once. Where
    the store cannot be written to, the indices stay in memory as long as the store is open.

    Raises:
        ValueError: the store has an event that cannot be used; the message says which.
    """
    folder = index_folder(store, settings, part, requests=requests)
    if folder.is_dir():
        return WindowIndex.load(folder)
    unkept = _unkept.setdefault(store, {})
    if folder in unkept:
        return unkept[folder]
    parts: tuple[AnyPart, ...] = (part,) if requests else ("train", "val", "test")
    found = find_windows(store, settings, parts, requests=requests)
    for each, index in found.items():
        kept = index_folder(store, settings, each, requests=requests)
        try:
            if not kept.is_dir():
                index.save(kept)
            found[each] = WindowIndex.load(kept)
        except OSError as error:
            log.info("%s: the index of samples stays in memory, since it cannot be kept there (%s)", kept, error)
            unkept[kept] = index
    return found[part]


def find_windows(
    store: EventStore, settings: WindowSettings, parts: Sequence[AnyPart], *, requests: bool
) -> dict[AnyPart, WindowIndex]:
    """By part, its samples, in one pass over the store with one row group in memory at a time.

    Args:
        store: the store.
        settings: what samples are cut by.
        parts: which; `unlabelled` are the exposures that wait for a score.
        requests: whether a sample is all candidates of a user and a time, as many as there are, instead of a window.

    Raises:
        ValueError: a label, a time or an exposure without a label that cannot be used; the message says where.
    """
    if not store.has_timestamps:
        raise ValueError(f"aggregation: {store.path} has no times, and windows are of time; leave it out")
    exposures = Exposures(store, tasks=settings.tasks, history=settings.aggregation.history)
    checked = {f"tasks.{name}": task for name, task in settings.tasks.items()}
    if settings.aggregation.history is not None:
        checked["aggregation.history"] = settings.aggregation.history
    arrays: dict[AnyPart, list[tuple[Array, ...]]] = {part: [] for part in parts}
    passed_3 = np.array([0, -1, -1])
    for group in range(len(store.group_bounds) - 1):
        first_row = int(store.group_bounds[group])
        rows = store.read_group(group, exposures.columns)
        check_events(store, checked, first_row, rows)
        events = _Events(store, settings, exposures, first_row, rows)
        if len(events.passed):
            first = passed_3[1:] if passed_3[0] else events.place(int(events.passed[0]))
            passed_3 = np.array([passed_3[0] + len(events.passed), *first])
        for part in parts:
            arrays[part].append(events.samples(part, requests=requests))
    return {part: _joined(found, len(settings.tasks), passed_3) for part, found in arrays.items()}


class _Events:
    """What is known of the events of a row group.

    Attributes:
        passed: exposures without a label that wait for no score, since one of their user of that time or later has one.
    """

    def __init__(
        self, store: EventStore, settings: WindowSettings, exposures: Exposures, first_row: int, rows: UserRows
    ) -> None:
        assert rows.timestamps is not None
        self._store, self._settings, self._first_row = store, settings, first_row
        self._fields, self._times_E, self._offsets = rows.event_fields, rows.timestamps, rows.offsets
        self._num_users = len(rows.offsets) - 1
        self._user_E = np.repeat(np.arange(self._num_users), np.diff(rows.offsets))
        self._window_E = self._times_E // settings.aggregation.seconds
        self._place_E = np.arange(len(self._times_E)) - rows.offsets[self._user_E]
        self._labelled_E = exposures.labelled_E(self._fields)
        self._waiting_E = self._waiting(exposures)
        self._history = np.flatnonzero(exposures.history_E(self._fields))
        self._history_before_E1 = np.searchsorted(self._history, np.arange(len(self._times_E) + 1))

    def _waiting(self, exposures: Exposures) -> Array:
        """Exposures without a label, later than everything of the user that has one."""
        waiting_E = exposures.waiting_E(self._fields)
        labelled = np.flatnonzero(self._labelled_E)
        last_U = np.full(self._num_users, np.iinfo(np.int64).min)
        last_U[self._user_E[labelled]] = self._times_E[labelled]
        later_E = self._times_E > last_U[self._user_E]
        self.passed = np.flatnonzero(waiting_E & ~later_E)
        if exposures.has_field and len(self.passed):
            names = dict.fromkeys(task.field for task in self._settings.tasks.values())
            raise ValueError(
                f"tasks: a candidate has no label ({', '.join(names)}), in "
                f"{event_place(self._store, *self.place(int(self.passed[0])))}, although a candidate of that user and "
                "time, or of a later time, has one; give it a label, or set its exposed to 0"
            )
        return waiting_E & later_E

    def place(self, event: int) -> tuple[int, int]:
        """The row of an event's user in the store, and the event's place in the user's history."""
        return self._first_row + int(self._user_E[event]), int(self._place_E[event])

    def _candidates(self, part: AnyPart) -> Array:
        if part == "unlabelled":
            return np.flatnonzero(self._waiting_E)
        rows = np.arange(self._first_row, self._first_row + self._num_users)
        begin_U, end_U = part_events(self._settings.split, self._store, part, rows)
        of_part_E = (self._place_E >= begin_U[self._user_E]) & (self._place_E < end_U[self._user_E])
        return np.flatnonzero(self._labelled_E & of_part_E)

    def samples(self, part: AnyPart, *, requests: bool) -> tuple[Array, ...]:
        """Samples of each user, and their places, counts and labels."""
        at_C, aggregation = self._candidates(part), self._settings.aggregation
        of_one = self._times_E if requests else self._window_E
        number_C = np.arange(len(at_C)) - _first(self._changes(of_one[at_C], self._user_E[at_C]))
        starts_sample_C = number_C == 0 if requests else number_C % aggregation.max_candidates == 0
        begins = np.flatnonzero(starts_sample_C)
        ends = np.append(begins[1:], len(at_C))[: len(begins)]
        first_S, last_S = at_C[begins], at_C[ends - 1]
        window_from = _first(self._changes(self._window_E, self._user_E))[first_S]
        # What has the time of the last candidate, or a later one, none of the sample's candidates may see.
        seen_to = _first(self._changes(self._times_E, self._user_E))[last_S]
        user_from = self._offsets[self._user_E[first_S]]
        static = self._latest(user_from, window_from, aggregation.max_static)
        realtime = self._latest(window_from, seen_to, aggregation.max_realtime)
        places = np.stack([static[0], window_from, realtime[0], seen_to, first_S, last_S + 1], 1) - user_from[:, None]
        counts = np.stack([static[1], realtime[1], ends - begins], 1)
        labels = np.zeros((len(begins), len(self._settings.tasks)), dtype=np.int64)
        fields = {name: values[at_C] for name, values in self._fields.items()}
        for column, (_, task) in enumerate(sorted(self._settings.tasks.items())):
            before = np.concatenate([[0], np.cumsum(~np.isnan(task.of(fields)))])
            labels[:, column] = before[ends] - before[begins]
        of_users = np.bincount(self._user_E[first_S], minlength=self._num_users)
        return tuple(_least(array) for array in (of_users, places, counts, labels))

    def _latest(self, begin_S: Array, end_S: Array, most: int) -> tuple[Array, Array]:
        """Where the latest `most` history events between two places begin, and how many there are."""
        upto_S = self._history_before_E1[end_S]
        counts_S = np.minimum(upto_S - self._history_before_E1[begin_S], most)
        first_S = np.append(self._history, 0)[upto_S - counts_S]
        return np.where(counts_S > 0, first_S, end_S), counts_S

    @staticmethod
    def _changes(values: Array, users: Array) -> Array:
        """Where a user, or a value of the user's, begins."""
        changes = np.ones(len(values), dtype=bool)
        changes[1:] = (values[1:] != values[:-1]) | (users[1:] != users[:-1])
        return changes


def _first(begins: Array) -> Array:
    """For each place the last one up to it where something begins."""
    found: Array = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    return found


def _least(array: Array) -> Array:
    """The numbers, none below 0, in the least integers that hold them."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def _joined(groups: Sequence[tuple[Array, ...]], num_tasks: int, passed_3: Array) -> WindowIndex:
    empty = np.zeros(0, np.uint8), *(np.zeros((0, width), np.uint8) for width in (6, 3, num_tasks))
    of_users, *arrays = (np.concatenate(parts) for parts in zip(empty, *groups, strict=True))
    starts = _least(np.concatenate([[0], np.cumsum(of_users, dtype=np.int64)]))
    places, counts, labels = arrays
    return WindowIndex(starts, places, counts, labels, passed_3)
