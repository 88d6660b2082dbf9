"""EpisodeBatch: rows of episodes against dicts, labels' shares, moving, and batches that are no episodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.batch import SequenceBatch
from lightning_gr.batch_samples import concatenate, padding_like, take
from lightning_gr.episode_batch import EpisodeBatch, EpisodeGroup, episode_batch
from tests.models.episode_samples import FEATURES, Episode, draw_episodes, evaluation_batch, training_batch

TABLES = {shape.name: shape.features for shape in FEATURES.shapes(4)}


def check_rows(batch: SequenceBatch, group: EpisodeGroup, episodes: dict[int, Episode], shots: int) -> None:
    """Each value of support and query has the row of its (episode, id), which stands where such a value is."""
    for table, features in TABLES.items():
        values = [int(x) for name in features for x in batch.features[name].values()]
        owners = [
            int(batch.sample_ids_B[b])
            for name in features
            for b, n in enumerate(batch.features[name].lengths().tolist())
            for _ in range(n)
        ]
        rows = [(owners[i], values[i]) for i in group.first_R[table].tolist()]
        assert len(set(rows)) == len(rows)
        assert [group.episodes[i] for i in group.episode_R[table].tolist()] == [owner for owner, _ in rows]
        used = set()
        for part, number in ((group.support, shots), (group.query, None)):
            for name in features:
                wanted = []
                for sample in group.episodes:
                    own = episodes[sample]
                    records = own.query if number is None else own.support[:number]
                    wanted += [(sample, i) for i in own.ids(name, records)]
                assert [rows[i] for i in part.rows_V[name].tolist()] == wanted
                assert part.batch.features[name].values().tolist() == [i for _, i in wanted]
                used |= set(wanted)
        assert used == set(rows)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 5), st.integers(0, 2), st.booleans(), st.permutations(range(5)), st.integers(0, 99))
def test_every_value_has_the_row_of_its_episode_and_id(
    number: int, history: int, apart: bool, order: list[int], seed: int
) -> None:
    episodes = draw_episodes(number, seed, history=history, support=3, query=2)
    batch = evaluation_batch(episodes, [1, 3])
    # Sequences in any order, padding among them.
    places = [
        place
        for i in order
        if i < number
        for place in ((i * 3 + 2, i * 3, i * 3 + 1) if i % 2 else range(i * 3, i * 3 + 3))
    ]
    batch = concatenate(
        [take(batch, torch.tensor(places[:2])), padding_like(batch), take(batch, torch.tensor(places[2:]))]
    )
    by_sample = {10 + i: x for i, x in enumerate(episodes)}
    found = episode_batch(batch, TABLES, apart=apart)
    assert found.num_samples == number
    assert sorted(found.groups) == [1, 3]
    real = [i for i in found.queries.sample_ids_B.tolist() if i >= 0]
    for shots, groups in found.groups.items():
        assert len(groups) == (number if apart else 1)
        assert [i for group in groups for i in group.episodes] == real
        for group in groups:
            check_rows(batch, group, by_sample, shots)
            for part, records in ((group.support, shots), (group.query, None)):
                for task in FEATURES.tasks:
                    counts = [
                        sum(
                            task in dict(x.labels)
                            for x in (by_sample[i].support[:records] if records else by_sample[i].query)
                        )
                        for i in group.episodes
                    ]
                    assert part.label_shares_M[task].tolist() == [1 / n for n in counts for _ in range(n)]
    for name in FEATURES.sparse:
        values = batch.features[name].values()[found.query_values_V[name]]
        assert torch.equal(values, found.queries.features[name].values())


def test_shares_of_labels_are_by_weight() -> None:
    batch = training_batch(draw_episodes(1))
    labels = batch.labels["click"]
    labels.weights_N = torch.arange(1.0, labels.num_labels + 1)
    (group,) = episode_batch(batch, TABLES, apart=True).groups[3]
    assert group.support.label_shares_M["click"].tolist() == pytest.approx([1 / 6] * 3)
    assert group.query.label_shares_M["click"].tolist() == pytest.approx([1 / 15] * 3)


def tensors_of(batch: EpisodeBatch) -> list[torch.Tensor]:
    groups = [group for own in batch.groups.values() for group in own]
    parts = [part for group in groups for part in (group.support, group.query)]
    found = [*batch.query_values_V.values(), batch.queries.features.values(), batch.features.values()]
    for group in groups:
        found += [*group.first_R.values(), *group.episode_R.values()]
    for part in parts:
        found += [*part.rows_V.values(), *part.label_shares_M.values(), part.batch.features.values()]
        found += [part.batch.layout.offsets_B1, *(x.values_N for x in part.batch.labels.values())]
    return found


def test_moving_moves_the_episodes_too() -> None:
    batch = episode_batch(training_batch(draw_episodes(2)), TABLES, apart=True)
    moved = batch.to("meta")
    assert isinstance(moved, EpisodeBatch)
    assert all(x.is_meta for x in tensors_of(moved))
    assert not any(x.is_meta for x in tensors_of(batch))
    assert moved.num_samples == 2
    assert moved.groups[3][0].episodes == (10,)
    assert not moved.groups[3][0].support.batch.token_counts_B4.is_meta
    assert not any(x.is_meta for x in tensors_of(batch.with_features(batch.features)))  # type: ignore[arg-type]


def test_episodes_made_in_inference_mode_may_enter_a_graph() -> None:
    batch = training_batch(draw_episodes(2))
    with torch.inference_mode():
        made = episode_batch(replace(batch, timestamps_T=batch.timestamps_T + 0), TABLES, apart=False).to("cpu")  # type: ignore[operator]
    (group,) = made.groups[3]  # type: ignore[attr-defined]
    for part in (group.support, group.query):
        assert not any(x.is_inference() for x in (*part.rows_V.values(), *part.label_shares_M.values()))
        own = part.batch
        assert not any(x.is_inference() for x in (own.timestamps_T, own.layout.sequence_T, *own.dense.values()))


def test_a_batch_is_taken_apart_once() -> None:
    batch = episode_batch(training_batch(draw_episodes(2)), TABLES, apart=True)
    assert episode_batch(batch, TABLES, apart=True) is batch


def changed(what: str) -> Any:
    batch = training_batch(draw_episodes(2))
    if what == "outside":
        return replace(batch, shots_B=None)
    if what == "no labels":
        cut = batch.layout.offsets_B1[1]  # behind the first support
        for labels in batch.labels.values():
            kept = labels.tokens_N >= cut
            labels.values_N, labels.tokens_N = labels.values_N[kept], labels.tokens_N[kept]
        return batch
    places = {"no query": [0, 1, 2], "no support": [0, 1, 3], "two queries": [0, 1, 2, 3, 3], "two": [0, 0, 1, 2, 3]}
    return take(batch, torch.tensor(places[what]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("outside", "shots_B: none, so nothing says what is support; use TaskDataModule"),
        ("no query", "sample 11: an episode without query; drop its task, or top it up"),
        ("no support", "sample 11: an episode without support; drop its task, or top it up"),
        ("two queries", "one query, and one support of each size"),
        ("two", "one query, and one support of each size"),
        ("no labels", "sample 10: its support has no label of click, buy"),
    ],
)
def test_batches_that_hold_no_whole_episodes_are_refused(what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episode_batch(changed(what), TABLES, apart=True)
