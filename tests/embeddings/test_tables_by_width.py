"""Static tables of several widths: each feature's rows are those of its table, with the first values it has alone."""

from __future__ import annotations

import functools

import torch
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from lightning_gr.embeddings import embedding_collection, is_static_collection
from lightning_gr.embeddings.tables_by_width import TablesByWidth, static_tables


def config(name: str, dim: int, *features: str) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=name,
        num_embeddings=5,
        embedding_dim=dim,
        feature_names=list(features),
        init_fn=functools.partial(torch.nn.init.normal_, std=1.0),
    )


CONFIGS = [config("a", 3, "a"), config("b", 2, "b", "c"), config("d", 3, "d")]


def test_rows_are_those_of_each_table_alone() -> None:
    torch.manual_seed(3)
    together = static_tables(CONFIGS)
    assert isinstance(together, TablesByWidth)
    alone = {config.name: embedding_collection([config]) for config in CONFIGS}
    lengths = torch.tensor([2, 1, 0, 2, 1, 0, 3, 1])
    values = torch.arange(10) % 5
    features = KeyedJaggedTensor(["c", "d", "a", "b"], values, lengths=lengths)
    found = together(features)
    assert set(found) == {"a", "b", "c", "d"}
    for table, names in (("a", "a"), ("b", "bc"), ("d", "d")):
        (weight,) = alone[table].state_dict().values()
        for name in names:
            assert torch.equal(found[name].values(), weight[features[name].values()])
            assert torch.equal(found[name].lengths(), features[name].lengths())


def test_tables_of_one_width_are_a_collection_of_torchrecs() -> None:
    tables = static_tables([config("a", 3, "a"), config("d", 3, "d")])
    assert isinstance(tables, EmbeddingCollection)
    assert list(tables.state_dict()) == ["embeddings.a.weight", "embeddings.d.weight"]
    several = static_tables(CONFIGS)
    assert sum(is_static_collection(module) for module in several.modules()) == 2
