"""Samples longer than the network takes are refused before the first batch, and no others."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.data import (
    Aggregation,
    ByTime,
    Field,
    LeaveOneOut,
    RankingDataModule,
    SequenceDataModule,
    StoreWriter,
    StreamDataModule,
    Task,
)
from lightning_gr.layers.hstu import HSTUEncoder
from lightning_gr.models import DLRM, MTGR, RankingModule, RetrievalModule

NAN = math.nan
EVENT = st.tuples(st.integers(0, 29), st.sampled_from([0.0, 1.0, 1.0, NAN]))
USERS = st.lists(st.lists(EVENT, min_size=1, max_size=14), min_size=1, max_size=4)
LOG = [[(time, float(time % 2)) for time in range(0, 24, step)] for step in (1, 2, 3)]
SPLIT = ByTime(val_from=12, test_from=18)


def make_store(folder: Path, users: list[list[tuple[int, float]]]) -> str:
    users = [sorted(user, key=lambda e: e[0]) for user in users]
    fields = [Field("click", "label", "event"), Field("city", "sparse", "user", 3)]
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=True, work=folder / "work")
    columns = {
        "user_id": [f"u{i}" for i in range(len(users))],
        "item_id": [[i % 4 for i in range(len(u))] for u in users],
        "timestamp": [[e[0] for e in u] for u in users],
        "click": polars.Series([[e[1] for e in u] for u in users], dtype=polars.List(polars.Float32)),
        "city": [i % 3 for i in range(len(users))],
    }
    writer.write_users(polars.DataFrame(columns))
    writer.write_vocabulary("item_id", polars.Series("value", range(4)))
    writer.finish(summary={})
    return str(folder / "store")


def ranking_data(path: str, **changes: Any) -> RankingDataModule:
    given_: dict[str, Any] = {"path": path, "tasks": {"click": Task("click")}, "global_tokens": 512, "split": SPLIT}
    return RankingDataModule(**(given_ | changes))


def most_positions(data: RankingDataModule, part: Any) -> int:
    """Of all samples of a part, made into one batch: the tokens that are no candidates, and one."""
    source = data._source("all" if part == "predict" else part)
    ids, _ = source.samples(0, source.num_rows)
    if not len(ids):
        return 0
    batch = source.collate(
        ids,
        windows=[tuple(range(len(source.group_bounds) - 1))],
        epoch=0,
        denominators={"click": 1.0},
        gradient_divisor=1.0,
    )
    return max(sum(counts[:3]) for counts in batch.token_counts_B4.tolist()) + 1


@settings(deadline=None, max_examples=40)
@given(
    USERS,
    st.sampled_from(["train", "val", "test", "predict"]),
    st.one_of(
        st.none(),
        st.builds(
            Aggregation,
            window=st.just("10s"),
            max_candidates=st.integers(1, 4),
            max_static=st.integers(0, 6),
            max_realtime=st.integers(0, 5),
            history=st.sampled_from([None, Task("click")]),
        ),
    ),
    st.integers(1, 9),
    st.integers(1, 6),
    st.booleans(),
)
def test_what_is_said_at_start_is_what_the_longest_sample_has(
    tmp_path_factory: pytest.TempPathFactory,
    users: list[list[tuple[int, float]]],
    part: Any,
    aggregation: Aggregation | None,
    max_history: int,
    block: int,
    user_token: bool,
) -> None:
    path = make_store(tmp_path_factory.mktemp("store"), users)
    blocks = {} if aggregation is not None else {"max_history": max_history, "block": block}
    data = ranking_data(path, aggregation=aggregation, user_token=user_token, **blocks)
    try:
        longest = most_positions(data, part)
    except ValueError:  # the part has no sample
        longest = 0
    sample = data.longest_sample(part, above=max(longest - 1, 0))
    if not longest:
        assert sample is None
        return
    assert data.longest_sample(part, above=longest) is None
    assert sample is not None
    assert sample.positions == longest


@pytest.mark.parametrize("long_histories", ["truncate", "split"])
def test_the_longest_history_of_next_item_prediction(tmp_path: Path, long_histories: Any) -> None:
    path = make_store(tmp_path, LOG)
    made: dict[str, Any] = {"path": path, "split": LeaveOneOut(), "long_histories": long_histories}
    data = SequenceDataModule(max_length=40, **made)
    # Of 24 events the last two are targets; what is trained on predicts within the first 22.
    lengths: tuple[tuple[Any, int], ...] = (("train", 21), ("val", 22), ("test", 23), ("predict", 24))
    for part, longest in lengths:
        assert data.longest_sample(part, above=longest) is None
        sample = data.longest_sample(part, above=longest - 1)
        assert sample is not None
        assert sample.positions == longest
    assert SequenceDataModule(max_length=20, **made).longest_sample("predict", above=20) is None


# ---- under a Trainer ----------------------------------------------------------------------------------------------


def make_trainer(**changes: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    given_ = {"accelerator": "cpu", "max_steps": 1, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**(given_ | quiet | changes))


def ranking(max_length: int) -> RankingModule:
    network = MTGR(dim=8, num_layers=1, num_heads=2, max_length=max_length, dropout=0.0)
    return RankingModule(network=network, embedding_dim=4)


class NoBatches(pl.Callback):
    """Fails the test at the first batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise AssertionError("a batch was trained")


def test_a_sample_of_a_window_that_is_too_long_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    caps = Aggregation(window="10s", max_static=9, max_realtime=9)
    data = ranking_data(make_store(tmp_path, LOG), aggregation=caps)
    longest = max(most_positions(data, "train"), most_positions(data, "val"))
    with pytest.raises(MisconfigurationException) as error:
        make_trainer(callbacks=[NoBatches()]).fit(ranking(longest - 1), data)
    said = str(error.value)
    assert said.startswith(f"network.max_length={longest - 1}: the longest sample (")
    assert f"has {longest} positions: 2 of user features, {longest - 3} events, 1 for all candidates" in said
    assert f"raise it to at least {longest}" in said
    assert f"aggregation.max_static=9 and aggregation.max_realtime=9 until they add up to {longest - 4}" in said
    # What the message says helps, both ways.
    make_trainer().fit(ranking(longest), data)
    fewer = Aggregation(window="10s", max_static=longest - 4, max_realtime=0)
    make_trainer().fit(ranking(longest - 1), ranking_data(data.path, aggregation=fewer))


def test_a_block_that_is_too_long_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    data = ranking_data(make_store(tmp_path, LOG), max_history=5, block=4)
    # Two of the user, five before the block and three in it, and one for the candidates.
    assert most_positions(data, "train") == 2 + 5 + 3 + 1
    with pytest.raises(MisconfigurationException, match=r"max_history=5 and block=4 until they add up to 8$"):
        make_trainer(callbacks=[NoBatches()]).fit(ranking(10), data)
    make_trainer().fit(ranking(10), ranking_data(data.path, max_history=5, block=3))


def test_a_network_without_a_limit_takes_any_sample(tmp_path: Path) -> None:
    data = ranking_data(make_store(tmp_path, LOG), max_history=5, block=4)
    make_trainer().fit(RankingModule(network=DLRM(dim=8, dropout=0.0), embedding_dim=4), data)


def test_training_warns_of_a_longer_test_sample_and_the_test_refuses_it(tmp_path: Path) -> None:
    path = make_store(tmp_path, LOG)
    data = SequenceDataModule(path=path, max_length=40, global_tokens=128)

    def retrieval(max_length: int) -> RetrievalModule:
        return RetrievalModule(encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=max_length), top_k=[2])

    with pytest.raises(MisconfigurationException, match=r"encoder.max_length=21: .*\(val\).* has 22 tokens"):
        make_trainer(callbacks=[NoBatches()]).fit(retrieval(21), data)
    with pytest.warns(UserWarning, match=r"encoder.max_length=22: .*\(test\).* has 23 tokens.*the test will refuse"):
        make_trainer().fit(retrieval(22), data)
    with pytest.raises(MisconfigurationException, match=r"lower the data's max_length=40 to 22"):
        make_trainer().test(retrieval(22), data, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_length")
        make_trainer().fit(retrieval(23), data)
        make_trainer().fit(retrieval(9), SequenceDataModule(path=path, max_length=9, global_tokens=128))


def test_of_a_stream_only_a_warning_is_possible() -> None:
    data = StreamDataModule(folder="nowhere", num_items=4, max_length=9)
    assert data.longest_sample("train", above=9) is None
    sample = data.longest_sample("train", above=8)
    assert sample is not None
    assert (sample.positions, sample.known) == (9, False)


def test_a_part_without_a_candidate_is_not_the_business_of_this_check(tmp_path: Path) -> None:
    split = ByTime(val_from=100, test_from=100)
    data = ranking_data(make_store(tmp_path, LOG), split=split, aggregation=Aggregation(window="10s"))
    make_trainer(limit_val_batches=0).fit(ranking(60), data)
    assert np.isfinite(data._source("train").samples(0, 3)[1]).all()
