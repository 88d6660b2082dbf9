"""Recipes on dynamic tables: what the command makes of them, and of static recipes that are told to be dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lightning_gr import recipes
from lightning_gr.cli.training import GRCLI
from lightning_gr.embeddings.dynamic import DynamicTables, SparseOptimizerConfig, TablePolicy

DYNAMIC = ["hstu/tiny-dynamic", "hstu/amazon-beauty-dynamic", "mtgr/tiny-dynamic"]


class Parsed(GRCLI):
    """Builds what `fit` runs, and does not run it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(*words: str) -> tuple[Any, Any]:
    cli = Parsed(args=["fit", *words, "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"])
    return cli.model, cli.datamodule


@pytest.mark.parametrize("recipe", DYNAMIC)
def test_a_dynamic_recipe_has_raw_ids_and_tables_for_them(recipe: str) -> None:
    model, data = build("--config", recipe)
    assert data.raw_ids
    assert model.dynamic_tables == DynamicTables(policy=TablePolicy(max_rows=1_000_000))


@pytest.mark.parametrize("recipe", DYNAMIC)
def test_a_dynamic_recipe_is_the_static_one_otherwise(recipe: str) -> None:
    own, static = (yaml.safe_load(recipes.path(x).read_text()) for x in (recipe, recipe.removesuffix("-dynamic")))
    assert own["data"]["init_args"].pop("raw_ids")
    assert own["model"]["init_args"].pop("dynamic_tables")
    assert static["trainer"]["strategy"]["init_args"].pop("sharding")
    own["trainer"]["callbacks"].remove({"class_path": "lightning_gr.callbacks.TableMonitor"})
    for logger, of_static in zip(own["trainer"].pop("logger"), static["trainer"].pop("logger"), strict=True):
        assert logger["init_args"]["name"] == of_static["init_args"]["name"] + "-dynamic"
    assert own == static


@pytest.mark.parametrize(
    ("recipe", "settings", "wanted"),
    [
        ("hstu/tiny", [".merge", "false"], DynamicTables(merge=False)),
        ("hstu/tiny", ["", "{}"], DynamicTables()),
        (
            "mtgr/tiny",
            ["", "{policy: {max_rows: 100000}, optimizer: {name: adam}}"],
            DynamicTables(policy=TablePolicy(max_rows=100_000), optimizer=SparseOptimizerConfig(name="adam")),
        ),
    ],
)
def test_a_static_recipe_becomes_dynamic_by_settings(recipe: str, settings: list[str], wanted: DynamicTables) -> None:
    setting, value = settings
    tables = [f"--model.init_args.dynamic_tables{setting}", value]
    model, data = build("--config", recipe, "--data.init_args.raw_ids", "true", *tables)
    assert data.raw_ids
    assert model.dynamic_tables == wanted
