"""The TorchRec front end against TorchRec's own unsharded collections, and batches with little or nothing in them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.embeddings import embedding_collection
from lightning_gr.embeddings.dynamic import (
    DynamicEmbeddingBagCollection,
    DynamicEmbeddingCollection,
    DynamicTableConfig,
    DynamicTables,
    SparseOptimizerConfig,
    TablePolicy,
)

FEATURES = ["f", "g", "k"]
NORMAL = functools.partial(torch.nn.init.normal_, std=0.5)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-8),
}


def jagged(values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Any:
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(keys=FEATURES, values=values, lengths=lengths, weights=weights)


def batches(num: int, *, weighted: bool = False, size: int = 5) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(num):
        lengths = torch.randint(0, 5, (len(FEATURES) * size,), generator=generator)
        ids = torch.randint(0, 12, (int(lengths.sum()),), generator=generator)
        made.append(jagged(ids, lengths, torch.rand(len(ids), generator=generator) if weighted else None))
    return made


def configs(kind: Any, *, tag_dim: int = 3, **more: Any) -> list[Any]:
    """`item` has features f and g, and g is `tag`'s too."""
    tables = (("item", 6, ["f", "g"]), ("tag", tag_dim, ["k", "g"]))
    return [
        kind(name=name, embedding_dim=dim, num_embeddings=12, feature_names=of, init_fn=NORMAL, **more)
        for name, dim, of in tables
    ]


def loss_of(output: Any) -> Tensor:
    outputs = [x.values() for x in output.values()] if isinstance(output, dict) else [output.values()]
    return sum((x - 0.3).pow(2).sum() * (i + 1) for i, x in enumerate(outputs))  # type: ignore[return-value]


def settings_of(name: str, **more: Any) -> DynamicTables:
    return DynamicTables(optimizer=SparseOptimizerConfig(name, lr=0.1, momentum=0.9), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_dynamic_collection_trains_as_a_static_one(name: str) -> None:
    from torchrec import EmbeddingConfig

    torch.manual_seed(11)
    tables = configs(EmbeddingConfig, tag_dim=6)  # TorchRec's have one width
    static, dynamic = embedding_collection(tables), settings_of(name).collection(tables)
    optimizer = OPTIMIZERS[name](static.parameters())
    everything = jagged(torch.arange(12).repeat(3), torch.tensor([12, 12, 12]))
    for i, batch in enumerate(batches(6)):
        a, b = static(batch), dynamic(batch)
        assert sorted(a) == sorted(b)
        for feature in a:
            assert torch.equal(a[feature].lengths(), b[feature].lengths())
            if i == 0:  # first values are the same to the bit
                assert torch.equal(a[feature].values(), b[feature].values())
            torch.testing.assert_close(a[feature].values(), b[feature].values(), rtol=1e-5, atol=1e-6)
        # Adam of torch moves every row, which a gradient of zero makes the dynamic table do too.
        rest = [(0 * loss_of(dynamic(everything)))] if name in ("adam", "momentum") else []
        optimizer.zero_grad()
        loss_of({x: a[x] for x in sorted(a)}).backward()
        (sum(rest) + loss_of({x: b[x] for x in sorted(b)})).backward()
        optimizer.step()
        dynamic.engine.step()
    for t in range(2):
        (merged,) = dynamic.engine.tables
        rows, _ = merged.rows_of(t)
        weight = static.state_dict()[f"embeddings.{merged.names[t]}.weight"]
        torch.testing.assert_close(rows.values_ND, weight[rows.ids_N], rtol=1e-5, atol=1e-6)
        assert len(rows.ids_N) == 12


@pytest.mark.parametrize("pooling", ["SUM", "MEAN", "weighted"])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_dynamic_bag_collection_trains_as_a_static_one(pooling: str, name: str) -> None:
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

    from lightning_gr.embeddings.static_tables import initialise_tables

    kind = PoolingType.MEAN if pooling == "MEAN" else PoolingType.SUM
    torch.manual_seed(11)
    tables = configs(EmbeddingBagConfig, pooling=kind)
    static = EmbeddingBagCollection(tables=tables, is_weighted=pooling == "weighted")
    initialise_tables(static, seed=11)
    torch.manual_seed(11)
    dynamic = settings_of(name).bag_collection(tables)
    optimizer = OPTIMIZERS[name](static.parameters())
    for batch in batches(6, weighted=pooling == "weighted"):
        a, b = static(batch), dynamic(batch)
        assert sorted(a.keys()) == sorted(b.keys())
        assert a.values().shape == b.values().shape
        for feature in a.keys():  # noqa: SIM118 (a KeyedTensor is no dict)
            torch.testing.assert_close(a[feature], b[feature], rtol=1e-5, atol=1e-6)
        empty = batch["f"].lengths() == 0
        assert not b["f"][empty].any()
        optimizer.zero_grad()
        for output in (a, b):
            sum((output[x] - 0.3).pow(2).sum() for x in output.keys()).backward()  # noqa: SIM118
        optimizer.step()
        dynamic.engine.step()


@pytest.mark.parametrize("pooled", [False, True])
def test_batches_with_little_or_nothing_in_them(pooled: bool) -> None:
    kind = DynamicEmbeddingBagCollection if pooled else DynamicEmbeddingCollection
    tables = [DynamicTableConfig("item", 6, ["f", "g"]), DynamicTableConfig("tag", 3, ["k"])]
    made: Any = kind(tables=tables, settings=settings_of("adam"))
    none = torch.zeros(0, dtype=torch.int64)
    for values, lengths in (
        (none, none),  # no samples
        (none, torch.zeros(6, dtype=torch.int64)),  # two samples without ids
        (torch.tensor([-1, 0]), torch.tensor([0, 0, 1, 1, 0, 0])),  # one feature alone
        (torch.tensor([7]), torch.tensor([0, 0, 1])),
    ):
        batch = jagged(values, lengths)
        for training in (True, False):
            made.train(training)
            output = made(batch)
            if pooled:
                assert output.values().shape == (len(lengths) // 3, 15)
            else:
                shapes = {x: tuple(y.values().shape) for x, y in output.items()}
                ids = dict(zip(FEATURES, batch.length_per_key(), strict=True))
                assert shapes == {"f": (ids["f"], 6), "g": (ids["g"], 6), "k": (ids["k"], 3)}
            if training:
                loss_of(output).backward()
                made.engine.step()
    assert made.engine.next_step == 4
    assert [len(table) for table in made.engine.tables] == [2, 1]


@pytest.mark.parametrize("policy", [TablePolicy(), TablePolicy(max_rows=70, rows_per_group=64, on_missing="bucket")])
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({"placement": "host", "cache_rows": 4}, 1e-6),
        ({"placement": "host", "cache_rows": 5000}, 1e-6),
        ({"precision": "bf16"}, 0.06),
        ({"precision": "fp16"}, 0.01),
        ({"precision": "mixed", "hot_count": 3}, 0.01),
        ({"precision": "mixed", "hot_count": 1}, 1e-3),
        ({"precision": "mixed", "hot_count": 3, "placement": "host", "cache_rows": 8}, 0.01),
    ],
    ids=str,
)
def test_precision_and_placement_reach_the_rows(policy: TablePolicy, more: dict[str, Any], tolerance: float) -> None:
    from torchrec import EmbeddingConfig

    def trained(**changed: Any) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(4)
        made = settings_of("adagrad", policy=policy, **changed).collection(configs(EmbeddingConfig))
        outputs, generator = [], torch.Generator().manual_seed(3)
        for i in range(8):
            ids = torch.randint(-90, 90, (60,), generator=generator)
            output = made(jagged(ids, torch.full((30,), 2)))
            outputs.append(torch.cat([x.values().detach().flatten() for x in output.values()]))
            loss_of(output).backward()
            made.engine.step()
            assert made.engine.next_step == i + 1
        return made, outputs

    (plain, expected), (made, outputs) = trained(), trained(**more)
    assert {config.precision for config in made.configs} == {more.get("precision", "fp32")}
    assert {config.placement for config in made.configs} == {more.get("placement", "device")}
    for a, b in zip(expected, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(plain.engine.tables, made.engine.tables, strict=True):
        assert vars(a.statistics[0]) == vars(b.statistics[0])
        (of_a, _), (of_b, _) = a.rows_of(0), b.rows_of(0)
        assert torch.equal(of_a.ids_N, of_b.ids_N)
        assert torch.equal(of_a.metadata.counts, of_b.metadata.counts)
        if (precision := more.get("precision")) in ("bf16", "fp16"):
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            assert torch.equal(of_b.values_ND, of_b.values_ND.to(dtype).float())
        if precision == "mixed":
            assert of_b.hot_N is not None
            assert torch.equal(of_b.hot_N, of_b.metadata.counts >= more["hot_count"])


def test_settings_turn_static_tables_into_dynamic_ones() -> None:
    from torchrec import EmbeddingBagConfig, EmbeddingConfig, PoolingType

    own, common = TablePolicy(max_rows=100, rows_per_group=64), TablePolicy(ttl_steps=3)
    settings = DynamicTables(policy=common, policies={"tag": own})
    made = settings.configs(configs(EmbeddingConfig))
    assert [(x.name, x.embedding_dim, x.feature_names, x.policy) for x in made] == [
        ("item", 6, ("f", "g"), common),
        ("tag", 3, ("k", "g"), own),
    ]
    assert [x.first_values for x in made] == [NORMAL, NORMAL]
    pooled = settings.configs(configs(EmbeddingBagConfig, pooling=PoolingType.MEAN))
    assert [x.pooling for x in pooled] == ["mean", "mean"]
    assert {x.pooling for x in settings.configs(configs(EmbeddingBagConfig))} == {"sum"}
    assert list(settings.collection(configs(EmbeddingConfig)).state_dict()) == []


def test_outputs_are_named_as_torchrec_names_them() -> None:
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

    tables = {"t": ["f", "g"], "u": ["g"], "v": ["h"]}
    theirs = EmbeddingCollection(
        tables=[
            EmbeddingConfig(name=name, num_embeddings=4, embedding_dim=4, feature_names=list(features))
            for name, features in tables.items()
        ]
    )
    ours = DynamicEmbeddingCollection(
        tables=[DynamicTableConfig(name, 4, features) for name, features in tables.items()]
    )
    features = KeyedJaggedTensor(keys=["f", "g", "h"], values=torch.tensor([1, 2, 3]), lengths=torch.ones(3).long())
    assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()
    assert sorted(ours(features)) == ["f", "g@t", "g@u", "h"]
