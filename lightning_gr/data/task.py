"""Task: what is predicted of a candidate, from label fields of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_gr.data.event_store.fields import Field

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, repr=False)
class Task:
    """What is predicted of a candidate.

    ``Task("order")`` is the conversion of what was shown, ``Task("order", where="click")`` that of what was clicked.

    Args:
        field: label of events in the store.
        at_least: labels from this number on are positive; None takes labels that are 0 or 1 as they are.
        where: a label that has to be above 0 for this one to count; elsewhere there is none. None counts all.
    """

    field: str
    at_least: float | None = None
    where: str | None = None

    def __repr__(self) -> str:
        # Fingerprints of data are made of it, so what is not set is not named.
        where = "" if self.where is None else f", where={self.where!r}"
        return f"Task(field={self.field!r}, at_least={self.at_least!r}{where})"

    @property
    def fields(self) -> tuple[str, ...]:
        """The label fields that are read."""
        return (self.field,) if self.where is None else (self.field, self.where)

    def labels(self, values: Array, where: Array | None = None) -> Array:
        """0 or 1, float64; NaN where there is no label.

        Args:
            values: of `field`, NaN where there is none.
            where: of the field `where`, if there is one.

        Raises:
            ValueError: the values of `where` are missing.
        """
        if self.at_least is None:
            labels = values.astype(np.float64)
        else:
            labels = np.where(np.isnan(values), np.nan, (values >= self.at_least).astype(np.float64))
        if self.where is None:
            return labels
        if where is None:
            raise ValueError(f"where={self.where}: labels of {self.field} need its values too")
        return np.where(where > 0, labels, np.nan)

    def of(self, fields: Mapping[str, Array]) -> Array:
        """The `labels` of events whose fields are given by name."""
        return self.labels(fields[self.field], None if self.where is None else fields[self.where])

    def check(self, name: str, fields: Sequence[Field]) -> None:
        """Raises where a store has no such labels.

        Args:
            name: how the setting is called in messages.
            fields: of the store.

        Raises:
            ValueError: names the setting, and the labels there are.
        """
        labels = [field.name for field in fields if field.kind == "label"]
        for setting, field in ((name, self.field), (f"{name}.where", self.where)):
            if field is not None and field not in labels:
                raise ValueError(f"{setting}: the store has no label {field}; it has {', '.join(labels) or 'none'}")
        if self.at_least is not None and not np.isfinite(self.at_least):
            raise ValueError(f"{name}.at_least={self.at_least}: expected a finite number")


def label_fields(tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The label fields that tasks read, each once."""
    return tuple(dict.fromkeys(field for task in tasks.values() for field in task.fields))
