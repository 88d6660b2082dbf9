"""The leave-one-out samples against plain Python lists."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.batch import PADDING_SAMPLE_ID, TokenKind
from lightning_gr.data import Interactions, RetrievalSource

HISTORIES = st.lists(st.integers(0, 9), min_size=1, max_size=12)
SPLITS: list[Any] = ["train", "val", "test", "all"]


def make_log(lengths: list[int], times: bool = True) -> Interactions:
    """Every event is an item of its own, so that an item tells which event it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events = np.arange(offsets[-1])
    return Interactions(
        users=np.arange(len(lengths)) + 100,
        offsets=offsets,
        items=events,
        timestamps=events * 10 + 1_000 if times else None,
        item_ids=events + 500,
    )


def expected_samples(log: Interactions, split: str, max_length: int) -> dict[int, tuple[list[int], list[int]]]:
    """By user row, the history and the labels of its last tokens."""
    samples = {}
    for user in range(len(log.users)):
        events = log.items[log.offsets[user] : log.offsets[user + 1]].tolist()
        if split == "all":
            history, labels = events, []
        elif split == "train":
            kept = events[:-2] if len(events) >= 3 else events
            history, labels = kept[:-1], kept[1:]
        elif len(events) < 3:
            continue
        else:
            end = -1 if split == "test" else -2
            history, labels = events[:end], [events[end]]
        if history:
            samples[user] = (history[-max_length:], labels[-max_length:])
    return samples


def collate(source: RetrievalSource, indices: list[int], **changes: Any) -> Any:
    """The batch of the samples at some places of the source's list."""
    numbers = ids_of(source)[np.array(indices, dtype=np.int64)]
    denominators = {task: float(counts.sum()) for task, counts in source.label_counts(numbers).items()}
    given_: dict[str, Any] = {"epoch": 0, "denominators": denominators, "gradient_divisor": 1.0} | changes
    return source.collate(numbers, windows=[tuple(range(len(source.group_bounds) - 1))], **given_)


def ids_of(source: RetrievalSource) -> np.ndarray[Any, Any]:
    return source.samples(0, source.num_rows)[0]


@settings(deadline=None)
@given(HISTORIES, st.sampled_from(SPLITS), st.integers(1, 12), st.booleans(), st.randoms())
def test_batches_hold_what_plain_lists_say(
    lengths: list[int], split: Any, max_length: int, times: bool, random: Any
) -> None:
    log = make_log(lengths, times)
    source = RetrievalSource(log, part=split, max_length=max_length)
    expected = expected_samples(log, split, max_length)
    ids, counts = source.samples(0, source.num_rows)
    assert ids.tolist() == list(expected)
    assert counts.tolist() == [len(history) for history, _ in expected.values()]
    assert source.token_counts(ids).tolist() == counts.tolist()
    if split == "all":
        assert source.label_counts(ids) == {}
    else:
        assert source.label_counts(ids)["next_item"].tolist() == [len(labels) for _, labels in expected.values()]
    indices = list(range(len(expected)))
    random.shuffle(indices)
    batch = collate(source, indices)
    if not indices:
        return
    users = [list(expected)[index] for index in indices]
    assert batch.sample_ids_B.tolist() == users
    assert batch.token_counts_B4[:, TokenKind.REALTIME].tolist() == [len(expected[user][0]) for user in users]
    assert int(batch.token_counts_B4.sum()) == batch.num_tokens
    history = [item for user in users for item in expected[user][0]]
    assert batch.features.keys() == ["item_id"]
    assert batch.features.values().tolist() == history
    assert batch.features.lengths().tolist() == [len(expected[user][0]) for user in users]
    ends = np.cumsum([len(expected[user][0]) for user in users])
    tokens = [
        int(end) - len(expected[user][1]) + i
        for user, end in zip(users, ends, strict=True)
        for i in range(len(expected[user][1]))
    ]
    if split == "all":
        assert batch.labels == batch.denominators == {}
    else:
        assert batch.labels["next_item"].tokens_N.tolist() == tokens
        assert batch.labels["next_item"].values_N.tolist() == [label for user in users for label in expected[user][1]]
    if not times:
        assert batch.timestamps_T is None
        assert batch.request_timestamps_T is None
        return
    assert batch.timestamps_T.tolist() == [item * 10 + 1_000 for item in history]
    last = {int(end) - 1 for end in ends}
    # Without a next event the last token asks at its own time.
    requests = [item + (0 if split == "all" and token in last else 1) for token, item in enumerate(history)]
    assert batch.request_timestamps_T.tolist() == [item * 10 + 1_000 for item in requests]


@settings(deadline=None)
@given(HISTORIES, st.integers(1, 12))
def test_nothing_leaks_and_nothing_is_lost(lengths: list[int], max_length: int) -> None:
    log = make_log(lengths)
    seen: dict[str, Counter[int]] = {}
    targets: dict[str, Counter[int]] = {}
    for split in SPLITS:
        source = RetrievalSource(log, part=split, max_length=max_length)
        batch = collate(source, list(range(len(ids_of(source)))))
        seen[split] = Counter(batch.features.values().tolist())
        targets[split] = Counter(batch.labels["next_item"].values_N.tolist() if batch.labels else [])
    evaluated = [user for user in range(len(lengths)) if lengths[user] >= 3]
    ends = log.offsets[1:]
    test, val = {int(ends[user]) - 1 for user in evaluated}, {int(ends[user]) - 2 for user in evaluated}
    assert set(targets["test"]) == test
    assert set(targets["val"]) == val
    assert not (set(seen["train"]) | set(targets["train"])) & (test | val)
    assert not set(seen["val"]) & (test | val)
    assert not set(seen["test"]) & test
    assert all(count == 1 for part in (seen, targets) for split in SPLITS for count in part[split].values())
    # With room for whole histories every event is used.
    whole = RetrievalSource(log, part="all", max_length=100)
    batch = collate(whole, list(range(len(ids_of(whole)))))
    assert Counter(batch.features.values().tolist()) == Counter(log.items.tolist())
    train = RetrievalSource(log, part="train", max_length=100)
    batch = collate(train, list(range(len(ids_of(train)))))
    used = set(batch.features.values().tolist()) | set(batch.labels["next_item"].values_N.tolist())
    alone = {
        int(log.offsets[user])
        for user in range(len(lengths))
        if lengths[user] in (1, 3)  # one training event: nothing to predict from
    }
    assert used | test | val | alone == set(log.items.tolist())


@pytest.mark.parametrize("split", SPLITS)
def test_no_index_gives_one_padding_sequence(split: Any) -> None:
    source = RetrievalSource(make_log([5, 4]), part=split, max_length=8)
    batch = collate(source, [], epoch=3, gradient_divisor=4.0, denominators=dict.fromkeys(source.tasks, 7.0))
    assert batch.sample_ids_B.tolist() == [PADDING_SAMPLE_ID]
    assert batch.token_counts_B4.tolist() == [[0, 0, 0, 0]]
    assert (batch.num_tokens, batch.num_samples, batch.epoch, batch.gradient_divisor) == (0, 0, 3, 4.0)
    assert batch.features.values().dtype == torch.int64
    assert all(labels.num_labels == 0 for labels in batch.labels.values())
    assert batch.labels.keys() == batch.denominators.keys() == set(source.tasks)


def test_fingerprint_names_log_split_and_cut() -> None:
    sources = [
        RetrievalSource(make_log(lengths), part=split, max_length=max_length)
        for lengths in ([5, 4], [4, 5])
        for split in SPLITS
        for max_length in (2, 8)
    ]
    assert len({source.fingerprint for source in sources}) == len(sources)
