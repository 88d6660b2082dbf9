"""WindowCuts: samples of a user and a window of time, or of a user and a request.

Shape suffixes: B samples, X event tokens of all samples together: static history, real-time history, candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_gr.data.aggregation import Aggregation
from lightning_gr.data.event_checks import event_place
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.exposures import Exposures
from lightning_gr.data.sample_cuts import SampleCuts, SampleEvents, runs
from lightning_gr.data.splits import ByTime, Split, part_events
from lightning_gr.data.task import Task
from lightning_gr.data.window_index import AnyPart, WindowIndex, WindowSettings, window_index

Array = np.ndarray[Any, Any]


class WindowCuts(SampleCuts):
    """A user's exposures in a window of time as candidates, what happened before the window as static history.

    Real-time history is what happened in the window before the last candidate; which candidate sees which of it is the
    mask's affair, by time. So every exposure of a part is a candidate exactly once, and no event is in both histories
    (user-level compression, MTGR arXiv 2505.18654, section 3.2). The samples are found in one pass over the store, when
    first asked for.

    Args:
        store: the store, with times.
        part: `train`, `val` or `test`; `unlabelled` are the exposures that wait for a score.
        split: what is trained on and what is held out.
        tasks: by name, what is predicted.
        aggregation: windows and caps.
        requests: whether a sample is all candidates of a user and a time instead of those of a window.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        store: EventStore,
        *,
        part: AnyPart,
        split: Split,
        tasks: Mapping[str, Task],
        aggregation: Aggregation,
        requests: bool = False,
    ) -> None:
        if not store.has_timestamps:
            raise ValueError(f"aggregation: {store.path} has no times, and windows are of time; leave it out")
        if part == "unlabelled" and not requests:
            raise ValueError("part=unlabelled: exposures without a label are scored by request; set requests")
        self._store, self._part, self._requests = store, part, requests
        self._settings = WindowSettings(tasks=dict(tasks), split=split, aggregation=aggregation)
        self._exposures = Exposures(store, tasks=tasks, history=aggregation.history)
        self._num_rows = max(len(store.lengths), 1)
        self.identity = ("windows", *self._settings.identity(part, requests=requests)[1:-1])
        self.columns = self._exposures.columns
        self.most_history = aggregation.max_static + aggregation.max_realtime

    @cached_property
    def index(self) -> WindowIndex:
        """Where the samples lie.

        Raises:
            ValueError: the part has no candidate, or the store has an event that cannot be used.
        """
        index = window_index(self._store, self._settings, self._part, requests=self._requests)
        if not len(index):
            raise ValueError(self._nothing())
        self._warn_of_passed(*index.passed_3.tolist())
        return index

    def _warn_of_passed(self, count: int, row: int, place: int) -> None:
        """Says what becomes of events without a label that a labelled one follows."""
        if not count:
            return
        clicks = self._settings.aggregation.history
        becomes = "history" if clicks is None else f"no history either, since history is {clicks.field}"
        rank_zero_warn(
            f"aggregation: {count:,} events of {self._store.path} have no label ({self._fields}) although one of "
            f"their user of that time or later has one; the first is {event_place(self._store, row, place)}; they are "
            f"no candidates, and {becomes}. If labels are missing, mend the log; if they are history of another "
            "source, let lightning-gr prepare --history mark them"
        )

    @override
    def prepare(self) -> None:
        window_index(self._store, self._settings, self._part, requests=self._requests)

    @override
    def longest_history(self) -> int | None:
        index = window_index(self._store, self._settings, self._part, requests=self._requests)
        return int(index.counts_S3[:, :2].sum(1, dtype=np.int64).max()) if len(index) else None

    def _nothing(self) -> str:
        fields = self._fields
        if self._part == "unlabelled":
            return (
                f"predict_part=unlabelled: {self._store.path} has no exposure that waits for a score, which has no "
                f"label ({fields}) and is later than all of the user's that have one; predict another part"
            )
        split, labelled, events, waiting = self._settings.split, 0, 0, 0
        for group, first_row in enumerate(self._store.group_bounds[:-1].tolist()):
            rows = self._store.read_group(group, self.columns)
            begin, end = part_events(split, self._store, self._part, first_row + np.arange(len(rows.offsets) - 1))
            at = runs(rows.offsets[:-1] + begin, end - begin)
            held = {name: rows.event_fields[name][at] for name in self.columns}
            labelled += int(self._exposures.labelled_E(rows.event_fields).sum())
            events, waiting = events + len(at), waiting + int(self._exposures.waiting_E(held).sum())
        found = f"{waiting:,} have no label ({fields})"
        if self._exposures.has_field:
            found = f"{waiting:,} have exposed 1 and no label ({fields}), {events - waiting:,} are history (exposed 0)"
        if not labelled:
            remedy = "nor has any other event a label; see tasks"
        elif isinstance(split, ByTime) or not events:
            remedy = "see split"
        else:
            remedy = (
                "this split counts all events of a user, requests and history too; split such a log by time, with "
                "lightning_gr.data.ByTime(val_from, test_from)"
            )
        return (
            f"aggregation: no window of the {self._part} part has a candidate: of the {self._store.num_events:,} "
            f"events of {self._store.path} it has {events:,} ({split.identity()}), of which {found}; {remedy}"
        )

    @property
    def _fields(self) -> str:
        """Names of the label fields."""
        return ", ".join(dict.fromkeys(task.field for task in self._settings.tasks.values()))

    def _samples_of(self, sample_ids: Array) -> Array:
        """Places in the index."""
        starts: Array = self.index.starts_U1[sample_ids % self._num_rows].astype(np.int64)
        return starts + sample_ids // self._num_rows

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        starts = self.index.starts_U1[first_row : last_row + 1].astype(np.int64)
        counts = np.diff(starts)
        ids = np.repeat(np.arange(first_row, last_row), counts) + runs(np.zeros_like(counts), counts) * self._num_rows
        tokens: Array = self.index.counts_S3[starts[0] : starts[-1]].sum(1, dtype=np.int64)
        return ids, tokens

    @override
    def event_counts(self, sample_ids: Array) -> Array:
        counts: Array = self.index.counts_S3[self._samples_of(sample_ids)].sum(1, dtype=np.int64)
        return counts

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        counts = self.index.labels_SK[self._samples_of(sample_ids)].astype(np.int64)
        return {name: counts[:, column] for column, name in enumerate(sorted(self._settings.tasks))}

    @override
    def events(self, sample_ids: Array, rows: UserRows, places_B: Array) -> SampleEvents:
        if not len(sample_ids):
            return SampleEvents(np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.int64))
        samples = self._samples_of(sample_ids)
        spans_B32 = self.index.places_S6[samples].astype(np.int64).reshape(-1, 3, 2)
        sizes_B3 = spans_B32[..., 1] - spans_B32[..., 0]
        at = runs((spans_B32[..., 0] + rows.offsets[places_B][:, None]).ravel(), sizes_B3.ravel())
        is_candidate = np.repeat(np.tile([False, False, True], len(samples)), sizes_B3.ravel())
        fields = {name: rows.event_fields[name][at] for name in self.columns}
        choose = self._exposures.waiting_E if self._part == "unlabelled" else self._exposures.labelled_E
        at_X = at[np.where(is_candidate, choose(fields), self._exposures.history_E(fields))]
        counts_B3 = self.index.counts_S3[samples].astype(np.int64)
        assert len(at_X) == counts_B3.sum(), "the index is of this store"
        return SampleEvents(at_X, counts_B3)
