"""The synthetic exposure log: its form, that labels have the planted probability, and that its oracle is the truth."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_gr.data.planted_exposures import PlantedExposures, gauc_as_drawn
from lightning_gr.data.synthetic_exposures import DAY, FIRST_TIME, write_exposure_log

SETTINGS: dict[str, Any] = {"num_users": 300, "num_items": 60, "mean_exposures": 60.0, "days": 8, "seed": 5}
FACTORS = {"": (1.0, 1.0), " without sequence": (0.0, 1.0), " without cross": (1.0, 0.0)}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def by_user(path: Path) -> dict[str, list[dict[str, str]]]:
    users = defaultdict(list)
    for row in rows_of(path):
        users[row["user_id"]].append(row)
    return users


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("exposures") / "log.csv"
    return path, write_exposure_log(path, **SETTINGS)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Truth:
    """The planted probabilities said once more, one exposure at a time, from the files and the tables."""

    def __init__(self, path: Path) -> None:
        self.planted = PlantedExposures(num_items=60, sequence=1.0, cross=1.0, seed=5)
        self.users = {row["user_id"]: row for row in rows_of(path.with_suffix(".users.csv"))}
        items = rows_of(path.with_suffix(".items.csv"))
        self.items = {row["item_id"]: (number, row) for number, row in enumerate(items)}

    def chances(
        self, row: dict[str, str], clicks: list[tuple[int, int]], sequence: float, cross: float
    ) -> tuple[float, float]:
        """Of a click, and of an order after one, given the (time, category) of all clicks before."""
        planted, user = self.planted, self.users[row["user_id"]]
        number, item = self.items[row["item_id"]]
        category, price, spend = int(item["category"]), float(item["price"]), float(user["spend"])
        affinity, distance = float(row["affinity"]), planted.distance[int(row["distance"])]
        before = planted.after_before[clicks[-2][1], category] if len(clicks) > 1 else 0.0
        last = 0.0
        if clicks:
            fresh = int(row["timestamp"]) - clicks[-1][0] <= 3600
            last = (1.0 if fresh else 0.4) * planted.after_last[clicks[-1][1], category]
        click = -2.4 + planted.segment[int(user["segment"])] + 0.4 * spend + planted.quality[number] - 0.3 * price
        click += cross * (0.8 * affinity + distance) + sequence * (last + before)
        order = -1.0 + 0.3 * spend - 0.3 * price + planted.order_quality[number]
        order += cross * (0.6 * affinity + 0.5 * distance) + sequence * 0.5 * before
        return logistic(click), logistic(order)


@pytest.fixture(scope="module")
def judged(written: tuple[Path, Any]) -> list[dict[str, Any]]:
    """Every exposure with its labels and probabilities."""
    path, _ = written
    truth, found = Truth(path), []
    for user, rows in by_user(path).items():
        clicks: list[tuple[int, int]] = []
        for row in rows:
            one: dict[str, Any] = {"user": user, "time": int(row["timestamp"])}
            one |= {"click": int(row["click"]), "ctcvr": int(row["order"])}
            for name, factors in FACTORS.items():
                click, order = truth.chances(row, clicks, *factors)
                one |= {f"click{name}": click} if name else {"p_click": click, "p_order": order}
                one |= {f"ctcvr{name}": click * order} if name else {}
            found.append(one)
            if one["click"]:
                clicks.append((one["time"], int(truth.items[row["item_id"]][1]["category"])))
    return found


def test_form_of_the_log(written: tuple[Path, Any]) -> None:
    path, summary = written
    users = by_user(path)
    lengths = [len(rows) for rows in users.values()]
    assert list(users)[:2] == ["u0000000", "u0000001"]
    assert (summary.num_users, summary.num_exposures) == (len(users), sum(lengths)) == (300, sum(lengths))
    assert abs(np.mean(lengths) - 60) < 8
    for rows in users.values():
        times = [int(row["timestamp"]) for row in rows]
        assert times == sorted(set(times))
        assert times[0] >= FIRST_TIME
        assert times[-1] < FIRST_TIME + 8 * DAY
    gaps = np.concatenate([np.diff([int(row["timestamp"]) for row in rows]) for rows in users.values()])
    assert np.mean(gaps <= 30) > 0.8  # sessions
    categories = {int(row["category"]) for row in rows_of(path.with_suffix(".items.csv"))}
    assert categories == set(range(8))
    assert {int(row["distance"]) for rows in users.values() for row in rows} == set(range(8))
    assert summary.test_from == FIRST_TIME + 6 * DAY
    assert summary.val_from == FIRST_TIME + 5 * DAY
    assert sorted(os.listdir(path.parent)) == [
        "log.csv",
        "log.items.csv",
        "log.oracle.json",
        "log.prepare.yaml",
        "log.users.csv",
    ]


def test_a_log_is_a_function_of_its_seed(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = written
    write_exposure_log(tmp_path / "log.csv", **SETTINGS)
    for name in ("log.csv", "log.users.csv", "log.items.csv", "log.oracle.json"):
        assert (tmp_path / name).read_bytes() == (path.parent / name).read_bytes()
    write_exposure_log(tmp_path / "log.csv", **(SETTINGS | {"seed": 6}))
    assert (tmp_path / "log.csv").read_bytes() != path.read_bytes()


def within_error(values: Any, expected: float) -> bool:
    return abs(float(np.mean(values)) - expected) < 4 * float(np.std(values)) / len(values) ** 0.5


def test_clicks_and_orders_have_the_planted_probability(judged: list[dict[str, Any]]) -> None:
    click, order = (np.array([row[name] for row in judged]) for name in ("click", "ctcvr"))
    p_click, p_order = (np.array([row[name] for row in judged]) for name in ("p_click", "p_order"))
    assert np.all(order <= click)
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)):  # calibrated in every range
        chosen = (p_click >= low) & (p_click < high)
        assert within_error((click - p_click)[chosen], 0.0)
        chosen = (p_order >= low) & (p_order < high) & (click == 1)
        assert within_error((order - p_order)[chosen], 0.0)
    # Who leaves out a part of the signal is not calibrated, so the agreement above is no accident.
    for name in FACTORS:
        if name:
            p = np.array([row[f"click{name}"] for row in judged])
            chosen = p_click > p + 0.05
            assert not within_error((click - p)[chosen], 0.0)


def auc(scores: list[float], labels: list[int]) -> float | None:
    hits = [s for s, y in zip(scores, labels, strict=True) if y]
    misses = [s for s, y in zip(scores, labels, strict=True) if not y]
    if not (hits and misses):
        return None
    return sum((h > m) + (h == m) / 2 for h in hits for m in misses) / (len(hits) * len(misses))


def grouped(scores: list[float], labels: list[int], users: list[Any]) -> float:
    of_users = defaultdict(list)
    for score, label, user in zip(scores, labels, users, strict=True):
        of_users[user].append((score, label))
    total = weight = 0.0
    for rows in of_users.values():
        own = auc([s for s, _ in rows], [y for _, y in rows])
        if own is not None:
            total, weight = total + own * len(rows), weight + len(rows)
    return total / weight if weight else 0.5


@pytest.mark.parametrize("part", ["val", "test"])
def test_oracle_is_what_the_ideal_scorer_reaches(
    part: str, written: tuple[Path, Any], judged: list[dict[str, Any]]
) -> None:
    path, summary = written
    oracle = json.loads(path.with_suffix(".oracle.json").read_text())[part]
    begin, end = (summary.val_from, summary.test_from) if part == "val" else (summary.test_from, 1 << 40)
    rows = [row for row in judged if begin <= row["time"] < end]
    users = [row["user"] for row in rows]
    assert oracle["exposures"] == len(rows) > 300
    for task in ("click", "ctcvr"):
        labels = [row[task] for row in rows]
        for name in FACTORS:
            scores = [row[f"{task}{name}"] for row in rows] if name else [row["p_click"] for row in rows]
            if task == "ctcvr" and not name:
                scores = [row["p_click"] * row["p_order"] for row in rows]
            assert oracle[f"{task} AUC as drawn{name}"] == pytest.approx(auc(scores, labels), abs=1e-9)
            assert oracle[f"{task} GAUC as drawn{name}"] == pytest.approx(grouped(scores, labels, users), abs=1e-9)
        assert oracle[f"{task} AUC as drawn"] > oracle[f"{task} AUC as drawn without sequence"] + 0.02
        assert oracle[f"{task} AUC as drawn"] > oracle[f"{task} AUC as drawn without cross"] + 0.02
        assert abs(oracle[f"{task} AUC"] - oracle[f"{task} AUC as drawn"]) < 0.05
        if part == "test":
            assert summary.best[f"{task} GAUC"] == oracle[f"{task} GAUC as drawn"]


def test_gauc_counts_the_pairs_of_each_user() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        count = int(rng.integers(1, 40))
        scores, labels = rng.integers(0, 5, count) / 4, rng.random(count) < 0.4
        users = rng.integers(0, 6, count)
        expected = grouped(scores.tolist(), labels.tolist(), users.tolist())
        assert gauc_as_drawn(scores, labels, users) == pytest.approx(expected, abs=1e-12)


def test_without_a_signal_its_part_counts_nothing(tmp_path: Path) -> None:
    write_exposure_log(tmp_path / "log.csv", **(SETTINGS | {"sequence": 0.0}))
    test = json.loads((tmp_path / "log.oracle.json").read_text())["test"]
    assert test["click AUC as drawn without sequence"] == test["click AUC as drawn"]
    assert test["click AUC as drawn without cross"] < test["click AUC as drawn"] - 0.02


def test_blocks_of_users_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gr.data.synthetic_exposures._BLOCK_USERS", 20)
    write_exposure_log(tmp_path / "log.csv", **(SETTINGS | {"num_users": 50}))
    users = by_user(tmp_path / "log.csv")
    assert list(users) == [f"u{i:07d}" for i in range(50)]
    assert len(rows_of(tmp_path / "log.users.csv")) == 50
    sequences = {tuple(row["item_id"] for row in rows) for rows in users.values()}
    assert len(sequences) == 50  # no block repeats another


def test_a_store_is_made_by_the_settings_beside_the_log(tmp_path: Path) -> None:
    from lightning_gr.cli import prepare
    from lightning_gr.data import EventStore

    write_exposure_log(tmp_path / "log.csv", **(SETTINGS | {"num_users": 20, "request_size": 3}))
    assert prepare.main(["--config", str(tmp_path / "log.prepare.yaml"), "--output", str(tmp_path / "store")]) == 0
    store = EventStore(tmp_path / "store")
    fields = {(field.name, field.per, field.kind) for field in store.fields}
    assert fields == {
        ("click", "event", "label"),
        ("order", "event", "label"),
        ("affinity", "event", "dense"),
        ("distance", "event", "sparse"),
        ("segment", "user", "sparse"),
        ("spend", "user", "dense"),
        ("category", "item", "sparse"),
        ("price", "item", "dense"),
    }
    users = by_user(tmp_path / "log.csv")
    assert store.lengths.tolist() == [len(rows) for rows in users.values()]
    for rows in users.values():  # a request last, at one time, without labels
        assert {row["timestamp"] for row in rows[-3:]} == {str(FIRST_TIME + 8 * DAY)}
        assert [row["click"] + row["order"] for row in rows[-3:]] == ["", "", ""]
        assert all(row["click"] and row["order"] for row in rows[:-3])
    settings = yaml.safe_load((tmp_path / "log.prepare.yaml").read_text())
    assert settings["path"] == str(tmp_path / "log.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_exposure_log(path, **(SETTINGS | {"num_users": 5}))
    assert os.listdir(tmp_path) == ["log.csv"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_items", 7),
        ("num_users", 0),
        ("mean_exposures", 3.0),
        ("mean_exposures", 801.0),
        ("val_days", 0),
        ("test_days", 7),
        ("request_size", -1),
        ("sequence", float("nan")),
        ("cross", float("inf")),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=setting) as error:
        write_exposure_log(tmp_path / "log.csv", **(SETTINGS | {setting: value}))
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
