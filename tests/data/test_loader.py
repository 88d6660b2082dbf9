"""PlannedLoader: the ranks' shares, the cursor and what it refuses."""

from __future__ import annotations

import random
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.balancing import TOKENS, Method, SequenceCost
from lightning_gr.data import GlobalBatchPlan, Interactions, PlannedLoader, RetrievalSource


def make_source(num_users: int = 30, seed: int = 0) -> RetrievalSource:
    lengths = np.random.default_rng(seed).integers(4, 14, num_users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = np.arange(offsets[-1])
    log = Interactions(np.arange(num_users), offsets, events, events * 60, events)
    return RetrievalSource(log, part="train", max_length=10)


def make_loader(
    source: RetrievalSource | None = None, *, seed: int = 1, global_tokens: int = 48, **settings: Any
) -> PlannedLoader:
    source = source or make_source()
    plan = GlobalBatchPlan(
        source,
        global_tokens=global_tokens,
        seed=seed,
        shuffle=True,
    )
    return PlannedLoader(source, plan, **settings)


def ids(batches: Any) -> list[list[int]]:
    return [batch.sample_ids_B.tolist() for batch in batches]


def test_ranks_share_the_global_batches_and_their_denominators() -> None:
    one = list(make_loader())
    for world_size in (2, 3, 4):
        ranks = [list(make_loader(rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {len(one)}
        for whole, *parts in zip(one, *ranks, strict=True):
            assert sorted(sum((part.sample_ids_B.tolist() for part in parts), [])) == sorted(
                whole.sample_ids_B.tolist()
            )
            for part in parts:
                assert part.denominators == whole.denominators == {"next_item": float(whole.num_tokens)}
                assert part.gradient_divisor == world_size


@pytest.mark.parametrize("limit", [None, 12])
def test_the_tokens_of_the_first_batches_are_known_to_within_a_sample(limit: int | None) -> None:
    ranks = [balanced(rank, 2, limit=limit) for rank in range(2)]
    batches = [sum(part.num_tokens for part in parts if part.num_samples) for parts in zip(*ranks, strict=True)]
    steps = 1 if limit is None else len(ranks[0]) // len(make_loader())
    assert ranks[0].tokens_before(0) == 0
    assert ranks[0].tokens_before(len(batches)) == sum(batches)
    for done in range(0, len(batches), steps):
        assert abs(ranks[0].tokens_before(done) - sum(batches[:done])) <= 10, done


def test_a_rank_without_samples_gets_a_padding_sequence() -> None:
    source = make_source(4)
    batches = [list(make_loader(source, global_tokens=20, rank=rank, world_size=4)) for rank in range(4)]
    padded = [batch for rank in batches for batch in rank if batch.num_samples == 0]
    assert padded
    assert all(batch.sample_ids_B.tolist() == [-1] for batch in padded)


def balanced(
    rank: int, world_size: int, *, limit: int | None, method: Method = "lpt", **settings: Any
) -> PlannedLoader:
    loader = make_loader(rank=rank, world_size=world_size, **settings)
    steps = loader.balance(cost=SequenceCost(1.0, 0.1), method=method, tokens_per_rank=limit)
    assert (limit is not None) is (steps > 1)
    return loader


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.sampled_from(get_args(Method)),
    st.sampled_from([None, *range(10, 16)]),
    st.integers(1, 3),
    st.integers(1, 30),
)
def test_global_batches_do_not_depend_on_the_deal(
    world_size: int, method: Method, limit: int | None, accumulate: int, num_users: int
) -> None:
    source = make_source(num_users)
    plain = list(make_loader(source, accumulate=accumulate))
    loaders = [
        make_loader(source, rank=rank, world_size=world_size, accumulate=accumulate) for rank in range(world_size)
    ]
    (steps,) = {loader.balance(cost=TOKENS, method=method, tokens_per_rank=limit) for loader in loaders}
    ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {len(loader) for loader in loaders} == {len(plain) * steps}
    for i, whole in enumerate(plain):
        dealt = [batch for batches in ranks for batch in batches[i * steps : (i + 1) * steps]]
        samples = [sample for batch in dealt for sample in batch.sample_ids_B.tolist() if sample != -1]
        assert sorted(samples) == sorted(whole.sample_ids_B.tolist())
        assert all(batch.denominators == whole.denominators for batch in dealt)
        assert {batch.gradient_divisor for batch in dealt} == {world_size * accumulate * steps}
        assert limit is None or max(batch.num_tokens for batch in dealt) <= limit


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients_are_those_of_the_whole_window(accumulate: int, limit: int | None) -> None:
    """Each label's loss is 1 in turn, so the divided and summed losses of a window are the mean over its labels."""
    single = list(make_loader())
    ranks = [list(balanced(rank, 2, limit=limit, accumulate=accumulate)) for rank in range(2)]
    steps = len(ranks[0]) // len(single)
    for first in range(0, len(single), accumulate):
        labels = [batch.labels["next_item"].values_N.float().sum() for batch in single[first : first + accumulate]]
        count = sum(batch.num_tokens for batch in single[first : first + accumulate])
        total = 0.0
        for rank in ranks:
            for batch in rank[first * steps : (first + accumulate) * steps]:
                loss = batch.mean_over_global_batch({"next_item": batch.labels["next_item"].values_N.float().sum()})
                total += float(loss) / (accumulate * steps) / 2  # Lightning divides by one, DDP by the other
        assert total == pytest.approx(float(sum(labels)) / count, rel=1e-5)


def test_one_user_trains_on_any_number_of_ranks() -> None:
    batches = [list(make_loader(make_source(1), rank=rank, world_size=3)) for rank in range(3)]
    assert [[batch.num_samples for batch in rank] for rank in batches] == [[1], [0], [0]]
    assert {rank[0].denominators["next_item"] for rank in batches} == {float(batches[0][0].num_tokens)}


def test_sequences_of_one_token() -> None:
    lengths = np.array([2, 2, 2, 9, 2])  # the last event is a target only, and one more is held out
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    events = np.arange(offsets[-1])
    source = RetrievalSource(Interactions(np.arange(5), offsets, events, events, events), part="train", max_length=1)
    plan = GlobalBatchPlan(source, global_tokens=3)
    found = []
    for rank in range(4):
        loader = PlannedLoader(source, plan, rank=rank, world_size=4)
        assert loader.balance(cost=TOKENS, method="karmarkar_karp", tokens_per_rank=1) == 1
        found += [batch.sample_ids_B.tolist() for batch in loader]
    assert {len(samples) for samples in found} == {1}
    real = [samples[0] for samples in found if samples != [-1]]
    assert sorted(real) == sorted(source.samples(0, source.num_rows)[0].tolist())


def test_a_limit_below_the_longest_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokens_per_rank=9: the longest sample has 10 tokens"):
        make_loader().balance(cost=TOKENS, method="lpt", tokens_per_rank=9)
    wrong: Any = "best"
    with pytest.raises(ValueError, match=r"^method='best': "):
        make_loader().balance(cost=TOKENS, method=wrong, tokens_per_rank=None)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_within_a_global_batch_counts_the_whole_ones(num_workers: int) -> None:
    loader = balanced(1, 2, limit=12, num_workers=num_workers)
    batches = iter(loader)
    steps = len(loader) // len(make_loader())
    for taken in range(1, 3 * steps):
        next(batches)
        assert loader.state_dict() == make_loader().state_dict() | {"batches_done": taken // steps}
    # The rest on other ranks and without micro-steps begins with the global batch that was cut off.
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert ids(resumed) == ids(make_loader())[2:]
    again = balanced(1, 2, limit=12, num_workers=num_workers)
    again.load_state_dict(loader.state_dict())
    assert ids(again) == ids(balanced(1, 2, limit=12))[2 * steps :]
    assert again.state_dict()["batches_done"] == len(make_loader())


def test_epochs_differ_and_repeat() -> None:
    loader = make_loader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert {batch.epoch for batch in batches} == {epoch}
        assert len(batches) == len(loader)
        epochs.append(ids(batches))
    assert epochs[0] == epochs[2] != epochs[1]


def test_workers_change_nothing() -> None:
    alone, helped = list(make_loader()), list(make_loader(num_workers=2))
    assert ids(alone) == ids(helped)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.features.values(), other.features.values())
        assert torch.equal(one.labels["next_item"].values_N, other.labels["next_item"].values_N)
        assert one.request_timestamps_T is not None
        assert other.request_timestamps_T is not None
        assert torch.equal(one.request_timestamps_T, other.request_timestamps_T)
        assert one.layout.num_tokens == other.layout.num_tokens == other.num_tokens


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_counts_the_batches_handed_out(num_workers: int) -> None:
    loader = make_loader(num_workers=num_workers)
    loader.set_epoch(2)
    whole = ids(make_with_epoch(2))
    iter(loader)  # an iterator that nobody asks for a batch
    batches = iter(loader)
    for done in range(1, 4):
        next(batches)
        state = loader.state_dict()
        assert (state["epoch"], state["batches_done"]) == (2, done)
        resumed = make_loader(num_workers=num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert len(resumed) == len(whole)
        iter(resumed)
        resumed.set_epoch(2)
        assert ids(resumed) == whole[done:]
        assert resumed.state_dict()["batches_done"] == len(whole)
        assert ids(resumed) == whole  # the saved place counts once
        resumed.set_epoch(3)
        assert ids(resumed) == ids(make_with_epoch(3))


def make_with_epoch(epoch: int) -> PlannedLoader:
    loader = make_loader()
    loader.set_epoch(epoch)
    return loader


def test_a_cursor_holds_on_any_number_of_ranks() -> None:
    loader = make_loader(rank=1, world_size=3)
    batches = iter(loader)
    next(batches)
    next(batches)
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert ids(resumed) == ids(make_loader())[2:]


def test_another_epoch_than_the_saved_one_starts_at_its_beginning() -> None:
    loader = make_loader()
    loader.load_state_dict(make_loader().state_dict() | {"epoch": 0, "batches_done": 3})
    loader.set_epoch(1)
    assert ids(loader) == ids(make_with_epoch(1))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", {"seed": 2}),
        ("global_tokens", {"global_tokens": 64}),
        ("data", {"source": make_source(seed=1)}),
    ],
)
def test_another_plan_is_refused_by_name(name: str, other: dict[str, Any]) -> None:
    state = make_loader().state_dict()
    loader = make_loader(**other)
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        loader.load_state_dict(state)
    message = str(error.value)
    assert repr(state[name]) in message
    assert repr(loader.state_dict()[name]) in message
    assert "\n" not in message


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^train split: no samples"):
        make_loader(make_source(0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_numbers_of_the_training_process_are_left_alone(num_workers: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    list(make_loader(num_workers=num_workers))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
