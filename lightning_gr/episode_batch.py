"""EpisodeBatch: a batch of meta learning with each episode's support and query apart, made on the host.

An episode is some records of one task: its support is what a model adapts to, its query what the adapted model is
judged by (G-Meta, arXiv 2401.04338; MAML, arXiv 1703.03400).

Shape suffixes: B sequences, V values of a feature, R distinct ids of a table in an episode, M labels of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch
from lightning_gr.batch_samples import take

Array = np.ndarray[Any, Any]


@dataclass
class EpisodePart:
    """Support or query of some episodes.

    Args:
        batch: their sequences.
        rows_V: by feature, the place of each value's row among the group's rows of its table, int64.
        label_shares_M: by task, one over the labels that the label's episode has here, float64; they make a sum over
            labels a sum of the episodes' means.
    """

    batch: SequenceBatch
    rows_V: dict[str, Tensor]
    label_shares_M: dict[str, Tensor]

    def map_tensors(self, apply: Callable[[Any], Any]) -> EpisodePart:
        """The part with `apply` done to each device tensor."""
        return EpisodePart(
            self.batch._map_tensors(apply),
            {name: apply(x) for name, x in self.rows_V.items()},
            {name: apply(x) for name, x in self.label_shares_M.items()},
        )


@dataclass
class EpisodeGroup:
    """Episodes that are adapted together; each has rows of its own.

    Args:
        support: what is adapted to.
        query: what the loss is of.
        first_R: by table, where each row first stands among the batch's values of the table's features, one feature
            after the other; int64.
        episode_R: by table, the episode of each row, as a number in the group; int64.
        episodes: their sample ids.
    """

    support: EpisodePart
    query: EpisodePart
    first_R: dict[str, Tensor]
    episode_R: dict[str, Tensor]
    episodes: tuple[int, ...]

    def map_tensors(self, apply: Callable[[Any], Any]) -> EpisodeGroup:
        """The group with `apply` done to each device tensor."""
        return EpisodeGroup(
            self.support.map_tensors(apply),
            self.query.map_tensors(apply),
            {name: apply(x) for name, x in self.first_R.items()},
            {name: apply(x) for name, x in self.episode_R.items()},
            self.episodes,
        )


@dataclass
class EpisodeBatch(SequenceBatch):
    """A batch whose `features` hold the ids of support and query, so that one exchange looks up both.

    Args:
        groups: by shots, the episodes with a support of that many, in groups that are adapted together; none on a rank
            without an episode.
        queries: all queries, padding where there is none.
        query_values_V: by feature, the places of their values among the batch's, int64.
    """

    groups: dict[int, list[EpisodeGroup]] = field(default_factory=dict)
    queries: SequenceBatch = None  # type: ignore[assignment]
    query_values_V: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    @override
    def num_samples(self) -> int:
        """Episodes."""
        assert self.shots_B is not None
        return int(((self.sample_ids_B != PADDING_SAMPLE_ID) & (self.shots_B == 0)).sum())

    @override
    def _map_tensors(self, apply: Any) -> SequenceBatch:
        moved = super()._map_tensors(apply)
        assert isinstance(moved, EpisodeBatch)
        # Evaluation adapts too, and what is made in inference mode cannot enter a graph.
        with torch.inference_mode(False):
            moved.groups = {shots: [x.map_tensors(apply) for x in own] for shots, own in self.groups.items()}
            moved.queries = self.queries._map_tensors(apply)
            moved.query_values_V = {name: apply(x) for name, x in self.query_values_V.items()}
        return moved


def episode_batch(batch: SequenceBatch, tables: Mapping[str, Sequence[str]], *, apart: bool) -> EpisodeBatch:
    """Takes a batch's episodes apart, on the host.

    Args:
        batch: with `SequenceBatch.shots_B`.
        tables: by table, the features that look it up.
        apart: whether each episode is a group of its own, as where dense parameters are adapted; otherwise all
            episodes of as many shots are one.

    Returns:
        The same batch where it has been taken apart before.

    Raises:
        ValueError: the batch has no episodes, or one is without support or query.
    """
    if isinstance(batch, EpisodeBatch):
        return batch
    if batch.shots_B is None:
        raise ValueError("SequenceBatch.shots_B: none, so nothing says what is support; use TaskDataModule")
    whole = EpisodeBatch(**{x.name: getattr(batch, x.name) for x in fields(batch) if x.init})
    whole.layout = batch.layout
    values = _Values(batch)
    with torch.inference_mode(False):
        whole.groups = _groups(batch, values, tables, apart=apart)
        queries = np.flatnonzero(batch.shots_B.numpy() == 0)
        whole.queries = take(replace(batch, shots_B=None), torch.from_numpy(queries))
        whole.query_values_V = {name: torch.from_numpy(values.of(name, queries)[0]) for name in values.ids}
    return whole


def _groups(
    batch: SequenceBatch, values: _Values, tables: Mapping[str, Sequence[str]], *, apart: bool
) -> dict[int, list[EpisodeGroup]]:
    assert batch.shots_B is not None
    shots_B, ids_B = batch.shots_B.numpy(), batch.sample_ids_B.numpy()
    real_B = ids_B != PADDING_SAMPLE_ID
    queries = np.flatnonzero(real_B & (shots_B == 0))
    found: dict[int, list[EpisodeGroup]] = {}
    plain = replace(batch, shots_B=None)
    for shots in np.unique(shots_B[real_B & (shots_B > 0)]).tolist():
        supports = np.flatnonzero(real_B & (shots_B == shots))
        _check_pairs(ids_B[supports], ids_B[queries])
        order = dict(zip(ids_B[supports].tolist(), supports.tolist(), strict=True))
        pairs = [(order[int(ids_B[query])], int(query)) for query in queries]
        cuts = [[pair] for pair in pairs] if apart else [pairs]
        found[shots] = [_group(plain, values, tables, own) for own in cuts]
    return found


def _check_pairs(supports: Array, queries: Array) -> None:
    for what, missing in (
        ("query", np.setdiff1d(supports, queries)),
        ("support", np.setdiff1d(queries, supports)),
    ):
        if len(missing):
            raise ValueError(f"sample {missing[0]}: an episode without {what}; drop its task, or top it up")
    if len(np.unique(queries)) != len(queries) or len(supports) != len(queries):
        raise ValueError("SequenceBatch.sample_ids_B: an episode has one query, and one support of each size")


class _Values:
    """Where a batch's values lie, by feature and sequence.

    Args:
        batch: on the host.
    """

    def __init__(self, batch: SequenceBatch) -> None:
        features = batch.features
        lengths_FB = features.lengths().view(len(features.keys()), features.stride()).numpy().astype(np.int64)
        ids = features.values().numpy()
        ends_F = np.cumsum(lengths_FB.sum(1))
        self.ids = {
            name: ids[end - n : end] for name, end, n in zip(features.keys(), ends_F, lengths_FB.sum(1), strict=True)
        }
        self.offsets = {
            name: np.concatenate([[0], np.cumsum(row)]) for name, row in zip(features.keys(), lengths_FB, strict=True)
        }

    def of(self, feature: str, sequences: Sequence[int] | Array) -> tuple[Array, Array]:
        """Places among a feature's values of some sequences' values, and how many each sequence has."""
        offsets, at = self.offsets[feature], np.asarray(sequences, dtype=np.int64)
        counts = offsets[at + 1] - offsets[at]
        places = np.arange(counts.sum()) + np.repeat(offsets[at] - counts.cumsum() + counts, counts)
        return places, counts


def _group(
    batch: SequenceBatch,
    values: _Values,
    tables: Mapping[str, Sequence[str]],
    pairs: Sequence[tuple[int, int]],
) -> EpisodeGroup:
    sides = [[support for support, _ in pairs], [query for _, query in pairs]]
    numbers = np.arange(len(pairs))
    rows_V: list[dict[str, Tensor]] = [{}, {}]
    first_R, episode_R = {}, {}
    for table, features in tables.items():
        ids, places, episodes, spans, before = [], [], [], [], 0
        for feature in features:
            for side, sequences in enumerate(sides):
                at, counts = values.of(feature, sequences)
                spans.append((feature, side, len(at)))
                ids.append(values.ids[feature][at])
                places.append(at + before)
                episodes.append(np.repeat(numbers, counts))
            before += len(values.ids[feature])
        # One number for an episode and an id, whatever the ids are.
        _, code = np.unique(np.concatenate(ids), return_inverse=True)
        episode = np.concatenate(episodes)
        size = int(code.max(initial=0)) + 1
        distinct, first, row = np.unique(episode * size + code, return_index=True, return_inverse=True)
        first_R[table] = torch.from_numpy(np.concatenate(places)[first])
        episode_R[table] = torch.from_numpy(distinct // size)
        upto = 0
        for feature, side, count in spans:
            rows_V[side][feature] = torch.from_numpy(row[upto : upto + count].astype(np.int64))
            upto += count
    support, query = (_part(batch, sequences, rows) for sequences, rows in zip(sides, rows_V, strict=True))
    samples = batch.sample_ids_B[torch.tensor(sides[1])].tolist()
    labelled = [_episode_of_labels(support.batch, task) for task in batch.labels]
    without = np.setdiff1d(numbers, np.concatenate(labelled)) if labelled else numbers
    if len(without):
        raise ValueError(
            f"sample {samples[without[0]]}: its support has no label of {', '.join(batch.labels) or 'any task'}, so "
            "there is nothing to adapt to; leave such tasks out"
        )
    return EpisodeGroup(support, query, first_R, episode_R, tuple(samples))


def _part(batch: SequenceBatch, sequences: Sequence[int], rows_V: dict[str, Tensor]) -> EpisodePart:
    own = take(batch, torch.tensor(sequences))
    shares = {}
    for task, labels in own.labels.items():
        sequence_M = _episode_of_labels(own, task)
        weights = np.ones(labels.num_labels) if labels.weights_N is None else labels.weights_N.double().numpy()
        sums_B = np.bincount(sequence_M, weights, minlength=len(sequences))
        shares[task] = torch.from_numpy(1.0 / np.maximum(sums_B[sequence_M], 1e-12))
    return EpisodePart(own, rows_V, shares)


def _episode_of_labels(batch: SequenceBatch, task: str) -> Array:
    """Of each label of a task, its sequence, on the host."""
    ends_B = np.cumsum(batch.token_counts_B4.sum(1).numpy())
    sequence_M: Array = np.searchsorted(ends_B, batch.labels[task].tokens_N.numpy(), side="right")
    return sequence_M
