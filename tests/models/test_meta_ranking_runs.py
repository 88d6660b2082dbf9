"""MetaRankingModule under a Trainer: fit, validate, test and predict, and settings that cannot work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gr.data import TaskDataModule
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.feature_config import FeatureConfig
from lightning_gr.models import DLRM, MetaRankingModule
from tests.models.episode_samples import (
    FEATURES,
    collate,
    draw_episodes,
    make_module,
    make_network,
    train,
    training_batch,
)
from tests.models.test_ranking import TASKS, write_store

SHOTS = [0, 1, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("tasks"))


class Recorder(pl.Callback):
    """What each step returned and logged, and how often the optimiser stepped."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged.append(float(trainer.callback_metrics["train/loss"]))
        assert batch.shots_B is not None


def run(store: Path, *, data: Any = None, model: Any = None, **trainer: Any) -> tuple[MetaRankingModule, Any, Any, Any]:
    pl.seed_everything(5)
    settings: dict[str, Any] = {"support": 4, "query": 4, "shots": SHOTS, "val_tasks": 0.3, "test_tasks": 0.2}
    datamodule = TaskDataModule(path=str(store), tasks=TASKS, global_tokens=120, **(settings | (data or {})))
    network = DLRM(dim=8, hidden_dims=(12, 10), pooling="none", dropout=0.0)
    module = MetaRankingModule(
        **(
            {
                "network": network,
                "embedding_dim": 6,
                "embedding_std": 0.3,
                "inner_lr": 0.1,
                "inner_lr_rows": 1.0,
                "optimizer": lambda params: torch.optim.Adam(params, lr=0.01),
            }
            | (model or {})
        )
    )
    recorder = Recorder()
    made = pl.Trainer(
        **(
            {
                "accelerator": "cpu",
                "max_epochs": 1,
                "limit_train_batches": 4,
                "callbacks": [recorder],
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            }
            | trainer
        )
    )
    made.fit(module, datamodule=datamodule)
    return module, datamodule, made, recorder


def test_fit_validate_test_and_predict(store: Path) -> None:
    module, data, trainer, recorder = run(
        store, model={"learn_step_sizes": True, "adapt_in_predict": True}, limit_train_batches=1.0
    )
    names = {f"{t}/{m}@{k}" for t in TASKS for m in ("loss", "AUC", "GAUC", "NE", "calibration") for k in SHOTS}
    during = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
    assert during.keys() == {f"val/{name}" for name in names}
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    assert after == pytest.approx(during, rel=1e-6)
    (test,) = trainer.test(module, datamodule=data, verbose=False)
    assert test.keys() == {f"test/{name}" for name in names}
    assert test["test/click/loss@0"] != test["test/click/loss@3"]
    predicted = trainer.predict(module, datamodule=data)
    assert predicted is not None
    scores = torch.cat([part["probabilities"]["click"] for part in predicted])
    assert 0 < len(scores) == len(torch.cat([part["item_rows"] for part in predicted]))
    # The queries of predict are those of test, adapted to the largest support.
    batches = list(data.test_dataloader())
    labels = torch.cat(
        [x.labels["click"].values_N[x.shots_B[x.layout.sequence_T[x.labels["click"].tokens_N]] == 0] for x in batches]
    )
    loss = nn.functional.binary_cross_entropy(scores, labels.double())
    assert float(loss) == pytest.approx(test["test/click/loss@3"], rel=1e-4)
    assert all(
        float(x.detach()) != pytest.approx(0.1, abs=1e-9) for name, x in module.step_sizes.items() if "heads" in name
    )


@pytest.mark.parametrize(
    ("data", "model", "trainer"),
    [
        ({"user_token": False, "order": "random"}, {"adapt": "embedding"}, {"precision": "bf16-mixed"}),
        ({}, {"dynamic_tables": DynamicTables(), "order": "second"}, {}),
        (
            {
                "features": [FeatureConfig("item_id"), FeatureConfig("city", dim=3), FeatureConfig("price")],
                "history": 2,
            },
            {"network": make_network("mtgr", max_length=64), "order": "second", "backend": "reference"},
            {"accumulate_grad_batches": 2},
        ),
    ],
)
def test_every_kind_of_table_and_precision_trains(store: Path, data: Any, model: Any, trainer: Any) -> None:
    module, _, made, recorder = run(store, data=data, model=model, max_epochs=2, **trainer)
    of_epoch = len(recorder.losses) // 2
    assert made.global_step == 2 * math.ceil(of_epoch / trainer.get("accumulate_grad_batches", 1))
    assert len(set(recorder.losses)) == len(recorder.losses) > 3
    assert all(0.1 < x < 5 for x in recorder.logged)
    metrics = made.callback_metrics
    assert float(metrics["val/click/loss@0"]) != float(metrics["val/click/loss@3"])
    assert not any(bool(x.isnan().any()) for x in module.parameters())


def test_the_logged_loss_is_the_mean_of_the_querys_labels() -> None:
    """As `RankingModule` logs it: all labels alike, whatever the tasks weigh."""
    episodes = draw_episodes(3)
    module = make_module("none", inner_steps=0)
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    train(module, training_batch(episodes))
    plain = collate([(x, x.query) for x in episodes])
    with torch.no_grad():
        sums = module.loss_sums(module(plain), plain)
    wanted = sum(float(x) for x in sums.values()) / sum(x.num_labels for x in plain.labels.values())
    assert float(logged["train/loss"]) == pytest.approx(wanted, rel=1e-6)
    assert float(logged["train/loss_epoch"].compute()) == pytest.approx(wanted, rel=1e-6)


# ---- settings that cannot work --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_lr": 0.0}, r"inner_lr=0\.0: expected a number above 0; inner_steps=0 trains without adaptation"),
        ({"inner_lr": float("nan")}, "inner_lr=nan"),
        ({"inner_lr_rows": -1.0}, r"inner_lr_rows=-1\.0"),
        ({"inner_steps": -1}, "inner_steps=-1: expected at least 0"),
        ({"inner_steps": 0, "learn_step_sizes": True}, "learn_step_sizes=True: with inner_steps=0 nothing is adapted"),
        ({"inner_steps": 0, "adapt_in_predict": True}, "adapt_in_predict=True: with inner_steps=0 nothing is adapted"),
        ({"order": "third"}, "order='third': expected one of first, second, reptile"),
        ({"adapt": "rows"}, "adapt='rows': expected one of dense, embedding, both, or a list of patterns"),
        ({"adapt": []}, r"adapt=\[\]: expected one of dense"),
        ({"order": "reptile", "adapt": "dense"}, r"order=reptile.*set adapt=both \(now dense\)"),
        ({"order": "reptile", "learn_step_sizes": True}, r"learn_step_sizes=false \(now True\)"),
        ({"order": "reptile", "inner_steps": 0}, r"inner_steps of at least 1 \(now 0\)"),
        ({"shots": []}, r"shots=\[\]: expected at least one number"),
        ({"shots": [0, -1]}, r"shots=\[0, -1\]: expected at least one number, none below 0"),
        ({"network": make_network("mtgr"), "order": "second", "backend": "auto"}, "fused operators of MTGR.*reference"),
        (
            {"network": make_network("target_attention"), "order": "second", "backend": "auto"},
            "order=second: the fused operators of DLRM are differentiable once; set backend=reference, or order=first",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make_module("none", **changes)


def test_what_is_not_adapted_is_named_before_the_first_batch() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"adapt='tower\.\*': matches nothing; there are network.*heads"
    ):
        make_module("none", adapt=["heads.*", "tower.*"])


def test_a_setting_that_is_not_used_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"inner_lr_rows=0\.7: not used, since adapt=dense leaves embedding rows alone"
    ):
        make_module("none", adapt="dense")


def test_shots_that_the_data_has_not_are_named(store: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"shots=\[0, 2, 3\]: the data has supports of \[0, 1, 3\]; give"
    ):
        run(store, model={"shots": [3, 2, 0]})
    module = MetaRankingModule(network=make_network("none"), features=FEATURES)
    with pytest.raises(MisconfigurationException, match="shots: not given.*use TaskDataModule, or pass"):
        module.setup("fit")


def test_training_batches_with_supports_of_several_sizes_are_named() -> None:
    from tests.models.episode_samples import evaluation_batch

    module = make_module("none")
    with pytest.raises(MisconfigurationException, match=r"supports of \[1, 3\] records, and each must have one"):
        train(module, evaluation_batch(draw_episodes(1), [1, 3]))
    with pytest.raises(MisconfigurationException, match=r"supports of \[\] records"):
        train(module, evaluation_batch(draw_episodes(1), []))
    with pytest.raises(ValueError, match="shots_B: none, so nothing says what is support; use TaskDataModule"):
        train(module, collate([(x, x.query) for x in draw_episodes(1)]))


class FusedNetwork(nn.Module):
    """A user's network that says too much of itself."""

    dim = 4
    differentiable_twice = True

    def build(self, features: Any, embedding_dim: int) -> None:
        self.inner = make_network("target_attention")
        self.inner.build(features, embedding_dim)
        self.out = nn.Linear(5, 4)

    def forward(self, embedded: Any, batch: Any) -> Tensor:
        out: Tensor = self.out(self.inner(embedded, batch))
        return out


def test_a_fused_operator_of_a_users_network_says_what_to_do() -> None:
    batch = training_batch(draw_episodes(1))
    settings: dict[str, Any] = {"exact": False, "order": "second", "adapt": "both"}
    fused = make_module(network=FusedNetwork(), backend="auto", **settings)
    with pytest.raises(
        RuntimeError, match="hstu_attention: backend='cpu' is differentiable once; take backend='reference'"
    ):
        train(fused, batch)
    train(make_module(network=FusedNetwork(), backend="reference", **settings), batch)
    plain = make_module(network=FusedNetwork(), backend="auto", **(settings | {"order": "first"}))
    train(plain, batch)
