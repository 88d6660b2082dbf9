"""Statistics of dense features over the training part, by one pass over the store.

Shape suffixes: X values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gr.data.declared_features import DeclaredFeature
from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import EXPOSED
from lightning_gr.data.splits import Split, part_events
from lightning_gr.ranking_features import Normalisation

Array = np.ndarray[Any, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Moments:
    """Of values seen so far; joined as Chan, Golub and LeVeque do, so that no large sums cancel."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of differences from the mean

    def with_values(self, values_X: Array) -> _Moments:
        n = len(values_X)
        if not n:
            return self
        mean = float(values_X.mean())
        difference, total = mean - self.mean, self.count + n
        squares = self.squares + float(((values_X - mean) ** 2).sum()) + difference**2 * self.count * n / total
        return replace(self, count=total, mean=self.mean + difference * n / total, squares=squares)

    @property
    def std(self) -> float:
        """1 where all values are the same, to rounding."""
        std = math.sqrt(self.squares / max(self.count, 1))
        return std if std > 1e-12 * abs(self.mean) else 1.0


def normalisations(store: EventStore, split: Split, features: Sequence[DeclaredFeature]) -> dict[str, Normalisation]:
    """By dense feature, how its numbers are normalised.

    Means and standard deviations that no config gives are those of the training part, in float64: of its events, of the
    users that have some, and of all items; of candidates' features those of what was shown, where the store says so by
    `exposed`. Missing numbers do not count. The same on every rank, since each reads all.

    Args:
        store: the log.
        split: says which events are trained on.
        features: sparse ones are left out.

    Raises:
        ValueError: a number is infinite; the message says where.
    """
    dense = [feature for feature in features if feature.kind == "dense"]
    counted = [feature for feature in dense if feature.normalisation != "none" and feature.mean is None]
    moments = _moments(store, split, counted) if counted else {}
    found = {}
    for feature in dense:
        if feature.name not in moments:
            mean = 0.0 if feature.mean is None else feature.mean
            std = 1.0 if feature.std is None else feature.std
        else:
            mean, std = moments[feature.name].mean, moments[feature.name].std
        found[feature.name] = Normalisation(mean, std, feature.normalisation == "log")
    for name, own in moments.items():
        if not own.count:
            rank_zero_warn(f"features.{name}: no number in the training part of {store.path}; it stays 0")
        log.info("features.%s: mean %.6g, std %.6g, of %d numbers", name, own.mean, own.std, own.count)
    return found


def _moments(store: EventStore, split: Split, features: Sequence[DeclaredFeature]) -> dict[str, _Moments]:
    moments = {feature.name: _Moments() for feature in features}

    def take(feature: DeclaredFeature, values: Array, where: str) -> None:
        values_X = values[~np.isnan(values)].astype(np.float64)
        if not np.isfinite(values_X).all():
            raise ValueError(
                f"features.{feature.name}: a number is infinite, {where} of {store.path}; prepare the store with "
                "finite ones, or leave it missing"
            )
        if feature.normalisation == "log":
            values_X = np.sign(values_X) * np.log1p(np.abs(values_X))
        moments[feature.name] = moments[feature.name].with_values(values_X)

    of_items = [feature for feature in features if feature.per == "item"]
    if of_items:
        frame = store.items()
        for feature in of_items:
            take(feature, _numbers(frame[feature.name].to_numpy()), "in the table of items")
    others = [feature for feature in features if feature.per != "item"]
    shown_codes = _shown_codes(store) if any(x.group == "candidate" for x in others) else None
    names = [*(feature.name for feature in others), *([EXPOSED] if shown_codes is not None else [])]
    for group in range(len(store.group_bounds) - 1) if others else ():
        first, last = store.group_bounds[group : group + 2].tolist()
        begin_U, end_U = part_events(split, store, "train", np.arange(first, last))
        rows = store.read_group(group, names)
        lengths_U = np.diff(rows.offsets)
        place = np.arange(int(rows.offsets[-1])) - np.repeat(rows.offsets[:-1], lengths_U)
        trained = (place >= np.repeat(begin_U, lengths_U)) & (place < np.repeat(end_U, lengths_U))
        for feature in others:
            where = f"in row group {group} (users {first} to {last - 1})"
            if feature.per == "event":
                taken = trained
                if feature.group == "candidate" and shown_codes is not None:
                    taken = trained & shown_codes[rows.event_fields[EXPOSED]]
                take(feature, rows.event_fields[feature.name][taken], where)
            else:
                take(feature, _numbers(rows.user_fields[feature.name][0])[end_U > begin_U], where)
    return moments


def _shown_codes(store: EventStore) -> Array | None:
    """By code of the field `exposed`, whether the event was shown; None in a store without the field."""
    if not any(field.name == EXPOSED and (field.kind, field.per) == ("sparse", "event") for field in store.fields):
        return None
    return np.array([str(value) == "1" for value in store.vocabulary(EXPOSED)])


def _numbers(values: Array) -> Array:
    """Numbers as floats; what is missing as NaN."""
    return values.astype(np.float64)
