"""Ranking samples: a user's context and history with a block of candidates whose labels are to be predicted.

Shape suffixes: B sequences, T tokens of all sequences together, X event tokens (T without the contextual ones), I
items, W columns of numeric features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch
from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import ITEM, USER, Field
from lightning_gr.data.row_windows import RowWindows, spread
from lightning_gr.data.source import SequenceSource, keyed_jagged
from lightning_gr.data.splits import Part, Split
from lightning_gr.ranking_features import RankingFeatures

Array = np.ndarray[Any, Any]
_ONE_HOT_MOST = 512
"""Categories of a multi-valued item field, which is given to models as one column a category."""


@dataclass(frozen=True)
class Task:
    """What is predicted of a candidate.

    Args:
        field: label of events in the store.
        at_least: labels from this number on are positive; None takes labels that are 0 or 1 as they are.
    """

    field: str
    at_least: float | None = None

    def labels(self, values: Array) -> Array:
        """0 or 1, NaN where there is no label."""
        if self.at_least is None:
            return values.astype(np.float64)
        return np.where(np.isnan(values), np.nan, (values >= self.at_least).astype(np.float64))


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
        fields = {field.name: field for field in store.fields}
        if not tasks:
            raise ValueError("tasks: expected at least one")
        for name, task in tasks.items():
            if task.field not in fields or fields[task.field].kind != "label":
                labels = [field.name for field in store.fields if field.kind == "label"]
                raise ValueError(
                    f"tasks.{name}: the store has no label {task.field}; it has {', '.join(labels) or 'none'}"
                )
        chosen = [f for f in store.fields if f.kind != "label"] if features is None else []
        for name in features or ():
            if name not in fields or fields[name].kind == "label":
                raise ValueError(f"features: the store has no field {name}; it has {', '.join(fields)}")
            chosen.append(fields[name])
        if max_history < 1 or block < 1:
            raise ValueError(f"max_history={max_history}, block={block}: expected at least 1")
        self._store, self._part, self._split = store, part, split
        self._tasks, self._max_history, self._block = dict(tasks), max_history, block
        self._fields = {per: [f for f in chosen if f.per == per] for per in ("event", "user", "item")}
        self._label_fields = tuple(dict.fromkeys(task.field for task in tasks.values()))
        self._cross = cross
        self._item_keys, self._user_keys = item_keys, user_keys
        self._event_starts = np.concatenate([[0], np.cumsum(store.lengths, dtype=np.int64)])
        columns = [f.name for f in (*self._fields["event"], *self._fields["user"])]
        self._rows = RowWindows(store, [*columns, *self._label_fields])
        self._item_codes, self._item_values = item_columns(store, self._fields["item"])
        self.num_rows = len(store.lengths)
        self.group_bounds = store.group_bounds
        self.tasks: tuple[str, ...] = tuple(tasks)
        dense = [f for f in self._fields["event"] if f.kind == "dense"]
        self.ranking_features = RankingFeatures(
            contextual=({USER: self.num_rows} if user_token else {})
            | {f.name: int(f.cardinality or 0) for f in self._fields["user"] if f.kind == "sparse"},
            contextual_width=sum(f.kind == "dense" for f in self._fields["user"]),
            tokens={ITEM: store.num_items}
            | {f.name: int(f.cardinality or 0) for f in self._fields["event"] if f.kind == "sparse"}
            | {name: int(codes.max(initial=0)) + 1 for name, codes in self._item_codes.items()},
            width=self._item_values.shape[1] + len(dense),
            history_width=2 * len(self.tasks) + len(self._label_fields),
            candidate_width=0 if cross is None else cross.values_EW.shape[1],
            tasks=self.tasks,
            raw_ids=item_keys is not None,
        )
        settings = (
            store.fingerprint,
            part,
            split.identity(),
            max_history,
            block,
            sorted(self._tasks.items()),
            columns,
            user_token,
        )
        self.fingerprint = "-".join(str(x) for x in settings) + "-raw" * (item_keys is not None)
        self._missing = self._missing_labels()

    # ---- what a plan asks --------------------------------------------------------------------------------------

    def _candidates(self, rows: Array) -> tuple[Array, Array]:
        """First candidate event of each user and the end of its candidates."""
        last_token, asking = self._split.spans(self._store, self._part, rows)
        has = last_token >= asking
        return np.where(has, asking + 1, 0), np.where(has, last_token + 2, 0)

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        rows = np.arange(first_row, last_row)
        begin, end = self._candidates(rows)
        blocks = -(-(end - begin) // self._block)
        piece = np.arange(int(blocks.sum())) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        ids = np.repeat(rows, blocks) + piece * self.num_rows
        return ids, self.token_counts(ids)

    def _spans(self, sample_ids: Array) -> tuple[Array, Array, Array]:
        """First history event, first candidate and end of the candidates, as places in the user's history."""
        rows = sample_ids % max(self.num_rows, 1)
        begin, end = self._candidates(rows)
        first = begin + sample_ids // max(self.num_rows, 1) * self._block
        return np.maximum(first - self._max_history, 0), first, np.minimum(first + self._block, end)

    @override
    def token_counts(self, sample_ids: Array) -> Array:
        begin, first, end = self._spans(sample_ids)
        # All events but the last one are history of some candidate.
        return self.ranking_features.num_contextual + (end - 1 - begin) + (end - first)

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        _, first, end = self._spans(sample_ids)
        starts = self._event_starts[sample_ids % max(self.num_rows, 1)]
        counts = {}
        for name, missing in self._missing.items():
            gone = np.searchsorted(missing, starts + end) - np.searchsorted(missing, starts + first)
            counts[name] = end - first - gone
        return counts

    def _missing_labels(self) -> dict[str, Array]:
        """By task, the events without a label, as places among all events; read only where the index has such."""
        missing = {}
        for name, task in self._tasks.items():
            missing[name] = np.zeros(0, dtype=np.int64)
            if int(self._store.label_counts(task.field).sum(dtype=np.int64)) == int(self._event_starts[-1]):
                continue
            parts = [np.isnan(values) for values in self._of_all_events(task.field)]
            missing[name] = np.flatnonzero(np.concatenate(parts))
        return missing

    def _of_all_events(self, field: str) -> list[Array]:
        groups = range(len(self.group_bounds) - 1)
        return [self._store.read_group(group, [field]).event_fields[field] for group in groups]

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
        begin_B, first_B, end_B = self._spans(sample_ids)
        events_B = rows.offsets[places_B]
        times = rows.timestamps
        # Events before the first candidate's time are static; of those at its time and later the mask decides.
        static_B = first_B - begin_B
        if times is not None:
            static_B = static_B - _ties_before(times, events_B + begin_B, events_B + first_B)
        history_B, candidates_B = end_B - 1 - begin_B, end_B - first_B
        contextual = self.ranking_features.num_contextual
        at_X, is_candidate_X = _interleaved(events_B + begin_B, history_B, events_B + first_B, candidates_B)
        lengths_B = history_B + candidates_B
        sequence_X = np.repeat(np.arange(len(sample_ids)), lengths_B)
        token_X = np.arange(len(at_X)) + contextual * (sequence_X + 1)
        total = len(at_X) + contextual * len(sample_ids)

        items_X = rows.items[at_X]
        ids = {ITEM: (items_X if self._item_keys is None else self._item_keys[items_X], lengths_B)}
        ids |= {name: (codes[items_X], lengths_B) for name, codes in self._item_codes.items()}
        numbers = [self._item_values[items_X]]
        for field in self._fields["event"]:
            values = rows.event_fields[field.name][at_X]
            if field.kind == "sparse":
                ids[field.name] = (values, lengths_B)
            else:
                numbers.append(np.nan_to_num(values)[:, None])
        labels_X = {name: task.labels(rows.event_fields[task.field][at_X]) for name, task in self._tasks.items()}
        action_XW = self._actions(rows.event_fields, at_X, labels_X)
        action_XW[is_candidate_X] = 0.0
        dense = {
            "numbers": _on_tokens(np.concatenate(numbers, 1), token_X, total),
            "actions": _on_tokens(action_XW, token_X, total),
        }
        if self._cross is not None:
            of_event = at_X - events_B[sequence_X] + self._event_starts[user_rows][sequence_X]
            cross_XW = np.where(is_candidate_X[:, None], self._cross.values_EW[of_event], 0.0)
            dense["cross"] = _on_tokens(cross_XW, token_X, total)
        users_B = user_rows if self._user_keys is None else self._user_keys[user_rows]
        ids[USER] = (users_B, np.ones(len(sample_ids), dtype=np.int64))
        of_users = []
        for field in self._fields["user"]:
            values, offsets = rows.user_fields[field.name]
            at, counts = spread(offsets, places_B)
            if field.kind == "sparse":
                ids[field.name] = (values[at], counts)
            else:
                of_users.append(np.nan_to_num(values[at]))
        if of_users:
            dense["contextual"] = torch.from_numpy(np.stack(of_users, 1).astype(np.float32))
        labels = {}
        for name, values in labels_X.items():
            labelled = np.flatnonzero(is_candidate_X & ~np.isnan(values))
            labels[name] = Labels(
                torch.from_numpy(values[labelled].astype(np.float32)), torch.from_numpy(token_X[labelled])
            )
        counts_B4 = np.stack([np.full_like(static_B, contextual), static_B, history_B - static_B, candidates_B], 1)
        stamps_X = at_X - events_B[sequence_X] if times is None else times[at_X]
        times_T = np.zeros(total, dtype=np.int64)
        times_T[token_X] = stamps_X
        if not len(sample_ids):
            ids = {name: (values, np.zeros(1, dtype=np.int64)) for name, (values, _) in ids.items()}
            sample_ids, counts_B4 = np.array([PADDING_SAMPLE_ID]), np.zeros((1, 4), dtype=np.int64)
            if "contextual" in dense:
                dense["contextual"] = torch.zeros(1, self.ranking_features.contextual_width)
        return SequenceBatch(
            features=keyed_jagged(ids),
            token_counts_B4=torch.from_numpy(counts_B4.astype(np.int64)),
            sample_ids_B=torch.from_numpy(sample_ids.astype(np.int64)),
            labels=labels,
            denominators=denominators,
            gradient_divisor=gradient_divisor,
            epoch=epoch,
            timestamps_T=torch.from_numpy(times_T),
            dense=dense,
        )

    def _actions(self, fields: Mapping[str, Array], at_X: Array, labels_X: Mapping[str, Array]) -> Array:
        """What the user did at each event: labels of the tasks, which of them there are, and the labels' own values."""
        columns = []
        for values in labels_X.values():
            columns += [np.nan_to_num(values), ~np.isnan(values)]
        columns += [np.nan_to_num(fields[name][at_X]) for name in self._label_fields]
        return np.stack([np.asarray(column, dtype=np.float64) for column in columns], 1)


def item_columns(store: EventStore, fields: Sequence[Field]) -> tuple[dict[str, Array], Array]:
    """Item fields as models take them: codes by field, and numeric columns (I, W).

    Numbers are columns, and so are the categories of fields with several values, one column each, which share 1.

    Raises:
        ValueError: a field with several values has too many categories.
    """
    frame = store.items()
    codes: dict[str, Array] = {}
    columns = [np.zeros((store.num_items, 0), dtype=np.float32)]
    for field in fields:
        values = frame[field.name]
        if field.kind == "dense":
            columns.append(np.nan_to_num(values.to_numpy().astype(np.float32))[:, None])
        elif values.dtype.is_nested():
            cardinality = int(field.cardinality or 0)
            if cardinality > _ONE_HOT_MOST:
                raise ValueError(
                    f"features: {field.name} has {cardinality:,} categories and several an item; ranking models take "
                    f"at most {_ONE_HOT_MOST}, so leave it out or group them"
                )
            offsets, flat = item_categories(store, field.name)
            hot = np.zeros((store.num_items, cardinality), dtype=np.float32)
            hot[np.repeat(np.arange(store.num_items), np.diff(offsets)), flat] = 1.0
            columns.append(hot / np.maximum(hot.sum(1, keepdims=True), 1.0))
        else:
            codes[field.name] = values.to_numpy().astype(np.int64)
    return codes, np.concatenate(columns, 1)


def item_categories(store: EventStore, name: str) -> tuple[Array, Array]:
    """Offsets (I + 1,) and codes of an item field's categories."""
    values = store.items()[name]
    if not values.dtype.is_nested():
        return np.arange(store.num_items + 1), values.to_numpy().astype(np.int64)
    sizes = values.list.len().fill_null(0).to_numpy().astype(np.int64)
    return np.concatenate([[0], np.cumsum(sizes)]), values.list.explode().drop_nulls().to_numpy().astype(np.int64)


def _interleaved(history: Array, num_history: Array, candidates: Array, num_candidates: Array) -> tuple[Array, Array]:
    """Events of each sequence, its history and then its candidates, and which are candidates."""
    starts = np.stack([history, candidates], 1).ravel()
    counts = np.stack([num_history, num_candidates], 1).ravel()
    ends = np.cumsum(counts)
    at = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return at, np.repeat(np.tile([False, True], len(history)), counts)


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


def _on_tokens(values_XW: Array, token_X: Array, total: int) -> torch.Tensor:
    """Rows of event tokens among all tokens; contextual ones have zeros."""
    spread_TW = np.zeros((total, values_XW.shape[1]), dtype=np.float32)
    spread_TW[token_X] = values_XW
    return torch.from_numpy(spread_TW)
