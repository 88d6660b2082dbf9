"""Taking, joining, padding and sending sequences of a batch, against lists of plain records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch
from lightning_gr.batch_samples import concatenate, from_bytes, padding_like, structure, take, to_bytes

Record = dict[str, Any]
TASKS = ("click", "next_item")


def record(sample: int, length: int, users: int, labelled: list[bool]) -> Record:
    """A sequence whose values say where they come from."""
    tokens = [sample * 100 + i for i in range(length)]
    return {
        "sample": sample,
        "counts": [0, length // 2, length - length // 2, 0],
        "item": tokens,
        "user": [sample * 100 + 50 + i for i in range(users)],
        "times": [token * 10 for token in tokens],
        "per_token": [[token + 0.5, token + 0.25] for token in tokens],
        "per_sequence": [sample + 0.125],
        "labels": [i for i in range(length) if labelled[i % len(labelled)]],
    }


def build(records: list[Record]) -> SequenceBatch:
    items, users = [x for r in records for x in r["item"]], [x for r in records for x in r["user"]]
    lengths = [len(r["item"]) for r in records] + [len(r["user"]) for r in records]
    labels = {}
    starts = [sum(len(r["item"]) for r in records[:i]) for i in range(len(records))]
    tokens = torch.tensor([s + i for s, r in zip(starts, records, strict=True) for i in r["labels"]], dtype=torch.int64)
    values = torch.tensor([r["item"][i] for r in records for i in r["labels"]], dtype=torch.int64)
    labels["next_item"] = Labels(values + 1, tokens)
    labels["click"] = Labels(values.float(), tokens.clone(), values * 0.5)
    return SequenceBatch(
        features=KeyedJaggedTensor(
            ["item", "user"],
            torch.tensor(items + users, dtype=torch.int64),
            weights=torch.tensor(items + users, dtype=torch.float32) / 2,
            lengths=torch.tensor(lengths, dtype=torch.int32),
            stride=len(records),
        ),
        token_counts_B4=torch.tensor([r["counts"] for r in records], dtype=torch.int64).reshape(-1, 4),
        sample_ids_B=torch.tensor([r["sample"] for r in records], dtype=torch.int64),
        shots_B=torch.tensor([r["sample"] % 3 for r in records], dtype=torch.int64),
        labels=labels,
        denominators={"next_item": 3.0, "click": 0.1},
        gradient_divisor=6.0,
        epoch=4,
        timestamps_T=torch.tensor([x for r in records for x in r["times"]], dtype=torch.int64),
        dense={
            "of tokens": torch.tensor([x for r in records for x in r["per_token"]], dtype=torch.float64).reshape(-1, 2),
            "of users": torch.tensor([r["per_sequence"] for r in records], dtype=torch.float32).reshape(-1, 1),
        },
    )


def assert_same(found: SequenceBatch, wanted: SequenceBatch) -> None:
    def everything(batch: SequenceBatch) -> dict[str, Any]:
        return {
            "keys": list(batch.features.keys()),
            "values": batch.features.values(),
            "lengths": batch.features.lengths(),
            "weights": batch.features.weights_or_none(),
            "stride": batch.features.stride(),
            "offsets": batch.layout.offsets_B1,
            **{name: x for name, x in vars(batch).items() if name not in ("features", "labels", "layout", "dense")},
            **{f"dense.{name}": x for name, x in batch.dense.items()},
            **{f"{task}.{name}": x for task, own in batch.labels.items() for name, x in vars(own).items()},
        }

    one, other = everything(found), everything(wanted)
    one.pop("num_samples", None), other.pop("num_samples", None)  # cached
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert value.shape == other[name].shape, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


# Lengths of at least 2 and an own feature of any length: rows of tokens are never as many as rows of sequences.
RECORDS = st.lists(
    st.tuples(st.integers(2, 6), st.integers(0, 3), st.lists(st.booleans(), min_size=1, max_size=3)), max_size=6
).map(lambda drawn: [record(i, *x) for i, x in enumerate(drawn)])


@settings(deadline=None, max_examples=80)
@given(RECORDS, st.data())
def test_taken_sequences_keep_all_that_is_theirs(records: list[Record], data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(records) - 1), max_size=8)) if records else []
    taken = take(build(records), torch.tensor(places, dtype=torch.int64))
    assert_same(taken, build([records[i] for i in places]))
    taken.check_values()


@settings(deadline=None, max_examples=80)
@given(RECORDS, st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_joined_parts_are_the_whole(records: list[Record], cuts: list[int]) -> None:
    bounds = sorted({0, len(records), *(min(cut, len(records)) for cut in cuts)})
    parts = [build(records[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)] or [build([])]
    whole = concatenate(parts)
    assert_same(whole, build(records))
    whole.check_values()


@settings(deadline=None, max_examples=50)
@given(RECORDS, st.booleans())
def test_bytes_give_the_batch_back(records: list[Record], holds_corpus: bool) -> None:
    batch = replace(build(records), holds_corpus=holds_corpus)
    sent = to_bytes(batch)
    assert sent.dtype == torch.uint8
    assert sent.dim() == 1
    assert_same(from_bytes(sent), batch)


def test_tensors_that_share_memory_or_leave_gaps_are_sent_too() -> None:
    batch = build([record(1, 4, 1, [True])])
    own = batch.labels["next_item"].tokens_N
    shared = replace(
        batch,
        labels={"next_item": Labels(own, own), "click": batch.labels["click"]},
        request_timestamps_T=batch.timestamps_T,
        dense={"every other": torch.arange(8.0)[::2]},
    )
    of_one = replace(shared, dense={"every other": torch.arange(8.0)[::2][:1]})
    for sent in (shared, padding_like(shared), of_one):
        assert_same(from_bytes(to_bytes(sent)), sent)


def test_one_sequence_of_one_token_each_may_be_taken() -> None:
    records = [record(i, 1, 1, [True]) for i in range(3)]
    assert_same(take(build(records), torch.tensor([2, 0])), build([records[2], records[0]]))


def test_rows_that_may_be_of_tokens_or_of_sequences_are_refused() -> None:
    records = [record(0, 0, 1, [True]), record(1, 2, 1, [True])]
    with pytest.raises(ValueError, match=r"dense\['of tokens'\]: 2 rows, as many as tokens and as sequences.*leave"):
        take(build(records), torch.tensor([1]))


@pytest.mark.parametrize("records", [[], [record(1, 3, 2, [True])], [record(1, 3, 2, [True]), record(2, 2, 0, [True])]])
def test_padding_is_one_empty_sequence_that_fits(records: list[Record]) -> None:
    batch = build(records)
    padding = padding_like(batch)
    assert padding.sample_ids_B.tolist() == [PADDING_SAMPLE_ID]
    assert (padding.num_sequences, padding.num_tokens, padding.num_samples) == (1, 0, 0)
    assert {task: x.num_labels for task, x in padding.labels.items()} == dict.fromkeys(TASKS, 0)
    assert padding.features.lengths().tolist() == [0, 0]
    assert structure(padding) == structure(batch)
    joined = concatenate([padding, batch])
    assert_same(take(joined, torch.arange(1, 1 + len(records))), batch)


def test_a_padding_batch_has_a_row_of_what_belongs_to_sequences() -> None:
    padding = padding_like(build([record(1, 3, 2, [True])]))
    assert padding.dense["of tokens"].shape == (0, 2)
    assert padding.dense["of users"].shape == (1, 1)


def test_labels_without_weights_count_as_1_beside_labels_with() -> None:
    one, other = build([record(1, 2, 0, [True])]), build([record(2, 2, 0, [True])])
    bare = Labels(one.labels["click"].values_N, one.labels["click"].tokens_N)
    joined = concatenate([replace(one, labels={**one.labels, "click": bare}), other])
    weights = joined.labels["click"].weights_N
    assert weights is not None
    assert weights.tolist() == [1.0, 1.0, 100.0, 100.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 5}, r"SequenceBatch\.epoch: .* have 4 and 5"),
        ({"holds_corpus": True}, r"SequenceBatch\.holds_corpus: .* have False and True"),
        ({"timestamps_T": None}, r"SequenceBatch\.timestamps_T: .* have int64 \(\) and none"),
        ({"dense": {}}, r"SequenceBatch\.dense\['of tokens'\]: .* have float64 \(2,\) and none"),
        ({"labels": {}, "denominators": {}}, r"SequenceBatch\.labels\['click'\]: .* have float32 \(\) and none"),
        (
            {"features": KeyedJaggedTensor(["a"], torch.arange(0), lengths=torch.tensor([0]))},
            r"features: .*item, user and",
        ),
    ],
)
def test_batches_that_do_not_fit_together_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    batch = build([record(1, 3, 2, [True])])
    with pytest.raises(ValueError, match=message):
        concatenate([batch, replace(batch, **changes)])
