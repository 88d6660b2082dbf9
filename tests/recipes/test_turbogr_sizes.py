"""Recipes of TurboGR's and Meta's sizes: counted on the meta device, and stepped through with a small overlay."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_gr import recipes

SMALL = Path(__file__).with_name("small_encoder.yaml")
GUIDE = (Path(__file__).parents[2] / "docs" / "turbogr.md").read_text()
SHAPES = {"tiny": (128, 2, 2048), "small": (256, 4, 2048), "medium": (512, 8, 2048), "large": (1024, 16, 2048)}
SHAPES["long"] = (1024, 16, 4096)
"""Width, blocks and length: arXiv 2605.13433, appendix A."""
PUBLISHED = {
    "hstu": {"tiny": 0.17, "small": 1.33, "medium": 10.52, "large": 83.97, "long": 83.97},
    "fuxi": {"tiny": 0.41, "small": 3.18, "medium": 25.22, "large": 201.55, "long": 201.55},
}
"""Millions of dense parameters: the same, table 1."""
BIG = [(kind, size) for kind in PUBLISHED for size in SHAPES]
META = {"hstu/ml-20m": (256, 4, 4, 200), "hstu/amazon-books": (64, 4, 4, 50)}
"""Width, blocks, heads and length: the .gin files of facebookresearch/generative-recommenders."""


def name_of(kind: str, size: str) -> str:
    return f"turbogr/{kind}-{size}" + ("-kuairand" if size == "tiny" else "")


def loaded(name: str) -> dict[str, Any]:
    with recipes.path(name).open() as file:
        settings: dict[str, Any] = yaml.safe_load(file)
    return settings


def encoder_of(name: str, **changes: Any) -> Any:
    """The recipe's own, without memory."""
    from lightning_gr import layers

    settings = loaded(name)["model"]["init_args"]["encoder"]
    with torch.device("meta"):
        return getattr(layers, settings["class_path"].rpartition(".")[2])(**settings["init_args"] | changes)


def millions(encoder: Any) -> float:
    """Of the blocks: tables by id or by place at the input are embeddings."""
    assert all(x.is_meta for x in encoder.parameters())
    return sum(x.numel() for x in encoder.layers.parameters()) / 1e6


@pytest.mark.parametrize(("kind", "size"), BIG)
def test_a_recipe_has_the_papers_parameters_and_settings(kind: str, size: str) -> None:
    settings, said = loaded(name_of(kind, size)), recipes.path(name_of(kind, size)).read_text()
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    dim, blocks, length = SHAPES[size]
    encoder = model["encoder"]["init_args"]
    assert [encoder[x] for x in ("dim", "num_layers", "num_heads", "max_length")] == [dim, blocks, 8, length]
    assert data["max_length"] == length
    assert (encoder["dropout"], model["num_negatives"], model["negatives"]) == (0.5, 128, "uniform")
    assert model["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.004, "weight_decay": 0.0}}
    counted = millions(encoder_of(name_of(kind, size)))
    assert counted == pytest.approx(PUBLISHED[kind][size], rel=0.02)
    if kind == "hstu" and size != "long":
        assert round(counted, 2) == PUBLISHED[kind][size]
    assert f"counted: {counted:.3f}".replace(": 0.", ": .") in said
    square = {"hstu": 5, "fuxi": 12}[kind] * blocks * dim**2
    assert 0 < counted * 1e6 - square < 0.06 * square


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_tiny_recipe_for_the_demo_has_the_papers_parameters(kind: str) -> None:
    assert millions(encoder_of(f"turbogr/{kind}-tiny")) == pytest.approx(PUBLISHED[kind]["tiny"], rel=0.02)


@pytest.mark.parametrize(("kind", "size"), BIG)
def test_a_recipe_counts_the_operations_of_its_products(kind: str, size: str) -> None:
    dim, blocks, length = SHAPES[size]
    tokens, pairs = length, length * (length + 1) // 2
    # HSTU: U, V, Q, K and the output; Q K^T and its map times V. FuXi: 3 U, V, Q, K, the output of 3 and SwiGLU's
    # three; Q K^T and three maps times V.
    squares, maps = {"hstu": (5, 2), "fuxi": (12, 4)}[kind]
    wanted = blocks * (2 * squares * dim**2 * tokens + 2 * maps * dim * pairs)
    assert encoder_of(name_of(kind, size)).flops(tokens, pairs) == wanted


@pytest.mark.parametrize(("kind", "size"), BIG)
def test_the_guides_table_has_the_recipes_figures(kind: str, size: str) -> None:
    (line,) = [x for x in GUIDE.splitlines() if x.startswith(f"| `{name_of(kind, size)}`")]
    encoder = encoder_of(name_of(kind, size))
    dim, blocks, length = SHAPES[size]
    flops = encoder.flops(length, length * (length + 1) // 2) / 1e9
    *sizes, counted, published, said = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")][1:]
    assert sizes == [str(dim), str(blocks), "8", str(length)]
    assert float(counted.removesuffix(" M")) == pytest.approx(millions(encoder), abs=0.0005)
    assert float(published.removesuffix(" M")) == PUBLISHED[kind][size]
    assert float(said) == pytest.approx(flops, rel=0.01)


def test_the_guide_prepares_kuairand_as_the_recipes_do() -> None:
    (command,) = [x for x in GUIDE.splitlines() if x.startswith("lightning-gr prepare KuaiRand-27K")]
    for each in BIG:
        assert preparation(name_of(*each)) == shlex.split(command)
    said = next(yaml.safe_load(x) for x in re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.M | re.S) if "KuaiRand" in x)
    words = shlex.split(command)[2:]
    settings = dict(zip(words[2::2], words[3::2], strict=True))
    assert said == {"path": words[0], "output": words[1]} | {
        name.removeprefix("--"): yaml.safe_load(value) for name, value in settings.items()
    }


@pytest.mark.parametrize("name", META)
def test_a_recipe_has_metas_settings(name: str) -> None:
    settings = loaded(name)
    model, encoder = settings["model"]["init_args"], settings["model"]["init_args"]["encoder"]["init_args"]
    dim, blocks, heads, length = META[name]
    assert [encoder[x] for x in ("dim", "num_layers", "num_heads", "max_length")] == [dim, blocks, heads, length]
    assert settings["data"]["init_args"]["max_length"] == length
    assert 1 / encoder["scale"] == pytest.approx(length + 11, rel=1e-4)
    books = name.endswith("books")
    assert (model["num_negatives"], encoder["dropout"], settings["trainer"]["max_epochs"]) == (
        (512, 0.5, 201) if books else (128, 0.2, 101)
    )
    # One matrix for U, V, Q and K without a bias, an output with one, and tables of a layer that its heads share.
    assert millions(encoder_of(name)) * 1e6 == blocks * (5 * dim**2 + dim + 2 * length - 1 + 129)


@pytest.mark.parametrize("ablation", ["fuxi-without-queries", "fuxi-time-buckets"])
def test_an_ablation_of_fuxi_changes_the_map_that_it_names(ablation: str) -> None:
    changes = loaded(f"turbogr/ablations/{ablation}")["model"]["init_args"]["encoder"]["init_args"]
    plain, changed = encoder_of("turbogr/fuxi-tiny"), encoder_of("turbogr/fuxi-tiny", **changes)
    blocks, width = 2, 128
    more = {"fuxi-without-queries": -4 * width**2 - width, "fuxi-time-buckets": (129 - 3) * 8}[ablation]
    assert round((millions(changed) - millions(plain)) * 1e6) == blocks * more


# ---- steps -------------------------------------------------------------------------------------------------------


def steps(recipe: str, path: str, folder: str, words: list[str]) -> tuple[list[float], int]:
    """Losses of two steps of this rank, and how many parameters the optimiser has."""
    from lightning.pytorch.callbacks import Callback

    from lightning_gr.cli.training import GRCLI

    losses: list[float] = []

    class Losses(Callback):
        """Of this rank, as they come."""

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    class Watched(GRCLI):
        """`fit` as the command runs it."""

        def before_fit(self) -> None:
            self.trainer.callbacks.append(Losses())  # type: ignore[attr-defined]

    common = [f"--data.init_args.path={path}", f"--trainer.default_root_dir={folder}", "--trainer.max_steps=2"]
    cli = Watched(args=["fit", "--config", recipe, "--config", str(SMALL), *common, *words])
    (optimizer,) = cli.trainer.optimizers
    assert "val/NDCG@5" in cli.trainer.callback_metrics
    return losses, sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def preparation(recipe: str) -> list[str]:
    """The words of the command that the recipe's header gives for its data."""
    said = recipes.path(recipe).read_text().partition("# Data:")[2].partition("# Launch:")[0]
    return shlex.split(re.sub(r"\\\n#", " ", said).partition("   (")[0])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A store of generated data in the form that a recipe's header names, prepared as the header says."""
    from lightning_gr.cli import main
    from lightning_gr.data.synthetic_formats import write_like

    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("sizes")

    def store(recipe: str) -> tuple[Path, Path]:
        form = {"hstu/ml-20m": "movielens-20m", "hstu/amazon-books": "amazon-ratings"}.get(recipe, "kuairand")
        if form not in made:
            log, _ = write_like(form, folder / f"{form}-log", seed=3, num_users=60, num_items=25)
            command, name, _, output, *words = preparation(recipe)
            assert (command, name, output) == ("lightning-gr", "prepare", loaded(recipe)["data"]["init_args"]["path"])
            made[form] = folder / output
            assert main(["prepare", str(log), str(made[form]), *words]) == 0
        return made[form], folder

    return store


@pytest.mark.parametrize("name", ["turbogr/fuxi-small", "hstu/amazon-books"])
def test_a_headers_command_leaves_a_five_core_of_what_counts(name: str, stores: Any) -> None:
    """Of KuaiRand: no event that is hated or has no positive signal; `tests/data/test_formats.py` has more of it."""
    import polars as pl

    from lightning_gr.data.synthetic_formats import make_events

    events = make_events(seed=3, num_users=60, num_items=25)
    kept = [event for event in events if name.startswith("hstu") or event.rating >= 3]
    while True:
        users, items = Counter(event.user for event in kept), Counter(event.item for event in kept)
        left = [event for event in kept if min(users[event.user], items[event.item]) >= 5]
        if len(left) == len(kept):
            break
        kept = left
    assert 5 < len(kept) < len(events)
    found = pl.read_parquet(stores(name)[0] / "events" / "*.parquet")
    assert Counter(found["item_id"].list.len().to_list()) == Counter(users.values())
    assert sorted(found["timestamp"].explode().to_list()) == sorted(event.time for event in kept)
    assert Counter(found["item_id"].explode().value_counts()["count"].to_list()) == Counter(items.values())


@pytest.mark.dist
@pytest.mark.long  # test_every_recipe_steps takes steps on one process
@pytest.mark.parametrize("name", [*(name_of(*each) for each in BIG), *META])
def test_a_recipe_steps_with_a_small_encoder(name: str, stores: Any, gloo: Callable[[int], Any]) -> None:
    path, folder = stores(name)
    found = gloo(2).run(steps, name, str(path), str(folder), [], timeout=300)
    for losses, _ in found:
        assert len(losses) == 2
        assert all(math.isfinite(x) for x in losses)
        assert losses[0] != losses[1]
    assert found[0][1] > 1000


@pytest.mark.dist
def test_what_is_exact_changes_no_loss_of_fuxi_tiny(stores: Any, gloo: Callable[[int], Any]) -> None:
    strategy = "--trainer.strategy.init_args"
    path, folder = stores("turbogr/fuxi-tiny")
    exact = [f"{strategy}.table_groups=2", f"{strategy}.sparse_update=exact_async", f"{strategy}.schedule=six_stage"]
    runs = [
        gloo(2).run(
            steps, "turbogr/fuxi-tiny", str(path), str(folder), [f"{strategy}.sync_steps=1", *words], timeout=300
        )
        for words in ([], exact)
    ]
    for plain, switched in zip(*runs, strict=True):
        assert switched[0] == pytest.approx(plain[0], rel=1e-5)
