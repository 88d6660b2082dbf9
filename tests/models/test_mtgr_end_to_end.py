"""MTGR from log files to scores: what `prepare`, aggregation, tokens, mask and micro-batches make of it, all together.

A candidate's score has to be that of a log in which nothing later was ever written, whatever it is scored beside.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gr import FeatureConfig
from lightning_gr.batch import SequenceBatch
from lightning_gr.cli.prepare import main as prepare
from lightning_gr.data import Aggregation, ByTime, RankingDataModule, Task
from lightning_gr.models import MTGR, RankingModule
from lightning_gr.models.ranking_tokens import candidate_places

DAY, START = 86_400, 1_700_006_400  # midnight
ITEMS = [f"i{n}" for n in range(30)]
TASKS = {"click": Task("click"), "ctcvr": Task("order"), "cvr": Task("order", where="click")}
FEATURES: list[str | FeatureConfig] = [
    FeatureConfig("segment"),
    FeatureConfig("liked", table="category", pooling="sum"),
    FeatureConfig("category", dim=8),
    FeatureConfig("price"),
    FeatureConfig("device", group="history"),
    FeatureConfig("affinity", group="candidate"),
    FeatureConfig("distance", group="candidate"),
]
Key = tuple[str, int, str]


@dataclass(frozen=True)
class Shown:
    """A row of the log of exposures."""

    user: str
    item: str
    time: int
    click: int | None
    order: int | None
    affinity: float
    distance: str
    device: str


def draw_log(seed: int = 0) -> tuple[list[Shown], list[tuple[str, str, int]]]:
    """Exposures of four days, several at a time, and purchases elsewhere."""
    rng, shown, bought = random.Random(seed), [], []
    for user in [f"u{n}" for n in range(6)]:
        for day in range(4):
            times = sorted(rng.sample(range(0, 40), 5))
            for place, time in enumerate(times):
                at = START + day * DAY + 1000 * time
                for item in rng.sample(ITEMS, rng.randint(1, 4)):
                    click = int(rng.random() < 0.5)
                    order = click * int(rng.random() < 0.5)
                    row = Shown(user, item, at, click, order, round(rng.gauss(0, 1), 2), rng.choice("abc"), "p")
                    shown.append(replace(row, device=rng.choice(["p", "t"])))
                if place % 2:
                    bought.append((user, rng.choice(ITEMS), at + rng.choice([-500, 0, 500])))
    # Users who have seen everything: vocabularies do not depend on what becomes of the others.
    shown += [
        Shown("z", item, START + n, n % 2, n % 4 // 3, 0.5, "abc"[n % 3], "pt"[n % 2]) for n, item in enumerate(ITEMS)
    ]
    shown += [replace(shown[-1], user=user) for user in ("z1", "z2")]
    bought += [("z", ITEMS[0], START + 5)]
    return shown, bought


def write_store(folder: Path, shown: list[Shown], bought: list[tuple[str, str, int]]) -> Path:
    folder.mkdir()
    cells = [[x.user, x.item, x.time, x.click, x.order, x.affinity, x.distance, x.device] for x in shown]
    header = "user_id,item_id,timestamp,click,order,affinity,distance,device"
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in cells]
    (folder / "log.csv").write_text("\n".join([header, *lines]) + "\n")
    lines = [",".join(map(str, row)) for row in bought]
    (folder / "bought.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    users = [f"u{n},s{n % 3},{'|'.join(['c1', 'c2', 'c0'][: n % 4])}" for n in range(6)]
    (folder / "users.csv").write_text(
        "\n".join(["user_id,segment,liked", *users, "z,s0,c0|c1|c2", "z1,s1,", "z2,s2,"]) + "\n"
    )
    items = [f"{item},{'|'.join(f'c{k}' for k in range(n % 4))},{n / 7}" for n, item in enumerate(ITEMS)]
    (folder / "items.csv").write_text("\n".join(["item_id,category,price", *items]) + "\n")
    (folder / "prepare.yaml").write_text(
        f"path: {folder}/log.csv\noutput: {folder}/store\nhistory: {folder}/bought.csv\n"
        "columns: {labels: [click, order], sparse: [distance, device], dense: [affinity]}\n"
        f"options:\n  users: {{path: {folder}/users.csv, sparse: [segment, liked]}}\n"
        f"  items: {{path: {folder}/items.csv, sparse: [category], dense: [price]}}\n"
    )
    assert prepare(["--config", str(folder / "prepare.yaml")]) == 0
    return folder / "store"


def data_of(store: Path, **changed: Any) -> RankingDataModule:
    aggregation: dict[str, Any] = {
        "window": "1d",
        "max_candidates": 64,
        "max_static": 12,
        "max_realtime": 40,
        "history": Task("click"),
    }
    aggregation |= {name: changed.pop(name) for name in tuple(changed) if name in aggregation}
    settings: dict[str, Any] = {
        "tasks": TASKS,
        "features": FEATURES,
        "global_tokens": 700,
        "seed": 3,
        "user_token": False,
    }
    settings |= {"split": ByTime(val_from=START + 2 * DAY, test_from=START + 3 * DAY)}
    return RankingDataModule(path=str(store), aggregation=Aggregation(**aggregation), **(settings | changed))


def module_of(data: RankingDataModule, **network: Any) -> RankingModule:
    torch.manual_seed(0)
    module = RankingModule(
        network=MTGR(**({"dim": 16, "num_layers": 2, "max_length": 96, "scale": 0.2} | network)),
        features=data.ranking_features,
        embedding_dim=8,
        embedding_std=1.0,
        num_experts=2,
        head_dim=16,
    )
    module.configure_model()
    # Parameters that begin with 0 would hide what they multiply.
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


def scored(module: RankingModule, data: RankingDataModule, batches: Any) -> Iterator[tuple[Key, tuple[float, ...]]]:
    """Of each candidate user, time and item, and its logits."""
    for batch in batches:
        assert isinstance(batch, SequenceBatch)
        assert batch.timestamps_T is not None
        with torch.no_grad():
            logits = torch.stack([module(batch)[task] for task in TASKS], 1)
        places_N = candidate_places(batch)
        rows_B, items = batch.sample_ids_B % len(data.users), batch.features["item_id"].values()
        contextual_T = (batch.kind_T == 0).cumsum(0)
        for place, row in zip(places_N.tolist(), logits.tolist(), strict=True):
            user = data.users[int(rows_B[batch.layout.sequence_T[place]])]
            item = data.item_ids[int(items[place - contextual_T[place]])]
            yield (str(user), int(batch.timestamps_T[place]), str(item)), tuple(row)


def all_scores(module: RankingModule, data: RankingDataModule) -> dict[Key, tuple[float, ...]]:
    parts = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    found = [x for part in parts for x in scored(module, data, part)]
    assert len(dict(found)) == len(found), "each candidate once"
    return dict(found)


def assert_equal(a: dict[Key, tuple[float, ...]], b: dict[Key, tuple[float, ...]], keys: Any) -> None:
    for key in keys:
        assert a[key] == pytest.approx(b[key], abs=2e-5), key


@pytest.fixture(scope="module")
def log() -> tuple[list[Shown], list[tuple[str, str, int]]]:
    return draw_log()


@pytest.fixture(scope="module")
def store(log: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("log") / "whole", *log)


@pytest.fixture(scope="module")
def module(store: Path) -> RankingModule:
    return module_of(data_of(store))


@pytest.fixture(scope="module")
def scores(store: Path, module: RankingModule) -> dict[Key, tuple[float, ...]]:
    return all_scores(module, data_of(store))


def test_every_exposure_has_one_score_and_scores_differ(log: Any, scores: dict[Key, tuple[float, ...]]) -> None:
    assert set(scores) == {(x.user, x.time, x.item) for x in log[0]}
    clicks = torch.tensor([row[0] for row in scores.values()])
    assert clicks.std() > 0.05


@pytest.mark.parametrize("changed", [{"max_candidates": 1}, {"max_candidates": 3, "global_tokens": 150}])
def test_a_score_does_not_depend_on_what_it_is_scored_beside(
    store: Path, module: RankingModule, scores: dict[Key, tuple[float, ...]], changed: dict[str, int]
) -> None:
    others = all_scores(module, data_of(store, **changed))
    assert len(others) == len(scores)
    assert_equal(others, scores, scores)


@pytest.mark.parametrize("micro_batch", [None, 7, 1000])
def test_requests_are_scored_as_training_would(
    store: Path, module: RankingModule, scores: dict[Key, tuple[float, ...]], micro_batch: int | None
) -> None:
    data = data_of(store, predict_part="test")
    module.micro_batch = micro_batch
    try:
        requests = dict(scored(module, data, data.predict_dataloader()))
    finally:
        module.micro_batch = None
    assert set(requests) == {key for key in scores if key[1] >= START + 3 * DAY}
    assert_equal(requests, scores, requests)


@pytest.mark.parametrize("history", [Task("click"), None])
def test_a_score_is_that_of_a_log_that_ends_with_its_request(
    store: Path, log: Any, tmp_path: Path, history: Task | None
) -> None:
    """Later events are gone, those at the time itself have other labels, and other candidates other features."""
    shown, bought = log
    module, scores = None, {}
    for number, (user, time) in enumerate(sorted({(x.user, x.time) for x in shown if x.user[0] != "z"})[3::19]):
        if module is None:
            whole = data_of(store, history=history)
            module = module_of(whole)
            scores = all_scores(module, whole)
        other = {0: 1, 1: 0, None: None}
        kept = [x for x in shown if x.user[0] == "z" or (x.user == user and x.time <= time)]
        kept = [
            replace(x, click=other[x.click], order=0, device="t") if x.user == user and x.time == time else x
            for x in kept
        ]
        past = [x for x in bought if x[0][0] == "z" or (x[0] == user and x[2] < time)]
        store_cut = write_store(tmp_path / f"cut{number}", kept, past)
        cut = data_of(store_cut, history=history, split=ByTime(val_from=START + 9 * DAY, test_from=START + 10 * DAY))
        keys = {(x.user, x.time, x.item) for x in shown if (x.user, x.time) == (user, time)}
        assert_equal(dict(scored(module, cut, cut.train_dataloader())), scores, keys)
    assert number > 3


def test_what_happens_before_does_matter(
    store: Path, log: Any, tmp_path: Path, module: RankingModule, scores: Any
) -> None:
    shown, bought = log
    user, time = "u1", max(x.time for x in shown if x.user == "u1")
    before = max(x.time for x in shown if x.user == "u1" and x.time < time and x.click)
    changed = [replace(x, click=0, order=0) if (x.user, x.time) == (user, before) else x for x in shown]
    others = all_scores(module, data_of(write_store(tmp_path / "other", changed, bought)))
    keys = [key for key in scores if key[:2] == (user, time)]
    assert keys
    assert all(abs(others[key][0] - scores[key][0]) > 1e-4 for key in keys)


def test_a_cross_feature_is_of_its_candidate_alone(
    store: Path, log: Any, tmp_path: Path, module: RankingModule, scores: Any
) -> None:
    shown, bought = log
    at = next(n for n, x in enumerate(shown) if x.click and x.time > START + 2 * DAY)
    changed = [*shown[:at], replace(shown[at], affinity=9.0, distance="c"), *shown[at + 1 :]]
    others = all_scores(module, data_of(write_store(tmp_path / "other", changed, bought)))
    own = (shown[at].user, shown[at].time, shown[at].item)
    assert abs(others[own][0] - scores[own][0]) > 1e-3
    assert_equal(others, scores, set(scores) - {own})
