"""Sources of samples: what a plan needs to know of them, and how some become a batch.

Shape suffixes: B sequences, T tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch, TokenKind
from lightning_gr.data.event_store.fields import Field
from lightning_gr.data.event_table import EventTable, UserRows
from lightning_gr.data.plan import SampleIndex
from lightning_gr.data.row_windows import RowWindows, spread
from lightning_gr.data.splits import LeaveOneOut, Part, Split

LongHistories = Literal["truncate", "split"]
Array = np.ndarray[Any, Any]


class SequenceSource(SampleIndex, Protocol):
    """Samples by id. Lengths and label counts are known without reading the samples."""

    fingerprint: str
    """Identifies the content and how it was cut into samples."""

    def collate(
        self,
        sample_ids: Array,
        *,
        windows: Sequence[tuple[int, ...]],
        epoch: int,
        denominators: dict[str, float],
        gradient_divisor: float,
    ) -> SequenceBatch:
        """The batch of these samples; none gives one padding sequence of length 0 without labels.

        Args:
            sample_ids: the samples.
            windows: groups of rows to be held in memory together, which hold all the samples.
            epoch: epoch the batch belongs to.
            denominators: by task, the labels of the whole global batch.
            gradient_divisor: what engines divide the gradient by.
        """
        ...


class RetrievalSource(SequenceSource):
    """Next-item samples of one part of a split.

    Args:
        table: the log.
        part: `train`, `val`, `test`, or `all`: whole histories without labels.
        max_length: longest sample in tokens.
        split: what is trained on and what is held out; None means `LeaveOneOut`.
        long_histories: in training, `truncate` keeps the most recent `max_length` tokens; `split` makes further samples
            of the tokens before them. Elsewhere the most recent tokens are kept.
        features: further fields of events and users for the batch, where the table is a store.
        item_keys: int64 raw key of each item row, which batches carry instead of the row; None carries rows.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    TASK = "next_item"

    def __init__(
        self,
        table: EventTable,
        *,
        part: Part | Literal["all"],
        max_length: int,
        split: Split | None = None,
        long_histories: LongHistories = "truncate",
        features: Sequence[str] = (),
        item_keys: Array | None = None,
    ) -> None:
        if long_histories not in ("truncate", "split"):
            raise ValueError(f"long_histories={long_histories!r}: expected truncate or split")
        self._table, self._part, self._max_length = table, part, max_length
        self._split: Split = split or LeaveOneOut()
        self._cuts = part == "train" and long_histories == "split"
        self._features = tuple(features)
        if features:
            table.read_group(0, self._features)
        self._kinds = {field.name: field for field in getattr(table, "fields", ())}
        self.num_rows = len(table.lengths)
        self.group_bounds = table.group_bounds
        self.tasks: tuple[str, ...] = () if part == "all" else (self.TASK,)
        self.fingerprint = f"{table.fingerprint}-{part}-{max_length}-{self._split.identity()}" + "-cut" * self._cuts
        self.fingerprint += "-raw" * (item_keys is not None)
        self._item_keys = item_keys
        self._rows = RowWindows(table, self._features)

    # ---- what a plan asks --------------------------------------------------------------------------------------

    def _spans(self, rows: Array) -> tuple[Array, Array]:
        if self._part != "all":
            return self._split.spans(self._table, self._part, rows)
        lengths = self._table.lengths[rows].astype(np.int64)
        return lengths - 1, lengths

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        last_token, asking = self._spans(np.arange(first_row, last_row))
        tokens = last_token + 1
        if self._part not in ("train", "all"):
            tokens = np.where(asking > last_token, 0, tokens)
        rows = np.flatnonzero(tokens > 0)
        tokens = tokens[rows]
        if not self._cuts:
            return rows + first_row, np.minimum(tokens, self._max_length)
        pieces = -(-tokens // self._max_length)
        # Piece 0 is the most recent, so that cutting only adds samples to truncating.
        piece = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        counts = np.minimum(np.repeat(tokens, pieces) - piece * self._max_length, self._max_length)
        return np.repeat(rows + first_row, pieces) + piece * self.num_rows, counts

    @override
    def token_counts(self, sample_ids: Array) -> Array:
        first, last, _ = self._tokens_of(sample_ids)
        return last - first + 1

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        if not self.tasks:
            return {}
        first, last, asking = self._tokens_of(sample_ids)
        return {self.TASK: last - np.maximum(first, asking) + 1}

    def _tokens_of(self, sample_ids: Array) -> tuple[Array, Array, Array]:
        """First and last token of each sample and the first that asks, as places in the user's history."""
        last, asking = self._spans(sample_ids % max(self.num_rows, 1))
        last = last - sample_ids // max(self.num_rows, 1) * self._max_length
        return np.maximum(last - self._max_length + 1, 0), last, asking

    def item_label_counts(self) -> Array:
        """int64 (I,): how often each item row is the label of a sample; one pass over the items of the log."""
        counts = np.zeros(self._table.num_items, dtype=np.int64)
        if not self.tasks:
            return counts
        for group, (first_row, last_row) in enumerate(zip(self.group_bounds[:-1], self.group_bounds[1:], strict=True)):
            ids, _ = self.samples(int(first_row), int(last_row))
            first, last, asking = self._tokens_of(ids)
            events = self._table.read_group(group)
            starts = events.offsets[ids % max(self.num_rows, 1) - first_row]
            # Of +1 where the labels of a sample begin and -1 behind their end, the sum is how often an event is one.
            changes = np.zeros(len(events.items) + 1, dtype=np.int64)
            np.add.at(changes, starts + np.maximum(first, asking) + 1, 1)
            np.add.at(changes, starts + last + 2, -1)
            times = np.cumsum(changes[:-1])
            counts += np.bincount(np.repeat(events.items, times), minlength=len(counts))
        return counts

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
        first_B, last_B, asking_B = self._tokens_of(sample_ids)
        rows, places_B = self._rows.of(sample_ids % max(self.num_rows, 1), windows)
        return next_item_batch(
            rows,
            places_B,
            tokens_B3=(first_B, last_B, asking_B),
            sample_ids=sample_ids,
            labelled=bool(self.tasks),
            fields=[self._kinds[name] for name in self._features],
            item_keys=self._item_keys,
            epoch=epoch,
            denominators=denominators,
            gradient_divisor=gradient_divisor,
        )


def next_item_batch(
    rows: UserRows,
    places_B: Array,
    *,
    tokens_B3: tuple[Array, Array, Array],
    sample_ids: Array,
    labelled: bool,
    fields: Sequence[Field],
    item_keys: Array | None,
    epoch: int,
    denominators: dict[str, float],
    gradient_divisor: float,
) -> SequenceBatch:
    """Cuts samples out of users' events: items, times, fields, and the next event of each token that asks.

    Args:
        rows: users in memory.
        places_B: each sample's user among them.
        tokens_B3: first and last token of each sample, and the first that asks, as places in the user's history.
        sample_ids: ids of the samples; none gives one padding sequence of length 0 without labels.
        labelled: whether tokens ask for their next event; otherwise the last token may be the user's last event.
        fields: fields of events and users that the batch carries.
        item_keys: int64 key of each item number; None takes the numbers themselves.
        epoch: epoch the batch belongs to.
        denominators: by task, the labels of the whole global batch.
        gradient_divisor: what engines divide the gradient by.
    """
    first_B, last_B, asking_B = tokens_B3
    lengths_B = last_B - first_B + 1
    ends_B = np.cumsum(lengths_B)
    starts_B = ends_B - lengths_B
    total = int(ends_B[-1]) if len(ends_B) else 0
    position_T = np.arange(total)
    event_T = position_T + np.repeat(rows.offsets[places_B] + first_B - starts_B, lengths_B)

    def items_at(events: Array) -> Array:
        items = rows.items[events]
        return items if item_keys is None else item_keys[items]

    labels: dict[str, Labels] = {}
    if labelled:
        asks_T = position_T >= np.repeat(starts_B + np.maximum(asking_B - first_B, 0), lengths_B)
        tokens = np.flatnonzero(asks_T)
        labels[RetrievalSource.TASK] = Labels(_tensor(items_at(event_T[tokens] + 1)), torch.from_numpy(tokens))
    times_T = request_times_T = None
    if rows.timestamps is not None:
        times_T = _tensor(rows.timestamps[event_T])
        # Nobody knows when a whole history goes on: its last token asks at its own time.
        next_T = event_T + 1
        if not labelled:
            next_T[ends_B - 1] -= 1
        request_times_T = _tensor(rows.timestamps[next_T])
    ids = {"item_id": (items_at(event_T), lengths_B)}
    dense: dict[str, torch.Tensor] = {}
    for field in fields:
        if field.per == "event":
            values, lengths = rows.event_fields[field.name][event_T], lengths_B
        else:
            values, offsets = rows.user_fields[field.name]
            at, lengths = spread(offsets, places_B)
            values = values[at]
        if field.kind == "sparse":
            ids[field.name] = (values, lengths)
        elif not len(sample_ids) and field.per == "user":
            dense[field.name] = torch.zeros(1)
        else:
            dense[field.name] = torch.from_numpy(values.astype(np.float32))
    if not len(sample_ids):
        ids = {name: (values, np.zeros(1, dtype=np.int64)) for name, (values, _) in ids.items()}
        sample_ids, lengths_B = np.array([PADDING_SAMPLE_ID]), np.zeros(1, dtype=np.int64)
    counts_B4 = torch.zeros(len(lengths_B), 4, dtype=torch.int64)
    counts_B4[:, TokenKind.REALTIME] = torch.from_numpy(lengths_B)
    return SequenceBatch(
        features=keyed_jagged(ids),
        token_counts_B4=counts_B4,
        sample_ids_B=torch.from_numpy(sample_ids.astype(np.int64)),
        labels=labels,
        denominators=denominators,
        gradient_divisor=gradient_divisor,
        epoch=epoch,
        timestamps_T=times_T,
        request_timestamps_T=request_times_T,
        dense=dense,
    )


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def keyed_jagged(ids: dict[str, tuple[Array, Array]]) -> Any:
    """Features by name from values and lengths a sequence."""
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(
        keys=list(ids),
        values=torch.cat([_tensor(values) for values, _ in ids.values()]),
        lengths=torch.cat([_tensor(lengths) for _, lengths in ids.values()]),
    )
