"""Counters of keys that wait: exact ones against a Counter, the sketch never below the truth, both cut by shards."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.embeddings.dynamic.admission import ExactCounter, SketchCounter, salts_of

SALT = salts_of(["items"])[0]
CPU = torch.device("cpu")
IDS = st.one_of(st.sampled_from([0, -1, -(2**63), 2**63 - 1]), st.integers(-9, 9))
STEPS = st.lists(st.lists(st.lists(IDS, max_size=9), max_size=3), max_size=6)


def add(counter: ExactCounter | SketchCounter, ids: list[int]) -> None:
    occurrences = Counter(ids)
    counter.add(torch.tensor(list(occurrences), dtype=torch.int64), torch.tensor(list(occurrences.values())))


def counts(counter: ExactCounter | SketchCounter, ids: list[int]) -> list[int]:
    return counter.counts(torch.tensor(ids, dtype=torch.int64)).tolist()


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, dropped=st.sets(IDS, max_size=3))
def test_exact_counts_are_those_of_finished_steps(steps: list[list[list[int]]], dropped: set[int]) -> None:
    counter, truth = ExactCounter(salt=SALT, forget_after_steps=None, device=CPU), Counter[int]()
    for step, batches in enumerate(steps):
        known = list(truth)
        for ids in batches:
            add(counter, ids)
            assert counts(counter, known) == [truth[x] for x in known]
            assert counts(counter, [77]) == [0]
        counter.commit(step)
        truth.update(x for ids in batches for x in ids)
        assert counts(counter, list(truth)) == list(truth.values())
        assert len(counter) == len(truth)
    counter.forget(torch.tensor(sorted(dropped), dtype=torch.int64))
    for id_ in dropped:
        truth.pop(id_, None)
    assert len(counter) == len(truth)
    assert counts(counter, list(truth)) == list(truth.values())
    state, offsets = counter.state(3)
    assert offsets[-1] == len(truth)
    loaded = ExactCounter(salt=SALT, forget_after_steps=None, device=CPU)
    for v in range(8):  # shard by shard, as processes have them
        loaded.load({name: x[offsets[v] : offsets[v + 1]] for name, x in state.items()})
    assert counts(loaded, list(truth)) == list(truth.values())


def test_exact_counts_are_forgotten_with_time() -> None:
    counter = ExactCounter(salt=SALT, forget_after_steps=5, device=CPU)
    for step in range(65):
        add(counter, [1] * (step == 0) + [2] * (step == 60) + [3] * (step in (0, 59)))
        counter.commit(step)
    assert counts(counter, [1, 2, 3]) == [0, 1, 2]
    assert len(counter) == 2


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_a_sketch_is_never_below_the_truth(steps: list[list[list[int]]]) -> None:
    counter, truth = SketchCounter(salt=SALT, shard_bits=1, width=16, device=CPU), Counter[int]()
    for step, batches in enumerate(steps):
        before = counts(counter, list(range(-9, 10)))
        for ids in batches:
            add(counter, ids)
        assert counts(counter, list(range(-9, 10))) == before
        counter.commit(step)
        truth.update(x for ids in batches for x in ids)
        assert all(n >= truth[x] for x, n in zip(truth, counts(counter, list(truth)), strict=True))


def test_a_wide_sketch_is_nearly_exact_and_cut_by_shards() -> None:
    counter, ids = SketchCounter(salt=SALT, shard_bits=3, width=1024, device=CPU), torch.arange(-500, 500)
    counter.add(ids, torch.arange(1000) % 7 + 1)
    counter.commit(0)
    assert int((counter.counts(ids) != torch.arange(1000) % 7 + 1).sum()) < 5
    assert int(counter.counts(ids + 5000).count_nonzero()) < 20
    state, offsets = counter.state(3)
    assert offsets == list(range(9))
    loaded = SketchCounter(salt=SALT, shard_bits=3, width=1024, device=CPU)
    for v in range(8):
        loaded.load({name: x[offsets[v] : offsets[v + 1]] for name, x in state.items()})
    assert torch.equal(loaded.counts(ids), counter.counts(ids))
    with pytest.raises(ValueError, match="has 1024 counters a row, not 16; set sketch_width"):
        SketchCounter(salt=SALT, shard_bits=3, width=16, device=CPU).load(state)


def test_salts_depend_on_the_name_alone() -> None:
    assert salts_of(["a", "b"])[1] == salts_of(["b"])[0]
    assert len(set(salts_of([str(x) for x in range(1000)]))) == 1000
