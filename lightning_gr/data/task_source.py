"""Episodes as samples: some records of a task as support sequences and a query sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from lightning_gr.batch import SequenceBatch
from lightning_gr.data.episode_cuts import EpisodeCuts, EpisodeSettings, TaskCounts
from lightning_gr.data.event_checks import missing_labels
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.ranking_source import RankingSource
from lightning_gr.data.splits import ByUser, Part
from lightning_gr.data.task import Task
from lightning_gr.feature_config import FeatureConfig

Array = np.ndarray[Any, Any]


class TaskSource(RankingSource):
    """Episodes of tasks, the rows of a store, for meta learning; see `EpisodeCuts`.

    An episode is one sample of a plan, and several sequences of a batch, which share its sample id: a support for each
    number of shots, ascending, and its query. All records of an episode are candidates.

    Args:
        store: the store.
        part: `train`, `val` or `test`.
        split: which tasks are held out.
        tasks: by name, the label that is predicted.
        episodes: what an episode is.
        features: fields of records, tasks and items for the batch, by name or config; None takes all of the store but
            the labels.
        user_token: whether the task's id is a contextual token.
        item_keys: int64 raw key of each item row, which batches carry instead of the row; None carries rows.
        user_keys: the same of tasks.

    Attributes:
        counts: what became of the part's tasks.

    Raises:
        ValueError: a setting that cannot work, by name, no task with enough records, or a support without a label.
    """

    def __init__(
        self,
        store: EventStore,
        *,
        part: Part,
        split: ByUser,
        tasks: Mapping[str, Task],
        episodes: EpisodeSettings,
        features: Sequence[str | FeatureConfig] | None = None,
        user_token: bool = True,
        item_keys: Array | None = None,
        user_keys: Array | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("tasks: expected at least one label to predict")
        for name, task in tasks.items():
            task.check(f"tasks.{name}", store.fields)
        self._episodes = EpisodeCuts(
            store, part=part, split=split, settings=episodes, missing=missing_labels(store, tasks)
        )
        super().__init__(
            store,
            part=part,
            split=split,
            tasks=tasks,
            features=features,
            user_token=user_token,
            item_keys=item_keys,
            user_keys=user_keys,
            cuts=self._episodes,
        )
        self._part, self._settings = part, episodes
        self._sequences = len(self._episodes.shots_Q)

    @property
    def counts(self) -> TaskCounts:
        """What became of the part's tasks."""
        return self._episodes.counts

    def check(self) -> None:
        """Raises where the part has no episode, or one with nothing to adapt to.

        Raises:
            ValueError: says how many records there have to be, or which support has no label.
        """
        counts, settings = self.counts, self._settings
        if not counts.tasks:
            least, remedy = settings.min_records, "lower min_records, or set small_tasks=top_up"
            if self._part != "train":
                least, remedy = max(settings.shots) + 1, f"lower the largest of shots={list(settings.shots)}"
            raise ValueError(
                f"{self._part} split: none of its {counts.dropped_tasks} tasks has at least {least} records; {remedy}, "
                "or hold out another share of tasks"
            )
        number, row = self._episodes.without_support()
        if row is not None:
            raise ValueError(
                f"tasks: {number} episodes of the {self._part} split have no label of {', '.join(self.tasks)} in their "
                f"support, the first of task {self._store.users[row]}, so there is nothing to adapt to; predict a "
                "label that all records have, or raise support and shots"
            )

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
        task_rows = sample_ids % max(self.num_rows, 1)
        rows, places_B = self._rows.of(task_rows, windows)
        sequences = self._sequences
        batch = self._columns.batch(
            np.repeat(sample_ids, sequences),
            np.repeat(task_rows, sequences),
            self._episodes.events(sample_ids, rows, places_B),
            rows,
            np.repeat(places_B, sequences),
            epoch=epoch,
            denominators=denominators,
            gradient_divisor=gradient_divisor,
        )
        batch.shots_B = torch.from_numpy(np.tile(self._episodes.shots_Q, max(len(sample_ids), 1)))
        if not len(sample_ids):
            batch.shots_B = torch.zeros(1, dtype=torch.int64)
        return batch
