"""``predict --adapt``: the scores are those of a model that was adapted by hand; elsewhere the flag is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_gr.batch_samples import take
from lightning_gr.cli import main
from lightning_gr.data.synthetic_tasks import write_cold_start_store

INNER_LR, INNER_STEPS, LARGEST = 0.4, 2, 3


class AdaptedScores(pl.Callback):
    """Keeps the model, and what it was given and gave."""

    seen: list[tuple[Any, Any, Any]] = []

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append((pl_module, batch, outputs))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of meta learning over a small log, as a file."""
    folder = tmp_path_factory.mktemp("adapt")
    write_cold_start_store(folder / "cold", num_tasks=30, num_items=20, mean_records=14.0, seed=2)
    model = {
        "inner_lr": INNER_LR,
        "inner_steps": INNER_STEPS,
        "adapt": "both",
        "embedding_dim": 4,
        "embedding_std": 0.5,
        "head_dim": 6,
        "network": {
            "class_path": "lightning_gr.models.DLRM",
            "init_args": {"dim": 4, "hidden_dims": [6], "pooling": "none", "dropout": 0.0},
        },
    }
    data = {
        "path": str(folder / "cold" / "store"),
        "tasks": {"click": {"field": "click"}},
        "features": [{"name": "kind"}, {"name": "segment"}],
        "shots": [0, 1, LARGEST],
        "test_tasks": 0.4,
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    callbacks = [{"class_path": "tests.cli.test_predict_adapt.AdaptedScores"}]
    settings = {
        "seed_everything": 3,
        "trainer": quiet | {"devices": 1, "callbacks": callbacks},
        "model": {"class_path": "lightning_gr.models.MetaRankingModule", "init_args": model},
        "data": {"class_path": "lightning_gr.data.TaskDataModule", "init_args": data},
    }
    (folder / "adapt.json").write_text(json.dumps(settings))
    return folder / "adapt.json"


def scores(config: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[tuple[int, int], list[float]]:
    """By task and item, the probabilities of a `predict` without a checkpoint: of the first values."""
    from tests.cli import test_predict_adapt as imported  # the callback's module, which pytest may have another copy of

    monkeypatch.chdir(config.parent)
    imported.AdaptedScores.seen.clear()
    assert main(["predict", "--config", str(config), *words]) == 0
    found: dict[tuple[int, int], list[float]] = {}
    for _, _, said in imported.AdaptedScores.seen:
        rows, items, chances = (
            x.tolist() for x in (said["user_rows"], said["item_rows"], said["probabilities"]["click"])
        )
        for row, item, chance in zip(rows, items, chances, strict=True):
            found.setdefault((row, item), []).append(chance)
    AdaptedScores.seen[:] = list(imported.AdaptedScores.seen)
    return found


def adapted_by_hand(model: Any, batch: Any, task: int) -> dict[int, list[float]]:
    """By item, the probabilities of one task's query, from whole tables and a copy of the network."""
    network, heads = copy.deepcopy(model.network), copy.deepcopy(model.heads)
    tables = {
        feature: weight.detach().clone().requires_grad_()
        for name, weight in model.tables.state_dict().items()
        for feature in [name.split(".")[1]]
    }
    (sample,) = {int(x) for x in batch.sample_ids_B.tolist() if x % 30 == task}

    def part(shots: int) -> Any:
        at = [
            place
            for place, (own, number) in enumerate(zip(batch.sample_ids_B.tolist(), batch.shots_B.tolist(), strict=True))
            if (own, number) == (sample, shots)
        ]
        return take(batch, torch.tensor(at))

    def logits(own: Any) -> torch.Tensor:
        embedded = {name: tables[name][own.features[name].values()] for name in tables}
        found: torch.Tensor = heads(network(embedded, own))["click"]
        return found

    trained = [*network.parameters(), *heads.parameters(), *tables.values()]
    support = part(LARGEST)
    assert support.labels["click"].num_labels == LARGEST
    for _ in range(INNER_STEPS):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits(support), support.labels["click"].values_N.float()
        )
        for value, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            if gradient is not None:
                value.data -= INNER_LR * gradient
    query, found = part(0), {}
    for item, chance in zip(query.features["item_id"].values().tolist(), logits(query).sigmoid().tolist(), strict=True):
        found.setdefault(item, []).append(chance)
    return found


def test_scores_are_those_of_a_model_adapted_by_hand(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scores(config, monkeypatch)
    adapted = scores(config, monkeypatch, "--adapt")
    assert plain.keys() == adapted.keys()
    tasks = sorted({task for task, _ in plain})
    assert len(tasks) > 3
    model, batch, _ = AdaptedScores.seen[0]
    assert model.adapt_in_predict
    for task in tasks[:3]:
        truth = adapted_by_hand(model, batch, task)
        assert truth.keys() == {item for own, item in plain if own == task}
        for item, chances in truth.items():
            assert adapted[task, item] == pytest.approx(chances, abs=1e-5)
        assert any(abs(plain[task, item][0] - chances[0]) > 1e-3 for item, chances in truth.items())


def test_the_setting_does_what_the_flag_does(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_setting = scores(config, monkeypatch, "--model.init_args.adapt_in_predict=true")
    assert by_setting == scores(config, monkeypatch, "--adapt")


def test_a_model_that_cannot_adapt_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--config", "dlrm/movielens", "--adapt"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "lightning-gr: error:" in x]
    assert "--adapt: lightning_gr.models.RankingModule has no setting adapt_in_predict" in line
    assert "MetaRankingModule" in line


def test_the_flag_is_of_predict_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config", "dlrm/movielens", "--adapt"]) == 2
    assert "adapt" in capsys.readouterr().err
