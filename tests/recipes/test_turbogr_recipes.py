"""The recipes of TurboGR: each setting of its communication, switched on by one word, trains as it says it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from lightning_gr import recipes

pytestmark = pytest.mark.dist

STEPS, SYNC_STEPS = 12, 4
STRATEGY = "--trainer.strategy.init_args"
SWITCHES = {
    "none": [],
    "groups": [f"{STRATEGY}.table_groups=2"],
    "semi_async": [f"{STRATEGY}.sparse_update=semi_async"],
    "exact_async": [f"{STRATEGY}.sparse_update=exact_async"],
    "six_stage": [f"{STRATEGY}.schedule=six_stage"],
    "all": [f"{STRATEGY}.table_groups=2", f"{STRATEGY}.sparse_update=exact_async", f"{STRATEGY}.schedule=six_stage"],
}
LIKE = {"hstu-tiny": "hstu/tiny-dynamic", "hstu-tiny-amazon-beauty": "hstu/amazon-beauty-dynamic"}


def train(recipe: str, folder: str, settings: dict[str, list[str]]) -> dict[str, Any]:
    """Losses, rows held, the pipeline's stages and what is logged, of each way to train."""
    from lightning.pytorch.callbacks import Callback

    from lightning_gr.cli.training import GRCLI

    class Losses(Callback):
        """Of this rank, as they come."""

        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(float(outputs["loss"]))

    found = {}
    for name, words in settings.items():
        losses = Losses()

        class Watched(GRCLI):
            """`fit` as the command runs it."""

            def before_fit(self) -> None:
                self.trainer.callbacks.append(losses)  # type: ignore[attr-defined]  # noqa: B023

        data = [f"--data.init_args.path={folder}/events.csv", "--data.init_args.global_tokens=100"]
        unused = ["logger=false", "callbacks=[]", "enable_checkpointing=false", "enable_progress_bar=false"]
        common = [
            f"--trainer.{x}"
            for x in (*unused, f"default_root_dir={folder}", f"max_steps={STEPS}", "limit_val_batches=0")
        ]
        sync = f"{STRATEGY}.sync_steps={SYNC_STEPS}"
        cli = Watched(args=["fit", "--config", recipe, *data, *common, sync, *words])
        strategy: Any = cli.trainer.strategy
        (engine,) = strategy.dynamic.engines.values()
        found[name] = {
            "losses": losses.seen,
            "rows": [table.num_rows(0) for table in engine.tables],
            "stages": Counter(event.stage for event in strategy.stage_log.events()),
            "groups": (engine.num_groups, engine.world_size),
            "collisions": "gr/collision_rate" in cli.trainer.callback_metrics,
            "traffic": {kind: traffic.bytes for kind, traffic in engine.traffic.items()},
        }
    return found


@pytest.fixture(scope="module")
def trained(gloo: Callable[[int], Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from lightning_gr.data import write_synthetic_log

    folder = tmp_path_factory.mktemp("turbogr")
    write_synthetic_log(folder / "events.csv", num_users=150, num_items=400, mean_length=12, max_length=60, seed=0)
    results: list[dict[str, Any]] = gloo(2).run(train, "turbogr/hstu-tiny", str(folder), SWITCHES, timeout=300)
    return results


@pytest.mark.parametrize("switch", ["groups", "exact_async", "six_stage", "all"])
def test_what_is_exact_changes_no_loss(switch: str, trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert len(rank["none"]["losses"]) == STEPS
        assert rank[switch]["losses"] == pytest.approx(rank["none"]["losses"], rel=1e-5)
    rows = [sum(sum(rank[name]["rows"]) for rank in trained) for name in ("none", switch)]
    assert rows[1] == rows[0] * trained[0][switch]["groups"][0]


def test_semi_asynchronous_updates_are_late_once_they_begin(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert rank["semi_async"]["losses"][:SYNC_STEPS] == rank["none"]["losses"][:SYNC_STEPS]
        assert rank["semi_async"]["losses"] != rank["none"]["losses"]
        assert rank["semi_async"]["rows"] == rank["none"]["rows"]


def test_each_switch_does_what_it_names(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        for name, found in rank.items():
            stages, traffic = found["stages"], found["traffic"]
            assert found["groups"] == ((2, 1) if name in ("groups", "all") else (1, 2))
            assert found["collisions"] == (name in ("semi_async", "exact_async", "all"))
            assert ("exchange" in stages and "wait" in stages) == (name in ("six_stage", "all"))
            assert ("lookup" in stages) == (name not in ("six_stage", "all"))
            assert stages["train"] >= STEPS
            assert ("embed" in stages) == (name in ("semi_async", "exact_async", "all"))
            between = traffic["replica_keys"] + traffic["replica_gradients"]
            inside = traffic["keys"] + traffic["rows"] + traffic["gradients"]
            assert (between > 0, inside > 0) == ((True, False) if name in ("groups", "all") else (False, True))


@pytest.mark.parametrize("recipe", LIKE)
def test_a_recipe_is_the_dynamic_one_with_papers_heads_and_negatives(recipe: str) -> None:
    own, like = (yaml.safe_load(recipes.path(x).read_text()) for x in (f"turbogr/{recipe}", LIKE[recipe]))
    strategy = own["trainer"]["strategy"]["init_args"]
    switches = {name: strategy.pop(name) for name in ("table_groups", "sparse_update", "schedule")}
    assert switches == {"table_groups": 1, "sparse_update": "sync", "schedule": "lookup_ahead"}
    assert (strategy.pop("sync_steps"), strategy.pop("pipeline_depth")) == (100, 4)
    model, of_like = own["model"]["init_args"], like["model"]["init_args"]
    encoder = model["encoder"]["init_args"]
    assert (encoder["dim"], encoder["num_layers"], encoder.pop("num_heads")) == (128, 2, 8)
    assert (model.pop("loss"), model.pop("negatives"), model.pop("num_negatives")) == (
        "sampled_softmax",
        "uniform",
        128,
    )
    assert model["optimizer"]["init_args"] == {"lr": 0.004, "weight_decay": 0.0}
    of_like["encoder"]["init_args"].pop("num_heads")
    of_like.pop("loss")
    for settings in (model, of_like):
        settings.pop("top_k")
    for settings in (own["trainer"], like["trainer"]):
        settings.pop("logger")
        settings["callbacks"] = [x for x in settings["callbacks"] if "TopKWriter" not in x["class_path"]]
    assert own == like
