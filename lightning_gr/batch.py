"""SequenceBatch: the one jagged batch type of retrieval, ranking and meta learning.

Shape suffixes: B sequences, T tokens of all sequences together, N labelled tokens of one task, 4 token kinds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gr.ops.jagged import JaggedLayout

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor

PADDING_SAMPLE_ID = -1
"""Sample id of a weight-zero sequence that only keeps a rank in step with the others."""


class TokenKind(IntEnum):
    """Columns of `SequenceBatch.token_counts_B4`, in the order in which a sequence holds its tokens."""

    CONTEXTUAL = 0
    STATIC = 1
    REALTIME = 2
    CANDIDATE = 3


@dataclass
class Labels:
    """The labelled tokens of one task; tokens without a label are not listed.

    Args:
        values_N: label of each labelled token: int64 item ids (retrieval) or floats (ranking).
        tokens_N: int64 positions, in the batch's token order, of the tokens that carry the labels, ascending.
        weights_N: float32 weight of each label; None means 1.
    """

    values_N: Tensor
    tokens_N: Tensor
    weights_N: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.tokens_N.shape[0] if self.tokens_N.dim() == 1 else -1
        for name, tensor in (("values_N", self.values_N), ("weights_N", self.weights_N)):
            if tensor is not None and tensor.shape != (n,):
                raise ValueError(
                    f"Labels.{name}: expected one entry a labelled token (tokens_N has shape "
                    f"{tuple(self.tokens_N.shape)}), got shape {tuple(tensor.shape)}"
                )

    @property
    def num_labels(self) -> int:
        """``N``, known on the host."""
        return self.tokens_N.shape[0]


@dataclass
class SequenceBatch:
    """Jagged sequences with their ids, dense features, labels and the host numbers that losses and masks need.

    A sequence holds its tokens in the order contextual (user scalars), static history, real-time history,
    candidates. Counts, sample ids and denominators live on the host, so that nothing has to be read back from the
    device. It implements TorchRec's ``Pipelineable`` (`to`, `record_stream`) and `pin_memory`.

    The loss of a task is ``local sum * gradient_divisor / denominator``: the denominator counts the labels of the
    whole global batch, and the divisor undoes what engines divide gradients by (DDP's mean over ranks, TorchRec's
    gradient division, Lightning's accumulation). So the gradient equals that of one process fed the global batch;
    see MTGenRec (arXiv 2505.12663), weighted gradient averaging.

    Args:
        features: sparse ids by feature name; every feature has ``B`` rows.
        token_counts_B4: tokens of each `TokenKind` in each sequence, int64, on the CPU.
        sample_ids_B: stable ids of the samples, int64, on the CPU; `PADDING_SAMPLE_ID` for padding.
        labels: labelled tokens by task.
        denominators: by task, the sum of label weights over the *global* batch; tasks match `labels`.
        gradient_divisor: world size times accumulated micro-batches.
        epoch: epoch the batch belongs to; negatives are drawn from (seed, epoch, sample id).
        timestamps_T: time of each token, int64 seconds, or None where the data has none.
        request_timestamps_T: time of the request that each token answers, int64 seconds. In retrieval it is the
            next event's time; None means `timestamps_T`.
        dense: numeric features by name, float tensors whose first dimension is ``T`` or ``B``.
        holds_corpus: whether `features` hold the items to rank instead of a loss's candidates, the same on every rank,
            some of which may hold none of them; set by models.
        shots_B: for meta learning, how many records of its task a support sequence holds, int64, on the CPU; 0 marks a
            query. The sequences of an episode have one sample id, its query last. None outside of meta learning.

    Raises:
        ValueError: host counts disagree with each other or with a tensor's shape.
    """

    features: KeyedJaggedTensor
    token_counts_B4: Tensor
    sample_ids_B: Tensor
    labels: dict[str, Labels] = field(default_factory=dict)
    denominators: dict[str, float] = field(default_factory=dict)
    gradient_divisor: float = 1.0
    epoch: int = 0
    timestamps_T: Tensor | None = None
    request_timestamps_T: Tensor | None = None
    dense: dict[str, Tensor] = field(default_factory=dict)
    holds_corpus: bool = False
    shots_B: Tensor | None = None
    layout: JaggedLayout = field(init=False)

    def __post_init__(self) -> None:
        counts = self.token_counts_B4
        if counts.device.type != "cpu" or counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[1] != 4:
            raise ValueError(
                "SequenceBatch.token_counts_B4: expected int64 counts of shape (B, 4) on the CPU, got "
                f"{counts.dtype} of shape {tuple(counts.shape)} on {counts.device}"
            )
        if counts.numel() and int(counts.min()) < 0:
            raise ValueError(f"SequenceBatch.token_counts_B4: expected counts >= 0, got {int(counts.min())}")
        self.layout = JaggedLayout.from_lengths(counts.sum(1))
        self._check_shapes()
        if os.environ.get("LIGHTNING_GR_DEBUG") == "1":
            self.check_values()

    def _check_shapes(self) -> None:
        num_sequences, num_tokens = self.layout.num_sequences, self.layout.num_tokens
        ids = self.sample_ids_B
        if ids.device.type != "cpu" or ids.dtype != torch.int64 or ids.shape != (num_sequences,):
            raise ValueError(
                f"SequenceBatch.sample_ids_B: expected {num_sequences} int64 ids on the CPU, got {ids.dtype} of "
                f"shape {tuple(ids.shape)} on {ids.device}"
            )
        shots = self.shots_B
        if shots is not None and (
            shots.device.type != "cpu" or shots.dtype != torch.int64 or shots.shape != (num_sequences,)
        ):
            raise ValueError(
                f"SequenceBatch.shots_B: expected {num_sequences} int64 counts on the CPU, got {shots.dtype} of shape "
                f"{tuple(shots.shape)} on {shots.device}"
            )
        if self.features.stride() != num_sequences:
            raise ValueError(
                f"SequenceBatch.features: expected {num_sequences} rows a feature, got {self.features.stride()}"
            )
        for name in ("timestamps_T", "request_timestamps_T"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (num_tokens,):
                raise ValueError(
                    f"SequenceBatch.{name}: expected one time for each of the {num_tokens} tokens, got shape "
                    f"{tuple(tensor.shape)}"
                )
        for name, tensor in self.dense.items():
            if tensor.dim() == 0 or tensor.shape[0] not in (num_tokens, num_sequences):
                raise ValueError(
                    f"SequenceBatch.dense[{name!r}]: expected {num_tokens} (tokens) or {num_sequences} (sequences) "
                    f"rows, got shape {tuple(tensor.shape)}"
                )
        if self.labels.keys() != self.denominators.keys():
            raise ValueError(
                f"SequenceBatch.denominators: expected one for each task of labels {sorted(self.labels)}, got "
                f"{sorted(self.denominators)}"
            )
        for task, denominator in self.denominators.items():
            if not math.isfinite(denominator) or denominator < 0:
                raise ValueError(f"SequenceBatch.denominators[{task!r}]: expected a number >= 0, got {denominator}")

    def check_values(self) -> None:
        """Checks values that may live on the device; called by itself only under ``LIGHTNING_GR_DEBUG=1``.

        Raises:
            ValueError: a label names a token outside the batch, or labels are not in ascending order of token.
        """
        for task, labels in self.labels.items():
            tokens = labels.tokens_N
            if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < self.layout.num_tokens):
                raise ValueError(
                    f"SequenceBatch.labels[{task!r}].tokens_N: expected positions in 0 ... "
                    f"{self.layout.num_tokens - 1}, got {int(tokens.min())} ... {int(tokens.max())}"
                )
            if tokens.numel() > 1 and bool((tokens[1:] < tokens[:-1]).any()):
                raise ValueError(f"SequenceBatch.labels[{task!r}].tokens_N: expected ascending positions")

    @property
    def num_sequences(self) -> int:
        """``B``, padding included."""
        return self.layout.num_sequences

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return self.layout.num_tokens

    @property
    def kind_T(self) -> Tensor:
        """`TokenKind` of each token, int64 on the device; made from host counts, so nothing is read back."""
        kinds = torch.arange(4).repeat(self.num_sequences)
        kind_T = torch.repeat_interleave(kinds, self.token_counts_B4.flatten(), output_size=self.num_tokens)
        return kind_T.to(self.device, non_blocking=True)

    @cached_property
    def num_samples(self) -> int:
        """Sequences that are not padding."""
        return int((self.sample_ids_B != PADDING_SAMPLE_ID).sum())

    @property
    def device(self) -> torch.device:
        """Where the features live."""
        return self.features.device()

    def mean_over_global_batch(
        self, loss_sums: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """The loss whose gradient, after the engines' division, is that of the whole global batch.

        Args:
            loss_sums: by task, the sum of (weighted) losses over this batch's labels; 0-D tensors. Each task enters
                on every rank, with sum 0 where the rank has no label of it.
            weights: by task, its weight in the total; 1 where absent.

        Returns:
            ``sum_task weight * loss_sum * gradient_divisor / denominator``, a 0-D tensor; a task whose global
            denominator is 0 adds 0.

        Raises:
            ValueError: a task has no denominator, or a denominator has no loss sum.
        """
        if loss_sums.keys() != self.denominators.keys():
            raise ValueError(
                f"loss_sums: expected the tasks of the batch {sorted(self.denominators)}, got {sorted(loss_sums)}"
            )
        weights = weights or {}
        terms = [
            loss_sum * (weights.get(task, 1.0) * self.gradient_divisor / self.denominators[task])
            if self.denominators[task] > 0
            else loss_sum * 0.0
            for task, loss_sum in loss_sums.items()
        ]
        return torch.stack(terms).sum()

    def with_features(self, features: KeyedJaggedTensor, *, holds_corpus: bool = False) -> SequenceBatch:
        """A batch with other sparse features and everything else shared."""
        return self._with(features=features, holds_corpus=holds_corpus)

    def without_labels(self) -> SequenceBatch:
        """A batch without labels and everything else shared."""
        return self._with(labels={}, denominators={})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceBatch:
        """The batch with its device tensors on `device`; host numbers stay on the host."""
        return self._map_tensors(lambda x: x.to(device=torch.device(device), non_blocking=non_blocking))

    def pin_memory(self) -> SequenceBatch:
        """The batch with every device tensor in page-locked host memory."""
        return self._map_tensors(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses the batch's device tensors."""
        self._map_tensors(lambda x: (x.record_stream(stream), x)[1])

    def _map_tensors(self, apply: Any) -> SequenceBatch:
        optional = lambda x: None if x is None else apply(x)  # noqa: E731
        return self._with(
            features=apply(self.features),
            labels={
                task: Labels(apply(x.values_N), apply(x.tokens_N), optional(x.weights_N))
                for task, x in self.labels.items()
            },
            timestamps_T=optional(self.timestamps_T),
            request_timestamps_T=optional(self.request_timestamps_T),
            dense={name: apply(x) for name, x in self.dense.items()},
            layout=apply(self.layout),
        )

    def _with(self, layout: JaggedLayout | None = None, **changes: Any) -> SequenceBatch:
        batch = replace(self, **changes)
        batch.layout = layout or self.layout
        return batch
