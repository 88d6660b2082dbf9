"""Corpus: which items there are and which of them are ranked, as the ids that batches carry.

Shape suffixes: N ids, I items, C items that are ranked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gr.data.raw_ids import RowsOfKeys, raw_key

RAW_IDS = "raw ids"


@dataclass(frozen=True)
class Corpus:
    """Ids are rows 0 ... `num_items` - 1, or the raw keys of a datamodule with ``raw_ids``.

    Args:
        num_items: how many items there are; None where nothing says which.
        keys_I: int64 id of each row; None where a row is its own id.
        ranked_C: int64 ids that evaluation ranks; None for all items.
    """

    num_items: int | None = None
    keys_I: Tensor | None = None
    ranked_C: Tensor | None = None

    def ids(self, *, ranked: bool) -> Tensor | int:
        """All ids, or those that are ranked; how many where they are 0, 1, and so on."""
        if ranked and self.ranked_C is not None:
            return self.ranked_C
        if self.keys_I is not None:
            return self.keys_I
        assert self.num_items is not None
        return self.num_items

    @property
    def num_ranked(self) -> int | None:
        """How many items are ranked; None where nothing says which."""
        return self.num_items if self.ranked_C is None else len(self.ranked_C)

    def ids_of(self, rows_N: Tensor) -> Tensor:
        """The id of each row; of any shape."""
        return rows_N if self.keys_I is None else self.keys_I[rows_N]

    def rows_of(self, ids_N: Tensor) -> Tensor:
        """The row of each id, on the CPU; the ids themselves where nothing says which items there are."""
        return ids_N.cpu() if self.keys_I is None else self._rows_of_keys(ids_N)

    @cached_property
    def _rows_of_keys(self) -> RowsOfKeys:
        assert self.keys_I is not None
        return RowsOfKeys(self.keys_I)

    def ids_named(self, named: list[int | str] | str, item_ids: Sequence[Any] | None) -> Tensor:
        """The ids of items that a user names, each once, in the order of their rows where there are rows.

        Args:
            named: raw ids, or the path of a text file with one a line.
            item_ids: raw id of each row; None where a row is its own raw id.

        Raises:
            FileNotFoundError: there is no such file.
            MisconfigurationException: no item is named, or one that is not in the data.
        """
        if isinstance(named, str):
            if not Path(named).is_file():
                raise FileNotFoundError(f"corpus={named}: no such file; give one with an item id a line")
            named = [line.strip() for line in Path(named).read_text(encoding="utf-8").splitlines() if line.strip()]
            if self.num_items is None and all(re.fullmatch(r"-?\d+", str(item)) for item in named):
                named = [int(item) for item in named]
        if not named:
            raise MisconfigurationException("corpus: names no item; leave it out to rank all")
        if self.num_items is None:
            return torch.from_numpy(raw_key(named)).unique()
        known = {str(item): row for row, item in enumerate(range(self.num_items) if item_ids is None else item_ids)}
        if unknown := [item for item in named if str(item) not in known]:
            raise MisconfigurationException(
                f"corpus: {len(unknown)} item(s) are not in the data, {unknown[0]!r} the first; leave them out"
            )
        return self.ids_of(torch.tensor(sorted({known[str(item)] for item in named})))


def item_vocabulary(datamodule: object) -> str | None:
    """A fingerprint of which raw item each id stands for; None without a datamodule that knows."""
    if getattr(datamodule, "raw_ids", False):
        return RAW_IDS  # an id stands for itself, whatever the data
    item_ids = getattr(datamodule, "item_ids", None)
    if item_ids is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for item_id in item_ids:
        digest.update(f"{item_id}\n".encode())
    return digest.hexdigest()
