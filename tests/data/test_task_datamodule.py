"""TaskDataModule: batches of whole episodes on any number of ranks and workers, and the cursor between them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lightning_gr.balancing import TOKENS
from lightning_gr.balancing.global_batches import GlobalBatches
from lightning_gr.batch import SequenceBatch
from lightning_gr.data import EventStore, PlannedLoader, Task, TaskDataModule
from tests.data.task_stores import make_records, sequences_of, write_tasks

LENGTHS = np.random.default_rng(2).integers(2, 30, 40).tolist()
TASKS = make_records(LENGTHS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return write_tasks(tmp_path_factory.mktemp("tasks"), TASKS, group=6)


def make_data(store: EventStore, **settings: Any) -> TaskDataModule:
    given = {"support": 3, "query": 2, "shots": [0, 1, 3], "seed": 1, "global_tokens": 90, "shuffle_window": 12}
    return TaskDataModule(path=str(store.path), tasks={"click": Task("click")}, **(given | settings))


def loader_of(
    data: TaskDataModule, *, rank: int = 0, world_size: int = 1, workers: int = 0, epoch: int = 0
) -> PlannedLoader:
    """The training loader of a rank."""
    one = data.train_dataloader()
    loader = PlannedLoader(one._source, one.plan, rank=rank, world_size=world_size, num_workers=workers)
    loader.set_epoch(epoch)
    return loader


def ids(batches: list[SequenceBatch]) -> list[list[int]]:
    return [batch.sample_ids_B.tolist() for batch in batches]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (3, 0), (4, 0)])
def test_every_record_comes_once_an_epoch_in_whole_episodes_of_one_task(
    store: EventStore, world_size: int, workers: int
) -> None:
    data = make_data(store, order="random")
    trained = set(data.train_dataloader()._source.samples(0, len(LENGTHS))[0] % len(LENGTHS))
    whole = list(loader_of(data))
    ranks = [list(loader_of(data, rank=rank, world_size=world_size, workers=workers)) for rank in range(world_size)]
    records: Counter[int] = Counter()
    for batches in zip(whole, *ranks, strict=True):
        queried = 0
        for batch in batches[1:]:
            sequences = sequences_of(batch)
            assert [s.shots for s in sequences] == [3, 0] * (len(sequences) // 2)
            for support, query in zip(sequences[::2], sequences[1::2], strict=True):
                assert support.sample == query.sample
                assert support.tasks == query.tasks == (support.sample % len(LENGTHS),)
                own = {record.item for record in TASKS[support.tasks[0]]}
                assert {*support.candidates, *query.candidates} <= own
                records.update((*support.candidates, *query.candidates))
                queried += len(query.click)
        assert [batch.denominators for batch in batches] == [{"click": float(queried)}] * (world_size + 1)
    assert records == Counter(record.item for number in trained for record in TASKS[number])


def test_epochs_differ_in_the_order_of_episodes_alone(store: EventStore) -> None:
    data = make_data(store, order="random")
    epochs = []
    for epoch in range(2):
        sequences = [s for batch in loader_of(data, epoch=epoch) for s in sequences_of(batch)]
        epochs.append(sequences)
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0], key=repr) == sorted(epochs[1], key=repr)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_in_mid_epoch_on_another_number_of_ranks(store: EventStore, workers: int) -> None:
    data = make_data(store)
    whole = [sequences_of(batch) for batch in loader_of(data, epoch=3)]
    done = len(whole) // 2
    before = [loader_of(data, rank=rank, world_size=2, workers=workers, epoch=3) for rank in range(2)]
    for loader in before:
        for _, _batch in zip(range(done), loader, strict=False):
            pass
    states = [loader.state_dict() for loader in before]
    assert states[0] == states[1]
    after = [loader_of(make_data(store), rank=rank, world_size=3, epoch=3) for rank in range(3)]
    for loader in after:
        loader.load_state_dict(states[0])
    resumed = [[s for batch in batches for s in sequences_of(batch)] for batches in zip(*after, strict=True)]
    assert [sorted(x, key=repr) for x in resumed] == [sorted(x, key=repr) for x in whole[done:]]
    other = loader_of(make_data(store, query=3))
    with pytest.raises(ValueError, match="data: the checkpoint's data plan has"):
        other.load_state_dict(states[0])


def test_episodes_are_dealt_out_whole_whatever_is_balanced(store: EventStore) -> None:
    data = make_data(store, global_tokens=200)
    whole = list(loader_of(data))
    ranks = [loader_of(data, rank=rank, world_size=2) for rank in range(2)]
    (steps,) = {loader.balance(cost=TOKENS, method="lpt", tokens_per_rank=40) for loader in ranks}
    assert steps > 1
    dealt = [list(loader) for loader in ranks]
    for number, batch in enumerate(whole):
        parts = [b for batches in dealt for b in batches[number * steps : (number + 1) * steps]]
        assert max(part.num_tokens for part in parts) <= 40
        taken = [sequences_of(part) for part in parts]
        assert all([s.shots for s in own] == [3, 0] * (len(own) // 2) for own in taken)
        assert sorted((s for own in taken for s in own), key=repr) == sorted(sequences_of(batch), key=repr)


def test_a_rank_without_an_episode_gets_a_padding_sequence_that_is_no_support(store: EventStore) -> None:
    data = make_data(store, global_tokens=40)
    ranks = [list(loader_of(data, rank=rank, world_size=6)) for rank in range(6)]
    padded = [batch for batches in ranks for batch in batches if not batch.num_samples]
    assert padded
    for batch in padded:
        assert (batch.sample_ids_B.tolist(), batch.shots_B.tolist()) == ([-1], [0])  # type: ignore[union-attr]
        assert batch.labels["click"].num_labels == 0


def test_balancing_that_moves_single_sequences_is_refused(store: EventStore) -> None:
    for mode in ("local", "exchange"):
        batches = GlobalBatches(
            iter(loader_of(make_data(store))),
            mode=mode,  # type: ignore[arg-type]
            group=None,
            accumulate=1,
            tokens_per_rank=None,
            cost=TOKENS,
            method="lpt",
        )
        with pytest.raises(ValueError, match=f"mode={mode}: .* an episode .* set mode to planned"):
            next(batches)


def test_evaluation_has_a_support_of_each_size_for_unseen_tasks(store: EventStore) -> None:
    data = make_data(store, val_tasks=0.3, test_tasks=0.3, eval_global_tokens=400)
    rows = [{s.tasks[0] for b in loader() for s in sequences_of(b)} for loader in (
        data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader
    )]  # fmt: skip
    assert all(rows)
    assert len(set.union(*rows)) == sum(map(len, rows[:3]))
    assert rows[3] == rows[2]
    assert data.shots == [0, 1, 3]
    for batch in data.val_dataloader():
        assert batch.shots_B is not None
        assert batch.shots_B.tolist() == [1, 3, 0] * (batch.num_sequences // 3)


def test_what_becomes_of_small_tasks_is_said_and_counted(store: EventStore) -> None:
    data = make_data(store, min_records=10, val_tasks=0.0, test_tasks=0.0)
    small = [length for length in LENGTHS if length < 10]
    with pytest.warns(UserWarning, match=f"{len(small)} of 40 tasks, with {sum(small)} records, are left out"):
        data.train_dataloader()
    assert (data.dropped_tasks, data.topped_up_tasks) == (len(small), 0)
    data = make_data(store, min_records=10, small_tasks="top_up", val_tasks=0.0, test_tasks=0.0)
    with pytest.warns(UserWarning, match=f"{len(small)} of 40 tasks .* {10 * len(small) - sum(small)} are repetitions"):
        data.train_dataloader()
    assert (data.dropped_tasks, data.topped_up_tasks) == (0, len(small))


def test_an_episode_beyond_the_budget_is_refused_in_training_and_makes_room_in_evaluation(store: EventStore) -> None:
    with pytest.raises(ValueError, match="global_tokens=12: the largest episode has 9 tokens.*at least 18, or lower"):
        make_data(store, global_tokens=12, val_tasks=0.5).train_dataloader()
    with pytest.warns(UserWarning, match="eval_global_tokens=20: the largest episode .val. .* lower eval_query=None"):
        assert list(make_data(store, eval_global_tokens=20, val_tasks=0.5).val_dataloader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"support": 0}, "support=0"),
        ({"shots": []}, "shots=\\[\\]"),
        ({"val_tasks": 0.6, "test_tasks": 0.4}, "val_tasks=0.6, test_tasks=0.4: expected shares of tasks"),
        ({"predict_part": "train"}, "predict_part='train'"),
        ({"history": 2, "order": "random"}, "history=2"),
        ({"tasks": {"click": Task("rating")}}, "tasks.click: the store has no label rating; it has click, like"),
        ({"tasks": {}}, "tasks: expected at least one"),
    ],
)
def test_a_setting_that_cannot_work_is_named_when_the_run_starts(
    store: EventStore, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TaskDataModule(**({"path": str(store.path), "tasks": {"click": Task("click")}} | settings)).train_dataloader()


def test_a_network_with_fewer_positions_than_a_sequence_needs_is_told_the_history(store: EventStore) -> None:
    data = make_data(store, history=7)
    assert data.longest_sample("train", above=10) is None
    longest = data.longest_sample("train", above=6)
    assert longest is not None
    assert longest.positions == 2 + 7 + 1
    assert "history=7 to 3" in longest.remedy
