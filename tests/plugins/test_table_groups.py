"""The laws of hierarchical sparse parallelism: M groups of I ranks are one group of M I, and only replicas meet.

TurboGR, arXiv 2605.13433, section 4.2.1. Shape suffixes: T tokens, N labelled tokens or rows, B sequences, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from tests.more import more

pytestmark = pytest.mark.dist

STEPS, ITEMS, LONGEST, BUDGET = 30, 60, 24, 48


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Events of 41 users, popular items more often, at times that grow with the user."""
    path = tmp_path_factory.mktemp("log") / "log.csv"
    rng = np.random.default_rng(2)
    lines = ["user_id,item_id,timestamp"]
    for user in range(41):
        length = 30 if user == 0 else int(rng.integers(4, 7)) if user % 3 else int(rng.integers(12, 22))
        items = np.minimum(rng.zipf(1.3, length) - 1, rng.integers(0, ITEMS, length))
        ids = (np.arange(ITEMS)[::-1] if user == 0 else items)[:length] * (1 << 55) - (1 << 60)
        lines += [f"{user},{item},{1_000_000 + 9000 * user + 60 * step}" for step, item in enumerate(ids.tolist())]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# ---- what is trained ---------------------------------------------------------------------------------------------


class Tables(pl.LightningModule):
    """Guesses a number of the next item by what tables of all policies and two widths hold of the present one.

    Args:
        row: settings of every table's rows.
        tables: settings of the collections.
        max_bytes: budget of one table.
    """

    def __init__(
        self,
        *,
        row: dict[str, Any] | None = None,
        tables: dict[str, Any] | None = None,
        max_bytes: int | None = None,
    ) -> None:
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

        waits = Admission(min_count=2)
        policies = {
            "a": TablePolicy(admission=waits, max_rows=30, rows_per_group=15),
            "b": TablePolicy(eviction=Eviction(policy="lfu_lru"), max_rows=20, rows_per_group=5, on_missing="bucket"),
            "c": TablePolicy(ttl_seconds=10_000, max_bytes=max_bytes),
            "p": TablePolicy(admission=Admission(min_count=2, counter="sketch", sketch_width=16), ttl_steps=2),
        }
        made = [
            DynamicTableConfig(name, 8 if name == "b" else 4, ["item_id"], policy=policy, pooling="mean", **(row or {}))
            for name, policy in policies.items()
        ]
        settings = DynamicTables(**({"virtual_shards": 16} | (tables or {})))
        self.rows = DynamicEmbeddingCollection(tables=made[:3], settings=settings)
        self.pooled = DynamicEmbeddingBagCollection(tables=made[3:], settings=settings)
        self.head = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.labels["next_item"]
        found, pooled_BD = self.rows(batch.features), self.pooled(batch.features)["item_id"]
        parts = [found[f"item_id@{name}"].values() for name in "abc"] + [pooled_BD[batch.layout.sequence_T]]
        guesses_N = self.head(torch.cat(parts, 1)[labels.tokens_N])[:, 0]
        wanted_N = (labels.values_N % 1009).float().sin()
        loss: Tensor = batch.mean_over_global_batch({"next_item": ((guesses_N - wanted_N) ** 2).sum()})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def retrieval(**settings: Any) -> pl.LightningModule:
    from lightning_gr.embeddings.dynamic import Admission, DynamicTables, TablePolicy
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    return RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=LONGEST, dropout=0.0),
        num_negatives=4,
        temperature=0.2,
        top_k=[3],
        dynamic_tables=DynamicTables(policy=TablePolicy(admission=Admission(min_count=2), max_rows=40)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **settings,
    )


def engines(module: Any) -> dict[str, Any]:
    from lightning_gr.plugins.dynamic_sharding import sharded_dynamic_collections

    return {path: collection.engine for path, collection in sharded_dynamic_collections(module).items()}


# ---- what is looked at -------------------------------------------------------------------------------------------


def fingerprint(module: Any) -> str:
    """Of all that this rank's tables hold: keys, values, state, counters, clocks, what waits."""
    digest = hashlib.sha256()
    for path, engine in engines(module).items():
        digest.update(f"{path} {engine.next_step} {engine.time}".encode())
        for table in engine.tables:
            digest.update(f"{table.key_names} {table.group_rows}".encode())
            for k in range(len(table.key_names)):
                rows, offsets = table.rows_of(k)
                waiting = table.counter_state(k) if k < len(table.configs) else None
                kept = [rows.ids_N, rows.values_ND, rows.state_NS, *rows.metadata[:3], rows.hot_N]
                kept += [] if waiting is None else list(waiting[0].values())
                digest.update(str(offsets).encode())
                for x in kept:
                    digest.update(b"" if x is None else x.numpy().tobytes())
    return digest.hexdigest()


def contents(module: Any) -> dict[str, Any]:
    """This rank's rows and keys that wait, by table and id, and what has happened to them."""
    rows_of: dict[Any, Any] = {}
    waiting: dict[Any, Any] = {}
    happened: Counter[Any] = Counter()
    for engine in engines(module).values():
        for table in engine.tables:
            for k, name in enumerate(table.key_names):
                rows, _ = table.rows_of(k)
                used_N3 = torch.stack(rows.metadata[:3], 1).tolist()
                for i, key in enumerate(rows.ids_N.tolist()):
                    rows_of[name, key] = (rows.values_ND[i].numpy(), rows.state_NS[i].numpy(), used_N3[i])
                if k < len(table.configs):
                    happened += Counter({(name, what): n for what, n in vars(table.statistics[k]).items()})
                    state = table.counter_state(k)
                    numbers = [] if state is None else [x.tolist() for x in state[0].values()]
                    waiting |= {(name, key): rest for key, *rest in zip(*numbers, strict=True)}
    clocks = {path: (engine.next_step, engine.time) for path, engine in engines(module).items()}
    dense = {name: x.detach().numpy().copy() for name, x in module.named_parameters()}
    return {"rows": rows_of, "waiting": waiting, "happened": happened, "clocks": clocks, "dense": dense}


COLLECTIVES = (
    *("all_to_all_single", "all_to_all", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "scatter", "broadcast"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv"),
)


class Wire:
    """Every collective of training that Python calls: its name, its group's ranks (none: the default's), the bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[int, ...], float]] = []
        for name in COLLECTIVES:
            patch.setattr(dist, name, self._noted(name, getattr(dist, name)))

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **given: Any) -> Any:
            group = given.get("group") or dist.group.WORLD
            assert isinstance(group, dist.ProcessGroup)
            sent = math.nan  # nothing that tables may use
            if name == "all_to_all_single":
                splits = args[3] if len(args) > 3 else given.get("input_split_sizes")
                cut = args[1].split(splits or len(args[1]) // group.size())
                sent = sum(x.nbytes for rank, x in enumerate(cut) if rank != group.rank())
            elif name in ("all_gather", "all_gather_into_tensor"):
                sent = args[1].nbytes * (group.size() - 1)
            elif name in ("all_reduce", "broadcast"):
                sent = args[0].nbytes * (group.size() - 1)
            ranks = () if group is dist.group.WORLD else tuple(dist.get_process_group_ranks(group))
            self.calls.append((name, ranks, sent))
            return function(*args, **given)

        return noted


class Watch(pl.Callback):
    """Of each batch its ids; after each optimiser step a fingerprint; at the wanted ones a checkpoint, rows by hand."""

    wire: Wire

    def __init__(self, *, save: str | None, save_at: int, by_hand: bool) -> None:
        self.prints: list[str] = []
        self.ids: list[set[int]] = []
        self.losses: list[float] = [0.0]
        self.save, self.save_at, self.by_hand = save, save_at, by_hand
        self.done = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.done = trainer.global_step
        self.wire.calls.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[-1] += float(outputs["loss"])
        self.ids.append(set(batch.features["item_id"].values().tolist()))
        if trainer.global_step == self.done:
            return
        self.done = trainer.global_step
        self.losses.append(0.0)
        if self.by_hand and self.done == 12:
            ids_N = torch.arange(0, ITEMS, 3) * (1 << 55) - (1 << 60)
            module.rows.engine.delete(ids_N, "a")
            module.rows.engine.upsert(ids_N, torch.ones(len(ids_N), 8), "b")
        if self.save and self.done == self.save_at:
            trainer.save_checkpoint(self.save)
        self.prints.append(fingerprint(module))


def fit(
    world_size: int,
    log: str,
    *,
    kind: str = "tables",
    module: Any = None,
    groups: int = 1,
    sparse: str = "adagrad",
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    depth: int = 2,
    tokens_per_rank: int | None = None,
    save: str | None = None,
    save_at: int = 7,
    by_hand: bool = False,
    ckpt_path: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    kinds: dict[str, Any] = {"tables": Tables, "retrieval": retrieval, "static": Static}
    module = module or kinds[kind](**(model or {}))
    watch = Watch(save=save, save_at=save_at, by_hand=by_hand)
    strategy = SequenceBalancedStrategy(
        sparse_optimizer=sparse,  # type: ignore[arg-type]
        sparse_lr=0.05,
        pipeline_depth=depth,
        balancing=Balancing(tokens_per_rank=tokens_per_rank),
        table_groups=groups,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_steps": STEPS, "limit_val_batches": 0} | settings),
    )
    source = SequenceDataModule(
        path=log, raw_ids=True, max_length=LONGEST, **({"global_tokens": BUDGET} | (data or {}))
    )
    with pytest.MonkeyPatch.context() as patch:
        watch.wire = wire = Wire(patch)
        trainer.fit(module, datamodule=source, ckpt_path=ckpt_path)
    traffic = Counter[Any]()
    for engine in engines(module).values():
        for name, sent in engine.traffic.items():
            traffic += Counter({(name, "calls"): sent.calls, (name, "bytes"): sent.bytes})
    return contents(module) | {
        "losses": watch.losses[:-1],
        "prints": watch.prints,
        "calls": wire.calls,
        "traffic": traffic,
        "ids": watch.ids,
        "cut": {(engine.num_groups, engine.world_size, engine.rank) for engine in engines(module).values()},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


# ---- what is compared --------------------------------------------------------------------------------------------


def of_groups(ranks: list[dict[str, Any]], groups: int) -> list[list[dict[str, Any]]]:
    """The ranks of each table group."""
    size = len(ranks) // groups
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def assert_replicas_equal(ranks: list[dict[str, Any]], groups: int, steps: int = STEPS) -> None:
    """Bit for bit, after every step."""
    first, *others = of_groups(ranks, groups)
    assert others
    for place, rank in enumerate(first):
        assert len(set(rank["prints"])) == steps, "every step should change something"
        for number, other in enumerate(others, 1):
            same = [x == y for x, y in zip(rank["prints"], other[place]["prints"], strict=True)]
            assert all(same), f"place {place} of groups 0 and {number} differ after step {same.index(False)}"


def assert_equal(ranks: list[dict[str, Any]], groups: int, truth: list[dict[str, Any]], close: float = 1e-4) -> None:
    """Every group holds what the one group of `truth` holds: what is counted exactly, what is computed to rounding."""
    one = joined(truth)
    np.testing.assert_allclose(
        np.mean([rank["losses"] for rank in ranks], axis=0),
        np.mean([rank["losses"] for rank in truth], axis=0),
        rtol=close,
    )
    for group in of_groups(ranks, groups):
        mine = joined(group)
        for name in ("clocks", "happened", "waiting"):
            assert name not in one or mine[name] == one[name], name
        assert mine["rows"].keys() == one["rows"].keys()
        for key, (values, state, clocks) in one["rows"].items():
            found = mine["rows"][key]
            assert found[2] == clocks, key
            np.testing.assert_allclose(found[0], values, rtol=close, atol=0.1 * close, err_msg=str(key))
            np.testing.assert_allclose(found[1], state, rtol=close, atol=0.1 * close, err_msg=str(key))
        for rank in group:
            for name, weight in one["dense"].items():
                np.testing.assert_allclose(rank["dense"][name], weight, rtol=close, atol=0.1 * close, err_msg=name)


def joined(group: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks of a group hold together, each key on one of them."""
    whole = {name: dict(x) if isinstance(x, dict) else x for name, x in group[0].items()}
    whole |= {"happened": sum((x["happened"] for x in group), Counter())} if "happened" in whole else {}
    for rank in group[1:]:
        assert rank["clocks"] == whole["clocks"]
        for name in ("rows", "waiting"):
            assert not whole[name].keys() & rank[name].keys(), "a key is on one rank of a group"
            whole[name] |= rank[name]
    return whole


class Truth:
    """Runs with one group, each made once."""

    def __init__(self, gloo: Any, log: str) -> None:
        self.gloo, self.log, self.made = gloo, log, {}  # type: ignore[var-annotated]

    def __call__(self, world_size: int = 1, **settings: Any) -> Any:
        key = (world_size, repr(settings))
        if key not in self.made:
            self.made[key] = self.gloo(world_size).run(fit, world_size, self.log, **settings)
        return self.made[key]


@pytest.fixture(scope="module")
def truth(gloo: Any, log: str) -> Truth:
    return Truth(gloo, log)


# ---- M groups are one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", ["adagrad", *more("adam")])
@pytest.mark.parametrize(("world_size", "groups"), [*more((2, 2)), (4, 2)])
def test_groups_of_ranks_train_as_one(
    gloo: Any, log: str, truth: Any, sparse: str, world_size: int, groups: int
) -> None:
    from lightning_gr.embeddings.dynamic.table_statistics import TableStatistics

    settings = {"sparse": sparse, "by_hand": True}
    one = truth(**settings)
    happened = {what for (_, what), n in one[0]["happened"].items() if n}
    assert happened == vars(TableStatistics()).keys(), "everything that can happen to a key should"
    many = gloo(world_size).run(fit, world_size, log, groups=groups, **settings)
    assert_equal(many, groups, one)
    assert_equal(many, groups, truth(world_size, **settings))
    assert_replicas_equal(many, groups)
    if world_size == 4:
        assert any(not ids for rank in many for ids in rank["ids"]), "some ranks should be without samples"


@pytest.mark.long
def test_three_groups_and_groups_of_three(gloo: Any, log: str, truth: Any) -> None:
    settings = {"sparse": "adam", "max_steps": 12}
    for groups in (2, 3):
        many = gloo(6).run(fit, 6, log, groups=groups, **settings)
        assert_equal(many, groups, truth(**settings))
        assert_replicas_equal(many, groups, 12)


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 3},
    "micro-steps": {"data": {"global_tokens": 4 * LONGEST}, "tokens_per_rank": LONGEST},
    "one clipped norm": {"gradient_clip_val": 0.02},
    "both": {"gradient_clip_val": 0.02, "accumulate_grad_batches": 3, "sparse": "adam"},
    "row-wise": {"sparse": "rowwise_adagrad"},
    "bf16 on the way": {"model": {"tables": {"exchange_precision": "bf16"}}},
    "bf16 rows": {"model": {"row": {"precision": "bf16"}}},
    "mixed rows": {"model": {"row": {"precision": "mixed", "hot_count": 5}}},
    "distinct before travel": {"model": {"tables": {"dedup": "before_exchange"}}},
    "distinct on arrival": {"model": {"tables": {"dedup": "before_lookup"}}},
    "never distinct": {"model": {"tables": {"dedup": "none"}}},
    "apart": {"model": {"tables": {"merge": False}}},
    "updated in backward": {"model": {"tables": {"update": "backward"}}},
    "host rows": {"model": {"row": {"placement": "host", "cache_rows": 8}}},
    "not pipelined": {"depth": 0},
}


LONG = (
    *("accumulation", "one clipped norm", "row-wise", "bf16 rows", "mixed rows", "distinct before travel"),
    *("distinct on arrival", "apart", "updated in backward", "not pipelined"),
)


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in SETTINGS])
def test_with_other_settings(gloo: Any, log: str, truth: Any, case: str) -> None:
    settings = {"max_steps": 12} | SETTINGS[case]
    # What a micro-batch evicts depends on its cut. Keys of all groups are always made distinct.
    distinct: dict[str, Any] = {"model": {}} if "distinct" in case else {}
    one = truth(2 if case == "micro-steps" else 1, **settings | distinct)
    two = gloo(2).run(fit, 2, log, groups=2, **settings)
    assert_replicas_equal(two, 2, 12)
    # Keys, counters and clocks are equal in any precision.
    assert_equal(two, 2, one, close=0.05 if "bf16" in case or "mixed" in case else 1e-4)
    if "clipped" in case:
        with pytest.raises(AssertionError):
            assert_equal(two, 2, truth(max_steps=12))


@pytest.mark.parametrize(
    ("world_size", "model"),
    [(4, {"loss": "full_softmax"}), (2, {"loss": "sampled_softmax"}), (4, {"loss": "bce", "negatives": "in_batch"})],
)
def test_evaluation_ranks_the_whole_corpus(gloo: Any, log: str, truth: Any, world_size: int, model: Any) -> None:
    settings = {"kind": "retrieval", "model": model, "max_steps": 8, "val_check_interval": 4, "limit_val_batches": 1.0}
    one = truth(**settings)
    many = gloo(world_size).run(fit, world_size, log, groups=2, **settings)
    assert_equal(many, 2, one)
    assert_replicas_equal(many, 2, 8)
    wanted = {name: value for name, value in one[0]["metrics"].items() if name.startswith("val/")}
    assert {"val/loss", "val/HR@3", "val/MRR"} <= wanted.keys()
    for rank in many:
        assert {name: rank["metrics"][name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def fit_twice(world_size: int, log: str, groups: tuple[int, int]) -> dict[str, Any]:
    pl.seed_everything(7)
    module = Tables()
    fit(world_size, log, module=module, groups=groups[0], max_steps=6)
    return fit(world_size, log, module=module, groups=groups[1], max_steps=6)


@pytest.mark.parametrize("groups", [(2, 1), *(pytest.param(x, marks=pytest.mark.long) for x in ((2, 2), (1, 2)))])
def test_another_strategy_keeps_the_groups_of_the_first(gloo: Any, log: str, groups: tuple[int, int]) -> None:
    two = gloo(2).run(fit_twice, 2, log, groups)
    assert {cut[:2] for rank in two for cut in rank["cut"]} == {(groups[0], 2 // groups[0])}
    assert_equal(two, groups[0], gloo(1).run(fit_twice, 1, log, (1, 1)))
    if groups[0] == 2:
        assert_replicas_equal(two, 2, 6)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def after(ranks: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """What a run that was resumed after so many steps has to show."""
    cut = [rank | {name: rank[name][steps:] for name in ("losses", "prints")} for rank in ranks]
    return [{name: x for name, x in rank.items() if name != "happened"} for rank in cut]


@pytest.mark.long  # test_resume_laws resumes groups, too
def test_resumed_with_the_same_groups_bit_for_bit_and_with_others(gloo: Any, log: str, tmp_path: Path) -> None:
    def run(groups: int, save: str | None = None, **settings: Any) -> Any:
        path = None if save is None else str(tmp_path / save)
        return gloo(4).run(fit, 4, log, sparse="adam", groups=groups, save=path, max_steps=12, **settings)

    whole = {groups: after(run(groups, f"{groups}.ckpt"), 7) for groups in (1, 2)}
    for saved in (1, 2):
        resumed = run(2, ckpt_path=str(tmp_path / f"{saved}.ckpt"))
        assert_replicas_equal(resumed, 2, 5)
        assert_equal(resumed, 2, whole[1])
        for mine, wanted in zip(resumed, whole[2], strict=True) if saved == 2 else ():
            assert mine["prints"] == wanted["prints"]
            assert mine["losses"] == wanted["losses"]
            for name, weight in wanted["dense"].items():
                np.testing.assert_array_equal(mine["dense"][name], weight)
    for world_size in (4, 1):
        path = str(tmp_path / "2.ckpt")
        back = gloo(world_size).run(fit, world_size, log, sparse="adam", max_steps=12, ckpt_path=path)
        assert_equal(back, 1, whole[1])


# ---- who talks to whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "groups"), [(4, 2), *more((2, 2))])
def test_only_replicas_talk_across_groups(gloo: Any, log: str, world_size: int, groups: int) -> None:
    size, everyone = world_size // groups, tuple(range(world_size))
    own = {everyone[first : first + size] for first in range(0, world_size, size)}
    replicas = {everyone[place::size] for place in range(size)}
    ranks = gloo(world_size).run(fit, world_size, log, groups=groups, max_steps=12, gradient_clip_val=0.02)
    for number, rank in enumerate(ranks):
        assert rank["cut"] == {(groups, size, number % size)}
        inside, between = Counter[str](), Counter[str]()
        for name, members, sent in rank["calls"]:
            if members in own | replicas:
                assert number in members
                (inside if members in own else between).update({"calls": 1, "bytes": sent})
            else:
                assert members == ()
                assert name in ("all_reduce", "broadcast")
                assert sent <= 8 * (world_size - 1), "all ranks agree on single numbers and exchange nothing else"
        for counted, kinds in (
            (inside, ("keys", "rows", "gradients", "flags")),
            (between, ("replica_keys", "replica_gradients")),
        ):
            for what in ("calls", "bytes"):
                assert counted[what] == sum(rank["traffic"][kind, what] for kind in kinds)
        assert between["bytes"] > 0
        assert (inside["bytes"] > 0) == (size > 1)
    # Of what is activated the values travel, each once to every other group.
    for group in of_groups(ranks, groups):
        activated = sum(len(set.union(*ids)) for ids in zip(*(rank["ids"] for rank in group), strict=True))
        assert 0 < activated < 12 * ITEMS
        width = 4 + 8 + 4 + 4
        sent = sum(rank["traffic"]["replica_gradients", "bytes"] for rank in group)
        assert sent == 4 * width * activated * (groups - 1)


# ---- why gradients and not weights -------------------------------------------------------------------------------


def quadratic(name: str, how: str, lr: float = 0.3, steps: int = 12) -> np.ndarray[Any, Any]:
    """Rows that are pulled to one target by each of two replicas, which look up some of them in each step.

    Args:
        name: optimiser.
        how: `summed` gradients before the update; `weights` averaged after it, or `all`, the state too; `alone` is one
            process in float64, from the optimisers' definitions.
        lr: learning rate.
        steps: how many.
    """
    from lightning_gr.embeddings.dynamic.row_storage import RowStorage
    from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig, update_rows

    M, N, D = 2, 10, 4
    config = SparseOptimizerConfig(name)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    first_ND = torch.randn(N, D, generator=generator)
    targets_MND = torch.randn(M, N, D, generator=generator)
    active_SMN1 = torch.rand(steps, M, N, 1, generator=generator) < 0.6
    if how == "alone":
        return alone(config, lr, first_ND.double(), targets_MND.double(), active_SMN1)
    replicas = [RowStorage(dim=D, state_width=config.state_width(D)) for _ in range(M)]
    for storage in replicas:
        rows_N = storage.allocate(N)
        storage.write(rows_N, first_ND)
    for step, active_MN1 in enumerate(active_SMN1):
        grads_MND = (torch.stack([x.read(rows_N) for x in replicas]) - targets_MND) * active_MN1
        if how == "summed":
            grads_MND, active_MN1 = grads_MND.sum(0).expand(M, N, D), active_MN1.any(0).expand(M, N, 1)
        for storage, grads_ND, active_N1 in zip(replicas, grads_MND, active_MN1, strict=True):
            own_N = active_N1[:, 0]
            update_rows(storage, rows_N[own_N], grads_ND[own_N], config, lr=lr, step=step)
        if how != "summed":
            values_ND = torch.stack([x.read(rows_N) for x in replicas]).mean(0)
            state_NS = torch.stack([x.read_state(rows_N) for x in replicas]).mean(0)
            for storage in replicas:
                storage.write(rows_N, values_ND)
                if how == "all":
                    storage.write_state(rows_N, state_NS)
    assert torch.equal(replicas[0].read(rows_N), replicas[1].read(rows_N))
    return replicas[0].read(rows_N).numpy()


def alone(config: Any, lr: float, rows_ND: Tensor, targets_MND: Tensor, active_SMN1: Tensor) -> np.ndarray[Any, Any]:
    sums_ND, means_ND = torch.zeros_like(rows_ND), torch.zeros_like(rows_ND)
    times_N1 = torch.zeros_like(rows_ND[:, :1])
    for active_MN1 in active_SMN1:
        grads_ND = ((rows_ND - targets_MND) * active_MN1).sum(0)
        active_N1 = active_MN1.any(0)
        moved_ND = lr * grads_ND
        if config.name == "adam":
            times_N1 += active_N1
            (beta1, beta2), squares_ND = config.betas, grads_ND**2
            means_ND = torch.where(active_N1, beta1 * means_ND + (1 - beta1) * grads_ND, means_ND)
            sums_ND = torch.where(active_N1, beta2 * sums_ND + (1 - beta2) * squares_ND, sums_ND)
            root_ND = (sums_ND / (1 - beta2**times_N1)).sqrt()
            moved_ND = lr * means_ND / (1 - beta1**times_N1) / (root_ND + config.eps)
        elif config.name != "sgd":
            squares_ND = grads_ND**2
            sums_ND += squares_ND if config.name == "adagrad" else squares_ND.mean(1, keepdim=True)
            moved_ND = lr * grads_ND / (sums_ND.sqrt() + config.eps)
        rows_ND = torch.where(active_N1, rows_ND - moved_ND, rows_ND)
    return rows_ND.numpy()


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_averaged_weights_are_not_centralised_training(name: str) -> None:
    wanted = quadratic(name, "alone")
    np.testing.assert_allclose(quadratic(name, "summed"), wanted, rtol=1e-4, atol=1e-5)
    averaged = [quadratic(name, how, lr) for how in ("weights", "all") for lr in (0.3, 0.6)]
    errors = [float(np.abs(found - wanted).max()) for found in averaged]
    if name == "sgd":  # linear in the gradient: at M times the rate the average is the sum
        assert errors[1] < 1e-5
    else:
        assert min(errors) > 0.05, errors


# ---- what cannot work is said ------------------------------------------------------------------------------------


class Static(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        table = EmbeddingConfig(name="old", num_embeddings=50, embedding_dim=4, feature_names=["item_id"])
        self.static = EmbeddingCollection(tables=[table], device=torch.device("cpu"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("training began")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)


def said(world_size: int, log: str, **settings: Any) -> str:
    with pytest.raises(MisconfigurationException) as error:
        fit(world_size, log, max_steps=1, **settings)
    return str(error.value)


def test_what_cannot_work_is_refused_by_name(gloo: Any, log: str) -> None:
    for groups, number in ((3, "2"), (0, "at least 1")):
        for message in gloo(2).run(said, 2, log, groups=groups):
            assert f"table_groups={groups}" in message
            assert number in message
    for message in gloo(2).run(said, 2, log, kind="static", groups=2):
        assert "table_groups=2" in message
        assert "static" in message
        assert "old" in message or "Static" in message


def host_bytes() -> int:
    from lightning_gr.plugins.table_groups_memory import host_memory

    return host_memory()


def test_tables_too_large_for_a_group_are_refused_with_figures(gloo: Any, log: str) -> None:
    # Half of it on each of two ranks, which share the machine's memory, but not all of it on both.
    model = {"max_bytes": gloo(2).run(host_bytes)[0] * 3 // 4}
    gloo(2).run(fit, 2, log, model=model, max_steps=1)
    for message in gloo(2).run(said, 2, log, model=model, groups=2):
        assert "table_groups=2: table c may grow to" in message
        assert "GiB" in message
        assert "table_groups of at most 1" in message
