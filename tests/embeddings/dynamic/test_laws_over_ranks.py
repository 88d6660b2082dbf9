"""N processes are one process, to the bit: values, gradients, state, counters, clocks, every decision of every policy.

Gradients are small multiples of powers of two, so that no order of summation rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.embeddings.dynamic import (
    Admission,
    DynamicEngine,
    DynamicTableConfig,
    DynamicTables,
    Eviction,
    SparseOptimizerConfig,
    TablePolicy,
)
from lightning_gr.embeddings.dynamic.gather_rows import gather_rows
from tests.more import more

FEATURES = ["k", "f", "g", "h"]
NUM_STEPS, B = 24, 6
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]
POLICIES = {
    "plain": TablePolicy(),
    "lru": TablePolicy(max_rows=130, rows_per_group=64, ttl_steps=5),
    "lfu": TablePolicy(
        max_rows=100, rows_per_group=64, eviction=Eviction("lfu"),
        admission=Admission(min_count=2, forget_after_steps=9),
        on_missing="bucket", buckets_per_group=2,
    ),
    "lfu_lru": TablePolicy(
        max_rows=40, rows_per_group=64, eviction=Eviction("lfu_lru", slack=0.25), ttl_seconds=45,
        on_missing="default_row",
        default_value=0.5,
    ),
    "decayed": TablePolicy(
        max_bytes=14_000, rows_per_group=64, eviction=Eviction("decayed", half_life_steps=3.3),
        admission=Admission(min_count=2, counter="sketch", sketch_width=16),
    ),
    "score": TablePolicy(max_rows=70, rows_per_group=64, eviction=Eviction("score", slack=0.0), on_missing="bucket"),
}  # fmt: skip


class Features:
    """As much of a `KeyedJaggedTensor` as an engine asks for; TorchRec is slow to import in many processes."""

    def __init__(self, rows: dict[str, list[Tensor]]) -> None:
        self.rows = {name: torch.cat([*of, torch.zeros(0, dtype=torch.int64)]) for name, of in rows.items()}
        self.lengths = {name: [len(x) for x in of] for name, of in rows.items()}

    def keys(self) -> list[str]:
        return list(self.rows)

    def length_per_key(self) -> list[int]:
        return [len(x) for x in self.rows.values()]

    def values(self) -> Tensor:
        return torch.cat(list(self.rows.values()))


def cuts(world_size: int, step: int) -> list[int]:
    """Where the samples of each process begin; now and then one has none, or all."""
    if world_size > 1 and step % 4 == 1:
        return [0, *[B] * world_size] if step % 8 == 1 else [0, 0, *[4] * (world_size - 2), B]
    return [B * rank // world_size for rank in range(world_size + 1)]


def forward(engine: DynamicEngine, features: Features, *, training: bool = True) -> dict[str, Tensor]:
    """Rows of each looked-up feature, one for each id."""
    with torch.set_grad_enabled(training):
        lookup = engine.take(features, training=training)
        lookup.exchange.send_keys()
        engine.find(lookup)
        rows = engine.received(lookup)
        output: dict[str, Tensor] = {}
        for p, of_table in enumerate(rows):
            own = [i for i, (t, _, _) in enumerate(engine.lookups) if engine.logical[t][0] == p]
            pieces = gather_rows(of_table, lookup.exchange.places[p]).split([lookup.sizes[i] for i in own])
            output |= {engine.lookups[i][2]: x for i, x in zip(own, pieces, strict=True)}
        return output


def trained(
    name: str, *, micro_batches: int = 1, optimizer: Any = "adam", ahead: bool = False, silent: bool = False,
    with_loss: bool = True, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """A short training with everything in it, on the processes of the default group, or on one."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    policy = POLICIES[name]
    settings = {"optimizer": SparseOptimizerConfig(optimizer, lr=0.125), "virtual_shards": 16} | settings
    configs = [
        DynamicTableConfig("item", 4, ["f", "g"], policy=policy, precision=settings.get("precision", "fp32")),
        DynamicTableConfig("tag", 2, ["k"], policy=policy),
        DynamicTableConfig("shop", 4, ["h", "g"], policy=TablePolicy()),
    ]
    group = dist.group.WORLD if world_size > 1 else None
    engine = DynamicTables(**settings).engine(configs, seed=3, device="cpu", group=group)
    pool = torch.tensor([*(EXTREMES if settings.get("id_encoding") != "bits" else []), *range(1, 300)])
    generator, outputs, prepared = torch.Generator().manual_seed(1), [], []
    for step in range(NUM_STEPS):
        samples = {
            feature: [
                pool[(torch.rand(n, generator=generator).pow(1.5) * len(pool)).long()]
                for n in torch.randint(0, 12 if step < 12 else 5, (B,), generator=generator).tolist()
            ]
            for feature in FEATURES
        }
        samples["h"] = [x if b == 0 else x[:0] for b, x in enumerate(samples["h"])]  # one process alone sees it
        at = cuts(world_size, step)
        mine = range(at[rank], at[rank + 1])
        whole = [Features({f: [x[b] for b in mine[m::micro_batches]] for f, x in samples.items()})
                 for m in range(micro_batches)]  # fmt: skip
        prepared.append((mine, whole))
    for step, (mine, parts) in enumerate(prepared):
        engine.observe_time(10 * step + max(mine, default=0))
        of_step: dict[tuple[str, int], list[list[float]]] = {}
        for m, features in enumerate(parts):
            if ahead:
                engine.prefetch(features)
            if step % 5 == 2:
                forward(engine, prepared[step - 2][1][0], training=False)
            output, loss = forward(engine, features), torch.zeros(())
            for i, (key, values) in enumerate(output.items()):
                weights, lengths = [], features.lengths[key.partition("@")[0]]
                for b, rows in zip(mine[m::micro_batches], values.split(lengths), strict=True):
                    of_step[key, b] = rows.tolist()
                    mute = silent and key == "k" and b < B // 2
                    weights.append(torch.full((len(rows), 1), 0.0 if mute else (b + 1) * 2.0 ** (i - 4)))
                if not (silent and key == "k" and world_size > 1 and mine.stop <= B // 2):
                    loss = loss + (values * torch.cat([*weights, torch.zeros(0, 1)])).sum() * world_size
            if with_loss or step % 3:
                loss.backward()
        if step % 3 == 0 and not engine.fused_update:
            engine.flush()
            engine.scale_gradients(0.5)
        engine.step()
        outputs.append(of_step)
        if step % 7 == 6:
            engine.delete(pool[step : step + 40], "item")
        if step % 9 == 8:
            ids = pool[: 2 * step]
            engine.upsert(ids, torch.arange(4.0 * len(ids)).view(-1, 4), "shop")
        if name == "score":
            engine.set_scores(pool, (pool * 7919 + step) % 31 / 8, "item")
    return {"outputs": outputs, "kept": kept(engine), "clocks": (engine.next_step, engine.time)}


def kept(engine: DynamicEngine) -> dict[str, Any]:
    """All that a process keeps, by table and id."""
    made: dict[str, Any] = {}
    for table in engine.tables:
        for t, name in enumerate(table.key_names):
            rows, _ = table.rows_of(t)
            columns = (rows.values_ND, rows.state_NS, *rows.metadata[:3])
            made[name] = {x: row for x, *row in zip(rows.ids_N.tolist(), *(x.tolist() for x in columns), strict=True)}
        for t, name in enumerate(table.names):
            made[f"{name} statistics"] = vars(table.statistics[t])
            if (counted := table.counter_state(t)) is not None:
                rest = list(counted[0].values())
                made[f"{name} waits"] = {row[0]: row[1:] for row in zip(*(x.tolist() for x in rest), strict=True)}
    return made


@functools.cache
def on_one(name: str, **settings: Any) -> dict[str, Any]:
    return trained(name, **settings)


def union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the processes have together; no key is on two of them, sums of statistics."""
    assert all(x["clocks"] == parts[0]["clocks"] for x in parts)
    whole: dict[str, Any] = {"outputs": [{} for _ in range(NUM_STEPS)], "kept": {}, "clocks": parts[0]["clocks"]}
    for part in parts:
        for step, of_step in enumerate(part["outputs"]):
            assert not of_step.keys() & whole["outputs"][step].keys()
            whole["outputs"][step].update(of_step)
        for name, of in part["kept"].items():
            mine = whole["kept"].setdefault(name, {})
            if name.endswith("statistics"):
                mine.update({x: n + mine.get(x, 0) for x, n in of.items()})
            else:
                assert not mine.keys() & of.keys(), name
                mine.update(of)
    return whole


def assert_same(one: dict[str, Any], parts: list[dict[str, Any]], *, statistics: bool = True) -> None:
    many = union(parts)
    assert many["clocks"] == one["clocks"]
    for step in range(NUM_STEPS):
        assert many["outputs"][step] == one["outputs"][step], f"step {step}"
    assert many["kept"].keys() == one["kept"].keys()
    for name, expected in one["kept"].items():
        found = many["kept"][name]
        if name.endswith("statistics") and not statistics:  # the others are of what arrives
            found, expected = (
                {x: of[x] for x in ("inserted", "failed", "evicted", "expired")} for of in (found, expected)
            )
        assert found == expected, name


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "world_size"),
    [(x, 2 + i % 3) for i, x in enumerate(POLICIES)]
    + more(*((x, 2 + (i + j) % 3) for i, x in enumerate(POLICIES) for j in (1, 2))),
)
def test_many_processes_are_one(gloo: Callable[[int], Any], name: str, world_size: int) -> None:
    assert_same(on_one(name), gloo(world_size).run(trained, name))


@pytest.mark.dist
def test_a_group_of_one_is_no_group(gloo: Callable[[int], Any]) -> None:
    assert_same(on_one("lfu"), gloo(1).run(trained, "lfu"))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world_size", "name", "settings"),
    [
        (3, "lfu", {"dedup": "none"}),
        (2, "lru", {"dedup": "before_exchange"}),
        (2, "score", {"dedup": "before_lookup"}),
        (4, "lfu_lru", {"merge": False}),
        (2, "decayed", {"id_encoding": "bits"}),
        (3, "lfu", {"micro_batches": 2}),
        (2, "lru", {"update": "backward", "optimizer": "rowwise_adagrad"}),
        (3, "lfu", {"precision": "bf16", "optimizer": "sgd"}),
        (2, "score", {"precision": "mixed", "optimizer": "sgd"}),
        (2, "lru", {"silent": True}),
        (3, "lfu_lru", {"with_loss": False}),
        (3, "lfu", {"ahead": True}),
    ],
    ids=str,
)
def test_settings_are_the_same_on_many_processes(
    gloo: Callable[[int], Any], name: str, world_size: int, settings: dict[str, Any]
) -> None:
    same_numbers = {"dedup", "merge", "ahead"}
    one = on_one(name, **{x: y for x, y in settings.items() if x not in same_numbers})
    assert_same(one, gloo(world_size).run(trained, name, **settings), statistics="dedup" not in settings)


def test_the_training_above_meets_every_decision() -> None:
    totals: dict[str, int] = {}
    for name in POLICIES:
        for table in ("item", "tag"):
            for what, number in on_one(name)["kept"][f"{table} statistics"].items():
                totals[what] = totals.get(what, 0) + number
    assert min(totals.values()) > 0, totals
