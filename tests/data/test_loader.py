"""PlannedLoader: the ranks' shares, the cursor and what it refuses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

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


def test_a_rank_without_samples_gets_a_padding_sequence() -> None:
    source = make_source(4)
    batches = [list(make_loader(source, global_tokens=20, rank=rank, world_size=4)) for rank in range(4)]
    padded = [batch for rank in batches for batch in rank if batch.num_samples == 0]
    assert padded
    assert all(batch.sample_ids_B.tolist() == [-1] for batch in padded)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients_are_those_of_the_whole_window(accumulate: int) -> None:
    """Each label's loss is 1 in turn, so the divided and summed losses of a window are the mean over its labels."""
    single = list(make_loader())
    ranks = [list(make_loader(rank=rank, world_size=2, accumulate=accumulate)) for rank in range(2)]
    for first in range(0, len(single), accumulate):
        labels = [batch.labels["next_item"].values_N.float().sum() for batch in single[first : first + accumulate]]
        count = sum(batch.num_tokens for batch in single[first : first + accumulate])
        total = 0.0
        for rank in ranks:
            for batch in rank[first : first + accumulate]:
                loss = batch.mean_over_global_batch({"next_item": batch.labels["next_item"].values_N.float().sum()})
                total += float(loss) / accumulate / 2  # Lightning divides by one, DDP by the other
        assert total == pytest.approx(float(sum(labels)) / count, rel=1e-5)


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


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^val split: 3 sample.* for 4 processes.*--trainer.devices to at most 3"):
        make_loader(make_source(3), world_size=4, name="val")
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
