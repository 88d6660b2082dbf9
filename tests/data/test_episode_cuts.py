"""Episodes against plain loops: each record once, support before query, and labels counted where they are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import ByUser, EventStore, Task
from lightning_gr.data.episode_cuts import EpisodeSettings
from lightning_gr.data.splits import Part
from lightning_gr.data.task_source import TaskSource
from tests.data.task_stores import Record, Taken, make_records, sequences_of, write_tasks

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=8)
CLICK = {"click": Task("click")}
ALL_TRAIN, ALL_VAL = ByUser(val=0.0, test=0.0), ByUser(val=1 - 1e-12, test=0.0)
Episode = dict[int, Taken]


def make_source(store: EventStore, part: Part = "train", *, split: ByUser | None = None, **settings: Any) -> TaskSource:
    split = split or (ALL_TRAIN if part == "train" else ALL_VAL)
    return TaskSource(store, part=part, split=split, tasks=CLICK, episodes=EpisodeSettings(**settings))


def episodes_of(source: TaskSource) -> dict[int, Episode]:
    """By sample, its sequences by shots, and what the plan is told of it compared with them."""
    ids, tokens = source.samples(0, source.num_rows)
    groups = tuple(range(len(source.group_bounds) - 1))
    batch = source.collate(ids, windows=[groups], epoch=0, denominators={"click": 1.0}, gradient_divisor=1.0)
    found: dict[int, Episode] = {}
    for sequence in sequences_of(batch):
        assert sequence.shots not in found.setdefault(sequence.sample, {})
        found[sequence.sample][sequence.shots] = sequence
    assert list(found) == ids.tolist()
    lengths = dict.fromkeys(ids.tolist(), 0)
    for sample, length in zip(batch.sample_ids_B.tolist(), batch.layout.lengths_B.tolist(), strict=True):
        if sample != -1:
            lengths[sample] += length
    assert list(lengths.values()) == tokens.tolist() == source.token_counts(ids).tolist()
    counted = source.label_counts(ids)["click"].tolist()
    assert counted == [len(episode[0].click) for episode in found.values()]
    return found


def check_labels(tasks: list[list[Record]], episode: Episode) -> None:
    clicks = {record.item: record.click for task in tasks for record in task}
    for sequence in episode.values():
        expected = [(item, clicks[item]) for item in sequence.candidates if clicks[item] is not None]
        assert list(sequence.click) == expected


@settings(deadline=None, max_examples=30)
@given(
    lengths=LENGTHS,
    support=st.integers(1, 6),
    query=st.integers(1, 6),
    order=st.sampled_from(["time", "random"]),
    without=st.sets(st.integers(0, 60), max_size=12),
)
def test_every_record_is_in_one_episode_as_support_or_query(
    lengths: list[int],
    support: int,
    query: int,
    order: str,
    without: set[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tasks = make_records(lengths, without=sorted(without))
    store = write_tasks(tmp_path_factory.mktemp("tasks"), tasks)
    source = make_source(store, support=support, query=query, order=order)
    found = episodes_of(source)
    of_task: dict[int, list[Episode]] = {}
    for sample, episode in found.items():
        assert list(episode) == [support, 0]
        check_labels(tasks, episode)
        of_task.setdefault(sample % len(tasks), []).append(episode)
        assert {sequence.tasks for sequence in episode.values()} == {(sample % len(tasks),)}
        # Support and query are apart, none is empty, and both are in the order of time.
        candidates = [sequence.candidates for sequence in episode.values()]
        assert all(candidates)
        assert all(list(part) == sorted(part) for part in candidates)
        size = sum(map(len, candidates))
        assert size <= max(support + query, 3 if support == query == 1 else 0)
        assert abs(len(candidates[0]) - size * support / (support + query)) < 1
        assert len(candidates[0]) <= support
    for number, records in enumerate(tasks):
        items = [record.item for record in records]
        episodes = of_task.pop(number, [])
        if len(records) < 2:
            assert not episodes
            continue
        taken = [[*episode[support].candidates, *episode[0].candidates] for episode in episodes]
        assert sorted(itertools.chain(*taken)) == items
        sizes = sorted(map(len, taken))
        assert sizes[-1] - sizes[0] <= 1
        if order == "time":
            assert list(itertools.chain(*taken)) == items
    assert not of_task
    dropped = [length for length in lengths if length < 2]
    assert (source.counts.tasks, source.counts.dropped_tasks) == (len(lengths) - len(dropped), len(dropped))
    assert source.counts.dropped_records == sum(dropped)


@settings(deadline=None, max_examples=25)
@given(
    lengths=LENGTHS,
    shots=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    eval_query=st.sampled_from([None, 1, 3]),
    order=st.sampled_from(["time", "random"]),
    without=st.sets(st.integers(0, 60), max_size=12),
)
def test_evaluation_adapts_to_first_records_and_asks_the_same_of_all_shots(
    lengths: list[int],
    shots: list[int],
    eval_query: int | None,
    order: str,
    without: set[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tasks = make_records(lengths, without=sorted(without))
    store = write_tasks(tmp_path_factory.mktemp("tasks"), tasks)
    source = make_source(store, "val", shots=tuple(shots), eval_query=eval_query, order=order)
    found = episodes_of(source)
    assert list(found) == [number for number, records in enumerate(tasks) if len(records) > max(shots)]
    left_out = [length for length in lengths if length <= max(shots)]
    assert (source.counts.dropped_tasks, source.counts.dropped_records) == (len(left_out), sum(left_out))
    for number, episode in found.items():
        check_labels(tasks, episode)
        assert list(episode) == [*sorted({k for k in shots if k}), 0]
        items = [record.item for record in tasks[number]]
        whole = episode[0].candidates
        assert len(whole) == min(len(items) - max(shots), eval_query or len(items))
        larger: set[int] = set()
        for k in sorted({k for k in shots if k}):
            assert len(episode[k].candidates) == k
            assert larger <= set(episode[k].candidates)
            larger = set(episode[k].candidates)
        assert not larger & set(whole)
        if order == "time":
            assert all(list(episode[k].candidates) == items[:k] for k in episode if k)
            assert list(whole) == items[max(shots) :][: len(whole)]


def test_a_random_order_is_another_one_by_task_and_by_seed_and_the_same_again(tmp_path: Path) -> None:
    tasks = make_records([40, 40, 40])
    store = write_tasks(tmp_path, tasks)

    def supports(seed: int, part: Part = "train") -> list[list[int]]:
        whole = ALL_TRAIN if part == "train" else ALL_VAL
        split = ByUser(val=whole.val, test=whole.test, seed=seed)
        found = episodes_of(make_source(store, part, split=split, order="random"))
        first = [found[row][10] for row in range(3)]
        return [[item - 40 * row for item in support.candidates] for row, support in enumerate(first)]

    assert supports(0) == supports(0) == supports(0, "val")
    assert len({tuple(x) for x in supports(0) + supports(1)}) == 6
    assert all(x != list(range(10)) for x in supports(0))


def test_history_is_what_was_before_the_episode(tmp_path: Path) -> None:
    tasks = make_records([11, 3])
    store = write_tasks(tmp_path, tasks)
    source = make_source(store, support=2, query=2, history=5)
    found = episodes_of(source)
    for sample, episode in found.items():
        items = [record.item for record in tasks[sample % 2]]
        first = items.index(min(episode[2].candidates))
        assert {sequence.history for sequence in episode.values()} == {tuple(items[max(first - 5, 0) : first])}
    assert source.longest_history(above=0) == 5
    assert source.longest_history(above=5) is None
    evaluated = episodes_of(make_source(store, "val", shots=(1,), history=5))
    assert {sequence.history for episode in evaluated.values() for sequence in episode.values()} == {()}


@settings(deadline=None, max_examples=20)
@given(
    lengths=LENGTHS,
    min_records=st.integers(2, 7),
    order=st.sampled_from(["time", "random"]),
    without=st.sets(st.integers(0, 30), max_size=8),
)
def test_a_task_that_is_topped_up_repeats_its_records_in_turn(
    lengths: list[int], min_records: int, order: str, without: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tasks = make_records(lengths, without=sorted(without))
    store = write_tasks(tmp_path_factory.mktemp("tasks"), tasks)
    settings_ = {"support": 3, "query": 3, "min_records": min_records, "order": order}
    source = make_source(store, small_tasks="top_up", **settings_)
    found = episodes_of(source)
    small = [length for length in lengths if length < min_records]
    assert source.counts == replace(
        source.counts,
        tasks=len(lengths),
        dropped_tasks=0,
        topped_up_tasks=len(small),
        topped_up_records=sum(min_records - length for length in small),
    )
    dropped = make_source(store, **settings_).counts
    assert (dropped.dropped_tasks, dropped.dropped_records) == (len(small), sum(small))
    for number, records in enumerate(tasks):
        taken = [
            item
            for sample, episode in found.items()
            for sequence in episode.values()
            for item in sequence.candidates
            if sample % len(tasks) == number
        ]
        times = [taken.count(record.item) for record in records]
        assert sum(times) == len(taken) == max(len(records), min_records)
        assert max(times) - min(times) <= 1
        for sample, episode in found.items():
            if sample % len(tasks) == number:
                check_labels(tasks, episode)


def test_held_out_tasks_are_not_trained_on(tmp_path: Path) -> None:
    tasks = make_records([12] * 60)
    store = write_tasks(tmp_path, tasks, group=20)
    split = ByUser(val=0.3, test=0.2, seed=4)
    parts: dict[str, set[int]] = {}
    for part in ("train", "val", "test"):
        found = episodes_of(make_source(store, part, split=split, shots=(1, 5)))  # type: ignore[arg-type]
        parts[part] = {sample % 60 for sample in found}
        items = {x for episode in found.values() for sequence in episode.values() for x in sequence.candidates}
        assert items == {record.item for number in parts[part] for record in tasks[number]}
    assert sorted(itertools.chain(*parts.values())) == list(range(60))
    assert min(map(len, parts.values())) > 5


def test_an_episode_with_nothing_to_adapt_to_is_found_before_training(tmp_path: Path) -> None:
    tasks = make_records([4, 4], without=[4, 5])
    store = write_tasks(tmp_path, tasks)
    both = TaskSource(
        store,
        part="train",
        split=ALL_TRAIN,
        tasks=CLICK | {"like": Task("like")},
        episodes=EpisodeSettings(support=2, query=2),
    )
    both.check()
    with pytest.raises(ValueError, match="tasks: 1 episodes of the train split have no label of click .* task task 1"):
        make_source(store, support=2, query=2).check()
    make_source(store, "val", shots=(0, 3)).check()
    with pytest.raises(ValueError, match="tasks: 1 episodes of the val split"):
        make_source(store, "val", shots=(0, 1, 3)).check()
    make_source(store, "val", shots=(0,)).check()


def test_a_part_without_enough_records_is_refused_with_the_number_there_has_to_be(tmp_path: Path) -> None:
    store = write_tasks(tmp_path, make_records([1, 1, 1]))
    with pytest.raises(ValueError, match="train split: none of its 3 tasks has at least 2 records; lower min_records"):
        make_source(store).check()
    make_source(store, small_tasks="top_up").check()
    with pytest.raises(ValueError, match="val split: none of its 3 tasks has at least 6 records; lower the largest"):
        make_source(store, "val", shots=(0, 5)).check()


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"support": 0}, "support=0: expected at least 1"),
        ({"query": 0}, "query=0: expected at least 1"),
        ({"history": -1}, "history=-1: expected at least 0"),
        ({"min_records": 1}, "min_records=1: expected at least 2"),
        ({"eval_query": 0}, "eval_query=0: expected at least 1"),
        ({"shots": ()}, "shots=\\[\\]: expected"),
        ({"shots": (5, -1)}, "shots=\\[5, -1\\]: expected"),
        ({"order": "shuffled"}, "order='shuffled': expected one of time, random"),
        ({"small_tasks": "keep"}, "small_tasks='keep': expected one of drop, top_up"),
        ({"order": "random", "history": 3}, "history=3: what was before .* set order=time, or history=0"),
    ],
)
def test_a_setting_that_cannot_work_is_named(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSettings(**given_)


def test_a_great_many_tasks_are_cut_without_a_loop(tmp_path: Path) -> None:
    """Counts of 300,000 tasks against bincounts: lengths 1 ... 60, at most 20 records an episode."""
    lengths = np.random.default_rng(0).integers(1, 61, 300_000)
    store = write_tasks(tmp_path, make_records([2, 3]))
    store.__dict__["lengths"] = lengths
    source = make_source(store)
    _, tokens = source.samples(0, len(lengths))
    assert len(tokens) == int(np.where(lengths > 1, -(-lengths // 20), 0).sum())
    assert int(tokens.sum()) == int(lengths[lengths > 1].sum()) + 2 * source.num_contextual * len(tokens)
