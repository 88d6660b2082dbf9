"""RankingColumns: ids, numbers and labels of ranking samples, from users' events to a batch.

Shape suffixes: B sequences, T tokens of all sequences together, X event tokens (T without the contextual ones), I
items, W columns of numeric features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch
from lightning_gr.data.cross_statistics import CrossStatistics
from lightning_gr.data.declared_features import declared_features
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import ITEM, USER
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.feature_statistics import normalisations
from lightning_gr.data.item_columns import item_columns
from lightning_gr.data.row_windows import spread
from lightning_gr.data.sample_cuts import SampleEvents, event_starts
from lightning_gr.data.shared_tables import table_codes
from lightning_gr.data.source import keyed_jagged
from lightning_gr.data.splits import Split
from lightning_gr.data.task import Task, label_fields
from lightning_gr.feature_config import FeatureConfig, Group
from lightning_gr.ranking_features import EVENT_GROUPS, Normalisation, RankingFeatures

Array = np.ndarray[Any, Any]


class RankingColumns:
    """Makes batches of the events of ranking samples.

    Args:
        store: the store.
        tasks: by name, what is predicted.
        features: names of fields of events, users and items, or their configs; None takes all of the store but the
            labels. By name, numbers are given as they are, 0 where missing, and categories of items with several as
            one column each.
        cross: causal counts and means that candidates get; None leaves them out.
        cross_features: whether candidates get features of their own; without, `cross` and the group `candidate` are
            left out.
        user_token: whether the user's id is a contextual token.
        item_keys: int64 raw key of each item row, which batches carry instead of the row; None carries rows.
        user_keys: the same of users.

    Attributes:
        features: what the batches hold, without the statistics that numbers are normalised by; see `normalised`.
        names: fields of events and users that batches are made of, beside items and times.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        store: EventStore,
        *,
        tasks: Mapping[str, Task],
        features: Sequence[str | FeatureConfig] | None,
        cross: CrossStatistics | None,
        user_token: bool,
        item_keys: Array | None,
        user_keys: Array | None,
        cross_features: bool = True,
    ) -> None:
        if not tasks:
            raise ValueError("tasks: expected at least one")
        for name, task in tasks.items():
            task.check(f"tasks.{name}", store.fields)
        self._configured = any(isinstance(x, FeatureConfig) for x in features or ())
        declared = declared_features(store, features, user_token=user_token, cross_features=cross_features)
        self._declared = declared
        self._tasks = dict(tasks)
        self._label_fields = label_fields(tasks)
        self._cross = cross if cross_features else None
        self._item_keys, self._user_keys = item_keys, user_keys
        self._event_starts = event_starts(store)
        self._codes = table_codes(store, declared, {ITEM: item_keys, USER: user_keys})
        self._of_users = [x for x in declared if x.per == "user" and x.name != USER]
        self._of_events = [x for x in declared if x.per == "event"]
        columns = [x.name for x in (*self._of_events, *self._of_users)]
        self.names = (*columns, *self._label_fields)
        self._of_items = [x for x in declared if x.per == "item" and x.name != ITEM]
        self._items = item_columns(store, self._of_items, self._codes, one_hot=not self._configured)
        self.features = self._described(tuple(tasks))
        self.identity: tuple[object, ...] = (columns, user_token)
        if self._configured:
            self.identity = (*self.identity, hashlib.blake2b(repr(declared).encode(), digest_size=8).hexdigest())
        if not cross_features:
            self.identity = (*self.identity, "no cross features")

    def _described(self, tasks: tuple[str, ...]) -> RankingFeatures:
        sparse = [x for x in self._declared if x.kind == "sparse" and x.name not in self._items.one_hot]
        # Events before items, as batches have always had them.
        ordered = [x for per in ("event", "item") for x in sparse if x.per == per and x.name != ITEM]
        ordered = [x for x in sparse if x.name == ITEM] + ordered
        rows = dict(self._codes.rows)
        if not self._configured:
            rows |= {name: int(codes.max(initial=0)) + 1 for name, codes in self._items.codes.items()}
        groups = {group: {x.name: rows[x.name] for x in ordered if x.group == group} for group in EVENT_GROUPS}
        widths = {
            group: self._items.numbers[group].shape[1] + len(self._dense_of_events(group)) for group in EVENT_GROUPS
        }
        counted = 0 if self._cross is None else self._cross.values_EW.shape[1]
        return RankingFeatures(
            contextual={x.name: rows[x.name] for x in sparse if x.per == "user"},
            contextual_width=sum(x.kind == "dense" for x in self._of_users),
            tokens=groups["event"],
            width=widths["event"],
            history_width=2 * len(tasks) + len(self._label_fields) + widths["history"],
            candidate_width=counted + widths["candidate"],
            tasks=tasks,
            raw_ids=self._item_keys is not None,
            history_tokens=groups["history"],
            candidate_tokens=groups["candidate"],
            tables={x.name: x.table for x in sparse if x.table != x.name},
            dims={x.table: x.dim for x in sparse if x.dim is not None},
            pooling={x.name: x.pooling for x in sparse if x.several or (x.per == "user" and x.pooling != "mean")},
        )

    def normalised(self, store: EventStore, split: Split) -> RankingFeatures:
        """What the batches hold, with the statistics of the training part; see `normalisations`."""
        if not self._configured:
            return self.features
        of_column = normalisations(store, split, self._declared)

        def of_group(group: Group) -> tuple[Normalisation, ...]:
            of_items = [x.name for x in self._of_items if x.kind == "dense" and x.group == group]
            return tuple(of_column[name] for name in (*of_items, *self._dense_of_events(group)))

        features, own = self.features, {group: of_group(group) for group in EVENT_GROUPS}
        as_it_is = (Normalisation(),)
        of_dense = {
            "numbers": own["event"],
            # Before features stand the columns of what the user did, and counted cross statistics.
            "actions": as_it_is * (features.history_width - len(own["history"])) + own["history"],
            "cross": as_it_is * (features.candidate_width - len(own["candidate"])) + own["candidate"],
            "contextual": tuple(of_column[x.name] for x in self._of_users if x.kind == "dense"),
        }
        used = {"numbers": own["event"], "actions": own["history"], "cross": own["candidate"]}
        return replace(features, normalisation={name: x for name, x in of_dense.items() if used.get(name, x)})

    def _dense_of_events(self, group: Group) -> list[str]:
        return [x.name for x in self._of_events if x.kind == "dense" and x.group == group]

    # ---- batches -----------------------------------------------------------------------------------------------

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
        contextual = self.features.num_contextual
        tokens = _Tokens(events, rows.items[events.at_X], contextual)
        at_X, is_candidate_X, token_X, total = events.at_X, tokens.is_candidate_X, tokens.token_X, tokens.total
        events_B = rows.offsets[places_B]
        ids, dense = self._ids(tokens, rows), self._numbers(tokens, rows)
        fields_X = {name: rows.event_fields[name][at_X] for name in self._label_fields}
        labels_X = {name: task.of(fields_X) for name, task in self._tasks.items()}
        action_XW = np.zeros((len(at_X), 2 * len(labels_X) + len(fields_X)))
        past = np.flatnonzero(~is_candidate_X)
        if len(past):
            of_past = [{name: values[past] for name, values in x.items()} for x in (fields_X, labels_X)]
            action_XW[past] = self._actions(*of_past)
        of_dense = {"numbers": [dense["event"]], "actions": [action_XW, dense["history"]]}
        if self.features.candidate_width:
            of_dense["cross"] = [dense["candidate"]]
        if self._cross is not None:
            of_event = at_X - events_B[tokens.sequence_X] + self._event_starts[user_rows][tokens.sequence_X]
            of_dense["cross"].insert(0, np.where(is_candidate_X[:, None], self._cross.values_EW[of_event], 0.0))
        dense_T = {name: _on_tokens(np.concatenate(parts, 1), token_X, total) for name, parts in of_dense.items()}
        dense_T |= {f"{name}.count": _on_tokens(x, token_X, total) for name, x in tokens.num_values_X.items()}
        users_B = user_rows if self._user_keys is None else self._user_keys[user_rows]
        ids[USER] = (users_B, np.ones(len(sample_ids), dtype=np.int64))
        of_users_ids, of_users_BW = self._users(rows, places_B)
        ids |= of_users_ids
        if of_users_BW is not None:
            dense_T["contextual"] = torch.from_numpy(of_users_BW)
        labels = {}
        for name, values in labels_X.items():
            labelled = np.flatnonzero(is_candidate_X & ~np.isnan(values))
            labels[name] = Labels(
                torch.from_numpy(values[labelled].astype(np.float32)), torch.from_numpy(token_X[labelled])
            )
        counts_B4 = np.concatenate([np.full((len(sample_ids), 1), contextual), events.counts_B3], 1)
        stamps_X = at_X - events_B[tokens.sequence_X] if rows.timestamps is None else rows.timestamps[at_X]
        times_T = np.zeros(total, dtype=np.int64)
        times_T[token_X] = stamps_X
        if not len(sample_ids):
            ids = {name: (values, np.zeros(1, dtype=np.int64)) for name, (values, _) in ids.items()}
            sample_ids, counts_B4 = np.array([PADDING_SAMPLE_ID]), np.zeros((1, 4), dtype=np.int64)
            if "contextual" in dense_T:
                dense_T["contextual"] = torch.zeros(1, self.features.contextual_width)
        return SequenceBatch(
            features=keyed_jagged(ids),
            token_counts_B4=torch.from_numpy(counts_B4.astype(np.int64)),
            sample_ids_B=torch.from_numpy(sample_ids.astype(np.int64)),
            labels=labels,
            denominators=denominators,
            gradient_divisor=gradient_divisor,
            epoch=epoch,
            timestamps_T=torch.from_numpy(times_T),
            dense=dense_T,
        )

    def _ids(self, tokens: _Tokens, rows: UserRows) -> dict[str, tuple[Array, Array]]:
        """By sparse feature of events and items, its values and how many each sequence has."""
        ids: dict[str, tuple[Array, Array]] = {}
        items_X = tokens.items_X
        ids[ITEM] = (items_X if self._item_keys is None else self._item_keys[items_X], tokens.lengths_B("event"))
        for feature in (*self._of_items, *self._of_events):
            name, group = feature.name, feature.group
            if feature.kind == "dense" or name in self._items.one_hot:
                continue
            items_X = tokens.of_group(tokens.items_X, group)
            if feature.several:
                offsets, codes = self._items.lists[name]
                at, counts = spread(offsets, items_X)
                ids[name] = (codes[at], tokens.count_values(name, group, counts))
            elif feature.per == "item":
                ids[name] = (self._items.codes[name][items_X], tokens.lengths_B(group))
            else:
                codes = tokens.of_group(rows.event_fields[name][tokens.at_X], group)
                ids[name] = (self._codes(name, codes), tokens.lengths_B(group))
        return ids

    def _numbers(self, tokens: _Tokens, rows: UserRows) -> dict[str, Array]:
        """By group, the numeric columns (X, W) of its features; 0 at tokens of other groups."""
        found: dict[str, Array] = {}
        for group in EVENT_GROUPS:
            parts = [self._items.numbers[group][tokens.items_X]]
            for name in self._dense_of_events(group):
                values = rows.event_fields[name][tokens.at_X]
                whole = self._configured or np.isfinite(values).all()
                parts.append((values if whole else np.nan_to_num(values))[:, None])
            found[group] = np.concatenate(parts, 1)
            if group != "event":
                found[group][tokens.is_candidate_X == (group == "history")] = 0.0
        return found

    def _users(self, rows: UserRows, places_B: Array) -> tuple[dict[str, tuple[Array, Array]], Array | None]:
        """Sparse features of users as `_ids` has them, and dense ones (B, W), None where there are none."""
        ids, numbers = {}, []
        for feature in self._of_users:
            values, offsets = rows.user_fields[feature.name]
            at, counts = spread(offsets, places_B)
            if feature.kind == "sparse":
                ids[feature.name] = (self._codes(feature.name, values[at]), counts)
            else:
                numbers.append(values[at] if self._configured else np.nan_to_num(values[at]))
        return ids, np.stack(numbers, 1).astype(np.float32) if numbers else None

    def _actions(self, fields_X: Mapping[str, Array], labels_X: Mapping[str, Array]) -> Array:
        """What the user did at each event: labels of the tasks, which of them there are, and the labels' own values."""
        columns = []
        for values in labels_X.values():
            columns += [np.nan_to_num(values), ~np.isnan(values)]
        columns += [np.nan_to_num(fields_X[name]) for name in self._label_fields]
        return np.stack([np.asarray(column, dtype=np.float64) for column in columns], 1)


class _Tokens:
    """The event tokens of a batch.

    Args:
        events: of its samples.
        items_X: item row of each.
        contextual: contextual tokens of a sample, which stand before its events.
    """

    def __init__(self, events: SampleEvents, items_X: Array, contextual: int) -> None:
        num_samples = len(events.counts_B3)
        self.at_X, self.items_X, self._counts_B3 = events.at_X, items_X, events.counts_B3
        self.sequence_X = np.repeat(np.arange(num_samples), events.counts_B3.sum(1))
        self.is_candidate_X = np.repeat(np.tile([False, False, True], num_samples), events.counts_B3.ravel())
        self.token_X = np.arange(len(self.at_X)) + contextual * (self.sequence_X + 1)
        self.total = len(self.at_X) + contextual * num_samples
        self.num_values_X: dict[str, Array] = {}

    def _has(self, group: Group) -> Array | slice:
        if group == "event":
            return slice(None)
        return self.is_candidate_X if group == "candidate" else ~self.is_candidate_X

    def of_group(self, values_X: Array, group: Group) -> Array:
        """The values of the tokens that features of a group have."""
        return values_X[self._has(group)]

    def lengths_B(self, group: Group) -> Array:
        """How many of them each sequence has."""
        kinds = {"history": slice(0, 2), "candidate": slice(2, 3)}.get(group, slice(0, 3))
        lengths: Array = self._counts_B3[:, kinds].sum(1)
        return lengths

    def count_values(self, name: str, group: Group, counts: Array) -> Array:
        """Keeps how many values of a feature each token of its group has; how many each sequence has."""
        counts_X = np.zeros(len(self.at_X), dtype=np.int64)
        counts_X[self._has(group)] = counts
        self.num_values_X[name] = counts_X
        sums = np.concatenate([[0], np.cumsum(counts_X)])
        ends = np.cumsum(self.lengths_B("event"))
        lengths: Array = sums[ends] - sums[ends - self.lengths_B("event")]
        return lengths


def _on_tokens(values_XW: Array, token_X: Array, total: int) -> torch.Tensor:
    """Rows, or numbers (X,), of event tokens among all tokens; contextual ones have zeros."""
    spread_TW = np.zeros((total, *values_XW.shape[1:]), dtype=np.float32)
    spread_TW[token_X] = values_XW
    return torch.from_numpy(spread_TW)
