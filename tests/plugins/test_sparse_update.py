"""Laws of semi-asynchronous training: rows are stale by one step and nothing else is; the exact variant equals sync.

The model is linear, so that a dictionary of float64 rows can say what each step had to use.

Shape suffixes: B samples, D dimension.
"""

from __future__ import annotations

import csv
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from tests.more import more

pytestmark = pytest.mark.dist

STEPS, SAMPLES, FIRST = 12, 6, 0.5
CUTS = {1: [0, 6], 2: [0, 2, 6], 4: [0, 2, 2, 5, 6]}
PARTS = {"a": 4, "b": 4, "c": 6, "p": 4, "a2": 4, "b2": 4, "c2": 6}
"""The head's input: rows of three tables, two of them merged, pooled rows, and rows of a second forward; widths."""
LR, DENSE_LR = 0.5, 0.05
SEMI = {"sparse_update": "semi_async", "sync_steps": 0}
STATIC = {"sparse_optimizer": "rowwise_adagrad"}
EXACT = {"sparse_update": "exact_async", "sync_steps": 0}


def key(number: int) -> int:
    """Ids that need all 64 bits."""
    return number * 2**58 - 2**62


def samples(*, shared: bool, accumulate: int = 1, steps: int = STEPS) -> list[list[dict[str, Any]]]:
    """Batches of samples: by part the ids that they look up, and a label.

    Args:
        shared: whether batches share ids, one of them with all; otherwise those of consecutive steps share none.
        accumulate: batches of a step.
        steps: optimiser's steps.
    """
    rng, batches = np.random.default_rng(3), []
    for number in range(steps * accumulate):
        parity = number // accumulate % 2

        def draw(parity: int = parity) -> int:
            return key(int(rng.integers(0, 14)) if shared else int(rng.integers(0, 14)) * 2 + parity)

        batch: list[dict[str, Any]] = []
        for place in range(SAMPLES):
            sample: dict[str, Any] = {part: [draw()] for part in PARTS if part != "p"}
            if shared and place == 0:
                sample["a"] = sample["b2"] = [key(0)]
            batch.append(sample | {"p": [draw() for _ in range(int(rng.integers(0, 4)))], "y": float(rng.normal())})
        batches.append(batch)
    return batches


class Model(pl.LightningModule):
    """Squared error of a linear function of rows, those of one collection from two forwards.

    Args:
        policy: of table b.
        makes: whether the step also looks up features that it makes itself.
        static: whether the tables are static ones.
        settings: of the dynamic tables.
    """

    def __init__(
        self,
        *,
        policy: dict[str, Any] | None = None,
        makes: bool = False,
        static: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

        from lightning_gr.embeddings.dynamic import Admission, DynamicTables, Eviction, TablePolicy

        first: Any = functools.partial(nn.init.uniform_, a=FIRST, b=FIRST)
        tables = [
            EmbeddingConfig(name=x, num_embeddings=30, embedding_dim=PARTS[x], feature_names=[x], init_fn=first)
            for x in ("ab" if static else "abc")
        ]
        bags = [EmbeddingBagConfig(name="p", num_embeddings=30, embedding_dim=4, feature_names=["p"], init_fn=first)]
        given = dict(policy or {})
        given |= {"admission": Admission(**given.pop("admission", {})), "eviction": Eviction(**given.pop("evict", {}))}
        if static:
            self.rows: Any = EmbeddingCollection(tables=tables, device=torch.device("cpu"))
            self.pooled: Any = EmbeddingBagCollection(tables=bags, device=torch.device("cpu"))
        else:
            dynamic = DynamicTables(virtual_shards=16, **settings)
            own = DynamicTables(virtual_shards=16, policies={"b": TablePolicy(**given)}, **settings)
            self.rows, self.pooled = own.collection(tables), dynamic.bag_collection(bags)
        self.head, self.makes = nn.Linear(sum(PARTS.values()), 1), makes

    def losses(self, batch: Any) -> Any:
        from torchrec import KeyedJaggedTensor

        first, second, y_B = batch
        if self.makes:
            second = KeyedJaggedTensor(second.keys(), second.values() + (1 << 20), lengths=second.lengths())
        rows, again, pooled_BD = self.rows(first), self.rows(second), self.pooled(first)["p"]
        parts = [*(rows[x].values() for x in "abc"), pooled_BD[: len(y_B)], *(again[x].values() for x in "abc")]
        return (self.head(torch.cat(parts, 1)).squeeze(-1) - y_B) ** 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses_B = self.losses(batch)
        return {"loss": losses_B.sum(), "loss_sums": {"mse": (losses_B.sum(), len(losses_B))}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.losses(batch).mean(), batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=DENSE_LR)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


class Batches:
    """A rank's part of batches, with a cursor."""

    def __init__(self, batches: list[list[dict[str, Any]]], rank: int, world_size: int) -> None:
        own = slice(*CUTS[world_size][rank : rank + 2])
        self.batches, self.done = [self.made(batch[own]) for batch in batches], 0

    @staticmethod
    def made(samples: list[dict[str, Any]]) -> tuple[Any, Any, torch.Tensor]:
        from torchrec import KeyedJaggedTensor

        def features(parts: list[str]) -> Any:
            ids = [sample[part] for part in parts for sample in samples]
            lengths = [len(x) for x in ids] or [0] * len(parts)  # TorchRec takes no batch without samples
            values = torch.tensor(sum(ids, []), dtype=torch.int64)
            return KeyedJaggedTensor([part[0] for part in parts], values, lengths=torch.tensor(lengths))

        first, second = (features(x) for x in (["a", "b", "c", "p"], ["a2", "b2", "c2"]))
        return first, second, torch.tensor([sample["y"] for sample in samples])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        first = self.done if self.done < len(self.batches) else 0
        for place, batch in enumerate(self.batches[first:]):
            self.done = first + place + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Recorder(pl.Callback):
    """Losses as they come; saves once after so many of them."""

    def __init__(self, save: tuple[str, int] | None) -> None:
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.save = save

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:  # empty where the step returned None
            self.losses.append(float(outputs["loss"]))
        if self.save is not None and len(self.losses) == self.save[1]:
            trainer.save_checkpoint(self.save[0])

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append(float(trainer.callback_metrics["val/loss"]))


def contents(engines: dict[str, Any]) -> dict[str, Any]:
    """All that a rank keeps: rows, optimiser state, counters and clocks by table and id; statistics; what waits."""
    kept: dict[str, Any] = {}
    for path, engine in engines.items():
        kept[f"{path} clocks"] = (engine.next_step, engine.time)
        for table in engine.tables:
            for number, name in enumerate(table.key_names):
                rows, _ = table.rows_of(number)
                of = rows.metadata
                clocks_N3 = torch.stack([of.counts, of.last_steps, of.last_times], 1)
                whole = torch.cat([rows.values_ND.double(), rows.state_NS.double(), clocks_N3.double()], 1).numpy()
                kept |= {f"{name} {x}": whole[i] for i, x in enumerate(rows.ids_N.tolist())}
            for number, config in enumerate(table.configs):
                kept[f"{config.name} statistics"] = asdict(table.statistics[number])
                waiting, _ = table.counter_state(number) or ({}, [])
                kept |= {f"{config.name} waiting {name}": x.numpy() for name, x in waiting.items()}
    return kept


def fit(
    batches: list[list[dict[str, Any]]],
    *,
    model: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
    save: tuple[str, int] | None = None,
    ckpt_path: str | None = None,
    logger: Any = False,
    validates: bool = False,
    callbacks: Collection[Any] = (),
    **settings: Any,
) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    module, record = Model(**(model or {})), Recorder(save)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    given: dict[str, Any] = {"sparse_lr": LR, "sparse_optimizer": "sgd"} | (strategy or {})
    chosen = SequenceBalancedStrategy(**given)
    head = {name: p.detach().double().numpy().copy() for name, p in module.head.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=chosen,
        callbacks=[record, *callbacks],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 1} | settings),
    )
    held_out = Batches(batches[:2], rank, world_size) if validates else None
    trainer.fit(module, Batches(batches, rank, world_size), held_out, ckpt_path=ckpt_path)
    assert chosen.stage_log is not None
    assert chosen.dynamic is not None
    return {
        "losses": record.losses,
        "validated": record.validated,
        "tables": contents(chosen.dynamic.engines),
        "first head": head,
        "head": {name: p.detach().double().numpy().copy() for name, p in module.head.named_parameters()},
        "events": [(e.stage, e.batch, e.start, e.end) for e in chosen.stage_log.events()],
    }


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], *, since: int = 0) -> None:
    """Bit for bit, on every rank; of `wanted`, the losses from `since` on."""
    for mine, plain in zip(found, wanted, strict=True):
        assert mine["losses"] == plain["losses"][since:]
        assert mine["validated"] == plain["validated"][-len(mine["validated"]) or len(plain["validated"]) :]
        for name in ("head", "tables"):
            assert mine[name].keys() == plain[name].keys()
            for what, value in plain[name].items():
                if since and what.endswith("statistics"):
                    continue  # of this process
                np.testing.assert_equal(mine[name][what], value, err_msg=what)


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    try:
        assert_same(found, wanted)
    except AssertionError:
        return False
    return True


def total(ranks: list[dict[str, Any]], name: str) -> int:
    """A number of the tables' statistics, over all tables and ranks."""
    return sum(x[name] for rank in ranks for what, x in rank["tables"].items() if what.endswith("statistics"))


def assert_ahead(ranks: list[dict[str, Any]], batches: Collection[int]) -> None:
    """Rows of these batches were sent before the update before them had ended."""
    for rank in ranks:
        sent: dict[int, float] = {}
        for stage, batch, start, _ in sorted(rank["events"], key=lambda event: event[2]):
            if stage == "embed":
                sent.setdefault(batch, start)
        updated = {batch: end for stage, batch, _, end in rank["events"] if stage == "embed_backward"}
        for batch in batches:
            assert sent[batch] < updated[batch - 1], batch


# ---- what a run must be ------------------------------------------------------------------------------------------


def simulate(
    batches: list[list[dict[str, Any]]],
    first: dict[str, Any],
    *,
    stale: Callable[[int], bool],
    accumulate: int = 1,
    epochs: int = 1,
) -> dict[str, Any]:
    """One process with SGD; the first forward of a stale batch uses rows as they were before the latest update."""
    rows: dict[Any, Any] = defaultdict(lambda: np.full(6, FIRST))
    weight_D, bias, places = first["weight"][0].copy(), float(first["bias"][0]), {}
    for part, width in PARTS.items():
        start = sum(PARTS[x] for x in list(PARTS)[: list(PARTS).index(part)])
        places[part] = slice(start, start + width)
    before, grads = rows, defaultdict(lambda: np.zeros(6))  # type: ignore[var-annotated]
    weight_grad, bias_grad, losses, validated = np.zeros_like(weight_D), 0.0, [], []

    def inputs(sample: dict[str, Any], used: Any) -> Any:
        sums = []
        for part, width in PARTS.items():
            source = rows if part.endswith("2") else used
            sums.append(sum((source[part[0], x][:width] for x in sample[part]), np.zeros(width)))
        return np.concatenate(sums)

    for number, batch in enumerate(batches * epochs):
        used, loss = before if stale(number) else rows, 0.0
        for sample in batch:
            input_D = inputs(sample, used)
            error = input_D @ weight_D + bias - sample["y"]
            loss += error**2 / len(batch) / accumulate
            scaled = 2 * error / len(batch) / accumulate
            weight_grad, bias_grad = weight_grad + scaled * input_D, bias_grad + scaled
            for part, width in PARTS.items():
                for x in sample[part]:
                    grads[part[0], x][:width] += scaled * weight_D[places[part]]
        losses.append(loss)
        if (number + 1) % accumulate == 0:
            factor = 0.9 ** (number // accumulate // 2)
            before = defaultdict(lambda: np.full(6, FIRST), {name: x.copy() for name, x in rows.items()})
            for name, grad in grads.items():
                rows[name] = rows[name] - LR * factor * grad
            weight_D, bias = weight_D - DENSE_LR * factor * weight_grad, bias - DENSE_LR * factor * bias_grad
            grads.clear()
            weight_grad, bias_grad = np.zeros_like(weight_D), 0.0
            errors = [[inputs(x, rows) @ weight_D + bias - x["y"] for x in held] for held in batches[:2]]
            validated.append(np.mean([np.mean(np.square(x)) for x in errors]))
    return {"losses": losses, "rows": dict(rows), "weight": weight_D, "validated": validated}


def error_of(ranks: list[dict[str, Any]], truth: dict[str, Any]) -> float:
    """Largest difference from a simulation, of the losses of the steps and of any row or weight."""
    losses = np.mean([rank["losses"] for rank in ranks], axis=0)
    assert losses.shape == np.shape(truth["losses"])
    kept = {what: x for rank in ranks for what, x in rank["tables"].items()}
    found = [np.abs(losses - truth["losses"]).max(), np.abs(ranks[0]["head"]["weight"][0] - truth["weight"]).max()]
    assert sum(what.split()[-1].lstrip("-").isdigit() for what in kept) == len(truth["rows"])
    for (table, one), row in truth["rows"].items():
        width = PARTS[table]
        found.append(np.abs(kept[f"{table} {one}"][:width] - row[:width]).max())
    return float(max(found))


def begins_fresh(*fresh: int) -> Callable[[int], bool]:
    return lambda number: number not in fresh


# ---- semi-asynchronous -------------------------------------------------------------------------------------------

TIGHT = {"max_rows": 12, "rows_per_group": 6}
POLICIES: dict[str, dict[str, Any]] = {
    "grows": {},
    "admission, first values": {"admission": {"min_count": 3}},
    "admission, default row": {"admission": {"min_count": 3}, "on_missing": "default_row", "default_value": 0.25},
    "admission by sketch": {"admission": {"min_count": 3, "counter": "sketch"}, "on_missing": "default_row"},
    "evictions": TIGHT | {"evict": {"policy": "lru"}},
    "evictions, default row": TIGHT | {"evict": {"policy": "lfu_lru"}, "on_missing": "default_row"},
    "too small for a batch": {"max_rows": 4, "rows_per_group": 4, "on_missing": "default_row", "default_value": 0.25},
    "expiry": {"ttl_steps": 2},
    "all": TIGHT | {"ttl_steps": 3, "admission": {"min_count": 2}, "on_missing": "default_row"},
}
FEW = ("admission, default row", "evictions", "all")
HAPPENS = {"admission": "rejected", "evictions": "evicted", "too small": "failed", "expiry": "expired"}


@pytest.mark.parametrize("policy", [x if x in FEW else pytest.param(x, marks=pytest.mark.long) for x in POLICIES])
def test_it_is_synchronous_training_where_consecutive_batches_share_no_id(gloo: Any, policy: str) -> None:
    batches, place = samples(shared=False), list(POLICIES).index(policy)
    for world_size in (1, 2) if policy == "all" else (2,):
        run = functools.partial(gloo(world_size).run, fit, batches, model={"policy": POLICIES[policy]})
        optimizer = {"sparse_optimizer": ("adagrad", "adam")[(place + world_size) % 2], "sparse_lr": 0.1}
        plain, found = run(strategy=optimizer), run(strategy=optimizer | SEMI)
        assert_same(found, plain)
        assert_ahead(found, range(1, STEPS))
        assert total(plain, "collided") == 0
        assert all(total(plain, x) for words, x in HAPPENS.items() if policy.startswith(words))


def test_windows_that_share_no_id(gloo: Any) -> None:
    batches = samples(shared=False, accumulate=3, steps=5)
    run = functools.partial(gloo(2).run, fit, batches, accumulate_grad_batches=3)
    assert_same(run(strategy=SEMI), run())


def test_clipping_by_value(gloo: Any) -> None:
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    free, plain, found = (
        gloo(2).run(fit, samples(shared=False), strategy=x, **y) for x, y in (({}, {}), ({}, clip), (SEMI, clip))
    )
    assert_same(found, plain)
    assert not same(free, plain)


@pytest.mark.parametrize("world_size", [*more(1), 2])
def test_a_step_uses_rows_without_the_latest_update_alone(gloo: Any, world_size: int) -> None:
    batches = samples(shared=True)
    run = functools.partial(gloo(world_size).run, fit, batches, max_epochs=2)
    plain, found = run(), run(strategy=SEMI)
    first = plain[0]["first head"]
    fresh = simulate(batches, first, stale=lambda _: False, epochs=2)
    stale = simulate(batches, first, stale=begins_fresh(0, STEPS), epochs=2)
    assert error_of(plain, fresh) < 1e-5
    assert error_of(found, stale) < 1e-5
    assert error_of(plain, stale) > 1e-2, "the control"
    assert_ahead(found, [x for x in range(1, 2 * STEPS) if x != STEPS])


@pytest.mark.parametrize("k", [*more(1, 9), 4])
def test_it_begins_after_synchronous_steps(gloo: Any, k: int) -> None:
    batches = samples(shared=True)
    run = functools.partial(gloo(2).run, fit, batches)
    plain, found = run(), run(strategy=SEMI | {"sync_steps": k})
    assert [x["losses"][:k] for x in found] == [x["losses"][:k] for x in plain]
    assert found[0]["losses"][k] != plain[0]["losses"][k]
    truth = simulate(batches, plain[0]["first head"], stale=lambda number: number >= k)
    assert error_of(found, truth) < 1e-5


def test_of_a_window_only_the_first_micro_batch_is_stale(gloo: Any) -> None:
    batches = samples(shared=True, accumulate=3, steps=5)
    run = functools.partial(gloo(2).run, fit, batches, accumulate_grad_batches=3)
    plain, found = run(), run(strategy=SEMI)
    first = plain[0]["first head"]
    assert error_of(plain, simulate(batches, first, stale=lambda _: False, accumulate=3)) < 1e-5
    truth = simulate(batches, first, stale=lambda number: number > 0 and number % 3 == 0, accumulate=3)
    assert error_of(found, truth) < 1e-5
    assert error_of(plain, truth) > 1e-3


def test_the_step_at_hand_is_updated_when_a_fit_ends_early(gloo: Any) -> None:
    batches = samples(shared=True)
    for settings in ({"max_steps": 7, "max_epochs": -1}, {"limit_train_batches": 7}):
        found = gloo(2).run(fit, batches, strategy=SEMI, **settings)
        truth = simulate(batches[:7], found[0]["first head"], stale=begins_fresh(0))
        assert error_of(found, truth) < 1e-5
        assert {x["tables"]["rows clocks"][0] for x in found} == {7}


# ---- exact -------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    **{name: {"strategy": {"sparse_optimizer": name}} for name in ("rowwise_adagrad", "adagrad", "sgd", "momentum")},
    "adam, accumulated": {"strategy": {"sparse_optimizer": "adam"}, "accumulate_grad_batches": 3},
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "clipped, accumulated": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    **{
        f"policy {name}": {"model": {"policy": x}} for name, x in POLICIES.items() if name not in ("grows", "evictions")
    },
    **{
        f"tight, missing {x}": {"model": {"policy": POLICIES["all"] | {"on_missing": x, "max_rows": 8}}}
        for x in ("initial", "default_row", "bucket")
    },
    **{f"stored in {x}": {"model": {"precision": x, "hot_count": 4}} for x in ("bf16", "fp16", "mixed")},
    "bf16, tight": {"model": {"precision": "bf16", "policy": POLICIES["all"] | {"on_missing": "bucket"}}},
    "16 bits on the way": {"model": {"exchange_precision": "bf16"}},
    "not made distinct": {"model": {"dedup": "none"}},
    "not merged": {"model": {"merge": False}},
    "on the host": {"model": {"placement": "host", "cache_rows": 4}},
    "features made in the step": {"model": {"makes": True}},
    "two epochs": {"max_epochs": 2},
    "late": {"strategy": {"sync_steps": 5}},
}


LONG = (
    *("rowwise_adagrad", "sgd", "momentum", "clipped by norm", "clipped by value", "bf16, tight", "not merged"),
    *(name for name in CASES if name.startswith(("policy", "tight, missing ", "stored in "))),
)
SHORT = ("policy all", "tight, missing bucket", "stored in mixed")


def exact_and_sync(gloo: Any, world_size: int, case: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    accumulate = case.get("accumulate_grad_batches", 1)
    batches = samples(shared=True, accumulate=accumulate, steps=STEPS // accumulate)
    given = {"sparse_optimizer": "adagrad", "sparse_lr": 0.2} | case.get("strategy", {}) | more
    run = functools.partial(gloo(world_size).run, fit, batches, **{x: y for x, y in case.items() if x != "strategy"})
    return run(strategy=EXACT | given), run(strategy=given)


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.long) if x in LONG and x not in SHORT else x for x in CASES]
)
def test_the_exact_variant_is_synchronous_training(gloo: Any, case: str) -> None:
    found, plain = exact_and_sync(gloo, 2, CASES[case])
    assert_same(found, plain)
    assert total(plain, "collided") > 0
    accumulate = CASES[case].get("accumulate_grad_batches", 1)
    assert_ahead(found, range(6 if case == "late" else accumulate, STEPS, accumulate))


@pytest.mark.parametrize(("world_size", "groups"), [*more((1, 1), (4, 2)), (2, 2)])
def test_the_exact_variant_on_any_number_of_ranks_and_groups(gloo: Any, world_size: int, groups: int) -> None:
    for case in ("clipped, accumulated", "tight, missing bucket"):
        assert_same(*exact_and_sync(gloo, world_size, CASES[case], table_groups=groups, sparse_optimizer="adam"))


# ---- between the steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "groups"), [("semi_async", 2), ("exact_async", 1), *more(("semi_async", 1), ("exact_async", 2))]
)
def test_a_resumed_run_equals_the_one_that_saved(gloo: Any, tmp_path: Path, mode: str, groups: int) -> None:
    batches, path = samples(shared=True), str(tmp_path / "middle.ckpt")
    strategy = SEMI | {"sparse_update": mode, "table_groups": groups, "sparse_optimizer": "adam", "sparse_lr": 0.05}
    run = functools.partial(gloo(2).run, fit, batches, strategy=strategy, model={"policy": POLICIES["all"]})
    whole = run(save=(path, 5))
    assert len(whole[0]["losses"]) == STEPS
    assert_same(run(ckpt_path=path), whole, since=5)
    assert same(run(), whole) == (mode == "exact_async"), "after a checkpoint rows are looked up afresh"


def test_rows_are_fresh_after_a_checkpoint(gloo: Any, tmp_path: Path) -> None:
    batches = samples(shared=True)
    found = gloo(2).run(fit, batches, strategy=SEMI, save=(str(tmp_path / "middle.ckpt"), 5))
    truth = simulate(batches, found[0]["first head"], stale=begins_fresh(0, 5))
    assert error_of(found, truth) < 1e-5


def test_validation_sees_every_update_and_changes_nothing(gloo: Any) -> None:
    batches = samples(shared=True)
    run = functools.partial(gloo(2).run, fit, batches)
    validated = functools.partial(run, validates=True, val_check_interval=4)
    plain, exact, semi = validated(), validated(strategy=EXACT), validated(strategy=SEMI)
    assert_same(exact, plain)
    assert len(plain[0]["validated"]) == 3
    without = run(strategy=EXACT)
    assert [x["losses"] for x in without] == [x["losses"] for x in exact]
    (alone,) = gloo(1).run(fit, batches, strategy=SEMI, validates=True, val_check_interval=4)
    truth = simulate(batches, alone["first head"], stale=begins_fresh(0))
    assert len(semi[0]["losses"]) == STEPS
    np.testing.assert_allclose(alone["validated"], truth["validated"][3::4], rtol=1e-5)


# ---- all together ------------------------------------------------------------------------------------------------


def fit_recipe(log: str, strategy: dict[str, Any]) -> dict[str, Any]:
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.embeddings.dynamic import Admission, DynamicTables, Eviction, TablePolicy
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    policy = TablePolicy(
        admission=Admission(min_count=2), eviction=Eviction(policy="lru"), max_rows=40, ttl_seconds=40_000
    )
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=2, max_length=24, dropout=0.0),
        loss="sampled_softmax",
        num_negatives=5,
        dynamic_tables=DynamicTables(policy=policy, virtual_shards=16),
        top_k=[3],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    record = Recorder(None)
    chosen: Any = SequenceBalancedStrategy(
        sparse_optimizer="adam", balancing=Balancing(tokens_per_rank=24), table_groups=2, sync_steps=1, **strategy
    )
    import torch.distributed as dist

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=chosen,
        callbacks=[record],
        accumulate_grad_batches=2,
        max_steps=6,
        val_check_interval=2,
        limit_val_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=SequenceDataModule(path=log, global_tokens=120, max_length=24, raw_ids=True))
    return {
        "losses": record.losses,
        "validated": record.validated,
        "head": {name: p.detach().numpy().copy() for name, p in module.encoder.named_parameters()},
        "tables": contents(chosen.dynamic.engines),
        "steps": trainer.global_step,
    }


@pytest.mark.long
def test_groups_plan_accumulation_and_staleness_together(gloo: Any, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "log.csv"
    lines = ["user_id,item_id,timestamp"]
    for user in range(60):
        items = rng.integers(0, 120, int(rng.integers(3, 6)) if user % 3 else int(rng.integers(12, 25)))
        lines += [f"u{user},{item},{1_000_000 + 3600 * step + user}" for step, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    sync, semi, exact = (
        gloo(4).run(fit_recipe, str(path), {"sparse_update": x}) for x in ("sync", "semi_async", "exact_async")
    )
    assert_same(exact, sync)
    assert not same(semi, sync)
    for ranks in (sync, semi):
        assert {rank["steps"] for rank in ranks} == {6}
        assert np.isfinite([rank["losses"] for rank in ranks]).all()
        for one, replica in ((ranks[0], ranks[2]), (ranks[1], ranks[3])):
            assert one["tables"].keys() == replica["tables"].keys()
            for what, value in one["tables"].items():
                np.testing.assert_equal(replica["tables"][what], value, err_msg=what)
        rows = [{x for x in rank["tables"] if x.split()[-1].isdigit()} for rank in ranks]
        assert rows[0]
        assert not rows[0] & rows[1]
        assert total(ranks, "evicted") > 0


# ---- the collision rate ------------------------------------------------------------------------------------------


def fit_logged(folder: str, batches: list[list[dict[str, Any]]], mode: str) -> list[tuple[int, int]]:
    """By step, on this rank's share of the keys: how many distinct ones, and how many the step before had too."""
    from lightning.pytorch.loggers import CSVLogger

    class Keys(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            engines = trainer.strategy.dynamic.engines
            before: set[tuple[str, int]] = set()
            for batch in batches:
                looked_up = {(part[0], x) for sample in batch for part in PARTS for x in sample[part]}
                own = set()
                for table, one in looked_up:
                    engine = engines["pooled" if table == "p" else "rows"]
                    if bool(engine.owned(engine.table_number(table), torch.tensor([one]))):
                        own.add((table, one))
                self.counts.append((len(own), len(own & before)))
                before = own

        counts: list[tuple[int, int]]

    keys = Keys()
    keys.counts = []
    logger = CSVLogger(folder, name="", version="")
    fit(batches, strategy=SEMI | {"sparse_update": mode}, logger=logger, callbacks=[keys], log_every_n_steps=1)
    return keys.counts


@pytest.mark.parametrize("mode", ["semi_async", "exact_async"])
def test_the_collision_rate_is_logged(gloo: Any, tmp_path: Path, mode: str) -> None:
    batches = samples(shared=True)
    for sample in sum(batches, []):
        sample |= {part: [sample[part][0] + 1] for part in ("a2", "b2", "c2")}  # no key is in both forwards
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        counts = gloo(world_size).run(fit_logged, str(folder), batches, mode)[0]
        with (folder / "metrics.csv").open() as file:
            found = {int(x["step"]): float(x["gr/collision_rate"]) for x in csv.DictReader(file)}
        wanted = {step: shared / distinct for step, (distinct, shared) in enumerate(counts)}
        assert 0 < np.mean(list(wanted.values())) < 1
        assert {step: found[step] for step in range(1, STEPS)} == pytest.approx({x: wanted[x] for x in range(1, STEPS)})


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "norm": ({"strategy": SEMI, "gradient_clip_val": 1.0}, ("gradient_clip_val=1.0", "semi_async")),
    "scaling": ({"strategy": SEMI, "scales": True}, ("16-mixed", "semi_async")),
    "scaling, exact": ({"strategy": EXACT, "scales": True}, ("16-mixed", "exact_async")),
    "depth": ({"strategy": SEMI | {"pipeline_depth": 0}}, ("pipeline_depth=0", "semi_async")),
    "depth, exact": ({"strategy": EXACT | {"pipeline_depth": 0}}, ("pipeline_depth=0", "exact_async")),
    "static": ({"strategy": STATIC | SEMI, "model": {"static": True}}, ("semi_async", "dynamic tables")),
    "static, exact": ({"strategy": STATIC | EXACT, "model": {"static": True}}, ("exact_async", "dynamic tables")),
    "backward": ({"strategy": SEMI, "model": {"update": "backward"}}, ("semi_async", "update", "backward")),
    "backward, exact": ({"strategy": EXACT, "model": {"update": "backward"}}, ("exact_async", "update", "backward")),
    "unknown": ({"strategy": {"sparse_update": "later"}}, ("sparse_update='later'", "sync, semi_async, exact_async")),
    "negative": ({"strategy": SEMI | {"sync_steps": -1}}, ("sync_steps=-1",)),
    "schedule": ({"strategy": {"schedule": "seven"}}, ("schedule='seven'", "lookup_ahead, six_stage")),
    **{
        f"depth of {x}": (
            {"strategy": {"schedule": "six_stage", "pipeline_depth": x}},
            (f"pipeline_depth={x}", "six_stage", "4"),
        )
        for x in (0, 1, 3)
    },
}


class SlowUpdates(pl.Callback):
    """Updates that are still under way when the next step's backward has ended."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        from lightning_gr.embeddings.dynamic.engine import DynamicEngine

        self.finish = finish = DynamicEngine._finish_step

        def slow(engine: Any, *args: Any) -> None:
            time.sleep(0.03)
            finish(engine, *args)

        DynamicEngine._finish_step = slow  # type: ignore[method-assign]

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        time.sleep(0.06)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        from lightning_gr.embeddings.dynamic.engine import DynamicEngine

        DynamicEngine._finish_step = self.finish  # type: ignore[method-assign]


class ByHand(pl.Callback):
    """Changes tables between steps, or leaves a step out before or after its forward."""

    def __init__(self, what: str) -> None:
        self.what = what

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            if batch_idx in (3, 4) and self.what == "none before the forward":
                return None
            if batch_idx == 5 and self.what == "deleted in the step":
                module.rows.engine.delete(torch.tensor([key(x) for x in range(6)]), "b")
            output = step(batch, batch_idx)
            return None if batch_idx in (3, 4) and self.what == "none after the forward" else output

        module.training_step = training_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        engine, ids = module.rows.engine, torch.tensor([key(x) for x in range(14)])
        scores = torch.rand(len(ids), generator=torch.Generator().manual_seed(batch_idx))
        if self.what == "scores":
            engine.set_scores(ids, scores, "b")
        if self.what == "deleted between steps" and batch_idx % 3 == 0:
            engine.delete(ids[:5], "b")
        if self.what == "upserted between steps" and batch_idx % 3 == 0:
            engine.upsert(ids[:5], scores[:5, None].expand(-1, PARTS["b"]), "b")


CLIPPED = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize(("mode", "settings"), [*more((EXACT, {})), (EXACT, CLIPPED), (SEMI, CLIPPED)])
def test_an_update_that_takes_long_changes_no_number(gloo: Any, mode: dict[str, Any], settings: dict[str, Any]) -> None:
    run = functools.partial(gloo(2).run, fit, samples(shared=True, steps=8), **settings)
    wanted = run(strategy={} if mode is EXACT else mode)
    assert_same(run(strategy=mode, callbacks=[SlowUpdates()]), wanted)


@pytest.mark.parametrize(
    "what",
    [
        "scores",
        "deleted between steps",
        "upserted between steps",
        "deleted in the step",
        "none before the forward",
        "none after the forward",
    ],
)
def test_tables_changed_by_hand_and_steps_left_out(gloo: Any, what: str) -> None:
    policy = {"max_rows": 8, "rows_per_group": 8, "evict": {"policy": "score" if what == "scores" else "lru"}}
    model = {"policy": policy | {"admission": {"min_count": 2}}}
    run = functools.partial(gloo(1).run, fit, samples(shared=True), model=model, callbacks=[ByHand(what)])
    assert_same(run(strategy=EXACT), run(strategy={}))


def said(settings: dict[str, Any]) -> str:
    from lightning.pytorch.plugins.precision import MixedPrecision

    if settings.pop("scales", False):
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu")]  # Lightning itself would take bf16
    with pytest.raises(MisconfigurationException) as error:
        fit(samples(shared=True, steps=2), **settings)
    return str(error.value)


def test_what_cannot_be_is_refused_with_its_reason(gloo: Any) -> None:
    for case, (settings, words) in REFUSED.items():
        (message,) = gloo(1).run(said, settings)
        assert all(x in message for x in words), (case, message)
        assert "\n" not in message, case
