"""Aggregated samples as batches: what the plan was told is what is collated, and what the datamodule does of itself."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.batch import SequenceBatch
from lightning_gr.data import (
    Aggregation,
    EventStore,
    Field,
    LastShare,
    RankingDataModule,
    RankingSource,
    StoreWriter,
    Task,
)
from lightning_gr.data.event_checks import missing_labels
from lightning_gr.models.ranking_tokens import num_earlier

NAN = math.nan
TASKS = {"click": Task("click"), "ctcvr": Task("order"), "cvr": Task("order", where="click")}
Event = tuple[int, float, float, int]  # time, click, order, exposed
SHOWN = st.tuples(
    st.integers(0, 29), st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (NAN, 1.0), (1.0, NAN)]), st.just(1)
).map(lambda x: (x[0], *x[1], x[2]))
PAST = st.tuples(st.integers(0, 29), st.just(NAN), st.just(NAN), st.just(0))
USERS = st.lists(st.lists(st.one_of(SHOWN, SHOWN, PAST), min_size=1, max_size=12), min_size=1, max_size=5)


def make_store(folder: Path, users: list[list[Event]]) -> tuple[EventStore, list[list[Event]]]:
    users = [sorted(user, key=lambda e: e[0]) for user in users]
    fields = [Field("click", "label", "event"), Field("order", "label", "event"), Field("price", "dense", "event")]
    fields += [Field("exposed", "sparse", "event", 2), Field("city", "sparse", "user", 3)]
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=True, work=folder / "work")
    columns = {name: [[e[i] for e in u] for u in users] for i, name in enumerate(("timestamp", "click", "order"))}
    columns |= {
        "exposed": [[e[3] for e in u] for u in users],
        "item_id": [[i % 4 for i in range(len(u))] for u in users],
    }
    columns |= {
        "price": [[float(i) for i in range(len(u))] for u in users],
        "user_id": [f"u{i}" for i in range(len(users))],
    }
    columns |= {"city": [i % 3 for i in range(len(users))]}
    writer.write_users(polars.DataFrame(columns))
    writer.write_vocabulary("item_id", polars.Series("value", range(4)))
    writer.finish(summary={})
    return EventStore(folder / "store"), users


def collate(source: RankingSource, ids: Any) -> SequenceBatch:
    return source.collate(
        np.array(ids, dtype=np.int64),
        windows=[tuple(range(len(source.group_bounds) - 1))],
        epoch=0,
        denominators={task: float(n.sum()) for task, n in source.label_counts(np.array(ids, dtype=np.int64)).items()},
        gradient_divisor=1.0,
    )


def label_of(task: str, event: Event) -> float:
    _, click, order, _ = event
    return {"click": click, "ctcvr": order, "cvr": order if click == 1 else NAN}[task]


def exposures_of(user: list[Event], part: str, split: LastShare) -> list[int]:
    """Places of a user's exposures in a part, the first event of all included."""
    test = len(user) - math.floor(len(user) * split.test + 1e-9)
    val = test - math.floor(len(user) * split.val + 1e-9)
    return [i for i in (range(val) if part == "train" else range(test, len(user))) if user[i][3]]


@settings(deadline=None, max_examples=25)
@given(USERS, st.sampled_from(["train", "test"]), st.booleans(), st.integers(1, 4), st.integers(0, 4))
def test_a_batch_has_what_the_plan_was_told(
    tmp_path_factory: pytest.TempPathFactory,
    users: list[list[Event]],
    part: Any,
    requests: bool,
    most: int,
    realtime: int,
) -> None:
    store, rows = make_store(tmp_path_factory.mktemp("store"), users)
    aggregation = Aggregation(
        window=10, max_candidates=most, max_static=5, max_realtime=realtime, history=Task("click")
    )
    split = LastShare(val=0.2, test=0.4)
    source = RankingSource(
        store,
        part=part,
        split=split,
        tasks=TASKS,
        aggregation=aggregation,
        requests=requests,
        features=["price", "city"],
    )
    if not sum(len(exposures_of(user, part, split)) for user in rows):
        with pytest.raises(ValueError, match="has a candidate"):
            source.samples(0, store.num_users)
        return
    ids, tokens = source.samples(0, store.num_users)
    batch = collate(source, ids)
    assert batch.layout.lengths_B.tolist() == tokens.tolist() == source.token_counts(ids).tolist()
    assert {task: labels.num_labels for task, labels in batch.labels.items()} == batch.denominators
    kinds, times, earlier = batch.kind_T.tolist(), batch.timestamps_T.tolist(), num_earlier(batch).tolist()  # type: ignore[union-attr]
    price, actions = batch.dense["numbers"][:, 0].tolist(), batch.dense["actions"]
    labelled = {t: dict(zip(x.tokens_N.tolist(), x.values_N.tolist(), strict=True)) for t, x in batch.labels.items()}
    candidates = []
    for b, sample in enumerate(ids.tolist()):
        user, first = sample % len(rows), int(batch.layout.offsets_B1[b])
        events, last = range(first, first + int(tokens[b])), first + int(tokens[b])
        static = [t for t in events if kinds[t] == 1]
        recent = [t for t in events if kinds[t] == 2]
        assert kinds[first : first + 2] == [0, 0], "user and city"
        for token in events:
            if kinds[token] == 0:
                continue
            event = rows[user][int(price[token])]  # the price of the tests is the event's place
            assert times[token] == event[0]
            if kinds[token] == 3:
                candidates.append((user, int(price[token])))
                assert event[3] == 1
                for task in TASKS:
                    label = label_of(task, event)
                    assert labelled[task].get(token, NAN) == pytest.approx(label, nan_ok=True)
                # Shown are the static tokens and, of the real-time ones, those of a strictly earlier time.
                assert earlier[token] == sum(times[r] < event[0] for r in recent)
                assert actions[token].tolist() == [0.0] * actions.shape[1]
            else:
                assert event[3] == 0 or event[1] == 1
                for column, task in enumerate(TASKS):
                    label = label_of(task, event)
                    assert actions[token, 2 * column].item() == (0.0 if math.isnan(label) else label)
                    assert actions[token, 2 * column + 1].item() == (not math.isnan(label))
        start = times[last - 1] // 10 * 10
        assert all(times[t] < start for t in static)
        assert all(start <= times[t] < times[last - 1] for t in recent)
        if requests:
            assert len({times[t] for t in events if kinds[t] == 3}) == 1
    wanted = [(u, i) for u, user in enumerate(rows) for i in exposures_of(user, part, split)]
    assert sorted(candidates) == wanted


@settings(deadline=None, max_examples=25)
@given(USERS)
def test_blocks_count_masked_labels_too(tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]]) -> None:
    store, rows = make_store(tmp_path_factory.mktemp("store"), users)
    events = [event for user in rows for event in user]
    missing = missing_labels(store, TASKS)
    for task in TASKS:
        assert missing[task].tolist() == [i for i, event in enumerate(events) if math.isnan(label_of(task, event))]
    source = RankingSource(store, part="train", split=LastShare(), tasks=TASKS, block=3)
    ids, _ = source.samples(0, store.num_users)
    batch = collate(source, ids)
    assert {task: labels.num_labels for task, labels in batch.labels.items()} == batch.denominators


def test_blocks_refuse_labels_that_are_not_0_or_1_and_late_times_at_start(tmp_path: Path) -> None:
    wrong, _ = make_store(tmp_path / "a", [[(1, 1.0, 0.0, 1), (2, 3.0, 0.0, 1), (3, 1.0, 0.0, 1)]])
    with pytest.raises(
        ValueError, match=r"tasks\.click: the label click is 3, in .*part-00000\.parquet, row 0 \(user u0\)"
    ):
        RankingSource(wrong, part="test", split=LastShare(), tasks=TASKS)
    RankingSource(wrong, part="test", split=LastShare(), tasks={"click": Task("click", at_least=2)})
    late, _ = make_store(tmp_path / "b", [[(1, 1.0, 0.0, 1), (1_700_000_000_000, 1.0, 0.0, 1)]])
    with pytest.raises(ValueError, match=r"timestamp: 1700000000000 is beyond the year 2200"):
        RankingSource(late, part="test", split=LastShare(), tasks=TASKS)


# ---- the datamodule -----------------------------------------------------------------------------------------------

LOG: list[list[Event]] = [
    [(t, float(t % 3 == 0), float(t % 9 == 0), 1) for t in range(u, 60, 2)]
    + [(60, NAN, NAN, 1)] * (4 if u else 700)
    + [(t, NAN, NAN, 0) for t in range(u, 60, 7)]
    for u in range(4)
]


def module_of(path: Path, **changed: Any) -> RankingDataModule:
    given_: dict[str, Any] = {"path": str(path), "tasks": TASKS, "global_tokens": 400, "seed": 1}
    # Requests, which come last, are no event that a share of the events could be held out of.
    given_ |= {
        "aggregation": Aggregation(window=10, max_candidates=4, max_static=10),
        "split": LastShare(val=0, test=0.7),
    }
    return RankingDataModule(**(given_ | changed))


class Counts(pl.LightningModule):
    """Counts the candidates that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch.num_sequences, int(batch.token_counts_B4[:, 3].sum())))
        return self.weight.sum()

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> torch.Tensor:
        return batch.token_counts_B4[:, 3]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip


def test_fit_finds_samples_in_prepare_data_and_takes_every_exposure_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = make_store(tmp_path, LOG)
    data, module = module_of(store.path), Counts()
    trainer().fit(module, data)
    split = LastShare(val=0, test=0.7)
    train = [
        e for u in rows for e in u[: len(u) - math.floor(len(u) * split.test + 1e-9)] if e[3] and not math.isnan(e[1])
    ]
    assert sum(candidates for _, candidates in module.seen) == len(train)
    assert len(list((store.path / "index").glob("windows-*"))) == 3
    # Another process of the machine, after prepare_data, reads no event to find samples.
    with monkeypatch.context() as patched:
        patched.setattr(EventStore, "read_group", None)
        assert len(module_of(store.path).train_dataloader()) == len(module.seen)


def test_requests_without_labels_are_predicted_whole_however_large(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LOG)
    data = module_of(store.path, predict_part="unlabelled")
    with pytest.warns(
        UserWarning, match="eval_global_tokens=400: the largest request has 7.. tokens, so predict's batches"
    ):
        found = trainer().predict(Counts(), data)
    assert found is not None
    assert sorted(torch.cat(found).tolist()) == [4, 4, 4, 700]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = module_of(store.path, predict_part="test", global_tokens=2000)
        requests = list(small.predict_dataloader())
    # Here each exposure of the test part has a time of its own.
    assert requests
    assert all(int(n) == 1 for batch in requests for n in batch.token_counts_B4[:, 3])


def test_a_run_resumes_on_the_same_aggregation_only(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, LOG)
    state = module_of(store.path).train_dataloader().state_dict()
    module_of(store.path).train_dataloader().load_state_dict(state)
    for changed in (
        {"window": 20},
        {"max_static": 9},
        {"max_realtime": 9},
        {"max_candidates": 5},
        {"history": Task("click")},
    ):
        aggregation = Aggregation(**({"window": 10, "max_candidates": 4, "max_static": 10} | changed))
        with pytest.raises(ValueError, match="the checkpoint's data plan"):
            module_of(store.path, aggregation=aggregation).train_dataloader().load_state_dict(state)


def test_yaml_declares_it_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    store, _ = make_store(tmp_path, LOG)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RankingDataModule, "data", fail_untyped=False)
    (tmp_path / "data.yaml").write_text(
        f"data:\n  path: {store.path}\n  tasks:\n    click: {{field: click}}\n    cvr: {{field: order, where: click}}\n"
        "  aggregation: {window: 12h, max_candidates: 8, history: {field: click}}\n  predict_part: unlabelled\n"
    )
    data = parser.instantiate_classes(parser.parse_path(str(tmp_path / "data.yaml"))).data
    assert data.aggregation == Aggregation(window="12h", max_candidates=8, history=Task("click"))
    assert data.tasks["cvr"] == Task("order", where="click")
    with pytest.raises(ValueError, match="predict_part=unlabelled: scored by request; give aggregation too"):
        RankingDataModule(path="x", tasks=TASKS, predict_part="unlabelled")
    with pytest.warns(UserWarning, match="max_history=99, block=64: of no account with aggregation"):
        RankingDataModule(path="x", tasks=TASKS, max_history=99, aggregation=Aggregation())
    with pytest.raises(ValueError, match=r"part=test, requests=True: candidates of a request need aggregation"):
        RankingSource(store, part="test", split=LastShare(), tasks=TASKS, requests=True)
