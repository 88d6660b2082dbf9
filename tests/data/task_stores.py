"""Stores whose rows are tasks, with every record an item of its own, and the same as lists; for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from lightning_gr.batch import SequenceBatch
from lightning_gr.data import EventStore, Field, StoreWriter


@dataclass(frozen=True)
class Record:
    """A record: its item is its name; labels may be missing."""

    item: int
    time: int
    click: float | None
    like: float | None


@dataclass(frozen=True)
class Taken:
    """A sequence, taken out of a batch again: items of its history and candidates, and the labels by item."""

    sample: int
    shots: int
    tasks: tuple[int, ...]
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    click: tuple[tuple[int, float], ...]


def make_records(lengths: Sequence[int], *, without: Sequence[int] = ()) -> list[list[Record]]:
    """Tasks of so many records, the items counted up; those in `without` have no click."""
    tasks, item = [], 0
    for length in lengths:
        records = []
        for place in range(length):
            click = None if item in without else float(item % 3 == 0)
            records.append(Record(item, 10 * place, click, float(item % 2)))
            item += 1
        tasks.append(records)
    return tasks


def write_tasks(folder: Path, tasks: list[list[Record]], *, group: int = 3, times: bool = True) -> EventStore:
    """The store, with row groups of `group` tasks."""
    fields = (Field("click", "label", "event"), Field("like", "label", "event"), Field("city", "sparse", "user", 4))
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=times, work=folder / "work")
    for first in range(0, len(tasks), group):
        part = tasks[first : first + group]
        nan = float("nan")
        columns = {
            "item_id": [[r.item for r in task] for task in part],
            "timestamp": [[r.time for r in task] for task in part],
            "click": [[nan if r.click is None else r.click for r in task] for task in part],
            "like": [[nan if r.like is None else r.like for r in task] for task in part],
        }
        schema = {"item_id": pl.List(pl.Int64), "timestamp": pl.List(pl.Int64)}
        schema |= {"click": pl.List(pl.Float32), "like": pl.List(pl.Float32)}
        rows = range(first, first + len(part))
        frame = pl.DataFrame({"user_id": [f"task {i}" for i in rows]})
        frame = frame.hstack(pl.DataFrame(columns, schema=schema)).with_columns(city=pl.Series([i % 4 for i in rows]))
        writer.write_users(frame)
    total = sum(map(len, tasks))
    writer.write_vocabulary("item_id", pl.Series("value", range(max(total, 1))))
    writer.write_items(pl.DataFrame({"item_id": range(max(total, 1))}))
    writer.finish(summary={})
    return EventStore(folder / "store")


def sequences_of(batch: SequenceBatch, *, label: str = "click") -> list[Taken]:
    """The sequences of a batch but padding, with the raw items of their tokens."""
    assert batch.shots_B is not None
    by_feature = {name: batch.features[name] for name in batch.features.keys()}  # noqa: SIM118 - no dict
    items = by_feature["item_id"].values().tolist()
    offsets = by_feature["item_id"].offsets().tolist()
    tokens = batch.layout.offsets_B1.tolist()
    labels = batch.labels[label]
    found = []
    for b, (sample, shots) in enumerate(zip(batch.sample_ids_B.tolist(), batch.shots_B.tolist(), strict=True)):
        if sample == -1:
            continue
        contextual, static, realtime, candidates = batch.token_counts_B4[b].tolist()
        own = items[offsets[b] : offsets[b + 1]]
        assert (realtime, len(own)) == (0, static + candidates)
        first = tokens[b] + contextual + static
        labelled = [
            (own[static + at - first], value)
            for at, value in zip(labels.tokens_N.tolist(), labels.values_N.tolist(), strict=True)
            if tokens[b] <= at < tokens[b + 1]
        ]
        found.append(
            Taken(
                sample=sample,
                shots=shots,
                tasks=tuple(by_feature["user_id"].to_dense()[b].tolist()),
                history=tuple(own[:static]),
                candidates=tuple(own[static:]),
                click=tuple(labelled),
            )
        )
    return found
