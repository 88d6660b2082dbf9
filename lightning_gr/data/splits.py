"""Splits: which events of a user are history and which are targets, in training, validation and test."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Literal, Protocol

import numpy as np
import torch
from typing_extensions import override

from lightning_gr.counter_random import counter_uniform, name_key
from lightning_gr.data.event_table import EventTable

Part = Literal["train", "val", "test"]
Array = np.ndarray[Any, Any]


class Split(Protocol):
    """For each user the last token of a part's history and the first token that asks for its next event."""

    def spans(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        """Spans of some users, by row.

        Returns:
            ``(last_token, first_asking)``, int64, as positions in the user's history: the tokens ``first_asking ...
            last_token`` each predict the event that follows; ``last_token < first_asking`` where there is none.
        """
        ...

    def identity(self) -> str:
        """Names the split and its settings, for fingerprints."""
        ...


class LeaveOneOut(Split):
    """The last event of a user with at least three is the test target, the one before it the validation target.

    Training predicts every event before those two. Users with fewer events are trained on and not evaluated.
    """

    @override
    def spans(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        lengths = table.lengths[rows].astype(np.int64)
        evaluated = lengths >= 3
        if part == "train":
            return np.where(evaluated, lengths - 4, lengths - 2), np.zeros_like(lengths)
        token = np.where(evaluated, lengths - (2 if part == "test" else 3), -1)
        return token, np.maximum(token, 0)

    def events(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        """See `part_events`."""
        lengths = table.lengths[rows].astype(np.int64)
        held_out = np.where(lengths >= 3, 1, 0)
        bounds = {"train": (0 * lengths, lengths - 2 * held_out), "val": (lengths - 2 * held_out, lengths - held_out)}
        return bounds.get(part, (lengths - held_out, lengths))

    @override
    def identity(self) -> str:
        return "leave-one-out"


class LastShare(Split):
    """The last share of each user's events are test targets, those before them validation targets.

    A user's numbers are rounded down; the first event has no history and is never a target.

    Args:
        val: share of a user's events for validation.
        test: share for test.

    Raises:
        ValueError: the shares are no numbers in [0, 1) that leave something for training.
    """

    def __init__(self, *, val: float = 0.1, test: float = 0.1) -> None:
        if min(val, test) < 0 or val + test >= 1:
            raise ValueError(f"val={val}, test={test}: expected shares of at least 0 that add up to less than 1")
        self.val, self.test = val, test

    @override
    def spans(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        begins, ends = self.events(table, part, rows)
        # The event at a place is asked for by the token before it.
        asking = np.maximum(begins, 1) - 1
        return np.where(ends - 2 >= asking, ends - 2, -1), asking

    def events(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        """See `part_events`."""
        lengths = table.lengths[rows].astype(np.int64)
        test_from = lengths - np.floor(lengths * self.test + 1e-9).astype(np.int64)
        val_from = test_from - np.floor(lengths * self.val + 1e-9).astype(np.int64)
        return {"train": (0 * lengths, val_from), "val": (val_from, test_from)}.get(part, (test_from, lengths))

    @override
    def identity(self) -> str:
        return f"last-share-{self.val}-{self.test}"


class ByUser(Split):
    """Whole users are held out: their last event is the target, and nothing of theirs is trained on.

    Args:
        val: share of users for validation.
        test: share of users for test.
        seed: users are drawn by it and their row.

    Raises:
        ValueError: the shares leave nobody to train on.
    """

    def __init__(self, *, val: float = 0.1, test: float = 0.1, seed: int = 0) -> None:
        if min(val, test) < 0 or val + test >= 1:
            raise ValueError(f"val={val}, test={test}: expected shares of users that leave some for training")
        self.val, self.test, self.seed = val, test, seed

    @override
    def spans(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        token = np.where(self._drawn(part, rows), table.lengths[rows].astype(np.int64) - 2, -1)
        return token, np.maximum(token, 0) if part != "train" else np.zeros_like(token)

    def events(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        """See `part_events`."""
        ends = np.where(self._drawn(part, rows), table.lengths[rows].astype(np.int64), 0)
        return 0 * ends if part == "train" else np.maximum(ends - 1, 0), ends

    def _drawn(self, part: Part, rows: Array) -> Array:
        """Which of some users are of a part."""
        draws = counter_uniform(self.seed, name_key("ByUser"), torch.from_numpy(rows)).numpy()
        bounds = {
            "test": (0.0, self.test),
            "val": (self.test, self.test + self.val),
            "train": (self.test + self.val, 1),
        }
        low, high = bounds[part]
        drawn: Array = (draws >= low) & (draws < high)
        return drawn

    @override
    def identity(self) -> str:
        return f"by-user-{self.val}-{self.test}-{self.seed}"


class ByTime(Split):
    """Events from `val_from` on are validation targets, from `test_from` on test targets; training sees none of them.

    A target's history is everything before it, so a test target may follow validation events.

    Args:
        val_from: first time of validation: an ISO date or time (UTC), or seconds.
        test_from: first time of test.

    Raises:
        ValueError: a time cannot be read, or the order is wrong.
    """

    def __init__(self, *, val_from: str | int, test_from: str | int) -> None:
        self.val_from, self.test_from = _seconds("val_from", val_from), _seconds("test_from", test_from)
        if self.val_from > self.test_from:
            raise ValueError(f"val_from={val_from}: expected a time up to test_from={test_from}")
        self._counted: tuple[str, Array] | None = None

    def _counts(self, table: EventTable) -> Array:
        """int32 (2, U): events of each user before `val_from` and before `test_from`; one pass over the times."""
        if self._counted is None or self._counted[0] != table.fingerprint:
            if not table.has_timestamps:
                raise ValueError("split=ByTime: the log has no times; use LeaveOneOut or ByUser")
            counts = np.zeros((2, len(table.lengths)), dtype=np.int32)
            for group in range(len(table.group_bounds) - 1):
                first, last = table.group_bounds[group : group + 2].tolist()
                rows = table.read_group(group)
                assert rows.timestamps is not None
                for number, time in enumerate((self.val_from, self.test_from)):
                    before = np.concatenate([[0], np.cumsum(rows.timestamps < time)])
                    counts[number, first:last] = np.diff(before[rows.offsets])
            self._counted = (table.fingerprint, counts)
        return self._counted[1]

    @override
    def spans(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        trained, validated = self._counts(table)[:, rows].astype(np.int64)
        if part == "train":
            return trained - 2, np.zeros_like(trained)
        begins, ends = (trained, validated) if part == "val" else (validated, table.lengths[rows].astype(np.int64))
        # The first event of a user has no history to be predicted from.
        asking = np.maximum(begins - 1, 0)
        return np.where(ends > begins, ends - 2, -1), asking

    def events(self, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
        """See `part_events`."""
        trained, validated = self._counts(table)[:, rows].astype(np.int64)
        bounds = {"train": (0 * trained, trained), "val": (trained, validated)}
        return bounds.get(part, (validated, table.lengths[rows].astype(np.int64)))

    @override
    def identity(self) -> str:
        return f"by-time-{self.val_from}-{self.test_from}"


def part_events(split: Split, table: EventTable, part: Part, rows: Array) -> tuple[Array, Array]:
    """First event of a part and the end of its events, as places in the history of each of some users.

    Unlike `Split.spans`, the first event of a user is somebody's: it can be judged with no history. A split without a
    method ``events`` gives the events that its spans ask for.
    """
    if (events := getattr(split, "events", None)) is not None:
        begin, end = events(table, part, rows)
        return begin, np.maximum(begin, end)
    last_token, asking = split.spans(table, part, rows)
    has = last_token >= asking
    return np.where(has, asking + 1, 0), np.where(has, last_token + 2, 0)


def _seconds(name: str, time: str | int) -> int:
    if isinstance(time, int):
        return time
    try:
        moment = datetime.fromisoformat(time)
    except ValueError as error:
        raise ValueError(f"{name}={time!r}: expected an ISO date such as 2022-05-01, or whole seconds") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())
