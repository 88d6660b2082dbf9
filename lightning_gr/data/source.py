"""Sources of samples: what a plan needs to know of them, and how some become a batch.

Shape suffixes: B sequences, T tokens of all sequences together.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import torch

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch, TokenKind
from lightning_gr.data.interactions import Interactions

Split = Literal["train", "val", "test", "all"]
Array = np.ndarray[Any, Any]


class SequenceSource(Protocol):
    """Samples by index. Lengths and label counts are known without reading the samples."""

    fingerprint: str
    """Identifies the content and how it was cut into samples."""
    token_counts: Array
    """int64 tokens of each sample."""
    label_counts: dict[str, Array]
    """By task, the labelled tokens of each sample."""

    def collate(
        self, indices: Array, *, epoch: int, denominators: dict[str, float], gradient_divisor: float
    ) -> SequenceBatch:
        """The batch of these samples; no index gives one padding sequence of length 0 without labels."""
        ...


class RetrievalSource:
    """Next-item samples of one leave-one-out split, one a user.

    The last event of a user with at least three is the test target, the one before it the validation target; what
    comes before a target is its history. In training every token predicts the next event before those two. Users with
    fewer events are trained on and not evaluated. Histories keep the most recent `max_length` tokens.

    Args:
        interactions: the log.
        split: `train`, `val`, `test`, or `all`: whole histories without labels.
        max_length: longest history in tokens.
    """

    TASK = "next_item"

    def __init__(self, interactions: Interactions, *, split: Split, max_length: int) -> None:
        self._interactions = interactions
        self._split = split
        begins, ends = interactions.offsets[:-1], interactions.offsets[1:]
        evaluated = ends - begins >= 3
        if split == "train":
            # The last token predicts the last training event and is itself the one before it.
            last = np.where(evaluated, ends - 4, ends - 2)
            kept = last >= begins
        elif split == "all":
            last, kept = ends - 1, ends > begins
        else:
            last = ends - (2 if split == "test" else 3)
            kept = evaluated
        self._users = np.flatnonzero(kept)
        last, begins = last[kept], begins[kept]
        self.token_counts = np.minimum(last - begins + 1, max_length)
        self._first = last - self.token_counts + 1
        counts = self.token_counts if split == "train" else np.ones_like(self.token_counts)
        self.label_counts: dict[str, Array] = {} if split == "all" else {self.TASK: counts}
        self.fingerprint = f"{interactions.fingerprint}-{split}-{max_length}"

    def collate(
        self, indices: Array, *, epoch: int, denominators: dict[str, float], gradient_divisor: float
    ) -> SequenceBatch:
        """See `SequenceSource.collate`."""
        from torchrec import KeyedJaggedTensor

        log = self._interactions
        lengths_B, first_B = self.token_counts[indices], self._first[indices]
        ends_B = np.cumsum(lengths_B)
        total = int(ends_B[-1]) if len(ends_B) else 0
        event_T = np.arange(total) + np.repeat(first_B - (ends_B - lengths_B), lengths_B)
        labels: dict[str, Labels] = {}
        if self._split != "all":
            tokens = np.arange(total) if self._split == "train" else ends_B - 1
            labels[self.TASK] = Labels(torch.from_numpy(log.items[event_T[tokens] + 1]), torch.from_numpy(tokens))
        times_T = request_times_T = None
        if log.timestamps is not None:
            times_T = torch.from_numpy(log.timestamps[event_T])
            # Nobody knows when a whole history goes on: its last token asks at its own time.
            last_T = np.isin(np.arange(total), ends_B - 1) if self._split == "all" else np.zeros(total, dtype=bool)
            request_times_T = torch.from_numpy(log.timestamps[np.where(last_T, event_T, event_T + 1)])
        if not len(indices):
            lengths_B, samples_B = np.zeros(1, dtype=np.int64), np.array([PADDING_SAMPLE_ID])
        else:
            samples_B = self._users[indices]
        counts_B4 = torch.zeros(len(lengths_B), 4, dtype=torch.int64)
        counts_B4[:, TokenKind.REALTIME] = torch.from_numpy(lengths_B)
        return SequenceBatch(
            features=KeyedJaggedTensor(
                keys=["item_id"],
                values=torch.from_numpy(log.items[event_T]),
                lengths=torch.from_numpy(lengths_B.astype(np.int64)),
            ),
            token_counts_B4=counts_B4,
            sample_ids_B=torch.from_numpy(samples_B.astype(np.int64)),
            labels=labels,
            denominators=denominators,
            gradient_divisor=gradient_divisor,
            epoch=epoch,
            timestamps_T=times_T,
            request_timestamps_T=request_times_T,
        )
