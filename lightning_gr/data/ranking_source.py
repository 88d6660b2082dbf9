"""Ranking samples: a user's context and history with candidates whose labels are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_gr.batch import SequenceBatch
from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.ranking_columns import RankingColumns, Task
from lightning_gr.data.row_windows import RowWindows
from lightning_gr.data.sample_cuts import BlockCuts, SampleCuts, event_starts
from lightning_gr.data.source import SequenceSource
from lightning_gr.data.splits import Part, Split

Array = np.ndarray[Any, Any]


class RankingSource(SequenceSource):
    """Blocks of consecutive events of a user as candidates, with the events before them as history.

    Each event of a part is a candidate exactly once. A candidate may be shown with events of its own block: those of an
    earlier time are real-time history; what happened before the block's first candidate is static history. So a block
    costs one pass over its history (user-level compression, MTGR arXiv 2505.18654, section 3.2), and what a candidate
    may see is a matter of the mask, by time. Tokens: the contextual ones, static and real-time history, candidates.

    Args:
        store: the store.
        part: `train`, `val` or `test`.
        split: what is trained on and what is held out.
        tasks: by name, what is predicted.
        max_history: history tokens before a block.
        block: most candidates of a sample.
        features: fields of events, users and items for the batch; None takes all of the store but the labels.
        cross: causal counts and means that candidates get; None leaves them out.
        user_token: whether the user's id is a contextual token; where users have few events, its embedding learns them
            by heart.
        item_keys: int64 raw key of each item row, which batches carry instead of the row; None carries rows.
        user_keys: the same of users.

    Attributes:
        ranking_features: what the batches hold.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        store: EventStore,
        *,
        part: Part,
        split: Split,
        tasks: Mapping[str, Task],
        max_history: int = 200,
        block: int = 64,
        features: Sequence[str] | None = None,
        cross: CrossStatistics | None = None,
        user_token: bool = True,
        item_keys: Array | None = None,
        user_keys: Array | None = None,
    ) -> None:
        self._columns = RankingColumns(
            store,
            tasks=tasks,
            features=features,
            cross=cross,
            user_token=user_token,
            item_keys=item_keys,
            user_keys=user_keys,
        )
        self._cuts: SampleCuts = BlockCuts(
            store,
            part=part,
            split=split,
            max_history=max_history,
            block=block,
            missing=_missing_labels(store, tasks),
        )
        self._rows = RowWindows(store, tuple(dict.fromkeys([*self._columns.names, *self._cuts.columns])))
        self.num_rows = len(store.lengths)
        self.group_bounds = store.group_bounds
        self.tasks: tuple[str, ...] = tuple(tasks)
        self.ranking_features = self._columns.features
        settings = (
            store.fingerprint,
            part,
            split.identity(),
            *self._cuts.identity,
            sorted(tasks.items()),
            *self._columns.identity,
        )
        self.fingerprint = "-".join(str(x) for x in settings) + "-raw" * (item_keys is not None)

    # ---- what a plan asks --------------------------------------------------------------------------------------

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        ids, counts = self._cuts.samples(first_row, last_row)
        return ids, self.ranking_features.num_contextual + counts

    @override
    def token_counts(self, sample_ids: Array) -> Array:
        counts: Array = self.ranking_features.num_contextual + self._cuts.event_counts(sample_ids)
        return counts

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        return self._cuts.label_counts(sample_ids)

    # ---- batches -----------------------------------------------------------------------------------------------

    @override
    def collate(
        self,
        sample_ids: Array,
        *,
        windows: Sequence[tuple[int, ...]],
        epoch: int,
        denominators: dict[str, float],
        gradient_divisor: float,
    ) -> SequenceBatch:
        user_rows = sample_ids % max(self.num_rows, 1)
        rows, places_B = self._rows.of(user_rows, windows)
        return self._columns.batch(
            sample_ids,
            user_rows,
            self._cuts.events(sample_ids, rows, places_B),
            rows,
            places_B,
            epoch=epoch,
            denominators=denominators,
            gradient_divisor=gradient_divisor,
        )


def _missing_labels(store: EventStore, tasks: Mapping[str, Task]) -> dict[str, Array]:
    """By task, the events without a label, as places among all events; read only where the index has such."""
    missing, num_events = {}, int(event_starts(store)[-1])
    for name, task in tasks.items():
        missing[name] = np.zeros(0, dtype=np.int64)
        if int(store.label_counts(task.field).sum(dtype=np.int64)) == num_events:
            continue
        groups = range(len(store.group_bounds) - 1)
        parts = [np.isnan(store.read_group(group, [task.field]).event_fields[task.field]) for group in groups]
        missing[name] = np.flatnonzero(np.concatenate(parts))
    return missing
