"""Every shipped recipe takes steps, made small, on generated data in the form that its header names; new ones, too."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gr import recipes

pytestmark = [pytest.mark.dist, pytest.mark.recipe]

SMALL = [
    *(f"--trainer.{x}" for x in ("accelerator=cpu", "devices=1", "precision=32-true", "max_steps=2", "logger=false")),
    *(f"--trainer.{x}" for x in ("callbacks=[]", "limit_val_batches=0", "log_every_n_steps=1")),
    *(f"--trainer.{x}=false" for x in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")),
    "--data.init_args.num_workers=0",
]
RETRIEVAL = [
    *(f"--model.init_args.encoder.init_args.{x}" for x in ("dim=16", "num_layers=1")),
    "--model.init_args.num_negatives=4",
    "--model.init_args.top_k=[5]",
    "--data.init_args.global_tokens=200",
]
MTGR = [f"--model.init_args.network.init_args.{x}" for x in ("dim=24", "num_layers=1")]
RANKING = ["--model.init_args.head_dim=16", "--model.init_args.embedding_dim=8", "--data.init_args.global_tokens=600"]
DAYS_OF_KUAIRAND = [f"--data.init_args.split.init_args.{x}" for x in ("val_from=2022-04-24", "test_from=2022-04-25")]


def head(name: str, title: str) -> str:
    """What the recipe's comment says after such a word, on one line."""
    said = recipes.path(name).read_text().partition(f"# {title}:")[2]
    lines = re.match(r".*\n(?:#  .*\n)*", said)
    assert lines is not None, f"{name} has no {title}"
    return re.sub(r"\s*\\?\n# +", " ", lines.group()).strip()


def base_of(name: str) -> str | None:
    """The recipe that an overlay is compared with; None for a recipe of its own."""
    if "class_path" in recipes.path(name).read_text():
        return None
    command, base, other = re.findall(r"(compare) (\S+) (\S+)", head(name, "Launch"))[0]
    assert other.endswith(name) or base.endswith(name), (command, name)
    return base.partition("+")[0]


class Data:
    """Generated data by the path that recipes name, each made once, as the header says."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[str, Path]()

    def __call__(self, name: str) -> Path:
        path = yaml.safe_load(recipes.path(name).read_text())["data"]["init_args"]["path"]
        if path not in self._made:
            self._made[path] = self._folder / path
            self._made[path].parent.mkdir(parents=True, exist_ok=True)
            self._make(name, path)
        return self._made[path]

    def _make(self, name: str, path: str) -> None:
        from lightning_gr.data import write_exposure_log, write_synthetic_log
        from lightning_gr.data.synthetic_formats import write_like

        sizes = {"seed": 3, "num_users": 60, "num_items": 25}
        target, made, said = self._folder / path, self._folder / f"raw-{path.replace('/', '-')}", head(name, "Data")
        if path.endswith("events.csv"):
            write_synthetic_log(target, num_users=60, num_items=40, mean_length=12, max_length=40)
        elif path.endswith("_sequences.txt"):
            target.write_text(write_like("s3rec", made, **sizes)[0].read_text())
        elif path == "outputs/exposures/store":
            write_exposure_log(made / "log.csv", num_users=60, num_items=40, mean_exposures=60, request_size=10)
            self._prepare(["--config", str(made / "log.prepare.yaml"), "--output", str(target)])
        else:
            line = said[said.index("lightning-gr prepare") :].partition("(")[0]
            command, verb, log, output, *words = shlex.split(line)
            assert (command, verb, output) == ("lightning-gr", "prepare", path), name
            forms = {"KuaiRand-27K": "kuairand", "ml-latest-small": "movielens-20m", "ml-20m": "movielens-20m"}
            forms |= {"ml-1m": "movielens-1m", "ratings_Books.csv": "amazon-ratings"}
            raw = made / "events.csv" if log == "outputs/demo/events.csv" else None
            if raw is None:
                raw, _ = write_like(forms[log], made, **sizes)
            else:
                made.mkdir()
                write_synthetic_log(raw, num_users=60, num_items=40, mean_length=12, max_length=40)
            self._prepare([str(raw), str(target), *words])

    def _prepare(self, words: list[str]) -> None:
        from lightning_gr.cli import main

        assert main(["prepare", *words]) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("recipes"))


def steps(files: list[str], words: list[str], folder: str) -> list[float]:
    """The losses of two steps."""
    from lightning.pytorch.callbacks import Callback

    from lightning_gr.cli.training import GRCLI

    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    class Watched(GRCLI):
        """`fit` as the command runs it, but for the copy of the settings that it leaves, which takes long."""

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            self.save_config_callback = None

        def before_fit(self) -> None:
            self.trainer.callbacks.append(Losses())  # type: ignore[attr-defined]

    configs = [word for file in files for word in ("--config", file)]
    Watched(args=["fit", *configs, *SMALL, f"--trainer.default_root_dir={folder}", *words])
    return losses


@pytest.mark.parametrize("name", [name for name in recipes.ls() if not name.startswith("gmeta/")])
def test_a_recipe_takes_two_steps(name: str, data: Data, gloo: Callable[[int], Any], tmp_path: Path) -> None:
    base = base_of(name)
    files = [name] if base is None else [base, name]
    path = data(files[0])
    settings = yaml.safe_load(recipes.path(files[0]).read_text())["model"]
    if settings["class_path"].endswith("RetrievalModule"):
        words = RETRIEVAL
    else:
        words = [*RANKING, *(MTGR if settings["init_args"]["network"]["class_path"].endswith("MTGR") else [])]
        words += DAYS_OF_KUAIRAND if path.name == "kuairand-store" else []
    ((first, second),) = gloo(1).run(steps, files, [*words, f"--data.init_args.path={path}"], str(tmp_path))
    assert math.isfinite(first)
    assert math.isfinite(second)
    assert first != second


def test_recipes_of_gmeta_are_stepped_beside() -> None:
    beside = Path(__file__).parent
    said = "".join(file.read_text() for file in beside.glob("test_*gmeta*.py"))
    for name in recipes.ls():
        if name.startswith("gmeta/"):
            assert f'"{name}"' in said, f"{name}: no test in {beside.name}/test_*gmeta*.py steps it"
