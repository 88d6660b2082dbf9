"""Raw ids as int64 keys of dynamic tables, and the rows that keys of a known vocabulary stand for.

Shape suffixes: N ids, I ids of a vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gr.counter_random import name_key

Array = np.ndarray[Any, Any]


def raw_key(ids: Any) -> Array:
    """A 64-bit key for each raw id, the same in every run and on every machine.

    Args:
        ids: integers, which are their own keys, those of uint64 beyond int64 by two's complement; or text, whose key is
            the first 64 bits of its BLAKE2b digest, little-endian. Of any shape.

    Returns:
        int64, of the same shape.

    Raises:
        ValueError: other ids, or two different texts with one key.
    """
    values = np.asarray(ids)
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    given = values.ravel().tolist()
    texts = set(given)
    if wrong := [x for x in texts if not isinstance(x, str)]:
        raise ValueError(
            f"raw ids: {wrong[0]!r} is no 64-bit integer and no text; make all ids integers, or all of them text"
        )
    keys = {text: name_key(text) for text in texts}
    if len(of_key := {key: text for text, key in keys.items()}) < len(keys):
        text = next(text for text, key in keys.items() if of_key[key] != text)
        raise ValueError(f"raw ids: {text!r} and {of_key[keys[text]]!r} have the same 64-bit hash; rename one of them")
    hashed = np.fromiter((keys[text] for text in given), dtype=np.uint64, count=len(given))
    return hashed.view(np.int64).reshape(values.shape)


def refuse_static_tables(raw_ids: bool, dynamic_tables: object | None) -> None:
    """Refuses raw ids where static tables would take them for rows.

    Raises:
        MisconfigurationException: the data has raw ids and the model no dynamic tables.
    """
    if raw_ids and dynamic_tables is None:
        raise MisconfigurationException(
            "dynamic_tables: not given, and the data has raw ids, which static tables would take for rows; give the "
            "model dynamic_tables ({} takes the defaults), or the data raw_ids: false (a stream: num_items)"
        )


class RowsOfKeys:
    """Finds the row of each key of a vocabulary.

    Args:
        keys_I: int64 key of each row; distinct.
    """

    def __init__(self, keys_I: Tensor) -> None:
        self._keys_I, self._rows_I = keys_I.cpu().sort()

    def __call__(self, keys_N: Tensor) -> Tensor:
        """int64 rows, on the CPU and of the keys' shape; -1 for a key that is not in the vocabulary."""
        keys_N = keys_N.cpu()
        if not len(self._keys_I):
            return torch.full_like(keys_N, -1)
        places_N = torch.searchsorted(self._keys_I, keys_N).clamp(max=len(self._keys_I) - 1)
        return self._rows_I[places_N].masked_fill(self._keys_I[places_N] != keys_N, -1)
