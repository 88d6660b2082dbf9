"""Sequences of batches: taken out, joined, padded, and sent as bytes; all on the host.

Shape suffixes: B sequences, S taken rows, T tokens, N labelled tokens of one task, R rows of a jagged tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch

_ALIGNMENT = 8
_TIMES = ("timestamps_T", "request_timestamps_T")


def take(batch: SequenceBatch, places_B: Tensor) -> SequenceBatch:
    """Some sequences of a batch, with all that belongs to them.

    Args:
        batch: the batch, on the host.
        places_B: int64 places of the sequences, in the order in which they are wanted; none is allowed.

    Returns:
        A batch of ``len(places_B)`` sequences; denominators, gradient divisor and epoch stay as they are.

    Raises:
        ValueError: a dense tensor has as many rows as there are tokens and as sequences, some of which have no token,
            so that nothing says what its rows are.
    """
    at_T, lengths_B = _spread(batch.layout.offsets_B1, places_B)
    moved_B = lengths_B.cumsum(0) - lengths_B - batch.layout.offsets_B1[places_B]
    labels = {}
    for task, own in batch.labels.items():
        at_N, counts_B = _spread(torch.searchsorted(own.tokens_N.contiguous(), batch.layout.offsets_B1), places_B)
        tokens_N = own.tokens_N.index_select(0, at_N) + torch.from_numpy(np.repeat(moved_B.numpy(), counts_B.numpy()))
        weights_N = None if own.weights_N is None else own.weights_N.index_select(0, at_N)
        labels[task] = Labels(own.values_N.index_select(0, at_N), tokens_N, weights_N)
    dense = {}
    for name, tensor in batch.dense.items():
        of_tokens = tensor.shape[0] == batch.num_tokens
        if of_tokens and batch.num_tokens == batch.num_sequences and bool((batch.layout.lengths_B != 1).any()):
            raise ValueError(
                f"SequenceBatch.dense[{name!r}]: {tensor.shape[0]} rows, as many as tokens and as sequences, of which "
                "some have no token; leave sequences without tokens out of the stream"
            )
        dense[name] = tensor.index_select(0, at_T if of_tokens else places_B)
    return replace(
        batch,
        features=_take_features(batch.features, places_B),
        token_counts_B4=batch.token_counts_B4[places_B],
        sample_ids_B=batch.sample_ids_B[places_B],
        shots_B=None if batch.shots_B is None else batch.shots_B[places_B],
        labels=labels,
        dense=dense,
        **_times(lambda name: getattr(batch, name).index_select(0, at_T), batch),
    )


def _times(make: Callable[[str], Tensor], like: SequenceBatch) -> dict[str, Any]:
    """Times of tokens by name, where a batch has them."""
    return {name: None if getattr(like, name) is None else make(name) for name in _TIMES}


def _spread(offsets_R1: Tensor, rows_S: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the values of some rows of a jagged tensor, row after row, and how many each row has."""
    offsets, rows = offsets_R1.numpy(), rows_S.numpy()
    starts_S = offsets[rows]
    counts_S = offsets[rows + 1] - starts_S
    ends_S = np.cumsum(counts_S)
    # By numpy, which repeats three times as fast as torch.
    places = np.repeat(starts_S - ends_S + counts_S, counts_S) + np.arange(counts_S.sum())
    return torch.from_numpy(places), torch.from_numpy(counts_S)


def _take_features(features: Any, places_B: Tensor) -> Any:
    rows_S = (torch.arange(len(features.keys()))[:, None] * features.stride() + places_B).flatten()
    at, _ = _spread(_offsets(features), rows_S)
    weights = features.weights_or_none()
    return _features(
        features.keys(),
        features.values().index_select(0, at),
        features.lengths()[rows_S],
        weights=None if weights is None else weights.index_select(0, at),
        stride=len(places_B),
    )


def _offsets(features: Any) -> Tensor:
    return torch.nn.functional.pad(features.lengths().to(torch.int64).cumsum(0), (1, 0))


def _features(
    keys: Sequence[str], values: Tensor, lengths: Tensor, *, weights: Tensor | None = None, stride: int
) -> Any:
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(list(keys), values, weights=weights, lengths=lengths, stride=stride)


def concatenate(batches: Sequence[SequenceBatch]) -> SequenceBatch:
    """The sequences of all batches, in order.

    Args:
        batches: at least one, all on the host and of one structure.

    Returns:
        One batch; denominators and gradient divisor are those of the first.

    Raises:
        ValueError: epochs, `holds_corpus`, tasks, features or types differ, by name.
    """
    first, *others = batches
    for other in others:
        check_same_structure("batches to be joined", structure(first), structure(other))
    if not others:
        return first
    starts = [0, *accumulate(batch.num_tokens for batch in batches[:-1])]
    labels = {}
    for task in first.labels:
        own = [batch.labels[task] for batch in batches]
        weights = None
        if any(x.weights_N is not None for x in own):
            weights = torch.cat([torch.ones(x.num_labels) if x.weights_N is None else x.weights_N for x in own])
        labels[task] = Labels(
            torch.cat([x.values_N for x in own]),
            torch.cat([x.tokens_N + start for x, start in zip(own, starts, strict=True)]),
            weights,
        )
    return replace(
        first,
        features=_join_features([batch.features for batch in batches]),
        token_counts_B4=torch.cat([batch.token_counts_B4 for batch in batches]),
        sample_ids_B=torch.cat([batch.sample_ids_B for batch in batches]),
        shots_B=None if first.shots_B is None else torch.cat([batch.shots_B for batch in batches]),  # type: ignore[misc]
        labels=labels,
        dense={name: torch.cat([batch.dense[name] for batch in batches]) for name in first.dense},
        **_times(lambda name: torch.cat([getattr(batch, name) for batch in batches]), first),
    )


def _join_features(features: Sequence[Any]) -> Any:
    keys = features[0].keys()
    ends = [_offsets(x)[:: max(x.stride(), 1)].tolist() if x.stride() else [0] * (len(keys) + 1) for x in features]

    def by_key(tensors: Sequence[Tensor]) -> Tensor:
        parts = [x[e[key] : e[key + 1]] for key in range(len(keys)) for x, e in zip(tensors, ends, strict=True)]
        return torch.cat(parts) if parts else tensors[0]

    return _features(
        keys,
        by_key([x.values() for x in features]),
        torch.cat([x.lengths().view(len(keys), x.stride()) for x in features], 1).flatten(),
        weights=None if features[0].weights_or_none() is None else by_key([x.weights() for x in features]),
        stride=sum(x.stride() for x in features),
    )


def padding_like(batch: SequenceBatch) -> SequenceBatch:
    """One padding sequence of length 0 without labels, of a batch's features, tasks and types.

    A dense tensor with as many rows as there are tokens and as sequences is taken for one of tokens.
    """
    keys, values = batch.features.keys(), batch.features.values()
    weights = batch.features.weights_or_none()
    return replace(
        batch,
        features=_features(
            keys,
            values[:0],
            torch.zeros(len(keys), dtype=batch.features.lengths().dtype),
            weights=None if weights is None else weights[:0],
            stride=1,
        ),
        token_counts_B4=torch.zeros(1, 4, dtype=torch.int64),
        sample_ids_B=torch.tensor([PADDING_SAMPLE_ID]),
        shots_B=None if batch.shots_B is None else torch.zeros(1, dtype=torch.int64),
        labels={
            task: Labels(x.values_N[:0], x.tokens_N[:0], None if x.weights_N is None else x.weights_N[:0])
            for task, x in batch.labels.items()
        },
        dense={
            name: x[:0] if x.shape[0] == batch.num_tokens else x.new_zeros((1, *x.shape[1:]))
            for name, x in batch.dense.items()
        },
        **_times(lambda name: getattr(batch, name)[:0], batch),
    )


# ---- structure -------------------------------------------------------------------------------------------------


def structure(batch: SequenceBatch) -> dict[str, str]:
    """By name, what batches must have in common to be joined; in words, for messages."""

    def kind(tensor: Tensor | None) -> str:
        return "none" if tensor is None else f"{str(tensor.dtype)[6:]} {tuple(tensor.shape[1:])}"

    return {
        "epoch": str(batch.epoch),
        "holds_corpus": str(batch.holds_corpus),
        "shots_B": kind(batch.shots_B),
        "features": ", ".join(batch.features.keys()),
        "features' values": kind(batch.features.values()),
        "features' weights": kind(batch.features.weights_or_none()),
        **{name: kind(getattr(batch, name)) for name in _TIMES},
        **{f"labels[{task!r}]": kind(x.values_N) for task, x in sorted(batch.labels.items())},
        **{f"dense[{name!r}]": kind(x) for name, x in sorted(batch.dense.items())},
    }


def check_same_structure(whose: str, one: Mapping[str, str], other: Mapping[str, str]) -> None:
    """Compares what `structure` says of two batches.

    Args:
        whose: what the message calls the two.
        one: the first batch's.
        other: the second batch's.

    Raises:
        ValueError: they differ; the message says in what.
    """
    for name in {**one, **other}:
        if one.get(name) != other.get(name):
            raise ValueError(
                f"SequenceBatch.{name}: {whose} have {one.get(name, 'none')} and {other.get(name, 'none')}; give "
                "batches of one epoch that hold the same"
            )


# ---- bytes -----------------------------------------------------------------------------------------------------


def to_bytes(batch: SequenceBatch) -> Tensor:
    """A batch on the host as a uint8 tensor; see `from_bytes`.

    The length of a JSON header, the header, and the tensors as they lie in memory, each from a multiple of 8 bytes on.
    Not safetensors: it copies five times, which takes five to eight times as long.
    """
    features = batch.features
    tensors = {
        "values": features.values(),
        "lengths": features.lengths(),
        "weights": features.weights_or_none(),
        "token_counts_B4": batch.token_counts_B4,
        "sample_ids_B": batch.sample_ids_B,
        "shots_B": batch.shots_B,
        **{name: getattr(batch, name) for name in _TIMES},
        **{f"dense.{name}": tensor for name, tensor in batch.dense.items()},
    }
    for task, labels in batch.labels.items():
        tensors |= {f"labels.{task}.{name}": x for name, x in vars(labels).items()}
    held = {name: x for name, x in tensors.items() if x is not None}
    header = {
        "keys": features.keys(),
        "tasks": list(batch.labels),
        "dense": list(batch.dense),
        "denominators": batch.denominators,
        "gradient_divisor": batch.gradient_divisor,
        "epoch": batch.epoch,
        "holds_corpus": batch.holds_corpus,
        "tensors": [(name, str(x.dtype)[6:], list(x.shape)) for name, x in held.items()],
    }
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    parts = [torch.tensor([len(text)]), text, *held.values()]
    padded: list[Tensor] = []
    for part in parts:
        # Of at most one element, a tensor is contiguous with any stride, but may not be viewed as bytes.
        own = part.contiguous().as_strided((part.numel(),), (1,)).view(torch.uint8)
        padded += [own, torch.zeros(-len(own) % _ALIGNMENT, dtype=torch.uint8)]
    return torch.cat(padded)


def from_bytes(tensor: Tensor) -> SequenceBatch:
    """The batch that `to_bytes` wrote into a uint8 tensor, whose memory it shares.

    Args:
        tensor: uint8, begins at a multiple of 8 bytes of its storage.
    """

    def cut(at: int, size: int) -> tuple[Tensor, int]:
        return tensor[at : at + size], at + size + -size % _ALIGNMENT

    size, at = cut(0, 8)
    text, at = cut(at, int(size.view(torch.int64)))
    header = json.loads(text.numpy().tobytes())
    tensors: dict[str, Tensor] = {}
    for name, kind, shape in header["tensors"]:
        dtype = getattr(torch, kind)
        own, at = cut(at, math.prod(shape) * dtype.itemsize)
        tensors[name] = own.view(dtype).view(shape)
    sample_ids_B = tensors["sample_ids_B"]
    return SequenceBatch(
        features=_features(
            header["keys"],
            tensors["values"],
            tensors["lengths"],
            weights=tensors.get("weights"),
            stride=len(sample_ids_B),
        ),
        token_counts_B4=tensors["token_counts_B4"],
        sample_ids_B=sample_ids_B,
        shots_B=tensors.get("shots_B"),
        labels={
            task: Labels(
                tensors[f"labels.{task}.values_N"],
                tensors[f"labels.{task}.tokens_N"],
                tensors.get(f"labels.{task}.weights_N"),
            )
            for task in header["tasks"]
        },
        denominators=header["denominators"],
        gradient_divisor=header["gradient_divisor"],
        epoch=header["epoch"],
        dense={name: tensors[f"dense.{name}"] for name in header["dense"]},
        holds_corpus=header["holds_corpus"],
        timestamps_T=tensors.get("timestamps_T"),
        request_timestamps_T=tensors.get("request_timestamps_T"),
    )
