"""Tokens of declared features against plain loops, and what tables, checkpoints and ranks make of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_gr import FeatureConfig
from lightning_gr.batch import TokenKind
from lightning_gr.data import Aggregation, LastShare, RankingDataModule, RankingSource
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.models import DLRM, MTGR, RankingModule
from lightning_gr.models.ranking_tokens import candidate_places
from tests.data.test_feature_config import (
    GENRES,
    LIKED_VALUES,
    NUM_ITEMS,
    SOME,
    TASKS,
    USERS,
    Event,
    collate,
    make_store,
    source_of,
)

FEATURES = [
    FeatureConfig("item_id", dim=5),
    FeatureConfig("bucket", group="history", dim=3),
    FeatureConfig("affinity", group="candidate", normalisation="log", mean=0.3, std=1.7),
    FeatureConfig("price", mean=2.0, std=5.0),
    FeatureConfig("genres", pooling="sum"),
    FeatureConfig("maker", group="candidate"),
    FeatureConfig("weight", group="history", mean=1.0, std=0.5),
    FeatureConfig("liked", table="genres"),
    FeatureConfig("age", mean=20.0, std=2.0),
]
DIM, EMBEDDING = 6, 4


def make_module(source: RankingSource, network: Any = None, **changes: Any) -> RankingModule:
    torch.manual_seed(2)
    made = MTGR(dim=DIM, num_layers=1, num_heads=2, max_length=32, dropout=0.0, separate_histories=True)
    module = RankingModule(
        network=network or made, features=source.ranking_features, embedding_dim=EMBEDDING, embedding_std=1.0, **changes
    )
    module.setup("fit")
    module.configure_model()
    return module.eval()


def everything(source: RankingSource) -> Any:
    return collate(source, source.samples(0, source.num_rows)[0])


class Loop:
    """Makes one token at a time out of raw values."""

    def __init__(self, module: RankingModule, source: RankingSource, users: list[list[Event]]) -> None:
        self.tokens: Any = module.network.tokens
        assert module.tables is not None
        self.tables = {name.split(".")[-2]: w.double() for name, w in module.tables.state_dict().items()}
        self.users = users
        # Raw genres by row; "liked" names most values, so its vocabulary comes first.
        self.genre_rows = {"b": 0, "c": 1, "d": 2, None: 3, "a": 4}

    def pooled(self, values: list[Any], *, mean: bool) -> Tensor:
        rows = [self.tables["genres"][self.genre_rows[x]] for x in values]
        total = sum(rows, torch.zeros(EMBEDDING, dtype=torch.float64))
        return total / max(len(rows), 1) if mean else total

    @staticmethod
    def number(x: float, mean: float, std: float, log: bool = False) -> Tensor:
        x = math.copysign(math.log1p(abs(x)), x) if log else x
        return torch.tensor([0.0 if math.isnan(x) else (x - mean) / std], dtype=torch.float64)

    def contextual(self, row: int) -> list[Tensor]:
        layers = self.tokens.contextual
        age = math.nan if row % 3 == 2 else 20.0 + row
        return [
            layers["user_id"](self.tables["user_id"][row]),
            layers["liked"](self.pooled(LIKED_VALUES[row % 4], mean=True)),
            self.tokens.contextual_numbers(self.number(age, 20.0, 2.0)),
        ]

    def event(self, row: int, place: int, kind: TokenKind, *, mean: bool) -> Tensor:
        item, bucket, affinity, price = self.users[row][place]
        common = [self.tables["item_id"][item], self.pooled(GENRES[item], mean=mean)]
        numbers = [self.number(price, 2.0, 5.0)]
        if kind == TokenKind.CANDIDATE:
            parts = [*common, self.tables["maker"][item % 2], *numbers, self.number(affinity, 0.3, 1.7, log=True)]
        else:
            click = float(place % 2)
            action = torch.tensor([click, 1.0, click], dtype=torch.float64)
            weight = math.nan if item == 3 else 0.5 * item
            parts = [*common, self.tables["bucket"][bucket], *numbers, action, self.number(weight, 1.0, 0.5)]
        layers = {
            TokenKind.STATIC: self.tokens.history,
            TokenKind.REALTIME: self.tokens.realtime,
            TokenKind.CANDIDATE: self.tokens.candidate,
        }
        made: Tensor = layers[kind](torch.cat(parts))
        return made


@settings(deadline=None, max_examples=12)
@given(USERS, st.booleans(), st.sampled_from([None, 1, 3]))
def test_tokens_are_those_of_a_loop(
    tmp_path_factory: pytest.TempPathFactory, users: list[list[Event]], mean: bool, rows_at_once: int | None
) -> None:
    """Genres of an item are none, one, two or three; users like none, one or two."""
    pooled = FeatureConfig("genres", pooling="mean" if mean else "sum")
    features = [pooled if x.name == "genres" else x for x in FEATURES]
    source = source_of(make_store(tmp_path_factory.mktemp("store"), users), features)
    ids = source.samples(0, source.num_rows)[0]
    module = make_module(source)
    batch = collate(source, ids)
    embedded = {name: x.double() for name, x in module.embed(batch).items()}
    module.network.double()
    tokens: Any = module.network.tokens
    found = tokens(embedded, batch, rows_at_once=rows_at_once)
    loop, wanted = Loop(module, source, users), []
    clock, kinds = batch.timestamps_T.tolist(), batch.kind_T.tolist()  # type: ignore[union-attr]
    for b, sample in enumerate(ids.tolist()):
        row = sample % len(users)
        start, end = batch.layout.offsets_B1[b : b + 2].tolist()
        wanted += loop.contextual(row)
        wanted += [loop.event(row, clock[t], TokenKind(kinds[t]), mean=mean) for t in range(start + 3, end)]
    assert found.shape == (len(wanted), DIM)
    if wanted:
        # A batch's numbers are float32.
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-6)


def test_samples_of_candidates_alone_have_tokens(tmp_path: Path) -> None:
    """A window of a second each, so that a user's first sample has no history."""
    source = source_of(make_store(tmp_path), FEATURES, aggregation=Aggregation(window="1s", max_static=3))
    module, batch = make_module(source), everything(source)
    alone = [
        int(x) for x, counts in zip(batch.sample_ids_B, batch.token_counts_B4, strict=True) if not counts[1:3].sum()
    ]
    assert len(alone) == len(SOME)
    small = collate(source, alone)
    assert small.token_counts_B4.tolist() == [[3, 0, 0, 1]] * len(SOME)
    together, clock = module(batch)["click"], batch.timestamps_T[candidate_places(batch)]  # type: ignore[index]
    torch.testing.assert_close(module(small)["click"], together[clock == 0], rtol=1e-4, atol=1e-5)
    assert module(collate(source, []))["click"].shape == (0,)


def test_histories_have_an_mlp_each_only_where_asked(tmp_path: Path) -> None:
    source = source_of(make_store(tmp_path), FEATURES)
    batch = everything(source)
    kinds = batch.kind_T
    assert {int(k) for k in kinds} == {0, 1, 2, 3}
    for separate in (False, True):
        network = MTGR(dim=DIM, num_layers=1, num_heads=2, max_length=32, dropout=0.0, separate_histories=separate)
        module = make_module(source, network)
        tokens: Any = network.tokens
        embedded = module.embed(batch)
        before = tokens(embedded, batch)
        with torch.no_grad():
            tokens.history[0].bias += 1.0
        changed = (tokens(embedded, batch) != before).any(1)
        assert torch.equal(changed, (kinds == 1) | ((kinds == 2) & (not separate)))


def test_rows_of_a_shared_table_get_the_gradient_of_both_features(tmp_path: Path) -> None:
    source = source_of(make_store(tmp_path), FEATURES)
    module = make_module(source)
    batch = everything(source)
    embedded = {name: x.detach().requires_grad_() for name, x in module.embed(batch).items()}
    module.score(embedded, batch)["click"].sum().backward()
    wanted = torch.zeros(5, EMBEDDING)
    for name in ("genres", "liked"):
        gradient = embedded[name].grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0
        for row, of_value in zip(batch.features[name].values().tolist(), gradient, strict=True):
            wanted[row] += of_value
    module.zero_grad()
    module(batch)["click"].sum().backward()
    table = {name.split(".")[-2]: p for name, p in module.tables.named_parameters()}["genres"]  # type: ignore[union-attr]
    torch.testing.assert_close(table.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mtgr", "dlrm"])
def test_a_cross_feature_of_one_candidate_changes_its_logit_alone(tmp_path: Path, kind: str) -> None:
    source = source_of(make_store(tmp_path), FEATURES)
    network = None if kind == "mtgr" else DLRM(dim=DIM, hidden_dims=(8,), dropout=0.0)
    module = make_module(source, network)
    batch = everything(source)
    before = module(batch)["click"]
    places = candidate_places(batch).tolist()
    assert len(places) > 4
    assert batch.features["maker"].values().shape == (len(places),)
    for n, place in enumerate(places):
        batch.dense["cross"][place] += 2.0
        changed = module(batch)["click"] != before
        assert changed.nonzero()[:, 0].tolist() == [n]
        batch.dense["cross"][place] -= 2.0
        embedded = module.embed(batch)
        embedded["maker"] = embedded["maker"].clone()
        embedded["maker"][n] += 1.0
        assert (module.score(embedded, batch)["click"] != before).nonzero()[:, 0].tolist() == [n]


def test_counted_operations_are_those_of_the_products(tmp_path: Path) -> None:
    source = source_of(make_store(tmp_path), FEATURES)
    module = make_module(source)
    batch, tokens = everything(source), module.network.tokens
    embedded = module.embed(batch)
    with FlopCounterMode(display=False) as counter:
        tokens(embedded, batch)  # type: ignore[operator, misc]
    counts = batch.token_counts_B4.sum(0).tolist()
    assert counter.get_total_flops() == tokens.flops(counts)  # type: ignore[union-attr, operator]
    counted = module.flops(batch)
    assert counted is not None
    lengths = {name: batch.features[name].values().numel() for name in ("user_id", "liked", "genres")}
    assert lengths["genres"] > lengths["user_id"]
    assert counted.embedding == EMBEDDING * sum(lengths.values())


def test_names_that_modules_cannot_have_are_features_all_the_same(tmp_path: Path) -> None:
    """`keys` and `training` are attributes of PyTorch's ModuleDict, which tables are children of too."""
    from lightning_gr.data import Field

    columns = {
        "keys": (Field("keys", "sparse", "user", 2), [0, 1]),
        "training": (Field("training", "sparse", "user", 2), [1, 0]),
    }
    store = make_store(tmp_path, **columns)
    with pytest.raises(ValueError, match="features.keys: 'keys' cannot be the name of a table; give it another one"):
        source_of(store, [FeatureConfig("keys")])
    source = source_of(store, [FeatureConfig("keys", table="shared"), FeatureConfig("training", table="shared")])
    assert make_module(source)(everything(source))["click"].isfinite().all()


# ---- runs ----------------------------------------------------------------------------------------------------------

LEARNED = [
    FeatureConfig("item_id", dim=12),
    FeatureConfig("bucket", group="history", dim=4),
    FeatureConfig("affinity", group="candidate", normalisation="log"),
    FeatureConfig("price"),
    FeatureConfig("genres", pooling="sum"),
    FeatureConfig("maker", group="candidate"),
    FeatureConfig("liked", table="genres"),
    FeatureConfig("age"),
]


def many_users(seed: int, price: float = 1.0) -> list[list[Event]]:
    rng = np.random.default_rng(seed)
    return [
        [
            (int(i), int(b), float(a), price * float(p))
            for i, b, a, p in zip(
                rng.integers(0, NUM_ITEMS, n), rng.integers(0, 4, n), rng.normal(size=n), rng.random(n), strict=True
            )
        ]
        for n in rng.integers(4, 24, 10)
    ]


def make_trainer(world_size: int, *callbacks: pl.Callback, max_epochs: int = 1) -> pl.Trainer:
    from lightning_gr.plugins import SequenceBalancedStrategy

    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def make_run(store: str, *, dynamic: bool) -> tuple[RankingModule, RankingDataModule]:
    pl.seed_everything(11)
    module = RankingModule(
        network=MTGR(dim=8, num_layers=1, num_heads=2, max_length=64, dropout=0.0),
        embedding_dim=8,
        dynamic_tables=DynamicTables() if dynamic else None,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    data = RankingDataModule(
        path=store,
        tasks=TASKS,
        features=list(LEARNED),
        global_tokens=90,
        max_history=9,
        block=5,
        split=LastShare(val=0.2, test=0.2),
        raw_ids=dynamic,
    )
    return module, data


class Losses(pl.Callback):
    """Losses of the global batch, step by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def train(world_size: int, store: str, dynamic: bool) -> dict[str, Any]:
    module, data = make_run(store, dynamic=dynamic)
    losses = Losses()
    trainer = make_trainer(world_size, losses, max_epochs=2)
    trainer.fit(module, datamodule=data)
    (test,) = trainer.test(module, datamodule=data, verbose=False)
    statistics = {name: x.tolist() for name, x in module.named_buffers() if "normalisation" in name}
    return {"losses": losses.seen, "test": test, "statistics": statistics}


@pytest.mark.dist
@pytest.mark.parametrize("dynamic", [False, True])
def test_two_ranks_equal_one(gloo: Any, tmp_path: Path, dynamic: bool) -> None:
    store = str(make_store(tmp_path, many_users(0)).path)
    (one,) = gloo(1).run(train, 1, store, dynamic)
    assert len(one["losses"]) > 4
    assert len(one["statistics"]) == 9  # three buffers of numbers, cross and contextual each
    for result in gloo(2).run(train, 2, store, dynamic):
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert result["test"] == pytest.approx(one["test"], rel=1e-4)
        assert result["statistics"] == one["statistics"]


def train_and_score_elsewhere(store: str, other: str, folder: str) -> dict[str, Any]:
    module, data = make_run(store, dynamic=False)
    trainer = make_trainer(1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(f"{folder}/checkpoint")
    trained = {name: x.clone() for name, x in module.named_buffers() if "normalisation" in name}
    again, new_data = make_run(other, dynamic=False)
    predicted: Any = make_trainer(1).predict(again, datamodule=new_data, ckpt_path=f"{folder}/checkpoint")
    own = new_data.ranking_features.normalisation["numbers"][0]
    loaded = {name: x.clone() for name, x in again.named_buffers() if "normalisation" in name}
    # The same tokens by hand: the other data, the trained statistics.
    batch = next(iter(new_data.predict_dataloader()))
    with torch.no_grad():
        wanted = module.cpu()(batch)["click"].double().sigmoid()
    return {
        "trained": trained,
        "loaded": loaded,
        "own": own,
        "predicted": predicted[0]["probabilities"]["click"],
        "wanted": wanted,
    }


def test_a_checkpoint_scores_other_data_by_the_statistics_of_its_own(gloo: Any, tmp_path: Path) -> None:
    store = str(make_store(tmp_path / "a", many_users(0)).path)
    other = str(make_store(tmp_path / "b", many_users(1, price=1000.0)).path)
    (found,) = gloo(1).run(train_and_score_elsewhere, store, other, str(tmp_path))
    assert found["own"].mean > 100
    name = next(name for name in found["trained"] if name.endswith("numbers.mean_W"))
    assert float(found["trained"][name][0]) < 1
    for key, value in found["trained"].items():
        assert torch.equal(found["loaded"][key], value), key
    torch.testing.assert_close(found["predicted"], found["wanted"], rtol=1e-5, atol=1e-6)
