"""The log as every peer reads it: sequences of items, cut alike for all, split by leaving one out.

numpy alone is imported here, so that each peer's environment has what it takes. Suffixes: U users, L items of a
history.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Part = Literal["val", "test"]


def read_sequences(path: str | Path) -> list[Array]:
    """Item ids of each line ``user item item ...``, oldest first.

    Raises:
        ValueError: if a line has a word that is not a positive integer, or a user has no items.
    """
    sequences = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) < 2 or not all(x.isdigit() and int(x) > 0 for x in words[1:]):
            raise ValueError(f"{path}, line {number}: expected 'user item item ...' with positive integers for items")
        sequences.append(np.array(words[1:], dtype=np.int64))
    return sequences


def write_sequences(sequences: Iterable[Array], path: str | Path) -> None:
    """Writes what `read_sequences` reads; users are numbered from 1."""
    lines = (f"{user} {' '.join(map(str, items))}\n" for user, items in enumerate(sequences, 1))
    Path(path).write_text("".join(lines), encoding="utf-8")


def shortened(sequences: Iterable[Array], max_length: int) -> list[Array]:
    """Users that can be tested, with the items that a model of `max_length` can see or be asked for.

    Without users of fewer than three items; of each the last ``max_length + 3``: a history to train on, the item after
    it, and the two that are held out. So all train the same targets in an epoch, however they cut long sequences.
    """
    return [x[-(max_length + 3) :] for x in sequences if len(x) >= 3]


def renumbered(sequences: list[Array]) -> list[Array]:
    """Items numbered from 1 without gaps, in the order of their ids, as some peers make a table of the largest id."""
    _, rows = np.unique(np.concatenate(sequences), return_inverse=True)
    return np.split(rows + 1, np.cumsum([len(x) for x in sequences])[:-1])


class PeerLog:
    """Sequences split by leaving one out: the last item is for the test, the one before it for validation.

    Args:
        sequences: of users that have at least three items; see `shortened`.
    """

    def __init__(self, *, sequences: list[Array]) -> None:
        short = next((user for user, x in enumerate(sequences) if len(x) < 3), None)
        if short is not None:
            raise ValueError(f"user {short} has {len(sequences[short])} items; at least 3 are needed to hold two out")
        self.sequences = sequences
        self.num_items = int(max(x.max() for x in sequences))

    @classmethod
    def read(cls, path: str | Path) -> PeerLog:
        """Of a file that the driver wrote."""
        return cls(sequences=read_sequences(path))

    @property
    def train(self) -> list[Array]:
        """What is trained on: all but the last two items of each user."""
        return [x[:-2] for x in self.sequences]

    @property
    def num_targets(self) -> int:
        """Items that an epoch predicts: each of `train` that has one before it."""
        return sum(len(x) - 3 for x in self.sequences)

    def histories(self, part: Part) -> list[Array]:
        """Items before the one that is asked for."""
        return [x[:-2] if part == "val" else x[:-1] for x in self.sequences]

    def asked(self, part: Part) -> Array:
        """The items asked for (U,)."""
        return np.array([x[-2 if part == "val" else -1] for x in self.sequences])

    def padded(self, histories: list[Array], max_length: int, *, side: Literal["left", "right"]) -> Array:
        """Latest items of histories, zeros at `side` (U, L)."""
        rows_UL = np.zeros((len(histories), max_length), dtype=np.int64)
        for row, history in zip(rows_UL, histories, strict=True):
            items = history[-max_length:]
            if side == "left":
                row[max_length - len(items) :] = items
            else:
                row[: len(items)] = items
        return rows_UL
