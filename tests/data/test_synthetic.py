"""The synthetic log: its form, and that its oracle is the truth."""

from __future__ import annotations

import csv
import json
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gr.data.synthetic import Clicks, MarkovItems, best_auc, write_synthetic_log

SETTINGS: dict[str, Any] = {"num_users": 4000, "num_items": 60, "mean_length": 9.0, "max_length": 40, "seed": 5}


def histories(path: Path) -> dict[str, list[tuple[int, int]]]:
    """(time, raw item id) of each user's events in the order of the file."""
    users = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            users[row["user_id"]].append((int(row["timestamp"]), int(row["item_id"])))
    return users


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("synthetic") / "events.csv"
    return path, write_synthetic_log(path, **SETTINGS)


def test_form_of_the_log(written: tuple[Path, Any]) -> None:
    path, summary = written
    users = histories(path)
    lengths = [len(events) for events in users.values()]
    assert list(users)[:2] == ["u000000", "u000001"]
    assert (summary.num_users, summary.num_events) == (len(users), sum(lengths)) == (4000, sum(lengths))
    assert (min(lengths), max(lengths)) == (5, 40)
    assert abs(np.mean(lengths) - 9) < 1.5
    assert np.mean(lengths) > 1.1 * np.median(lengths)
    for events in users.values():
        times = [time for time, _ in events]
        assert times == sorted(set(times))
    items = {item for events in users.values() for _, item in events}
    assert len(items) == 60
    assert min(items) > 60
    assert sorted(os.listdir(path.parent)) == ["events.csv", "events.oracle.json"]


def test_a_log_is_a_function_of_its_seed(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = written
    write_synthetic_log(tmp_path / "again.csv", **SETTINGS)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    write_synthetic_log(tmp_path / "other.csv", **(SETTINGS | {"seed": 6}))
    assert (tmp_path / "other.csv").read_bytes() != path.read_bytes()


class Truth:
    """The planted model said once more, one history at a time, from the tables and the documented settings."""

    def __init__(self, oracle: dict[str, Any]) -> None:
        self.settings = oracle["settings"]
        chain = MarkovItems(**{name: self.settings[name] for name in ("num_items", "first", "second", "seed", "zipf")})
        self.tables = [table.tolist() for table in chain.successors]
        self.popularity = chain.popularity.tolist()
        by_rank = sorted(self.popularity, reverse=True)
        assert by_rank[0] / by_rank[9] == pytest.approx(10 ** self.settings["zipf"])

    def probabilities(self, last: int, before: int) -> list[float]:
        s = self.settings
        p = [(1 - s["first"] - s["second"]) * share for share in self.popularity]
        for weight, successors in ((s["first"], self.tables[0][last]), (s["second"], self.tables[1][before])):
            for item, share in zip(successors, s["successor_shares"], strict=True):
                p[item] += weight * share
        return p

    def draw(self, last: int, before: int, rng: random.Random) -> int:
        s = self.settings
        kind = rng.random()
        if kind < s["second"]:
            return rng.choices(self.tables[1][before], s["successor_shares"])[0]
        if kind < s["second"] + s["first"]:
            return rng.choices(self.tables[0][last], s["successor_shares"])[0]
        return rng.choices(range(s["num_items"]), self.popularity)[0]


def rank_by(scores: list[float], target: int) -> int:
    return 1 + sum(score > scores[target] for score in scores)


def within_error(values: list[float], expected: float) -> bool:
    return abs(float(np.mean(values)) - expected) < 4 * float(np.std(values)) / len(values) ** 0.5


@pytest.mark.parametrize(("split", "back"), [("test", 1), ("val", 2)])
def test_oracle_is_what_the_ideal_scorer_reaches(written: tuple[Path, Any], split: str, back: int) -> None:
    path, summary = written
    oracle = json.loads(path.with_suffix(".oracle.json").read_text())
    truth, rng = Truth(oracle), random.Random(1)
    users = [[item for _, item in events] for events in histories(path).values()]
    rows = {item: row for row, item in enumerate(sorted({item for events in users for item in events}))}
    held_out: dict[str, list[float]] = {"HR@10": [], "NDCG@10": []}
    sampled: dict[str, list[float]] = {"HR@10": [], "NDCG@10": []}
    exact: dict[str, list[float]] = {"HR@10": [], "NDCG@10": []}
    for events in users:
        target, last, before = (rows[item] for item in reversed(events[-back - 2 : len(events) - back + 1]))
        scores = truth.probabilities(last, before)
        assert sum(scores) == pytest.approx(1.0)
        top = sorted(scores, reverse=True)[:10]
        exact["HR@10"].append(sum(top))
        exact["NDCG@10"].append(sum(p / np.log2(rank + 1) for rank, p in enumerate(top, start=1)))
        for metrics, item in ((held_out, target), (sampled, truth.draw(last, before, rng))):
            rank = rank_by(scores, item)
            metrics["HR@10"].append(float(rank <= 10))
            metrics["NDCG@10"].append(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
    for name in held_out:
        best = oracle[split][name]
        assert np.mean(exact[name]) == pytest.approx(best, rel=1e-9)
        # Ranks among ties differ by a hair of probability; the sampling error is far wider.
        assert within_error(held_out[name], best)
        assert within_error(sampled[name], best)
    if split == "test":
        best = {"HR@10": summary.best_hr, "NDCG@10": summary.best_ndcg, "click AUC": summary.best_auc}
        assert best.items() <= oracle["test"].items()
    # A scorer that knows less does worse, so the agreement above is no accident.
    popular = [float(rank_by(truth.popularity, rows[events[-back]]) <= 10) for events in users]
    assert np.mean(popular) < oracle[split]["HR@10"] - 0.2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.csv"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic_log(path, num_users=5, num_items=20, mean_length=6)
    assert os.listdir(tmp_path) == ["events.csv"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_items", 9),
        ("num_users", 0),
        ("mean_length", 3.0),
        ("mean_length", 301.0),
        ("first", 0.9),
        ("second", -0.1),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=setting) as error:
        write_synthetic_log(tmp_path / "events.csv", **{setting: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def observed(planted: Clicks, items: Any, clicks: list[int]) -> float:
    """Probability of the last click when the taste is known by the clicks before alone: Bayes' rule on a fine grid."""
    tastes = np.linspace(-6, 6, 2001) * 0.7
    weight = np.exp(-0.5 * (tastes / 0.7) ** 2)
    for step, (item, click) in enumerate(zip(items, clicks, strict=True)):
        last = np.full(2001, items[step - 1] if step else -1)
        p = planted.probabilities(tastes, np.full(2001, item), last)
        if step == len(items) - 1:
            return float((weight * p).sum() / weight.sum())
        weight = weight * (p if click else 1 - p)
    raise AssertionError


def test_clicks_have_the_planted_probability_and_the_oracle_ranks_them_best(written: tuple[Path, Any]) -> None:
    path, summary = written
    chain = MarkovItems(num_items=60, first=0.6, second=0.25, seed=5)
    planted = Clicks(chain=chain, seed=5)
    raw: list[int] = []
    users = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            users[row["user_id"]].append((int(row["item_id"]), int(row["click"])))
            raw.append(int(row["item_id"]))
    number = {item: i for i, item in enumerate(sorted(set(raw)))}
    tastes = planted.tastes(0, len(users))
    chances, clicks, of_targets = [], [], []
    for taste, events in zip(tastes, users.values(), strict=True):
        items = np.array([number[item] for item, _ in events])
        p = planted.probabilities(np.full(len(items), taste), items, np.concatenate([[-1], items[:-1]]))
        chances += p.tolist()
        clicks += [click for _, click in events]
        of_targets.append((observed(planted, items, [click for _, click in events]), events[-1][1]))
    assert within_error((np.array(clicks) - np.array(chances)).tolist(), 0.0)
    for low in np.arange(0.0, 1.0, 0.2):  # calibrated in every range
        chosen = (np.array(chances) >= low) & (np.array(chances) < low + 0.2)
        assert within_error((np.array(clicks)[chosen] - np.array(chances)[chosen]).tolist(), 0.0)
    p, y = (np.array(column) for column in zip(*of_targets, strict=True))
    wins = (p[y == 1][:, None] > p[y == 0]).mean() + 0.5 * (p[y == 1][:, None] == p[y == 0]).mean()
    assert best_auc(p) == pytest.approx(summary.best_auc, abs=1e-6)
    assert abs(wins - summary.best_auc) < 0.03
    oracle = json.loads(path.with_suffix(".oracle.json").read_text())
    assert oracle["test"]["click AUC"] == summary.best_auc
    assert oracle["test"]["click AUC as drawn"] == pytest.approx(wins, abs=1e-4)


@pytest.mark.parametrize("p", [[0.1, 0.9], [0.5, 0.5, 0.5], [0.2, 0.2, 0.7, 0.9], [0.3]])
def test_best_auc_counts_every_pair(p: list[float]) -> None:
    won = pairs = 0.0
    for i, clicked in enumerate(p):
        for j, missed in enumerate(p):
            if i != j:
                pairs += clicked * (1 - missed)
                won += clicked * (1 - missed) * (1.0 if clicked > missed else 0.5 if clicked == missed else 0.0)
    assert best_auc(np.array(p)) == pytest.approx(won / pairs if pairs else 0.5)


def test_blocks_of_users_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gr.data.synthetic._BLOCK_USERS", 100)
    write_synthetic_log(tmp_path / "log.csv", **(SETTINGS | {"num_users": 250}))
    users = histories(tmp_path / "log.csv")
    assert list(users) == [f"u{i:06d}" for i in range(250)]
    sequences = [tuple(item for _, item in events) for events in users.values()]
    assert len(set(sequences)) == 250  # no block repeats another
