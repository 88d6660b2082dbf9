"""TableMonitor: its values are those of dictionaries that do what tables do, on any number of ranks and groups."""

from __future__ import annotations

import csv
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_gr.callbacks import TableMonitor
from lightning_gr.observability import table_counts

STEPS, EVERY, SAMPLES = 20, 5, 12
CUTS = {1: [0, 12], 2: [0, 3, 12], 4: [0, 3, 5, 11, 12]}
BUDGET, WAITS, LIVES = 6, 2, 2
NAMES = {"free": "free", "waits": "waits", "small": "rows.t", "lives": "pooled.t"}
"""Of what the dictionaries do, the table that does so; two collections have one of the same name."""


def key(number: int) -> int:
    """Ids that need all 64 bits."""
    return number * 2**57 - 2**62


def made_ids(steps: int = STEPS) -> list[list[int]]:
    """The ids that all tables are asked for: by step, one a sample."""
    rng = np.random.default_rng(4)
    return [[key(x) for x in np.minimum(rng.zipf(1.4, SAMPLES), 30).tolist()] for _ in range(steps)]


# ---- the truth ---------------------------------------------------------------------------------------------------


class Row:
    """A use count and the step of the last use."""

    def __init__(self) -> None:
        self.count, self.last = 0, 0


class Simulated:
    """A table as a dictionary, by what it does: admits late, evicts the least recently used, or forgets old rows."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rows: dict[int, Row] = {}
        self.waiting: Counter[int] = Counter()
        self.done: Counter[str] = Counter()
        self.before: set[int] = set()

    def step(self, step: int, parts: list[list[int]]) -> None:
        asked = self.asked = Counter(sum(parts, []))
        self.done += Counter(
            ids=asked.total(), sent=sum(len(set(part)) for part in parts), arrived=len(asked), looked_up=len(asked)
        )
        if self.kind == "lives":
            for old in [x for x in asked if x in self.rows and self.rows[x].last < step - LIVES]:
                del self.rows[old]
                self.done["expired"] += 1
        self.done["collided"] += len([x for x in asked if x in self.rows and self.rows[x].last == step - 1])
        new = [x for x in asked if x not in self.rows]
        if self.kind == "waits":
            refused = [x for x in new if self.waiting[x] < WAITS - 1]
            self.done["rejected"] += len(refused)
            new = [x for x in new if x not in refused]
            self.waiting += Counter({x: asked[x] for x in refused})
        if self.kind == "small":
            idle = sorted((x for x in self.rows if x not in asked), key=lambda x: (self.rows[x].last, x))
            for old in idle[: max(len(self.rows) + len(new) - BUDGET, 0)]:
                del self.rows[old]
                self.done["evicted"] += 1
            new.sort(key=lambda x: (-asked[x], x))
            room = BUDGET - len(self.rows)
            self.done["failed"] += len(new[room:])
            new = new[:room]
        self.done["inserted"] += len(new)
        self.rows |= {x: Row() for x in new}
        for x in asked:
            if x in self.rows:
                self.rows[x].count += asked[x]
                self.rows[x].last = step

    def values(self, step: int) -> dict[str, float]:
        """What is logged after a step; what happened begins anew."""
        done, self.done = self.done, Counter()
        found: dict[str, float] = {"rows": len(self.rows)}
        found |= {name: done[name] for name in ("inserted", "evicted", "rejected", "expired", "failed")}
        found["dedup_ratio_1"], found["dedup_ratio_2"] = done["ids"] / done["sent"], done["sent"] / done["arrived"]
        found["collision_rate"] = done["collided"] / done["looked_up"]
        found["hot_key_share"] = self.hot_share()
        if self.kind == "small":
            found["budget_share"] = len(self.rows) / BUDGET
        return found

    def hot_share(self) -> float:
        """The share of the last ids of the most used row; of rows whose counts begin with the same bits, the mean."""

        def first_bits(count: int) -> int:
            cut = max(count.bit_length() - 3, 0)
            return count >> cut << cut

        most = max(first_bits(row.count) for row in self.rows.values())
        hottest = [self.asked[x] for x, row in self.rows.items() if first_bits(row.count) == most]
        return sum(hottest) / len(hottest) / self.asked.total()

    def ages(self, step: int) -> list[int]:
        return sorted(step - row.last for row in self.rows.values())


def simulate(world_size: int, steps: int = STEPS) -> list[dict[str, Any]]:
    tables, found = {kind: Simulated(kind) for kind in NAMES}, []
    for step, ids in enumerate(made_ids(steps)):
        parts = [ids[a:b] for a, b in zip(CUTS[world_size], CUTS[world_size][1:], strict=False)]
        for table in tables.values():
            table.step(step, parts)
        if step % EVERY == EVERY - 1:
            found.append(
                {
                    kind: {
                        "values": table.values(step),
                        "ages": table.ages(step),
                    }
                    for kind, table in tables.items()
                }
            )
    return found


# ---- what is trained ---------------------------------------------------------------------------------------------


class Model(pl.LightningModule):
    """Looks the same ids up in four tables of two collections."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        from lightning_gr.embeddings.dynamic import (
            Admission,
            DynamicEmbeddingBagCollection,
            DynamicEmbeddingCollection,
            DynamicTableConfig,
            DynamicTables,
            Eviction,
            TablePolicy,
        )

        dynamic = DynamicTables(virtual_shards=16, **settings)
        waits = TablePolicy(admission=Admission(min_count=WAITS))
        small = TablePolicy(max_rows=BUDGET, eviction=Eviction(slack=0.0))
        self.rows = DynamicEmbeddingCollection(
            tables=[
                DynamicTableConfig("free", 4, ["id"]),
                DynamicTableConfig("waits", 4, ["id"], policy=waits),
                DynamicTableConfig("t", 2, ["id"], policy=small),
            ],
            settings=dynamic,
        )
        self.pooled = DynamicEmbeddingBagCollection(
            tables=[DynamicTableConfig("t", 4, ["id"], policy=TablePolicy(ttl_steps=LIVES))], settings=dynamic
        )
        self.head = nn.Linear(14, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        found = self.rows(features)
        parts = [found[f"id@{name}"].values() for name in ("free", "waits", "t")] + [self.pooled(features)["id"]]
        losses = (self.head(torch.cat(parts, 1)).squeeze(-1) - labels) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(labels))}}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Batches:
    """A rank's part of the batches, with a cursor."""

    def __init__(self, rank: int, world_size: int, steps: int) -> None:
        self.own, self.done = slice(*CUTS[world_size][rank : rank + 2]), 0
        self.ids = [torch.tensor(ids[self.own]) for ids in made_ids(steps)]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Any:
        from torchrec import KeyedJaggedTensor

        first = self.done if self.done < len(self.ids) else 0
        for place, ids in enumerate(self.ids[first:]):
            self.done = first + place + 1
            features = KeyedJaggedTensor(["id"], ids, lengths=torch.ones(len(ids), dtype=torch.int64))
            yield features, (ids % 7).float()

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Watch(pl.Callback):
    """Losses; what the monitor beside it has said after each log step; saves once."""

    def __init__(self, monitor: TableMonitor | None, save: tuple[str, int] | None) -> None:
        self.monitor, self.save = monitor, save
        self.losses: list[float] = []
        self.logged: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        step = trainer.global_step
        if self.monitor is not None and step % EVERY == 0:
            values = {x: float(y) for x, y in trainer.callback_metrics.items() if x.startswith("gr/table/")}
            self.logged[step] = {"values": values, "histograms": dict(self.monitor.histograms)}
        if self.save is not None and step == self.save[1]:
            trainer.save_checkpoint(self.save[0])


def fit(
    *,
    monitors: bool = True,
    groups: int = 1,
    sparse_update: str = "sync",
    steps: int = STEPS,
    save: tuple[str, int] | None = None,
    ckpt_path: str | None = None,
    every_n_log_steps: int = 1,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(3)
    monitor = TableMonitor(every_n_log_steps=every_n_log_steps) if monitors else None
    watch, world_size = Watch(monitor, save), dist.get_world_size()
    strategy = SequenceBalancedStrategy(
        sparse_optimizer="adagrad",
        sparse_lr=0.1,
        table_groups=groups,
        **({} if sparse_update == "sync" else {"sparse_update": sparse_update, "sync_steps": 0}),  # type: ignore[arg-type]
    )
    common: dict[str, Any] = {"logger": False, "max_epochs": 1, "log_every_n_steps": EVERY}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=[*([monitor] if monitor else []), watch],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **(common | settings),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Model(**(model or {})), Batches(dist.get_rank(), world_size, steps), ckpt_path=ckpt_path)
    said = [str(x.message) for x in caught if str(x.message).startswith(("table ", "TableMonitor"))]
    return {"losses": watch.losses, "logged": watch.logged, "said": said}


# ---- laws --------------------------------------------------------------------------------------------------------


def octaves(ages: list[int]) -> list[float]:
    """Ages by power of two: the number of their binary digits."""
    counts = Counter(age.bit_length() for age in ages)
    return [float(counts[i]) for i in range(max(counts) + 1)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {}),
        (2, {}),
        (2, {"sparse_update": "semi_async"}),
        pytest.param(2, {"model": {"merge": False}}, marks=pytest.mark.long),
        (4, {"groups": 2}),
        pytest.param(4, {"groups": 2, "sparse_update": "exact_async"}, marks=pytest.mark.long),
        pytest.param(4, {}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_values_are_those_of_dictionaries(world_size: int, settings: dict[str, Any], gloo: Any) -> None:
    ranks = gloo(world_size).run(fit, **settings)
    assert all(rank["logged"] == ranks[0]["logged"] for rank in ranks)
    truth = simulate(world_size)
    assert {kind for step in truth for kind in step if step[kind]["values"]["evicted"]} == {"small"}
    for happens in ("rejected", "expired", "failed", "collision_rate"):
        assert any(of["values"][happens] for step in truth for of in step.values()), happens
    for (step, logged), wanted in zip(ranks[0]["logged"].items(), truth, strict=True):
        for kind, name in NAMES.items():
            values = {
                x.removeprefix(f"gr/table/{name}/"): y
                for x, y in logged["values"].items()
                if x.startswith(f"gr/table/{name}/")
            }
            where = f"{name} after step {step}"
            for what, value in wanted[kind]["values"].items():
                assert values.pop(what) == pytest.approx(value, rel=1e-5), f"{where}: {what}"
            ages = wanted[kind]["ages"]
            assert logged["histograms"][f"gr/table/{name}/age"] == octaves(ages), where
            for percent in (50, 90, 99):
                age = ages[math.ceil(len(ages) * percent / 100) - 1]
                within = 0 if age < 8 else 0.25  # four buckets a power of two
                assert values.pop(f"age_p{percent}") == pytest.approx(age, rel=within), where
            assert 0 < values.pop("load_factor") <= 0.75, where
            assert values == {}, where


@pytest.mark.dist
@pytest.mark.parametrize("sparse_update", ["sync", "semi_async"])
def test_a_resumed_run_says_what_an_uninterrupted_one_says(sparse_update: str, tmp_path: Path, gloo: Any) -> None:
    path = str(tmp_path / "saved")
    given: dict[str, Any] = {"sparse_update": sparse_update, "every_n_log_steps": 2}
    whole = gloo(2).run(fit, save=(path, 12), **given)
    resumed = gloo(2).run(fit, ckpt_path=path, **given)
    for a, b in zip(whole, resumed, strict=True):
        assert b["losses"] == a["losses"][12:]
        # The values of step 20 count from step 10 on; the second log step of the resumed run is the first at step 15.
        assert b["logged"][20] == a["logged"][20]
        assert a["logged"][5]["values"] == {}
        assert a["logged"][15] == a["logged"][10]


@pytest.mark.dist
@pytest.mark.parametrize("sparse_update", ["sync", "semi_async"])
def test_it_changes_no_number_of_the_training(sparse_update: str, gloo: Any) -> None:
    with_it, without = (
        gloo(2).run(fit, monitors=monitors, sparse_update=sparse_update, log_every_n_steps=1)
        for monitors in (True, False)
    )
    assert [rank["losses"] for rank in with_it] == [rank["losses"] for rank in without]


@pytest.mark.dist
def test_a_full_table_is_warned_of_once_with_the_setting(gloo: Any) -> None:
    first, second = gloo(2).run(fit)
    assert second["said"] == []
    assert len(first["said"]) == 2
    failed = next(x for x in first["said"] if "found no room" in x)
    full = next(x for x in first["said"] if "of its budget" in x)
    assert failed.startswith("table rows.t: ")
    assert f"(max_rows={BUDGET}); raise max_rows" in failed
    assert full.startswith(f"table rows.t: its {BUDGET} rows are 100% of its budget (max_rows={BUDGET})")


def _fit_with_csv(folder: str) -> dict[str, Any]:
    from lightning.pytorch.loggers import CSVLogger

    return fit(logger=CSVLogger(folder, name="", version=""))


@pytest.mark.dist
def test_a_csv_file_has_all_values(tmp_path: Path, gloo: Any) -> None:
    first, _ = gloo(2).run(_fit_with_csv, str(tmp_path))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gr/table/free/rows"]]
    assert [int(row["step"]) + 1 for row in rows] == list(first["logged"])
    for row, logged in zip(rows, first["logged"].values(), strict=True):
        written = {x: float(y) for x, y in row.items() if x.startswith("gr/table/") and y}
        assert written == pytest.approx(logged["values"], rel=1e-6)


def test_a_module_without_dynamic_tables_costs_one_warning(tmp_path: Path) -> None:
    monitor = TableMonitor()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=3,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    with pytest.warns(UserWarning, match="BoringModel under SingleDeviceStrategy has no dynamic tables") as caught:
        trainer.fit(BoringModel())
    assert len([x for x in caught if "TableMonitor" in str(x.message)]) == 1
    assert not [name for name in trainer.callback_metrics if name.startswith("gr/")]
    assert monitor.state_dict() == {"log_steps": 0, "not_logged": {}}


def test_fewer_than_one_log_step_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="every_n_log_steps=0: expected at least 1"):
        TableMonitor(every_n_log_steps=0)


# ---- samples -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pair", "bits"])
def engine(request: pytest.FixtureRequest) -> Any:
    """30,000 rows, row i last used i steps ago and 30,000 / i times, as in the last lookup; and 300 beside them."""
    from lightning_gr.embeddings.dynamic import DynamicEmbeddingCollection, DynamicTableConfig, DynamicTables

    tables = [DynamicTableConfig(name, 4, [name]) for name in ("large", "little")]
    engine = DynamicEmbeddingCollection(tables=tables, settings=DynamicTables(id_encoding=request.param)).engine
    engine.next_step = 30_001
    last: list[tuple[torch.Tensor, ...]] = []
    for t, number in ((0, 30_000), (1, 300)):
        number_N = torch.arange(1, number + 1)
        table = engine.tables[engine.logical[t][0]]
        rows_N = table.add(number_N * 0x9E3779B97F, torch.full_like(number_N, t))
        table.storage.write_metadata(rows_N, counts=number // number_N, last_steps=30_000 - number_N)
        last.append((torch.full_like(number_N, t), rows_N, number // number_N))
    engine.last_keys = [tuple(torch.cat(column) for column in zip(*last, strict=True))]
    return engine


def exact_percentile(number: int, share: float) -> float:
    return math.ceil(number * share)


@pytest.mark.parametrize(("slots", "rows", "error"), [(1 << 20, 1 << 16, 0.0), (1 << 13, 2000, 0.15)])
def test_a_sample_stands_for_all_rows(
    slots: int, rows: int, error: float, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_counts, "_SLOTS", slots)
    monkeypatch.setattr(table_counts, "_ROWS", rows)
    read: list[int] = []
    storage: Any = engine.tables[0].storage
    read_metadata: Callable[[Any], Any] = storage.read_metadata
    monkeypatch.setattr(storage, "read_metadata", lambda x: (read.append(len(x)), read_metadata(x))[1])
    held = table_counts.held(engine)
    assert max(read[1:]) <= rows  # behind the keys of the last lookup
    nothing = table_counts.done(engine, 0)
    for of_table, number in zip(held, (30_000, 300), strict=True):
        found = table_counts.values(nothing | of_table, budget=None)
        assert found["rows"] == number
        assert sum(table_counts.ages(of_table)) == pytest.approx(number)
        if number == 300 and error:
            continue  # a sample of some tens of rows
        counts = [number // i for i in range(1, number + 1)]
        share = sum(counts[: number // 100]) / sum(counts)
        assert found["hot_key_share"] == pytest.approx(share, abs=0.02 + error / 3)
        for percent in (50, 90, 99):
            wanted = exact_percentile(number, percent / 100)
            # Ages 1, 2, 3, ... are spread evenly, as a bucket's inside is taken to be; the last one is not full.
            assert found[f"age_p{percent}"] == pytest.approx(wanted, rel=0.1 + error)


def test_an_empty_table_has_no_ages() -> None:
    sums = dict.fromkeys([*table_counts._DONE, "ids", "sent", "arrived", "rows", "used_slots", "last_uses"], 0.0) | {
        "slots": 64.0
    }
    sums |= {f"{x}_{i}": 0.0 for i in range(table_counts._BUCKETS) for x in table_counts._SPREADS}
    found = table_counts.values(sums, budget=10)
    assert {x: y for x, y in found.items() if not math.isnan(y)} == dict.fromkeys(
        ("rows", "load_factor", "budget_share", "inserted", "evicted", "rejected", "expired", "failed"), 0.0
    )
    assert table_counts.ages(sums) == []
