"""RankingColumns: ids, numbers and labels of ranking samples, from users' events to a batch.

Shape suffixes: B sequences, T tokens of all sequences together, X event tokens (T without the contextual ones), I
items, W columns of numeric features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch
from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import ITEM, USER, Field
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.row_windows import spread
from lightning_gr.data.sample_cuts import SampleEvents, event_starts
from lightning_gr.data.source import keyed_jagged
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


class RankingColumns:
    """Makes batches of the events of ranking samples.

    Args:
        store: the store.
        tasks: by name, what is predicted.
        features: fields of events, users and items for the batch; None takes all of the store but the labels.
        cross: causal counts and means that candidates get; None leaves them out.
        user_token: whether the user's id is a contextual token.
        item_keys: int64 raw key of each item row, which batches carry instead of the row; None carries rows.
        user_keys: the same of users.

    Attributes:
        features: what the batches hold.
        names: fields of events and users that batches are made of, beside items and times.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        store: EventStore,
        *,
        tasks: Mapping[str, Task],
        features: Sequence[str] | None,
        cross: CrossStatistics | None,
        user_token: bool,
        item_keys: Array | None,
        user_keys: Array | None,
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
        self._tasks = dict(tasks)
        self._fields = {per: [f for f in chosen if f.per == per] for per in ("event", "user", "item")}
        self._label_fields = tuple(dict.fromkeys(task.field for task in tasks.values()))
        self._cross = cross
        self._item_keys, self._user_keys = item_keys, user_keys
        self._event_starts = event_starts(store)
        columns = [f.name for f in (*self._fields["event"], *self._fields["user"])]
        self.names = (*columns, *self._label_fields)
        self._item_codes, self._item_values = item_columns(store, self._fields["item"])
        dense = [f for f in self._fields["event"] if f.kind == "dense"]
        self.features = RankingFeatures(
            contextual=({USER: len(store.lengths)} if user_token else {})
            | {f.name: int(f.cardinality or 0) for f in self._fields["user"] if f.kind == "sparse"},
            contextual_width=sum(f.kind == "dense" for f in self._fields["user"]),
            tokens={ITEM: store.num_items}
            | {f.name: int(f.cardinality or 0) for f in self._fields["event"] if f.kind == "sparse"}
            | {name: int(codes.max(initial=0)) + 1 for name, codes in self._item_codes.items()},
            width=self._item_values.shape[1] + len(dense),
            history_width=2 * len(tasks) + len(self._label_fields),
            candidate_width=0 if cross is None else cross.values_EW.shape[1],
            tasks=tuple(tasks),
            raw_ids=item_keys is not None,
        )
        self.identity = (columns, user_token)

    def batch(
        self,
        sample_ids: Array,
        user_rows: Array,
        events: SampleEvents,
        rows: UserRows,
        places_B: Array,
        *,
        epoch: int,
        denominators: dict[str, float],
        gradient_divisor: float,
    ) -> SequenceBatch:
        """The batch of some samples.

        Args:
            sample_ids: the samples; none gives one padding sequence of length 0 without labels.
            user_rows: row of each sample's user in the store.
            events: their events.
            rows: users in memory, with the fields `names`.
            places_B: each sample's user among them.
            epoch: epoch the batch belongs to.
            denominators: by task, the labels of the whole global batch.
            gradient_divisor: what engines divide the gradient by.
        """
        at_X, contextual = events.at_X, self.features.num_contextual
        lengths_B = events.counts_B3.sum(1)
        events_B = rows.offsets[places_B]
        sequence_X = np.repeat(np.arange(len(sample_ids)), lengths_B)
        is_candidate_X = np.repeat(np.tile([False, False, True], len(sample_ids)), events.counts_B3.ravel())
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
        counts_B4 = np.concatenate([np.full((len(sample_ids), 1), contextual), events.counts_B3], 1)
        stamps_X = at_X - events_B[sequence_X] if rows.timestamps is None else rows.timestamps[at_X]
        times_T = np.zeros(total, dtype=np.int64)
        times_T[token_X] = stamps_X
        if not len(sample_ids):
            ids = {name: (values, np.zeros(1, dtype=np.int64)) for name, (values, _) in ids.items()}
            sample_ids, counts_B4 = np.array([PADDING_SAMPLE_ID]), np.zeros((1, 4), dtype=np.int64)
            if "contextual" in dense:
                dense["contextual"] = torch.zeros(1, self.features.contextual_width)
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


def _on_tokens(values_XW: Array, token_X: Array, total: int) -> torch.Tensor:
    """Rows of event tokens among all tokens; contextual ones have zeros."""
    spread_TW = np.zeros((total, values_XW.shape[1]), dtype=np.float32)
    spread_TW[token_X] = values_XW
    return torch.from_numpy(spread_TW)
