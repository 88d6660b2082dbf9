"""RankingDataModule: from the path of an event store to planned batches of candidates with labels."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_gr.data.aggregation import Aggregation
from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.datamodule import SequenceDataModule
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.item_columns import item_categories
from lightning_gr.data.longest_sample import LongestSample
from lightning_gr.data.ranking_source import RankingSource
from lightning_gr.data.raw_ids import raw_key
from lightning_gr.data.source import SequenceSource
from lightning_gr.data.splits import LastShare, Part, Split
from lightning_gr.data.task import Task
from lightning_gr.data.window_index import AnyPart
from lightning_gr.feature_config import FeatureConfig
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
        block: most candidates of a block: consecutive events of a user.
        aggregation: samples of a user and a window of time instead of blocks, with caps of their own; `predict` then
            takes all candidates of a user and a time as one sample, a request.
        split: what is held out: `LastShare` (where None), `ByTime` or `LeaveOneOut`.
        features: columns of the store that batches carry, by name or as `FeatureConfig`; None takes all but the labels.
            Without configs numbers are given as they are.
        cross_task: task whose causal counts and means by user, item and category candidates get; None leaves them out.
            They are counted over the whole log in memory; a log that has cross features of its own does without.
        cross_categories: item field by whose categories they are counted too.
        cross_previous: whether they are counted too by the pair of the user's previous item and the candidate.
        cross_features: whether candidates have features of their own, those of group `candidate` and counted ones;
            false leaves them out, to see what they are worth.
        user_token: whether the user's id is a contextual token.
        shuffle_window: users that are shuffled together after the row groups are.
        num_workers: background processes that collate.
        seed: seed of the shuffle; None means the run's (`seed_everything`), or 0 where it has none.
        predict_part: whose candidates `predict` scores; `unlabelled` are those that wait for a score, with
            `aggregation`.
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
        aggregation: Aggregation | None = None,
        split: Split | None = None,
        features: list[str | FeatureConfig] | None = None,
        cross_task: str | None = None,
        cross_categories: str | None = None,
        cross_previous: bool = False,
        cross_features: bool = True,
        user_token: bool = True,
        shuffle_window: int = 1 << 16,
        num_workers: int = 0,
        seed: int | None = None,
        predict_part: Literal["val", "test", "unlabelled"] = "test",
        raw_ids: bool = False,
    ) -> None:
        if cross_task is not None and cross_task not in tasks:
            raise ValueError(f"cross_task={cross_task}: no such task; choose from {', '.join(tasks)}")
        if cross_categories is not None and cross_task is None:
            raise ValueError(f"cross_categories={cross_categories}: counted only with cross_task; give it too")
        if cross_previous and cross_task is None:
            raise ValueError(f"cross_previous={cross_previous}: counted only with cross_task; give it too")
        if predict_part == "unlabelled" and aggregation is None:
            raise ValueError("predict_part=unlabelled: scored by request; give aggregation too")
        if aggregation is not None and (max_history, block) != (200, 64):
            rank_zero_warn(
                f"max_history={max_history}, block={block}: of no account with aggregation; set its "
                "max_static, max_realtime and max_candidates"
            )
        of_candidates = any(isinstance(x, FeatureConfig) and x.group == "candidate" for x in features or ())
        if not cross_features and cross_task is None and not of_candidates:
            rank_zero_warn(
                "cross_features=False: there are none to be left out, neither features of group candidate nor counted "
                "ones of cross_task"
            )
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
        self.tasks, self.max_history, self.block, self.aggregation = tasks, max_history, block, aggregation
        self.chosen_features, self.cross_task, self.cross_categories = features, cross_task, cross_categories
        self.cross_previous, self.user_token, self.cross_features = cross_previous, user_token, cross_features
        self.predict_part: AnyPart = predict_part

    @cached_property
    def _cross(self) -> CrossStatistics | None:
        if self.cross_task is None:
            return None
        store, task = self._store(), self.tasks[self.cross_task]
        groups = range(len(store.group_bounds) - 1)
        labels = np.concatenate([task.of(store.read_group(group, task.fields).event_fields) for group in groups])
        categories = None if self.cross_categories is None else item_categories(store, self.cross_categories)
        return CrossStatistics(store, labels, categories=categories, previous=self.cross_previous)

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
            aggregation=self.aggregation,
            requests=self.aggregation is not None and part == "all",
            features=self.chosen_features,
            cross=self._cross if self.cross_features else None,
            cross_features=self.cross_features,
            user_token=self.user_token,
            item_keys=self.item_keys,
            user_keys=self.user_keys,
        )

    @override
    def longest_sample(self, part: Part | Literal["predict"], *, above: int) -> LongestSample | None:
        source = self._source("all" if part == "predict" else part)
        of_user, room = source.num_contextual, above - source.num_contextual - 1
        history = source.longest_history(above=room)
        if history is None or (longest := of_user + history + 1) <= above:
            return None
        of_sample = (
            f"the longest sample ({part}) of {self.path} has {longest} positions: {of_user} of user features, "
            f"{history} events, 1 for all candidates"
        )
        caps = self.aggregation
        if caps is None:
            settings, most = f"max_history={self.max_history} and block={self.block}", room + 1
        else:
            settings = f"aggregation.max_static={caps.max_static} and aggregation.max_realtime={caps.max_realtime}"
            most = room
        remedy = f"lower the data's {settings}" + f" until they add up to {most}" * (most > 1)
        return LongestSample(longest, of_sample, remedy)

    @override
    def prepare_data(self) -> None:
        super().prepare_data()
        if self.aggregation is None:
            return
        predicts = self.trainer is not None and self.trainer.state.fn == "predict"
        # One process finds the samples for all. What is wrong with the store each says itself, when it makes a loader:
        # were one to stop here, the others would wait for it.
        with contextlib.suppress(ValueError):
            self._source("all" if predicts else "train").prepare()

    @override
    def _budget(self, source: SequenceSource, name: str) -> int:
        budget = super()._budget(source, name)
        if name != "predict" or self.aggregation is None:
            return budget
        longest = 0
        for first in range(0, source.num_rows, 1 << 20):
            _, tokens = source.samples(first, min(first + (1 << 20), source.num_rows))
            longest = max(longest, int(tokens.max(initial=0)))
        if budget < 2 * longest:
            rank_zero_warn(
                f"eval_global_tokens={budget}: the largest request has {longest} tokens, so predict's batches have up "
                f"to {2 * longest}; micro_batch of the model bounds what is in memory at a time"
            )
        return max(budget, 2 * longest)

    @cached_property
    def user_keys(self) -> Array | None:
        """With `raw_ids`, the int64 that batches carry for each user row; None without."""
        return raw_key(self._store().users) if self.raw_ids else None

    @cached_property
    def ranking_features(self) -> RankingFeatures:
        """What the batches hold."""
        return self._source("train").ranking_features
