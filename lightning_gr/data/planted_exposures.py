"""What a synthetic exposure log plants: logits of clicks and orders, and how well a ranking by them does.

Shape suffixes: I items, C categories.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lightning_gr.data.synthetic import auc_as_drawn, best_auc

Array = np.ndarray[Any, Any]
NUM_CATEGORIES, NUM_SEGMENTS, NUM_DISTANCES = 8, 6, 8
FRESH_SECONDS = 3_600
"""Age up to which the last click has its whole effect."""
PARTS: tuple[Literal["sequence", "cross"], ...] = ("sequence", "cross")


class PlantedExposures:
    """The planted logits of a click, and of an order after a click.

    Args:
        num_items: items.
        sequence: factor of all that comes of the last two clicks; 0 plants none of it.
        cross: factor of all that comes of the logged affinity and distance.
        seed: seed of every table below.

    Attributes:
        category: (I,) category of each item.
        price: (I,) price of each item, standard normal, to three decimals.
        quality: (I,) logit of each item of its own.
        after_last: (C, C) logit of a candidate's category (second) after the last click's.
        after_before: (C, C) the same after the click before it.
        segment: logit of each of the users' segments.
        distance: logit of each bucket of the logged distance.
        order_quality: (I,) logit of an order of each clicked item.
        popularity: (I,) how often items are shown where nothing else decides; adds up to 1.
        places: (I, 2) where items are, in a square of side 1.
    """

    def __init__(self, *, num_items: int, sequence: float, cross: float, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self.num_items, self.sequence, self.cross = num_items, sequence, cross
        # Every category has an item.
        self.category = rng.permutation(np.arange(num_items) % NUM_CATEGORIES)
        self.price = np.round(rng.normal(size=num_items), 3)
        self.quality = rng.normal(0.0, 0.5, num_items)
        self.order_quality = rng.normal(0.0, 0.5, num_items)
        square = (NUM_CATEGORIES, NUM_CATEGORIES)
        self.after_last, self.after_before = rng.normal(0.0, 1.1, square), rng.normal(0.0, 0.8, square)
        self.segment = rng.normal(0.0, 0.4, NUM_SEGMENTS)
        self.distance = np.linspace(0.9, -0.9, NUM_DISTANCES)
        popularity = rng.permutation(1.0 / np.arange(1, num_items + 1) ** 0.8)
        self.popularity = popularity / popularity.sum()
        self.places = rng.random((num_items, 2))

    def without(self, part: Literal["sequence", "cross"]) -> PlantedExposures:
        """The same tables with one factor at 0."""
        other = copy.copy(self)
        setattr(other, part, 0.0)
        return other

    def click_logits(
        self,
        *,
        items: Array,
        segments: Array,
        spends: Array,
        affinities: Array,
        distances: Array,
        last: Array,
        before: Array,
        ages: Array,
    ) -> Array:
        """Logits of clicks; all arguments have one shape.

        Args:
            items: the item shown.
            segments: the user's segment.
            spends: the user's spending.
            affinities: the logged affinity.
            distances: bucket of the logged distance.
            last: category of the user's last click, -1 where there is none.
            before: category of the click before that, -1 where there is none.
            ages: seconds since the last click.
        """
        of_user = self.segment[segments] + 0.4 * spends
        of_item = self.quality[items] - 0.3 * self.price[items]
        crossed = 0.8 * affinities + self.distance[distances]
        fresh = np.where(ages <= FRESH_SECONDS, 1.0, 0.4)
        follows = np.where(last >= 0, fresh * self.after_last[last, self.category[items]], 0.0)
        follows = follows + np.where(before >= 0, self.after_before[before, self.category[items]], 0.0)
        logits: Array = -2.4 + of_user + of_item + self.cross * crossed + self.sequence * follows
        return logits

    def order_logits(self, *, items: Array, spends: Array, affinities: Array, distances: Array, before: Array) -> Array:
        """Logits of an order after a click; arguments as of `click_logits`."""
        crossed = 0.6 * affinities + 0.5 * self.distance[distances]
        follows = np.where(before >= 0, self.after_before[before, self.category[items]], 0.0)
        of_both = 0.3 * spends - 0.3 * self.price[items] + self.order_quality[items]
        logits: Array = -1.0 + of_both + self.cross * crossed + 0.5 * self.sequence * follows
        return logits


def sigmoid(logits: Array) -> Array:
    """Probabilities of logits."""
    probabilities: Array = 1 / (1 + np.exp(-logits))
    return probabilities


def gauc_as_drawn(scores: Array, clicked: Array, users: Array) -> float:
    """Mean of the users' own AUC, each weighing its exposures; users with one class are left out.

    Args:
        scores: (N,) what ranks the exposures.
        clicked: (N,) bool labels.
        users: (N,) user of each.
    """
    order = np.lexsort((scores, users))
    score, label, user = scores[order], clicked[order].astype(np.float64), users[order]
    new_user = np.r_[True, user[1:] != user[:-1]]
    new_score = new_user | np.r_[True, score[1:] != score[:-1]]
    of_user, of_score = np.cumsum(new_user) - 1, np.cumsum(new_score) - 1
    positives, totals = np.bincount(of_user, label), np.bincount(of_user)
    # Negatives below each run of equal scores of a user, and half of those in it.
    missed_S, hits_S = np.bincount(of_score, 1 - label), np.bincount(of_score, label)
    user_S = of_user[new_score]
    before_S = np.cumsum(missed_S) - missed_S
    before_S = before_S - before_S[np.flatnonzero(np.r_[True, user_S[1:] != user_S[:-1]])][user_S]
    won = np.bincount(user_S, hits_S * (before_S + missed_S / 2))
    pairs = positives * (totals - positives)
    both = pairs > 0
    if not both.any():
        return 0.5
    return float(np.average(won[both] / pairs[both], weights=totals[both]))


def oracle(rows: Mapping[str, Array]) -> dict[str, float]:
    """AUC and GAUC of ranking exposures by their planted probabilities, whole and without each part of the signal.

    Args:
        rows: of each exposure its ``user``, the labels ``click`` and ``ctcvr``, and ``click chance``, ``click chance
            without sequence`` and so on.
    """
    found: dict[str, float] = {"exposures": len(rows["user"])}
    for task in ("click", "ctcvr"):
        chances, drawn = rows[f"{task} chance"], rows[task]
        found[f"{task} rate"] = float(chances.mean()) if len(chances) else 0.0
        found[f"{task} AUC"] = best_auc(chances) if len(chances) else 0.5
        for name in ("", *(f" without {part}" for part in PARTS)):
            scores = rows[f"{task} chance{name}"]
            found[f"{task} AUC as drawn{name}"] = auc_as_drawn(scores, drawn)
            found[f"{task} GAUC as drawn{name}"] = gauc_as_drawn(scores, drawn, rows["user"]) if len(scores) else 0.5
    return found
