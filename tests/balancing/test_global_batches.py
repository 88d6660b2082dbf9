"""GlobalBatches on real gloo processes: as one process fed the union, nothing lost, nobody left waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from lightning_gr.balancing.cost import TOKENS, SequenceCost
from lightning_gr.balancing.global_batches import GlobalBatches
from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch, TokenKind
from tests.more import more

pytestmark = pytest.mark.dist
Samples = list[tuple[int, int]]  # id and tokens; token i of sample s is the item 100 s + i


def weight(item: int) -> float:
    return 0.25 * (item % 5)


def loss(item: int) -> float:
    return (item * 37 % 101) / 7


def make(samples: Samples, **changes: Any) -> SequenceBatch:
    lengths = torch.tensor([length for _, length in samples], dtype=torch.int64)
    items = torch.tensor([100 * s + i for s, length in samples for i in range(length)], dtype=torch.int64)
    counts = torch.zeros(len(samples), 4, dtype=torch.int64)
    counts[:, TokenKind.REALTIME] = lengths
    weights = torch.tensor([weight(item) for item in items.tolist()], dtype=torch.float32)
    fields: dict[str, Any] = {
        "features": KeyedJaggedTensor(["item_id"], items, lengths=lengths, stride=len(samples)),
        "token_counts_B4": counts,
        "sample_ids_B": torch.tensor([s for s, _ in samples], dtype=torch.int64),
        "labels": {
            "next_item": Labels(items, torch.arange(len(items)), weights),
            "last": Labels(items[1::2].float(), torch.arange(len(items))[1::2]),
        },
        "denominators": {"next_item": 77.0, "last": 77.0},
        "gradient_divisor": 77.0,
        "dense": {"of tokens": torch.zeros(len(items), 2), "of users": torch.zeros(len(samples), 3)},
        "epoch": 5,
    }
    return SequenceBatch(**(fields | changes))


def told(batch: SequenceBatch) -> dict[str, Any]:
    """What a test has to know of a batch."""
    items = batch.features.values().split(batch.features.lengths().tolist())
    own = batch.labels["next_item"]
    weights = own.weights_N
    assert weights is not None
    sums = {
        "next_item": (torch.tensor([loss(x) for x in own.values_N.tolist()], dtype=torch.float64) * weights).sum(),
        "last": torch.tensor([loss(int(x)) for x in batch.labels["last"].values_N.tolist()], dtype=torch.float64).sum(),
    }
    return {
        "samples": [
            (sample, len(x))
            for sample, x in zip(batch.sample_ids_B.tolist(), items, strict=True)
            if sample != PADDING_SAMPLE_ID
        ],
        "whole": all(
            x.tolist() == [100 * sample + i for i in range(len(x))]
            for sample, x in zip(batch.sample_ids_B.tolist(), items, strict=True)
        ),
        "sequences": batch.num_sequences,
        "shapes": {name: tuple(x.shape) for name, x in batch.dense.items()},
        "denominators": batch.denominators,
        "divisor": batch.gradient_divisor,
        "epoch": batch.epoch,
        "sums": {task: float(x) for task, x in sums.items()},
        "loss": float(batch.mean_over_global_batch(sums)),
    }


def group_of_its_own() -> Any:
    return dist.new_group(backend="gloo")


def iterate_here(streams: list[list[Samples]], **changes: Any) -> list[dict[str, Any]]:
    group = group_of_its_own()
    drawn = [0]

    def stream() -> Iterator[SequenceBatch]:
        for samples in streams[dist.get_rank()]:
            drawn[0] += 1
            yield make(samples)

    given_: dict[str, Any] = {"mode": "local", "accumulate": 1, "tokens_per_rank": None, "cost": TOKENS}
    given_ |= {"method": "lpt"} | changes
    if given_["tokens_per_rank"] is None:
        given_["cursor"] = lambda: [dist.get_rank(), drawn[0]]
    batches = GlobalBatches(stream(), group=group, **given_)
    found = [told(batch) | {"cursors": batches.cursors} for batch in batches]
    dist.destroy_process_group(group)
    return found


def one_process(samples: Samples) -> float:
    """The loss of one process fed all samples at once: each task's weighted mean."""
    items = [100 * s + i for s, n in samples for i in range(n)]
    total = sum(weight(x) for x in items)
    odd = [x for k, x in enumerate(items) if k % 2]
    mean = sum(weight(x) * loss(x) for x in items) / total if total else 0.0
    return mean + (sum(loss(x) for x in odd) / len(odd) if odd else 0.0)


@st.composite
def streams_of(draw: st.DrawFn, world_size: int, *, even: bool = False) -> list[list[Samples]]:
    """Streams of unlike length; with even lengths of samples, each batch's odd tokens are the samples' own."""
    number = iter(range(1, 1000))
    length = st.integers(1, 4).map(lambda n: 2 * n) if even else st.integers(1, 8)
    batches = st.lists(st.lists(length, min_size=1, max_size=4), max_size=4)
    drawn = draw(st.lists(batches, min_size=world_size, max_size=world_size))
    return [[[(next(number), n) for n in batch] for batch in own] for own in drawn]


@pytest.mark.parametrize("world_size", [*more(2), 3])
@pytest.mark.parametrize("mode", ["local", "exchange"])
def test_ranks_together_are_one_process_fed_the_union(gloo: Any, mode: str, world_size: int) -> None:
    pool = gloo(world_size)

    @settings(deadline=None, max_examples=15)
    @given(streams_of(world_size, even=True), st.integers(1, 3))
    def check(streams: list[list[Samples]], accumulate: int) -> None:
        ranks = pool.run(iterate_here, streams, mode=mode, accumulate=accumulate, cost=SequenceCost(1.0, 0.25))
        longest = max(len(own) for own in streams)
        assert [len(batches) for batches in ranks] == [longest] * world_size
        for first in range(0, longest, accumulate):
            wanted = [sample for own in streams for batch in own[first : first + accumulate] for sample in batch]
            window = [batch for batches in ranks for batch in batches[first : first + accumulate]]
            assert sorted(sample for batch in window for sample in batch["samples"]) == sorted(wanted)
            assert all(batch["whole"] for batch in window)
            # What Lightning and DDP divide by: micro-steps of a full window, and ranks.
            losses = sum(batch["loss"] for batch in window) / (world_size * accumulate)
            assert losses == pytest.approx(one_process(wanted), rel=1e-12)
        for batch in (batch for batches in ranks for batch in batches):
            assert batch["divisor"] == world_size * accumulate
            assert batch["epoch"] == 5
            assert batch["sequences"] == max(len(batch["samples"]), 1)
            assert batch["shapes"]["of users"] == (batch["sequences"], 3)
            assert batch["shapes"]["of tokens"] == (sum(n for _, n in batch["samples"]), 2)

    check()


def test_a_mean_of_means_fails_that_test(gloo: Any) -> None:
    streams: list[list[Samples]] = [[[(1, 2)]], [[(2, 8), (3, 6)]]]
    ranks = gloo(2).run(iterate_here, streams)
    means = [
        sum(batch["sums"][task] / share[task] for task in ("next_item", "last"))
        for batch, own in zip([x[0] for x in ranks], streams, strict=True)
        for share in [
            {
                "next_item": sum(weight(100 * s + i) for s, n in own[0] for i in range(n)),
                "last": sum(n // 2 for _, n in own[0]),
            }
        ]
    ]
    union = one_process([sample for own in streams for sample in own[0]])
    assert sum(x[0]["loss"] for x in ranks) / 2 == pytest.approx(union, rel=1e-12)
    assert sum(means) / 2 != pytest.approx(union, rel=1e-2)


@pytest.mark.parametrize("world_size", [*more(2), 3])
def test_local_keeps_order_and_budget_and_exchange_keeps_the_multiset(gloo: Any, world_size: int) -> None:
    pool = gloo(world_size)

    @settings(deadline=None, max_examples=10)
    @given(streams_of(world_size), st.integers(1, 12), st.integers(1, 2))
    def check(streams: list[list[Samples]], budget: int, accumulate: int) -> None:
        settings_ = {"tokens_per_rank": budget, "accumulate": accumulate}
        local = pool.run(iterate_here, streams, mode="local", **settings_)
        for batches, own in zip(local, streams, strict=True):
            samples = [sample for batch in own for sample in batch]
            assert [sample for batch in batches for sample in batch["samples"]] == samples
            for batch in batches:
                tokens = [n for _, n in batch["samples"]]
                assert len(tokens) <= 1 or sum(tokens) - tokens[-1] < budget
        exchanged = pool.run(iterate_here, streams, mode="exchange", **settings_)
        assert [len(batches) for batches in exchanged] == [len(batches) for batches in local]
        assert [x["denominators"] for x in exchanged[0]] == [x["denominators"] for x in local[0]]
        for step in range(0, len(local[0]), accumulate):
            one, other = (
                sorted(s for batches in ranks for batch in batches[step : step + accumulate] for s in batch["samples"])
                for ranks in (local, exchanged)
            )
            assert one == other

    check()


def test_exchange_evens_out_cost_over_ranks_and_micro_steps(gloo: Any) -> None:
    streams: list[list[Samples]] = [[[(i, 90)] for i in range(4)], [[(i, 10)] for i in range(4, 8)]]
    tokens = {
        mode: [
            [sum(n for _, n in batch["samples"]) for batch in batches]
            for batches in gloo(2).run(iterate_here, streams, mode=mode, accumulate=4)
        ]
        for mode in ("local", "exchange")
    }
    assert tokens["local"] == [[90] * 4, [10] * 4]
    # Two parts have to hold a long and none of the short ones: no partition of whole sequences is better.
    assert sorted(tokens["exchange"][0] + tokens["exchange"][1])[-4:] == [90] * 4
    for one, other in zip(*tokens["exchange"], strict=True):
        assert abs(one - other) <= 10


def test_exchange_evens_out_cost_without_filling_a_rank_with_short_sequences(gloo: Any) -> None:
    # By cost alone rank 0 would get the 60 and rank 1 all of the rest: 60 and 140 tokens.
    streams: list[list[Samples]] = [[[(0, 60), (1, 40)]], [[(i, 20) for i in range(2, 7)]]]
    ranks = gloo(2).run(iterate_here, streams, mode="exchange", cost=SequenceCost(0.0, 1.0))
    tokens = [[n for _, n in batches[0]["samples"]] for batches in ranks]
    assert max(sum(own) for own in tokens) <= 125
    costs = [sum(n * n for n in own) for own in tokens]
    # As they came: 5,200 and 2,000; equal ones would need 140 tokens.
    assert sorted(costs) == [3200, 4000]


def test_cursors_are_those_of_all_ranks_behind_whole_windows(gloo: Any) -> None:
    streams: list[list[Samples]] = [[[(i, 2)] for i in range(5)], [[(9, 2)]]]
    ranks = gloo(2).run(iterate_here, streams, accumulate=2)
    wanted = [[], [[0, 2], [1, 1]], [[0, 2], [1, 1]], [[0, 4], [1, 1]], [[0, 5], [1, 1]]]
    assert [[batch["cursors"] for batch in batches] for batches in ranks] == [wanted, wanted]


def test_a_rank_without_any_batch_learns_what_padding_looks_like(gloo: Any) -> None:
    streams: list[list[Samples]] = [[], [[(1, 1)], [(2, 3)]], []]
    ranks = gloo(3).run(iterate_here, streams)
    for batches in (ranks[0], ranks[2]):
        assert [batch["samples"] for batch in batches] == [[], []]
        # From the first batch nobody could tell rows of tokens from rows of sequences.
        assert batches[1]["shapes"] == {"of tokens": (0, 2), "of users": (1, 3)}
        assert batches[1]["denominators"] == ranks[1][1]["denominators"]
        assert [batch["epoch"] for batch in batches] == [5, 5]


def test_messages_longer_than_their_room_arrive(gloo: Any) -> None:
    streams: list[list[Samples]] = [[[(i, 1) for i in range(3000)]], [[(4000, 2)]], []]
    ranks = gloo(3).run(iterate_here, streams, mode="exchange")
    found = [sample for batches in ranks for batch in batches for sample in batch["samples"]]
    assert sorted(found) == [*((i, 1) for i in range(3000)), (4000, 2)]
    counts = [sum(n for _, n in batches[0]["samples"]) for batches in ranks]
    assert max(counts) - min(counts) <= 2


def test_padding_in_a_stream_is_left_out() -> None:
    stream = [make([(PADDING_SAMPLE_ID, 0)]), make([(1, 2), (PADDING_SAMPLE_ID, 0), (2, 3)])]
    batches = GlobalBatches(
        stream, mode="local", group=None, accumulate=1, tokens_per_rank=None, cost=TOKENS, method="lpt"
    )
    assert [told(batch)["samples"] for batch in batches] == [[(1, 2), (2, 3)]]


@pytest.mark.parametrize("mode", ["local", "exchange"])
def test_one_process_needs_no_group(mode: Any) -> None:
    stream = [make([(1, 2), (2, 6)]), make([(3, 4)]), make([(4, 2)])]
    batches = GlobalBatches(
        iter(stream), mode=mode, group=None, accumulate=2, tokens_per_rank=None, cost=TOKENS, method="lpt"
    )
    found = [told(batch) for batch in batches]
    assert [len(batch["samples"]) for batch in found] == ([2, 1, 1] if mode == "local" else [1, 2, 1])
    assert (found[0]["loss"] + found[1]["loss"]) / 2 == pytest.approx(one_process([(1, 2), (2, 6), (3, 4)]))
    # A last window of one batch is still divided by 2.
    assert found[2]["loss"] / 2 == pytest.approx(one_process([(4, 2)]))


def test_a_stream_without_batches_ends_at_once(gloo: Any) -> None:
    assert gloo(2).run(iterate_here, [[], []], accumulate=3) == [[], []]


# ---- failures ----------------------------------------------------------------------------------------------------


def fail_here(what: str, rank: int, mode: str) -> tuple[int, str]:
    group = group_of_its_own()
    mine = dist.get_rank() == rank

    def stream() -> Iterator[Any]:
        yield make([(1, 2)])
        if mine and what == "raises":
            raise KeyError("no such day")
        yield (
            {"item_id": [1]} if mine and what == "type" else make([(2, 2)], epoch=6 if mine and what == "epoch" else 5)
        )

    batches = GlobalBatches(
        stream(), mode=mode, group=group, accumulate=1, tokens_per_rank=None, cost=TOKENS, method="lpt"
    )
    done = 0
    try:
        for _ in batches:
            done += 1
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        return done, f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group(group)
    return done, "nothing"


@pytest.mark.parametrize("mode", ["local", "exchange"])
def test_a_stream_that_raises_on_one_rank_stops_all(gloo: Any, mode: str) -> None:
    one, other = gloo(2).run(fail_here, "raises", 1, mode)
    assert other == (1, "KeyError: 'no such day'")
    assert one[0] == 1
    assert one[1].startswith("RuntimeError: rank 1: its training batches failed with KeyError: 'no such day'")


def test_what_is_no_sequence_batch_is_refused_by_name(gloo: Any) -> None:
    one, other = gloo(2).run(fail_here, "type", 0, "local")
    assert one[1].startswith("TypeError: the training loader yields dict: mode local counts and moves")
    assert "RuntimeError: rank 0: its training batches failed with TypeError" in other[1]


def test_ranks_in_different_epochs_are_refused_on_all(gloo: Any) -> None:
    for done, message in gloo(3).run(fail_here, "epoch", 2, "exchange"):
        assert done == 1
        assert message.startswith("ValueError: SequenceBatch.epoch: ranks 0 and 2 have 5 and 6")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "planned"}, r"mode='planned': expected local or exchange"),
        ({"accumulate": 0}, r"accumulate=0"),
        ({"method": "greedy"}, r"method='greedy'"),
        ({"tokens_per_rank": 9, "cursor": lambda: [1]}, r"tokens_per_rank=9: .* let the stream cut"),
        ({"tokens_per_rank": 0}, r"budget=0"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"mode": "local", "group": None, "accumulate": 1, "tokens_per_rank": None}
    with pytest.raises(ValueError, match=message):
        list(GlobalBatches([make([(1, 2)])], **(given_ | {"cost": TOKENS, "method": "lpt"} | changes)))


# ---- beside training ---------------------------------------------------------------------------------------------


def iterate_beside_collectives(streams: list[list[Samples]]) -> tuple[int, float]:
    """Runs the iteration in a thread while the main thread reduces over the default group."""
    group = group_of_its_own()
    found: list[SequenceBatch] = []
    batches = GlobalBatches(
        [make(samples) for samples in streams[dist.get_rank()]],
        mode="exchange",
        group=group,
        accumulate=1,
        tokens_per_rank=None,
        cost=TOKENS,
        method="lpt",
    )
    thread = threading.Thread(target=lambda: found.extend(batches))
    thread.start()
    total = torch.zeros(())
    for _ in range(50):
        one = torch.ones(())
        dist.all_reduce(one)
        total += one
    thread.join()
    dist.destroy_process_group(group)
    return sum(batch.num_samples for batch in found), float(total)


def test_a_thread_may_iterate_while_others_communicate(gloo: Any) -> None:
    streams: list[list[Samples]] = [[[(i, 3)] for i in range(20)], [[(i, 1)] for i in range(20, 25)]]
    (one, total), (other, other_total) = gloo(2).run(iterate_beside_collectives, streams)
    assert one + other == 25
    assert total == other_total == 100.0
