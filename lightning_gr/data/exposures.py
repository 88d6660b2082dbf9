"""Exposures: which events of a log were shown as candidates, which are history, and which wait for a score.

Shape suffix: E events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import EXPOSED
from lightning_gr.data.task import Task, label_fields

Array = np.ndarray[Any, Any]


class Exposures:
    """Tells by an event's own fields what it is.

    In a store with the field `exposed`, an exposure is an event with 1; without a label it waits for a score. In a
    store without the field, an exposure is an event with a label of some task. Events with `exposed` 0 are history.
    Others are history too: with a `history` task those that are positive in it; else all, but where the store has
    `exposed` only those with a label.

    Args:
        store: the store.
        tasks: by name, what is predicted.
        history: only events positive in it are history; None takes all that have an outcome.

    Attributes:
        columns: fields of events that the answers are made of.

    Raises:
        ValueError: the field `exposed` cannot be used, or the history task names a label that is not there.
    """

    def __init__(self, store: EventStore, *, tasks: Mapping[str, Task], history: Task | None) -> None:
        if history is not None:
            history.check("aggregation.history", store.fields)
        self._labels = tuple(dict.fromkeys(task.field for task in tasks.values()))
        self._history = history
        self._shown_codes = _shown_codes(store)
        columns = (*label_fields(tasks), *(history.fields if history is not None else ()))
        self.has_field = self._shown_codes is not None
        self.columns: tuple[str, ...] = tuple(dict.fromkeys((*columns, *[EXPOSED] * self.has_field)))

    def labelled_E(self, fields: Mapping[str, Array]) -> Array:
        """Exposures with a label of some task, whatever a task's `where` says."""
        has_E: Array = np.logical_or.reduce([~np.isnan(fields[name]) for name in self._labels])
        return has_E & self._shown_E(fields)

    def waiting_E(self, fields: Mapping[str, Array]) -> Array:
        """Events that may have been shown and have no label of any task."""
        has_E: Array = np.logical_or.reduce([~np.isnan(fields[name]) for name in self._labels])
        return ~has_E & self._shown_E(fields)

    def history_E(self, fields: Mapping[str, Array]) -> Array:
        """Events that later candidates may see."""
        if self._history is not None:
            positive_E: Array = self._history.of(fields) == 1
        elif self.has_field:
            positive_E = self.labelled_E(fields)
        else:
            return np.ones(len(fields[self._labels[0]]), dtype=bool)
        return positive_E | ~self._shown_E(fields)

    def _shown_E(self, fields: Mapping[str, Array]) -> Array:
        if self._shown_codes is None:
            return np.ones(len(fields[self._labels[0]]), dtype=bool)
        shown_E: Array = self._shown_codes[fields[EXPOSED]]
        return shown_E


def _shown_codes(store: EventStore) -> Array | None:
    """By code of the field `exposed`, whether it means 1; None in a store without the field."""
    field = next((field for field in store.fields if field.name == EXPOSED), None)
    if field is None:
        return None
    if field.kind != "sparse" or field.per != "event":
        raise ValueError(
            f"{EXPOSED}: {store.path} has it as a {field.kind} field of each {field.per}; aggregation takes it for "
            "what tells exposures (1) from history (0), so make it a sparse field of events, or rename it"
        )
    values = [str(value) for value in store.vocabulary(EXPOSED)]
    if unknown := [value for value in values if value not in ("0", "1")]:
        raise ValueError(
            f"{EXPOSED}: {store.path} has the value {unknown[0]}; expected 1 of exposures, 0 of history and no other"
        )
    return np.array([value == "1" for value in values])
