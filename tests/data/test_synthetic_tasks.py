"""The synthetic cold-start log: its form, that its oracle is the truth, and that it is written whole."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gr.data import EventStore
from lightning_gr.data.synthetic_tasks import (
    NUM_KINDS,
    NUM_SEGMENTS,
    ColdStartLog,
    PlantedTasks,
    write_cold_start_log,
    write_cold_start_store,
)

SETTINGS: dict[str, Any] = {"num_tasks": 300, "num_items": 40, "mean_records": 20.0, "max_records": 35, "seed": 5}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ColdStartLog]:
    path = tmp_path_factory.mktemp("cold") / "log.csv"
    return path, write_cold_start_log(path, **SETTINGS)


def records(path: Path) -> dict[str, list[tuple[int, int, int]]]:
    """(time, raw item id, click) of each task in the order of the file."""
    tasks = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            tasks[row["user_id"]].append((int(row["timestamp"]), int(row["item_id"]), int(row["click"])))
    return tasks


def segments(path: Path) -> dict[str, int]:
    with path.with_suffix(".users.csv").open() as file:
        return {row["user_id"]: int(row["segment"]) for row in csv.DictReader(file)}


def kinds(path: Path) -> dict[int, int]:
    with path.with_suffix(".items.csv").open() as file:
        return {int(row["item_id"]): int(row["kind"]) for row in csv.DictReader(file)}


def test_form_of_the_log(written: tuple[Path, ColdStartLog]) -> None:
    path, summary = written
    tasks, kind_of = records(path), kinds(path)
    lengths = [len(x) for x in tasks.values()]
    assert list(tasks)[:2] == ["t000000", "t000001"]
    assert (summary.num_tasks, summary.num_items, summary.num_records) == (len(tasks), 40, sum(lengths))
    assert (len(tasks), min(lengths), max(lengths)) == (300, 12, 35)
    assert abs(np.mean(lengths) - 20) < 2
    for events in tasks.values():
        times = [time for time, _, _ in events]
        assert times == sorted(set(times))
    assert {item for events in tasks.values() for _, item, _ in events} == set(kind_of)
    assert set(kind_of.values()) == set(range(NUM_KINDS))
    assert list(segments(path)) == list(tasks)
    assert set(segments(path).values()) == set(range(NUM_SEGMENTS))
    assert sorted(os.listdir(path.parent)) == ["log.csv", "log.items.csv", "log.oracle.json", "log.users.csv"]


def test_a_log_is_a_function_of_its_seed(written: tuple[Path, ColdStartLog], tmp_path: Path) -> None:
    path, _ = written
    write_cold_start_log(tmp_path / "again.csv", **SETTINGS)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    write_cold_start_log(tmp_path / "other.csv", **(SETTINGS | {"seed": 6}))
    assert (tmp_path / "other.csv").read_bytes() != path.read_bytes()


def test_the_oracle_is_bayes_rule_integrated_on_a_grid(written: tuple[Path, ColdStartLog]) -> None:
    path, summary = written
    planted = PlantedTasks(num_items=40, seed=5)
    raw = sorted(kinds(path))
    assert [kinds(path)[item] for item in raw] == planted.kind_I.tolist()
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(30)
    grid = np.array(list(itertools.product(nodes, nodes)))
    prior = np.array([a * b for a, b in itertools.product(node_weights, node_weights)])
    of_segment = [
        planted.probabilities(mean + 0.95 * grid, np.tile(np.arange(40), (len(grid), 1)))  # (grid, items)
        for mean in planted.of_segment_SD
    ]
    segment_of = segments(path)
    scored: dict[int, list[tuple[float, int]]] = {shots: [] for shots in (0, 1, 5, 10)}
    for task, events in records(path).items():
        chance_of = of_segment[segment_of[task]]
        places = [raw.index(item) for _, item, _ in events]
        for shots, found in scored.items():
            posterior = prior.copy()
            for place, (_, _, click) in zip(places[:shots], events[:shots], strict=True):
                posterior *= chance_of[:, place] if click else 1 - chance_of[:, place]
            for place, (_, _, click) in zip(places[10:], events[10:], strict=True):
                found.append((float(posterior @ chance_of[:, place] / posterior.sum()), click))
    saved = json.loads(path.with_suffix(".oracle.json").read_text())["AUC"]
    for shots, found in scored.items():
        chances, clicks = np.array([x for x, _ in found]), np.array([y for _, y in found])
        up, down = chances[clicks == 1][:, None], chances[clicks == 0][None]
        truth = float(((up > down) + 0.5 * (up == down)).mean())
        assert summary.best[shots] == pytest.approx(truth, abs=0.01)
        assert saved[str(shots)] == summary.best[shots]


def test_a_few_records_tell_what_nothing_else_does(written: tuple[Path, ColdStartLog]) -> None:
    best = written[1].best
    assert 0.5 < best[0] < best[1] < best[5] < best[10]
    assert best[5] > best[0] + 0.12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tasks": 0}, "num_tasks=0: expected at least 1"),
        ({"num_items": 15}, "num_items=15: expected at least 16"),
        ({"shots": []}, r"shots=\[\]: expected numbers"),
        ({"shots": [-1, 3]}, r"shots=\[-1, 3\]: expected numbers"),
        ({"mean_records": 11}, "mean_records=11: expected 12, "),
        ({"max_records": 19}, r"mean_records=20.0: expected 12, .* max_records=19"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        write_cold_start_log(tmp_path / "log.csv", **(SETTINGS | settings))
    assert list(tmp_path.iterdir()) == []


def test_the_store_has_a_row_for_each_task(tmp_path: Path) -> None:
    small = SETTINGS | {"num_tasks": 9}
    assert write_cold_start_store(tmp_path / "cold", **small) is not None
    store = EventStore(tmp_path / "cold" / "store")
    tasks = records(tmp_path / "cold" / "log.csv")
    assert store.users.tolist() == sorted(tasks)
    assert [int(x) for x in store.lengths] == [len(tasks[name]) for name in sorted(tasks)]
    assert {field.name for field in store.fields} == {"click", "kind", "segment"}
    assert os.listdir(tmp_path) == ["cold"]


def test_of_two_who_make_the_store_at_once_the_first_stays(tmp_path: Path) -> None:
    small = SETTINGS | {"num_tasks": 9}
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold" / "of_the_first").touch()
    assert write_cold_start_store(tmp_path / "cold", **small) is None
    assert os.listdir(tmp_path) == ["cold"]
    assert os.listdir(tmp_path / "cold") == ["of_the_first"]
