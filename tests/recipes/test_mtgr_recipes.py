"""The recipes of MTGR's and MTGenRec's sizes: counted on the meta device, and stepped through with a small overlay."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_gr import recipes
from tests.forked_command import run_command

BIG = ["mtgr/small", "mtgr/medium", "mtgr/large", "grm/4g", "grm/110g"]
SMALL = Path(__file__).with_name("small_network.yaml")
SHAPES = {
    "mtgr/small": (3, 512, 2, 3e-4),
    "mtgr/medium": (5, 768, 3, 3e-4),
    "mtgr/large": (15, 768, 3, 1e-4),
    "grm/4g": (3, 512, 2, 3e-4),
    "grm/110g": (22, 1024, 4, 3e-4),
}
"""Blocks, width, heads and learning rate."""


def loaded(name: str) -> dict[str, Any]:
    with recipes.path(name).open() as file:
        settings: dict[str, Any] = yaml.safe_load(file)
    return settings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of generated data in KuaiRand's form."""
    from lightning_gr.data.formats import open_log
    from lightning_gr.data.prepare import prepare
    from lightning_gr.data.synthetic_formats import write_like

    folder = tmp_path_factory.mktemp("kuairand")
    path, _ = write_like("kuairand", folder / "log", seed=3, num_users=60, num_items=25)
    return prepare(open_log(path), folder / "store").path


def datamodule(name: str, store: Path) -> Any:
    """The recipe's own, over another store."""
    from jsonargparse import ArgumentParser

    from lightning_gr.data import RankingDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RankingDataModule, "data")
    settings = loaded(name)["data"]["init_args"] | {"path": str(store), "num_workers": 0}
    return parser.instantiate_classes(parser.parse_object({"data": settings})).data


@pytest.mark.parametrize("name", BIG)
def test_a_big_recipe_has_the_papers_size_and_operations(name: str, store: Path) -> None:
    from lightning_gr.models import MTGR, RankingModule

    settings = loaded(name)["model"]["init_args"]
    layers, dim, heads, rate = SHAPES[name]
    network_settings = settings["network"]["init_args"]
    assert (network_settings["num_layers"], network_settings["dim"], network_settings["num_heads"]) == (
        layers,
        dim,
        heads,
    )
    assert settings["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": rate}}
    caps = loaded(name)["data"]["init_args"]["aggregation"]
    features = datamodule(name, store).ranking_features
    longest = features.num_contextual + sum(caps[f"max_{kind}"] for kind in ("static", "realtime", "candidates"))
    assert longest <= network_settings["max_length"]
    with torch.device("meta"):
        network = MTGR(**network_settings)
        module = RankingModule(network=network, features=features, embedding_dim=settings["embedding_dim"])
        module.configure_model()
    parameters = sum(x.numel() for x in network.encoder.parameters() if x.is_meta)
    square = sum(x.numel() for x in network.encoder.parameters() if x.dim() == 2 and min(x.shape) >= dim)
    assert square == layers * 5 * dim**2  # U, V, Q, K and the output
    assert square < parameters < 1.1 * square
    assert all(x.is_meta for x in network.parameters())
    tokens = 500 if name.startswith("mtgr") else 400
    counted = network.encoder.flops(tokens, tokens**2) / 1e9
    assert counted == pytest.approx(layers * (10 * dim**2 * tokens + 4 * dim * tokens**2) / 1e9, rel=1e-9)
    wanted = {"mtgr/small": 5.47, "mtgr/medium": 18.59, "mtgr/large": 55.76, "grm/4g": 4, "grm/110g": 110}[name]
    assert counted == pytest.approx(wanted, abs=0.005 if name.startswith("mtgr") else 0.04 * wanted)
    said = recipes.path(name).read_text()
    assert f"{counted:.2f} GFLOPs" in said or f"{counted:.1f} GFLOPs" in said


@pytest.mark.long  # test_every_recipe_steps does it in one process for all
@pytest.mark.parametrize("name", BIG)
def test_a_big_recipe_steps_with_a_small_network(name: str, store: Path, tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "csv"}}
    words = ["--config", name, "--config", str(SMALL), "--data.init_args.path", str(store)]
    words += ["--trainer.max_steps", "2", "--trainer.logger", json.dumps(logger)]
    command = [sys.executable, "-m", "lightning_gr", "fit", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_command(command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 2
    assert all(math.isfinite(x) for x in losses)
    assert losses[0] != losses[1]


def test_what_a_recipe_of_kuairand_knows_of_a_candidate_was_known_before_it_was_shown(store: Path) -> None:
    for name in BIG:
        features = {each["name"]: each for each in loaded(name)["data"]["init_args"]["features"]}
        # How long it was played is seen afterwards.
        assert features["play_time_ms"]["group"] == "history"
        assert not {"is_click", "long_view", "is_like", "is_hate"} & set(features)


def test_the_recipes_of_exposures_differ_in_the_network_alone() -> None:
    own, baseline = loaded("mtgr/exposures"), loaded("dlrm/exposures")
    assert own["data"] == baseline["data"]
    assert own["model"]["init_args"]["network"]["class_path"].endswith("MTGR")
    assert baseline["model"]["init_args"]["network"]["class_path"].endswith("DLRM")
    caps = own["data"]["init_args"]["aggregation"]
    longest = 2 + sum(caps[f"max_{kind}"] for kind in ("static", "realtime", "candidates"))
    assert longest <= own["model"]["init_args"]["network"]["init_args"]["max_length"]
