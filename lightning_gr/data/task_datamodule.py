"""TaskDataModule: from the path of a store whose rows are tasks to planned batches of episodes, for meta learning."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_gr.data.episode_cuts import EpisodeSettings, Order, SmallTasks, TaskCounts
from lightning_gr.data.longest_sample import LongestSample
from lightning_gr.data.ranking_datamodule import RankingDataModule
from lightning_gr.data.source import SequenceSource
from lightning_gr.data.splits import ByUser, Part
from lightning_gr.data.task import Task
from lightning_gr.data.task_source import TaskSource
from lightning_gr.feature_config import FeatureConfig


class TaskDataModule(RankingDataModule):
    """Gives every rank its share of planned global batches of episodes (Meta-IO of G-Meta, arXiv 2401.04338).

    A task is a row of the store: a user, an item, or what ``lightning-gr prepare --tasks COLUMN`` grouped records by.
    Training gives every record of its tasks once an epoch, in an episode's support or in its query. Which records make
    an episode is the same in every epoch; which episodes make a batch is not. Validation and test take tasks that
    training has not seen, adapt to their first records, and judge by the same query for all numbers of `shots`.

    Args:
        path: a store that `lightning-gr prepare` made, with labels.
        tasks: by name, the label that is predicted, and from which value on it is positive.
        global_tokens: token budget of a global training batch, on all ranks together: a record of support or query is a
            token, and so is each contextual feature of each of an episode's sequences.
        eval_global_tokens: the same for validation, test and predict; None means `global_tokens`.
        support: records of an episode's support in training; where a task's records do not come out even, support and
            query are smaller in proportion.
        query: records of an episode's query in training.
        shots: evaluation adapts to so many first records of a task, each by itself; 0 is without adaptation. Its query
            is what comes after the largest.
        eval_query: most records of a query in evaluation; None takes all there are.
        order: whether a task's records are taken by `time`, or in a `random` order that stays the same in all epochs.
        history: so many of a task's records before an episode are history of its sequences, with their labels, for
            networks that read one; by `order` time alone. Unseen tasks have none.
        small_tasks: `drop` leaves training tasks with fewer than `min_records` records out; `top_up` repeats their
            records in turn until there are as many, so that support and query of a task with one record are the same.
        min_records: fewest records of a training task. Two are enough for a support and a query, so no more is asked
            by default: tasks with few records are what meta learning is for.
        val_tasks: share of tasks that are held out for validation.
        test_tasks: share for test.
        split_seed: which tasks these are, and the random order of records; apart from `seed`, so that runs of several
            seeds see the same.
        features: columns of the store that batches carry, by name or as `FeatureConfig`; None takes all but the labels.
            Without configs numbers are given as they are.
        user_token: whether the task's id is a contextual token.
        shuffle_window: tasks that are shuffled together after the row groups are.
        num_workers: background processes that collate.
        seed: seed of the shuffle; None means the run's (`seed_everything`), or 0 where it has none.
        predict_part: the tasks whose queries `predict` scores.
        raw_ids: batches carry raw item and task ids, text as 64-bit hashes, instead of rows; models then need
            `dynamic_tables`.

    Attributes:
        shots: of evaluation, for models.
        ranking_features: what batches hold, for models.
        item_keys: with `raw_ids`, the int64 that batches carry for each item row; None without.
        user_keys: the same of tasks.

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
        support: int = 10,
        query: int = 10,
        shots: list[int] | None = None,
        eval_query: int | None = None,
        order: Order = "time",
        history: int = 0,
        small_tasks: SmallTasks = "drop",
        min_records: int = 2,
        val_tasks: float = 0.1,
        test_tasks: float = 0.1,
        split_seed: int = 0,
        features: list[str | FeatureConfig] | None = None,
        user_token: bool = True,
        shuffle_window: int = 1 << 16,
        num_workers: int = 0,
        seed: int | None = None,
        predict_part: Literal["val", "test"] = "test",
        raw_ids: bool = False,
    ) -> None:
        self.episodes = EpisodeSettings(
            support=support,
            query=query,
            shots=(0, 1, 5, 10) if shots is None else tuple(sorted(set(shots))),
            order=order,
            history=history,
            small_tasks=small_tasks,
            min_records=min_records,
            eval_query=eval_query,
        )
        if min(val_tasks, test_tasks) < 0 or val_tasks + test_tasks >= 1:
            raise ValueError(
                f"val_tasks={val_tasks}, test_tasks={test_tasks}: expected shares of tasks that leave some for training"
            )
        if predict_part not in ("val", "test"):
            raise ValueError(f"predict_part={predict_part!r}: expected val or test")
        super().__init__(
            path=path,
            tasks=tasks,
            global_tokens=global_tokens,
            eval_global_tokens=eval_global_tokens,
            features=features,
            user_token=user_token,
            shuffle_window=shuffle_window,
            num_workers=num_workers,
            seed=seed,
            predict_part=predict_part,
            raw_ids=raw_ids,
        )
        self.held_out = ByUser(val=val_tasks, test=test_tasks, seed=split_seed)
        self.split = self.held_out

    @property
    def shots(self) -> list[int]:
        """Records that evaluation adapts to, each number by itself."""
        return list(self.episodes.shots)

    @cached_property
    def task_counts(self) -> dict[Part, TaskCounts]:
        """By part, how many tasks are used, dropped for lack of records, and topped up."""
        parts: tuple[Part, ...] = ("train", "val", "test")
        return {part: self._source(part).counts for part in parts}

    @property
    def dropped_tasks(self) -> int:
        """Training tasks left out for lack of records."""
        return self.task_counts["train"].dropped_tasks

    @property
    def topped_up_tasks(self) -> int:
        """Training tasks whose records are repeated."""
        return self.task_counts["train"].topped_up_tasks

    @override
    def _source(self, part: Part | Literal["all"]) -> TaskSource:
        assert self.predict_part != "unlabelled"
        return TaskSource(
            self._store(),
            part=self.predict_part if part == "all" else part,
            split=self.held_out,
            tasks=self.tasks,
            episodes=self.episodes,
            features=self.chosen_features,
            user_token=self.user_token,
            item_keys=self.item_keys,
            user_keys=self.user_keys,
        )

    @override
    def _budget(self, source: SequenceSource, name: str) -> int:
        assert isinstance(source, TaskSource)
        source.check()
        self._say(source.counts, name)
        budget = self.global_tokens if name == "train" else self.eval_global_tokens
        longest = 0
        for first in range(0, source.num_rows, 1 << 20):
            _, tokens = source.samples(first, min(first + (1 << 20), source.num_rows))
            longest = max(longest, int(tokens.max(initial=0)))
        if budget >= 2 * longest:
            return budget
        if name == "train":
            raise ValueError(
                f"global_tokens={budget}: the largest episode has {longest} tokens, and a batch must have room for two "
                f"of it; raise the budget to at least {2 * longest}, or lower support={self.episodes.support}, "
                f"query={self.episodes.query} or history={self.episodes.history}"
            )
        rank_zero_warn(
            f"eval_global_tokens={budget}: the largest episode ({name}) has {longest} tokens, so batches have up to "
            f"{2 * longest}; lower eval_query={self.episodes.eval_query}, or raise the budget"
        )
        return 2 * longest

    def _say(self, counts: TaskCounts, name: str) -> None:
        settings = self.episodes
        if counts.dropped_tasks:
            least, remedy = f"min_records={settings.min_records}", "small_tasks=top_up repeats their records"
            if name != "train":
                least = f"the largest of shots={list(settings.shots)} and a query"
                remedy = "lower shots, to judge by them too"
            rank_zero_warn(
                f"{self.path} ({name}): {counts.dropped_tasks} of {counts.dropped_tasks + counts.tasks} tasks, with "
                f"{counts.dropped_records} records, are left out: they have too few for {least}; {remedy}"
            )
        if counts.topped_up_tasks:
            rank_zero_warn(
                f"{self.path} ({name}): {counts.topped_up_tasks} of {counts.tasks} tasks have fewer than "
                f"min_records={settings.min_records} records; {counts.topped_up_records} are repetitions"
            )

    @override
    def longest_sample(self, part: Part | Literal["predict"], *, above: int) -> LongestSample | None:
        source = self._source("all" if part == "predict" else part)
        of_task, room = source.num_contextual, above - source.num_contextual - 1
        history = source.longest_history(above=room)
        if history is None or (longest := of_task + history + 1) <= above:
            return None
        of_sample = (
            f"the longest sequence ({part}) of {self.path} has {longest} positions: {of_task} of task features, "
            f"{history} records before it, 1 for all candidates"
        )
        return LongestSample(longest, of_sample, f"lower the data's history={self.episodes.history} to {max(room, 0)}")
