"""Ranking samples: a user's context and history with candidates whose labels are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_gr.batch import SequenceBatch
from lightning_gr.data.aggregation import Aggregation
from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.event_checks import missing_labels
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.ranking_columns import RankingColumns
from lightning_gr.data.row_windows import RowWindows
from lightning_gr.data.sample_cuts import BlockCuts, SampleCuts
from lightning_gr.data.source import SequenceSource
from lightning_gr.data.splits import Split
from lightning_gr.data.task import Task
from lightning_gr.data.window_cuts import WindowCuts
from lightning_gr.data.window_index import AnyPart
from lightning_gr.feature_config import FeatureConfig
from lightning_gr.ranking_features import RankingFeatures

Array = np.ndarray[Any, Any]


class RankingSource(SequenceSource):
    """Some events of a user as candidates, with what happened before them as history.

    An event is a candidate at most once. A sample has several, so that they cost one pass over its history (user-level
    compression, MTGR arXiv 2505.18654, section 3.2), and what a candidate may see is a matter of the mask, by time.
    Samples are blocks of consecutive events, see `BlockCuts`, or with `aggregation` the exposures of a window of
    time, see `WindowCuts`. Tokens: the contextual ones, static and real-time history, candidates.

    Args:
        store: the store.
        part: `train`, `val` or `test`; with `requests` also `unlabelled`.
        split: what is trained on and what is held out.
        tasks: by name, what is predicted.
        max_history: history tokens before a block.
        block: most candidates of a block.
        aggregation: windows instead of blocks, for which `max_history` and `block` are of no account.
        requests: with `aggregation`, whether a sample is all candidates of a user and a time.
        features: fields of events, users and items for the batch, by name or config; None takes all of the store but
            the labels.
        cross: causal counts and means that candidates get; None leaves them out.
        cross_features: whether candidates have features of their own: `cross`, and those of group `candidate`.
        user_token: whether the user's id is a contextual token; where users have few events, its embedding learns them
            by heart.
        item_keys: int64 raw key of each item row, which batches carry instead of the row; None carries rows.
        user_keys: the same of users.
        cuts: how events are cut into samples, in place of `max_history`, `block` and `aggregation`.

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
        max_history: int = 200,
        block: int = 64,
        aggregation: Aggregation | None = None,
        requests: bool = False,
        features: Sequence[str | FeatureConfig] | None = None,
        cross: CrossStatistics | None = None,
        cross_features: bool = True,
        user_token: bool = True,
        item_keys: Array | None = None,
        user_keys: Array | None = None,
        cuts: SampleCuts | None = None,
    ) -> None:
        self._columns = RankingColumns(
            store,
            tasks=tasks,
            features=features,
            cross=cross,
            cross_features=cross_features,
            user_token=user_token,
            item_keys=item_keys,
            user_keys=user_keys,
        )
        self._cuts: SampleCuts
        if cuts is not None:
            self._cuts = cuts
        elif aggregation is not None:
            self._cuts = WindowCuts(
                store, part=part, split=split, tasks=tasks, aggregation=aggregation, requests=requests
            )
        elif requests or part == "unlabelled":
            raise ValueError(f"part={part}, requests={requests}: candidates of a request need aggregation; set it")
        else:
            missing = missing_labels(store, tasks)
            self._cuts = BlockCuts(store, part=part, split=split, max_history=max_history, block=block, missing=missing)
        self._rows = RowWindows(store, tuple(dict.fromkeys([*self._columns.names, *self._cuts.columns])))
        self.num_rows = len(store.lengths)
        self.group_bounds = store.group_bounds
        self.tasks: tuple[str, ...] = tuple(tasks)
        self._store, self._split = store, split
        self._sequences = 1  # of a sample in a batch, each with contextual tokens of its own
        settings = (
            store.fingerprint,
            part,
            split.identity(),
            *self._cuts.identity,
            sorted(tasks.items()),
            *self._columns.identity,
        )
        self.fingerprint = "-".join(str(x) for x in settings) + "-raw" * (item_keys is not None)

    def prepare(self) -> None:
        """Does what one process may do for all, as finding samples; without it, each process does it when it must."""
        self._cuts.prepare()

    def longest_history(self, *, above: int) -> int | None:
        """History events of the sample that has most of them; None without one, or where settings allow `above`."""
        return self._cuts.longest_history() if self._cuts.most_history > above else None

    @property
    def num_contextual(self) -> int:
        """Contextual tokens of a sample."""
        return self._columns.features.num_contextual

    @cached_property
    def ranking_features(self) -> RankingFeatures:
        """What the batches hold; counting means and deviations of dense features is a pass over the training part."""
        return self._columns.normalised(self._store, self._split)

    # ---- what a plan asks --------------------------------------------------------------------------------------

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        ids, counts = self._cuts.samples(first_row, last_row)
        return ids, self._sequences * self.num_contextual + counts

    @override
    def token_counts(self, sample_ids: Array) -> Array:
        counts: Array = self._sequences * self.num_contextual + self._cuts.event_counts(sample_ids)
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
