"""ItemShares: how popular each item is, drawn from and looked up.

Shape suffixes: I items.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_gr.negatives.sampler import ItemCounts


class ItemShares:
    """Item i has the share ``(count_i + smoothing) ** power`` of their sum.

    Args:
        counts_I: how often each item occurs, at least 0.
        power: 1 for shares of occurrences, 0 for equal ones.
        smoothing: added to every count.
    """

    def __init__(self, counts_I: Tensor, *, power: float = 1.0, smoothing: float = 0.0) -> None:
        log_weights_I = power * (counts_I.to(torch.float64) + smoothing).log()
        # An item that does not occur has no share, whatever the power.
        log_weights_I = log_weights_I.masked_fill(counts_I + smoothing <= 0, -torch.inf)
        self._log_shares_I = log_weights_I - log_weights_I.logsumexp(0)
        self._sums_I = self._log_shares_I.exp().cumsum(0)

    def __len__(self) -> int:
        return len(self._sums_I)

    def items_at(self, numbers: Tensor) -> Tensor:
        """The items at numbers in (0, 1) of the cumulative shares: drawn by their share where those are uniform."""
        found = torch.searchsorted(self._sums_I, numbers * self._sums_I[-1], right=True)
        return found.clamp_(max=len(self) - 1)

    def log_share(self, rows: Tensor) -> Tensor:
        """Logarithm of the share of each of some items, float64; minus infinity for a share of 0."""
        return self._log_shares_I[rows]


def read_shares(
    *,
    path: str | None,
    item_counts: ItemCounts | None,
    num_items: int,
    power: float,
    smoothing: float,
    absent_allowed: bool,
    owner: str,
) -> ItemShares:
    """The shares of all items of a corpus.

    Args:
        path: counts by item row, see `counts_in`; None takes `item_counts`.
        item_counts: counts of the training part; None where nothing knows them.
        num_items: items of the corpus.
        power: exponent of a count.
        smoothing: added to every count.
        absent_allowed: whether an item may have a share of 0.
        owner: name of the sampler, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no counts, they are not one an item, or an item that needs a share has none.
    """
    if path is not None:
        counts_I, whence = counts_in(path), f"counts={path}"
    elif item_counts is not None:
        counts_I, whence = item_counts(), "the counts of the training part"
    else:
        raise ValueError(
            f"{owner}: nothing counts how often items occur, since the Trainer has no datamodule that does; give "
            f"{owner}(counts=...) a file with a count for each item row"
        )
    if len(counts_I) != num_items:
        raise ValueError(
            f"{owner}: {whence} cover {len(counts_I)} item(s), the corpus has num_items={num_items}; give one count "
            "for each item row"
        )
    absent_I = counts_I + smoothing <= 0
    if not absent_allowed and bool(absent_I.any()):
        raise ValueError(
            f"{owner}: {whence} have {int(absent_I.sum())} item(s) that do not occur, row "
            f"{int(absent_I.nonzero()[0])} the first, which could never be drawn; set smoothing, such as 1, which is "
            "added to every count"
        )
    if not bool((counts_I + smoothing > 0).any()):
        raise ValueError(f"{owner}: {whence} are all 0; give the counts of a part that has events")
    shares = ItemShares(counts_I, power=power, smoothing=smoothing)
    if not absent_allowed and bool((shares.log_share(torch.arange(num_items)).exp() == 0).any()):
        raise ValueError(f"{owner}: power={power} leaves items without a share that can be drawn; lower it")
    return shares


def check_shares(owner: str, *, power: float, smoothing: float) -> None:
    """Refuses settings of shares that cannot work.

    Raises:
        ValueError: a setting by name.
    """
    for name, value in (("power", power), ("smoothing", smoothing)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{owner}: {name}={value}: expected a number of at least 0")


def counts_in(path: str) -> Tensor:
    """Counts by item row: an ``.npy`` file of one dimension, or text with a number a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than finite numbers of at least 0.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"counts={path}: no such file; give an .npy file or text with one count an item row")
    try:
        counts_I = np.load(path) if path.endswith(".npy") else np.loadtxt(path, ndmin=1)
    except (ValueError, EOFError) as error:
        raise ValueError(f"counts={path}: cannot be read ({error}); expected one number an item row") from error
    if not isinstance(counts_I, np.ndarray):
        raise ValueError(f"counts={path}: holds several arrays; expected one of a number an item row")
    if counts_I.ndim != 1 or counts_I.dtype.kind not in "iuf":
        raise ValueError(
            f"counts={path}: expected one number an item row, got {counts_I.dtype} of shape {counts_I.shape}"
        )
    if counts_I.size and not (np.isfinite(counts_I).all() and counts_I.min() >= 0):
        raise ValueError(f"counts={path}: expected finite numbers of at least 0, got {counts_I.min()} the least")
    return torch.from_numpy(counts_I.astype(np.float64))
