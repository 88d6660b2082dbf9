"""The laws of meta training: tasks dealt out over ranks and micro-steps are learned as one process learns them.

Shape suffixes: B sequences, V values of a feature.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr import FeatureConfig
from lightning_gr.batch import SequenceBatch
from lightning_gr.batch_samples import padding_like, take
from lightning_gr.data import EventStore, RankingSource, TaskDataModule
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.models import DLRM, MetaRankingModule, RankingModule
from tests.data.test_feature_config import NUM_ITEMS, TASKS, Event, collate, make_store, source_of
from tests.plugins.test_laws_of_training import Recorder, Save, difference, make_trainer, samples
from tests.plugins.test_laws_of_training import state as state_of_dense_and_static
from tests.plugins.test_table_groups import COLLECTIVES

pytestmark = pytest.mark.dist

FEATURES = [
    FeatureConfig("item_id", dim=8),
    FeatureConfig("affinity", group="candidate"),
    FeatureConfig("price"),
    FeatureConfig("genres", pooling="sum"),
    FeatureConfig("liked", table="genres"),
]
EPISODES = (3, 1, 5, 2, 4, 1, 3)
"""Of the steps: on several ranks some have none."""
ENOUGH = (4, 5, 4, 6)
"""For every rank one."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(4)
    tasks = [[draw_event(rng) for _ in range(n)] for n in rng.integers(5, 19, 24).tolist()]
    return str(make_store(tmp_path_factory.mktemp("tasks"), tasks).path)


def draw_event(rng: np.random.Generator) -> Event:
    return int(rng.integers(NUM_ITEMS)), int(rng.integers(4)), float(rng.normal()), float(rng.random())


# ---- what is trained ---------------------------------------------------------------------------------------------


class DenseTables(nn.Module):
    """Tables as dense parameters of any precision, in place of sharded ones."""

    def __init__(self, shapes: Any) -> None:
        super().__init__()
        self.of_table = nn.ModuleDict({x.name: nn.Embedding(x.rows, x.dim) for x in shapes})
        self.table_of = {feature: x.name for x in shapes for feature in x.features}

    @override
    def forward(self, features: Any) -> Any:
        from torchrec import JaggedTensor

        lengths = features.lengths().view(len(features.keys()), -1)
        ids = features.values().split(features.length_per_key())
        return {
            name: JaggedTensor(self.of_table[self.table_of[name]](ids_V), lengths=lengths_B)
            for name, ids_V, lengths_B in zip(features.keys(), ids, lengths, strict=True)
        }


class InDouble(MetaRankingModule):
    """Without sharded tables, whose rows are float32."""

    @override
    def configure_model(self) -> None:
        if self.tables is None:
            super().configure_model()
            assert self.features is not None
            self.tables = DenseTables(self.features.shapes(self.embedding_dim))  # type: ignore[assignment]


class TwoLookups(MetaRankingModule):
    """Looks up supports and queries apart, each by exchanges of its own."""

    @override
    def embed(self, batch: SequenceBatch) -> dict[str, Tensor]:
        assert self.tables is not None
        assert batch.shots_B is not None
        found: dict[str, Any] = {}
        for side in (batch.shots_B > 0, batch.shots_B == 0):
            places = side.nonzero()[:, 0]
            for name, jagged in self.tables(take(batch, places).features).items():
                values = jagged.values().split(jagged.lengths().tolist())
                found.setdefault(name, {}).update(zip(places.tolist(), values, strict=True))
        return {name: torch.cat([of_sequence[b] for b in sorted(of_sequence)]) for name, of_sequence in found.items()}


class Joint(RankingModule):
    """Plain training on all records; takes what has no meaning for it."""

    def __init__(self, *, inner_lr: float, inner_lr_rows: float, shots: list[int], **given: Any) -> None:
        super().__init__(num_experts=0, **given)


def make_module(kind: str, features: Any = None, *, made: str | None = None, **changes: Any) -> MetaRankingModule:
    pl.seed_everything(11)
    kinds: dict[str | None, Any] = {None: MetaRankingModule, "two lookups": TwoLookups, "joint": Joint}
    settings: dict[str, Any] = {"inner_lr": 0.3, "inner_lr_rows": 0.5, "shots": [0, 1, 3]}
    module: MetaRankingModule = (InDouble if kind == "double" else kinds[made])(
        network=DLRM(dim=6, hidden_dims=(8,), pooling="sum", dropout=0.0),
        features=features,
        embedding_dim=4,
        embedding_std=0.5,
        head_dim=6,
        dynamic_tables=DynamicTables() if kind == "dynamic" else None,
        backend="reference",
        optimizer=functools.partial(torch.optim.AdamW if kind == "double" else torch.optim.SGD, lr=0.03),
        **(settings | changes),
    )
    return module


def state(module: Any) -> dict[str, Any]:
    """Dense and static weights, and this rank's rows of each dynamic table with the optimiser's state."""
    found = {name: x for name, x in state_of_dense_and_static(module).items() if not name.startswith("row ")}
    for place, table in enumerate(getattr(getattr(module.tables, "engine", None), "tables", [])):
        for number, name in enumerate(table.key_names):
            rows, _ = table.rows_of(number)
            for key, values, own in zip(rows.ids_N.tolist(), rows.values_ND, rows.state_NS, strict=True):
                found[f"row {place} {name} {key}"] = torch.cat([values, own]).double().numpy()
    return found


# ---- steps of so many episodes -----------------------------------------------------------------------------------


def steps_of(source: RankingSource, episodes: tuple[int, ...]) -> list[list[list[int]]]:
    """For each step its episodes: a sample to adapt to and a sample to learn from, of one user."""
    of_user: dict[int, list[int]] = {}
    for sample in source.samples(0, source.num_rows)[0].tolist():
        of_user.setdefault(sample % source.num_rows, []).append(sample)
    pairs = [own[i : i + 2] for own in of_user.values() for i in range(0, len(own) - 1, 2)]
    order = np.random.default_rng(0).permutation(len(pairs))
    places = np.cumsum([0, *episodes])
    return [[pairs[i % len(pairs)] for i in order.take(range(a, b), mode="wrap")] for a, b in zip(places, places[1:])]  # noqa: B905


def batch_of(source: RankingSource, step: list[list[int]], rank: int, world_size: int) -> SequenceBatch:
    """A rank's episodes of a step; padding where it has none."""
    queries = np.array([query for _, query in step])
    total = {task: float(count.sum()) for task, count in source.label_counts(queries).items()}
    numbers = range(rank, len(step), world_size)
    ids = [sample for number in numbers for sample in step[number]]
    batch = collate(source, ids or step[0])
    batch = replace(
        batch,
        sample_ids_B=torch.arange(len(ids or step[0])) // 2 + 100 * rank,
        shots_B=torch.tensor([3, 0] * (len(ids or step[0]) // 2)),
        denominators=total,
        gradient_divisor=float(world_size),
    )
    named = [number for number in numbers for _ in range(2)]
    return replace(batch, sample_ids_B=torch.tensor(named)) if ids else padding_like(batch)


class DenseWeights(pl.Callback):
    """A digest of this rank's dense parameters after each batch."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        digest = hashlib.sha256()
        for name, value in module.named_parameters():
            if not name.startswith("tables"):
                digest.update(value.detach().numpy().tobytes())
        self.digests.append(digest.hexdigest())


def train_steps(
    world_size: int,
    store: str,
    kind: str,
    *,
    sparse: str = "rowwise_adagrad",
    episodes: tuple[int, ...] = EPISODES,
    made: str | None = None,
    **model: Any,
) -> dict[str, Any]:
    import torch.distributed as dist

    source = source_of(EventStore(store), FEATURES)
    batches = [batch_of(source, step, dist.get_rank(), world_size) for step in steps_of(source, episodes)]
    module, record, dense = make_module(kind, source.ranking_features, made=made, **model), Recorder(), DenseWeights()
    trainer = make_trainer(
        world_size,
        record,
        dense,
        strategy={"sparse_optimizer": sparse},
        max_epochs=1,
        precision="64-true" if kind == "double" else "32-true",
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return record.taken() | {"state": state(module), "dense": dense.digests}


FIRST: dict[str, Any] = {"inner_steps": 1, "order": "first", "adapt": "both"}
SECOND: dict[str, Any] = {"inner_steps": 3, "order": "second", "adapt": "both", "learn_step_sizes": True}
REPTILE: dict[str, Any] = {"inner_steps": 2, "order": "reptile", "adapt": "both"}
PARTS: dict[str, Any] = {"inner_steps": 2, "order": "second", "adapt": ["heads.*", "tables.genres"]}
ROWS: dict[str, Any] = {"inner_steps": 3, "order": "second", "adapt": "embedding", "learn_step_sizes": True}
DENSE: dict[str, Any] = {"inner_steps": 1, "order": "second", "adapt": "dense"}
LONG: list[dict[str, Any]] = [
    {"inner_steps": steps, "order": order, "adapt": adapt, "learn_step_sizes": learn}
    for steps in (1, 3)
    for order in ("first", "second")
    for adapt in ("dense", "embedding", "both")
    for learn in (False, True)
]


class Truth:
    """Runs of one process, each made once."""

    def __init__(self, gloo: Any, store: str) -> None:
        self.gloo, self.store, self.made = gloo, store, {}  # type: ignore[var-annotated]

    def __call__(self, function: Any, *args: Any, **settings: Any) -> Any:
        key = f"{function.__name__} {args} {settings}"
        if key not in self.made:
            self.made[key] = self.gloo(1).run(function, 1, self.store, *args, **settings)
        return self.made[key]


@pytest.fixture(scope="module")
def truth(gloo: Any, store: str) -> Truth:
    return Truth(gloo, store)


def ranks(*quick: int) -> Any:
    """Numbers of ranks: those of the quick suite, and 2 to 4 in the long one."""
    long = [n for n in (2, 3, 4) if n not in quick]
    return pytest.mark.parametrize("world_size", [*quick, *(pytest.param(n, marks=pytest.mark.long) for n in long)])


@ranks(2, 3)
@pytest.mark.parametrize(
    "model", [FIRST, SECOND, REPTILE, PARTS, *(pytest.param(x, marks=pytest.mark.long) for x in LONG)], ids=str
)
def test_ranks_learn_what_one_process_does_to_the_last_digits_of_a_double(
    gloo: Any, store: str, truth: Truth, model: dict[str, Any], world_size: int
) -> None:
    one = truth(train_steps, "double", **model)
    assert len(one[0]["losses"]) == len(EPISODES)
    many = gloo(world_size).run(train_steps, world_size, store, "double", **model)
    assert samples(many) == samples(one)
    assert min(len(step) for rank in many for step in rank["samples"]) == 0, "some ranks should have no episode"
    assert difference(many, one) <= 1e-10


def test_what_the_law_is_about_makes_a_difference(truth: Truth) -> None:
    one = truth(train_steps, "double", **FIRST)
    for changed in ({"order": "second"}, {"inner_steps": 3}, {"adapt": "dense"}, {"adapt": "embedding"}):
        assert difference(truth(train_steps, "double", **(FIRST | changed)), one) > 1e-3


@ranks(2, 3)
@pytest.mark.parametrize(
    ("kind", "sparse", "model"),
    [
        ("static", "rowwise_adagrad", SECOND),
        ("dynamic", "adagrad", SECOND),
        ("dynamic", "rowwise_adagrad", REPTILE),
        *(
            pytest.param(kind, sparse, model, marks=pytest.mark.long)
            for kind in ("static", "dynamic")
            for sparse in ("adagrad", "rowwise_adagrad")
            for model in (FIRST, SECOND, REPTILE, PARTS, ROWS, DENSE)
        ),
    ],
)
def test_tables_on_ranks_are_those_of_one_process(
    gloo: Any, store: str, truth: Truth, kind: str, sparse: str, model: dict[str, Any], world_size: int
) -> None:
    one = truth(train_steps, kind, sparse=sparse, **model)
    many = gloo(world_size).run(train_steps, world_size, store, kind, sparse=sparse, **model)
    assert samples(many) == samples(one)
    assert difference(many, one) <= 2e-5
    dense = [rank["dense"] for rank in many]
    assert len(set(dense[0])) == len(EPISODES), "every step should change something"
    assert all(of_rank == dense[0] for of_rank in dense), "what is adapted to an episode stays with it"


# ---- what travels ------------------------------------------------------------------------------------------------


def test_one_lookup_of_support_and_query_is_two_lookups(gloo: Any, store: str) -> None:
    settings: dict[str, Any] = {"episodes": ENOUGH, "sparse": "adagrad", **SECOND}
    one = gloo(2).run(train_steps, 2, store, "dynamic", **settings)
    two = gloo(2).run(train_steps, 2, store, "dynamic", made="two lookups", **settings)
    for mine, other in zip(one, two, strict=True):
        np.testing.assert_allclose(mine["losses"], other["losses"], rtol=1e-5)
        assert mine["state"].keys() == other["state"].keys()
        for name, value in mine["state"].items():
            np.testing.assert_allclose(other["state"][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    # Static tables, which update rows lookup by lookup, are the same in values.
    one = gloo(2).run(train_steps, 2, store, "static", **settings)
    two = gloo(2).run(train_steps, 2, store, "static", made="two lookups", **settings)
    assert [rank["losses"][0] for rank in one] == pytest.approx([rank["losses"][0] for rank in two], rel=1e-6)


def watched(world_size: int, store: str, kind: str, made: str | None, **model: Any) -> list[list[str]]:
    """By step, what this rank did in its order: collectives, forwards, and where backward began."""
    import torch.distributed as dist

    source = source_of(EventStore(store), FEATURES)
    batches = [batch_of(source, step, dist.get_rank(), world_size) for step in steps_of(source, EPISODES)]
    module = make_module(kind, source.ranking_features, made=made, **model)
    events: list[list[str]] = [[]]

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **given: (events[-1].append(name), function(*args, **given))[1]

    def reduce(_: Any, bucket: Any) -> Any:
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda reduced: reduced.value()[0] / world_size)

    reduce.__annotations__.clear()  # DDP takes its own types or none

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            module.score = noted("forward", module.score)
            trainer.strategy.model._dmp_wrapped_module.register_comm_hook(None, reduce)

        def on_train_batch_start(self, *args: Any) -> None:
            events.append([])

        def on_before_backward(self, *args: Any) -> None:
            events[-1].append("backward")

        def on_train_batch_end(self, *args: Any) -> None:
            events.append([])

    trainer = make_trainer(
        world_size, Watch(), strategy={"pipeline_depth": 0}, max_epochs=1, use_distributed_sampler=False
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, noted(name, getattr(dist, name)))
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return [step for step in events if "backward" in step]


# Of dynamic tables of all widths: numbers of keys, keys, rows; gradients. Of TorchRec's by width: sizes, lengths, ids,
# rows; gradients.
@pytest.mark.parametrize(("kind", "lookups", "gradients"), [("dynamic", 3, 1), ("static", 2 * 4, 2)])
def test_a_step_exchanges_ids_rows_and_gradients_once_whatever_the_inner_steps(
    gloo: Any, store: str, kind: str, lookups: int, gradients: int
) -> None:
    exchange = "all_to_all_single"
    joint = gloo(2).run(watched, 2, store, kind, "joint")
    for inner_steps in (1, 3):
        meta = gloo(2).run(watched, 2, store, kind, None, **(SECOND | {"inner_steps": inner_steps}))
        for rank, (mine, plain) in enumerate(zip(meta, joint, strict=True)):
            for number, step, of_joint in zip(EPISODES, mine, plain, strict=True):
                episodes = len(range(rank, number, 2))
                # Nothing travels between the lookup and backward: the inner loop is local.
                forwards = ["forward"] * episodes * (inner_steps + 1)
                assert step[: step.index("backward")] == [exchange] * lookups + forwards
                behind = step[step.index("backward") :]
                assert behind == ["backward", "all_reduce", *[exchange] * gradients]
                assert behind == of_joint[of_joint.index("backward") :], "as where there is nothing to adapt"


# ---- planned -----------------------------------------------------------------------------------------------------


def make_data(store: str, kind: str, **changes: Any) -> TaskDataModule:
    settings: dict[str, Any] = {"global_tokens": 70, "eval_global_tokens": 40, "support": 4, "query": 4}
    settings |= {"shots": [0, 1, 3], "val_tasks": 0.25, "test_tasks": 0.1, "seed": 5, "eval_query": 6}
    return TaskDataModule(
        path=store, tasks=TASKS, features=list(FEATURES), raw_ids=kind == "dynamic", **(settings | changes)
    )


def train_planned(
    world_size: int,
    store: str,
    kind: str,
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    balancing: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
    save: tuple[str, int] | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    from lightning_gr.balancing import Balancing

    module, record, dense = make_module(kind, **(model or SECOND)), Recorder(), DenseWeights()
    trainer = make_trainer(
        world_size,
        record,
        dense,
        *(() if save is None else (Save(*save),)),
        strategy={"balancing": Balancing(**(balancing or {}))} | (strategy or {}),
        **({"max_epochs": 2, "precision": "64-true" if kind == "double" else "32-true"} | settings),
    )
    trainer.fit(module, datamodule=make_data(store, kind, **(data or {})), ckpt_path=ckpt_path)
    metrics = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
    return record.taken() | {"state": state(module), "dense": dense.digests, "metrics": metrics}


def close(kind: str) -> float:
    return 1e-10 if kind == "double" else 2e-5


MICRO: dict[str, Any] = {"balancing": {"tokens_per_rank": 26}}


@ranks(2)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("static", {}),
        ("double", MICRO | {"accumulate_grad_batches": 2}),
        ("dynamic", MICRO | {"strategy": {"pipeline_depth": 0}}),
        *(
            pytest.param(kind, settings, marks=pytest.mark.long)
            for kind in ("double", "dynamic")
            for settings in (
                {},
                MICRO,
                {"accumulate_grad_batches": 3},
                {"balancing": {"partitioner": "contiguous"}},
                {"model": REPTILE},
                {"model": PARTS, "data": {"order": "random"}},
                {"data": {"history": 3}},
            )
        ),
    ],
    ids=str,
)
def test_planned_episodes_on_ranks_are_those_of_one_process(
    gloo: Any, store: str, truth: Truth, kind: str, settings: dict[str, Any], world_size: int
) -> None:
    plain = {name: x for name, x in settings.items() if name not in ("balancing", "strategy")}
    one = truth(train_planned, kind, **plain)
    many = gloo(world_size).run(train_planned, world_size, store, kind, **settings)
    assert len(one[0]["losses"]) >= 4
    assert samples(many) == samples(one)
    assert difference(many, one) <= close(kind)
    assert all(rank["dense"] == many[0]["dense"] for rank in many)
    if settings.get("balancing", {}).get("tokens_per_rank"):
        assert many[0]["batches"] > one[0]["batches"], "batches of several micro-steps"
    # Metrics of each number of shots, of a batch of which some rank has no episode.
    assert world_size == 2 or any(rank["evaluated"][0] for rank in many)
    names = {f"val/click/{name}@{shots}" for name in ("AUC", "GAUC", "loss", "NE") for shots in (0, 1, 3)}
    assert names <= one[0]["metrics"].keys()
    for rank in many:
        assert rank["metrics"] == pytest.approx(one[0]["metrics"], rel=1e-4)


def test_rows_read_ahead_lack_one_update_on_any_number_of_ranks(gloo: Any, store: str, truth: Truth) -> None:
    late = {"strategy": {"sparse_update": "semi_async", "sync_steps": 2}}
    one = truth(train_planned, "dynamic", **late)
    assert difference(one, truth(train_planned, "dynamic")) > 1e-3
    assert difference(gloo(2).run(train_planned, 2, store, "dynamic", **late), one) <= 2e-5
    exact = {"strategy": {"sparse_update": "exact_async", "sync_steps": 2}}
    found = gloo(2).run(train_planned, 2, store, "dynamic", **exact)
    assert difference(found, truth(train_planned, "dynamic")) <= 2e-5


# ---- resumed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.long)])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(gloo: Any, store: str, tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "middle.ckpt")
    whole = gloo(2).run(train_planned, 2, store, kind, save=(path, 3))
    assert whole[0]["epochs"][2] == whole[0]["epochs"][3] == 0, "in the middle of an epoch"
    again = gloo(2).run(train_planned, 2, store, kind, ckpt_path=path)
    for mine, other in zip(again, whole, strict=True):
        assert mine["losses"] == other["losses"][3:]
        assert mine["samples"] == other["samples"][3:]
        assert mine["metrics"] == other["metrics"]
        assert mine["state"].keys() == other["state"].keys()
        assert any(name.startswith("step_sizes.") for name in mine["state"])
        for name, value in mine["state"].items():
            np.testing.assert_array_equal(other["state"][name], value, err_msg=name)
    one = gloo(1).run(train_planned, 1, store, kind, ckpt_path=path)
    rest = [rank | {"losses": rank["losses"][3:], "samples": rank["samples"][3:]} for rank in whole]
    assert samples(one) == samples(rest)
    assert difference(rest, one) <= 2e-5
