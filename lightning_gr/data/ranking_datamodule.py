"""RankingDataModule: from the path of an event store to planned batches of candidates with labels."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.datamodule import SequenceDataModule
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.ranking_columns import Task, item_categories
from lightning_gr.data.ranking_source import RankingSource
from lightning_gr.data.raw_ids import raw_key
from lightning_gr.data.splits import LastShare, Part, Split
from lightning_gr.ranking_features import RankingFeatures

Array = np.ndarray[Any, Any]


class RankingDataModule(SequenceDataModule):
    """Gives every rank its share of planned global batches of ranking samples.

    Args:
        path: a store that `lightning-gr prepare` made, with labels.
        tasks: by name, the label that is predicted, and from which value on it is positive.
        global_tokens: token budget of a global training batch, on all ranks together: a candidate and each event of its
            history are a token.
        eval_global_tokens: the same for validation, test and predict; None means `global_tokens`.
        max_history: history tokens before a block of candidates.
        block: most candidates of a sample: consecutive events of a user.
        split: what is held out: `LastShare` (where None), `ByTime` or `LeaveOneOut`.
        features: fields of the store that batches carry; None takes all but the labels.
        cross_task: task whose causal counts and means by user, item and category candidates get; None leaves them out.
            They are counted over the whole log in memory; a log that has cross features of its own does without.
        cross_categories: item field by whose categories they are counted too.
        cross_previous: whether they are counted too by the pair of the user's previous item and the candidate.
        user_token: whether the user's id is a contextual token.
        shuffle_window: users that are shuffled together after the row groups are.
        num_workers: background processes that collate.
        seed: seed of the shuffle; None means the run's (`seed_everything`), or 0 where it has none.
        predict_part: whose candidates `predict` scores.
        raw_ids: batches carry raw item and user ids, text as 64-bit hashes, instead of rows; models then need
            `dynamic_tables`.

    Attributes:
        ranking_features: what batches hold, for models.
        item_keys: with `raw_ids`, the int64 that batches carry for each item row; None without.
        user_keys: the same of users.

    Raises:
        FileNotFoundError: the store is not there.
        ValueError: a setting cannot be used; the message names it.
    """

    def __init__(
        self,
        *,
        path: str,
        tasks: dict[str, Task],
        global_tokens: int = 8192,
        eval_global_tokens: int | None = None,
        max_history: int = 200,
        block: int = 64,
        split: Split | None = None,
        features: list[str] | None = None,
        cross_task: str | None = None,
        cross_categories: str | None = None,
        cross_previous: bool = False,
        user_token: bool = True,
        shuffle_window: int = 1 << 16,
        num_workers: int = 0,
        seed: int | None = None,
        predict_part: Literal["val", "test"] = "test",
        raw_ids: bool = False,
    ) -> None:
        if cross_task is not None and cross_task not in tasks:
            raise ValueError(f"cross_task={cross_task}: no such task; choose from {', '.join(tasks)}")
        if cross_categories is not None and cross_task is None:
            raise ValueError(f"cross_categories={cross_categories}: counted only with cross_task; give it too")
        if cross_previous and cross_task is None:
            raise ValueError(f"cross_previous={cross_previous}: counted only with cross_task; give it too")
        super().__init__(
            path=path,
            global_tokens=global_tokens,
            eval_global_tokens=eval_global_tokens,
            split=split or LastShare(),
            shuffle_window=shuffle_window,
            num_workers=num_workers,
            seed=seed,
            raw_ids=raw_ids,
        )
        self.tasks, self.max_history, self.block = tasks, max_history, block
        self.chosen_features, self.cross_task, self.cross_categories = features, cross_task, cross_categories
        self.cross_previous, self.user_token = cross_previous, user_token
        self.predict_part: Part = predict_part

    @cached_property
    def _cross(self) -> CrossStatistics | None:
        if self.cross_task is None:
            return None
        store, task = self._store(), self.tasks[self.cross_task]
        groups = range(len(store.group_bounds) - 1)
        values = np.concatenate([store.read_group(group, [task.field]).event_fields[task.field] for group in groups])
        categories = None if self.cross_categories is None else item_categories(store, self.cross_categories)
        return CrossStatistics(store, task.labels(values), categories=categories, previous=self.cross_previous)

    def _store(self) -> EventStore:
        if not isinstance(self.table, EventStore):
            raise ValueError(
                f"path={self.path}: labels are read from an event store; make one with lightning-gr prepare"
            )
        return self.table

    @override
    def _source(self, part: Part | Literal["all"]) -> RankingSource:
        assert self.split is not None
        return RankingSource(
            self._store(),
            part=self.predict_part if part == "all" else part,
            split=self.split,
            tasks=self.tasks,
            max_history=self.max_history,
            block=self.block,
            features=self.chosen_features,
            cross=self._cross,
            user_token=self.user_token,
            item_keys=self.item_keys,
            user_keys=self.user_keys,
        )

    @cached_property
    def user_keys(self) -> Array | None:
        """With `raw_ids`, the int64 that batches carry for each user row; None without."""
        return raw_key(self._store().users) if self.raw_ids else None

    @cached_property
    def ranking_features(self) -> RankingFeatures:
        """What the batches hold."""
        return self._source("train").ranking_features
