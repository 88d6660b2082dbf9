"""Aggregated ranking samples under every balancing mode: dealt out over ranks and micro-steps, one process's run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.data import Aggregation, LastShare, RankingDataModule, RankingSource, Task
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.models import MTGR, RankingModule
from tests.data.test_feature_config import TASKS, make_store
from tests.models.test_ranking_tokens import LEARNED, many_users
from tests.more import more
from tests.plugins.test_laws_of_training import Recorder, difference, make_trainer, samples
from tests.plugins.test_laws_of_training import state as state_of_dense_and_static

pytestmark = pytest.mark.dist

WINDOWS = Aggregation(window="5s", max_candidates=3, max_static=4, max_realtime=2, history=Task("click"))
SPLIT = LastShare(val=0.2, test=0.2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_store(tmp_path_factory.mktemp("ranking"), many_users(0)).path)


def make_data(store: str, kind: str) -> RankingDataModule:
    return RankingDataModule(
        path=store,
        tasks=TASKS,
        features=list(LEARNED),
        aggregation=WINDOWS,
        split=SPLIT,
        global_tokens=70,
        raw_ids=kind == "dynamic",
    )


def make_module(kind: str, features: Any = None) -> RankingModule:
    pl.seed_everything(11)
    return RankingModule(
        network=MTGR(dim=8, num_layers=1, num_heads=2, max_length=16, dropout=0.0),
        features=features,
        embedding_dim=8,
        dynamic_tables=DynamicTables() if kind == "dynamic" else None,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3),
    )


def state(module: Any) -> dict[str, Any]:
    """Dense and static weights, and this rank's rows of each dynamic table."""
    found = {name: x for name, x in state_of_dense_and_static(module).items() if not name.startswith("row ")}
    for place, table in enumerate(getattr(getattr(module.tables, "engine", None), "tables", [])):
        for number, name in enumerate(table.key_names):
            rows, _ = table.rows_of(number)
            for key, values, own in zip(rows.ids_N.tolist(), rows.values_ND, rows.state_NS, strict=True):
                found[f"row {place} {name} {key}"] = torch.cat([values, own]).double().numpy()
    return found


def balanced(world_size: int, record: Recorder, balancing: dict[str, Any], **settings: Any) -> Any:
    from lightning_gr.balancing.settings import Balancing

    return make_trainer(world_size, record, strategy={"balancing": Balancing(**balancing)}, **settings)


# ---- planned ------------------------------------------------------------------------------------------------------


def train_planned(world_size: int, store: str, kind: str, balancing: dict[str, Any]) -> dict[str, Any]:
    module, record = make_module(kind), Recorder()
    trainer = balanced(world_size, record, balancing, max_epochs=2)
    data = make_data(store, kind)
    trainer.fit(module, datamodule=data)
    taken = record.taken() | {"state": state(module)}
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    return taken | {"tested": tested}


@pytest.mark.parametrize(("kind", "tokens_per_rank"), [*more(("static", None), ("dynamic", None)), ("dynamic", 26)])
def test_planned_windows_on_two_ranks_are_those_of_one(
    gloo: Any, store: str, kind: str, tokens_per_rank: int | None
) -> None:
    one = gloo(1).run(train_planned, 1, store, kind, {})
    many = gloo(2).run(train_planned, 2, store, kind, {"tokens_per_rank": tokens_per_rank})
    assert len(one[0]["losses"]) > 4
    assert samples(many) == samples(one)
    if tokens_per_rank is not None:
        assert many[0]["batches"] > len(many[0]["losses"]), "steps of several micro-steps"
    assert difference(many, one) <= 1e-4
    for rank in many:
        assert rank["tested"] == pytest.approx(one[0]["tested"], rel=1e-4)
    # Every window of the training part, each once an epoch.
    source = make_data(store, kind)._source("train")
    ids, _ = source.samples(0, source.num_rows)
    assert sum(samples(many), Counter()) == Counter(ids.tolist() * 2)


# ---- local and exchange: each rank has windows of its own --------------------------------------------------------


def make_batch(source: RankingSource, ids: Any) -> Any:
    ids = np.array(ids, dtype=np.int64)
    return source.collate(
        ids,
        windows=[tuple(range(len(source.group_bounds) - 1))],
        epoch=0,
        denominators={task: float(count.sum()) for task, count in source.label_counts(ids).items()},
        gradient_divisor=1.0,
    )


def own_ids(source: RankingSource, rank: int, world_size: int, budget: int | None) -> list[list[int]]:
    """A rank's samples, cut into its batches: by number, and cut again by a token budget where there is one."""
    ids, _ = source.samples(0, source.num_rows)
    ids = ids[rank::world_size][: len(ids) // world_size - 5 * rank]  # some ranks have fewer
    batches = [ids[first : first + 3 + rank].tolist() for first in range(0, len(ids), 3 + rank)]
    if budget is None:
        return batches
    from lightning_gr.balancing.token_budget import token_budget_batches

    cut = token_budget_batches((make_batch(source, batch) for batch in batches), budget)
    return [batch.sample_ids_B.tolist() for batch in cut]


def train_streams(
    world_size: int, store: str, kind: str, balancing: dict[str, Any] | None, feed: tuple[int, int | None]
) -> dict[str, Any]:
    import torch.distributed as dist

    data = make_data(store, kind)
    source, (ranks, budget) = data._source("train"), feed
    if balancing is None:
        streams = [own_ids(source, rank, ranks, budget) for rank in range(ranks)]
        steps = [sum((own[i] for own in streams if i < len(own)), []) for i in range(max(map(len, streams)))]
    else:
        steps = own_ids(source, dist.get_rank(), world_size, None)
    record, module = Recorder(), make_module(kind, data.ranking_features)
    trainer = balanced(world_size, record, balancing or {}, max_epochs=2, use_distributed_sampler=False)
    trainer.fit(module, torch.utils.data.DataLoader([make_batch(source, ids) for ids in steps], batch_size=None))
    return record.taken() | {"state": state(module)}


@pytest.mark.parametrize("mode", ["local", "exchange"])
@pytest.mark.parametrize(("kind", "budget"), [*more(("static", None), ("dynamic", None)), ("dynamic", 30)])
def test_own_streams_of_windows_equal_one_process_fed_their_union(
    gloo: Any, store: str, mode: str, kind: str, budget: int | None
) -> None:
    one = gloo(1).run(train_streams, 1, store, kind, None, (2, budget))
    balancing = {"mode": mode, "tokens_per_rank": budget}
    many = gloo(2).run(train_streams, 2, store, kind, balancing, (2, budget))
    assert len(one[0]["losses"]) > 6
    assert samples(many) == samples(one)
    if mode == "exchange":
        own = [set(sum(own_ids(make_data(store, kind)._source("train"), rank, 2, None), [])) for rank in range(2)]
        moved = [set(sum(many[rank]["samples"], [])) - own[rank] for rank in range(2)]
        assert any(moved), "samples with all their features changed rank"
    assert difference(many, one) <= 1e-4


def refused(store: str, mode: str) -> str:
    trainer = balanced(1, Recorder(), {"mode": mode}, max_epochs=1)
    try:
        trainer.fit(make_module("static"), datamodule=make_data(store, "static"))
    except MisconfigurationException as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", ["local", "exchange"])
def test_a_mode_for_own_streams_is_refused_for_planned_windows(
    gloo: Any, store: str, mode: str, tmp_path: Path
) -> None:
    (said,) = gloo(1).run(refused, store, mode)
    assert mode in said
    assert "plan" in said
