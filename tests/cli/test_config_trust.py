"""A configuration that came with a checkpoint or an export names nothing that could run somebody else's code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_gr import recipes
from lightning_gr.cli import main
from lightning_gr.cli.config_trust import Trust, is_untrusted
from lightning_gr.cli.training import GRCLI

REMEDY = "if you trust where it came from, add --trust_config (or set LIGHTNING_GR_TRUST_CONFIG=1)"
MODEL = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}


class Parsed(GRCLI):
    """Builds what the command would run, and does not run it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_GR_TRUST_CONFIG", raising=False)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "export.json").write_text("{}")
    return folder


def popen(trace: str) -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", trace]}}


# Each would leave the file "trace" behind if what it names were called or imported.
HOSTILE: dict[str, tuple[str, str, str]] = {
    "class": (yaml.safe_dump({"model": popen("trace")}), "model.class_path", "subprocess.Popen"),
    "in_a_list": (
        yaml.safe_dump({"trainer": {"callbacks": [popen("trace")]}}),
        "trainer.callbacks[0].class_path",
        "subprocess.Popen",
    ),
    "deep": (
        yaml.safe_dump(
            {
                "model": {
                    "class_path": "lightning_gr.models.RetrievalModule",
                    "init_args": {"encoder": popen("trace")},
                }
            }
        ),
        "model.init_args.encoder.class_path",
        "subprocess.Popen",
    ),
    "dotted_key": ("trainer.logger.class_path: subprocess.Popen\n", "trainer.logger.class_path", "subprocess.Popen"),
    "of_a_subcommand": (yaml.safe_dump({"fit": {"model": popen("trace")}}), "fit.model.class_path", "subprocess.Popen"),
    "as_a_word": ("trainer: {logger: subprocess.Popen}\n", "trainer.logger", "subprocess.Popen"),
    "in_a_text": (
        yaml.safe_dump({"trainer": {"callbacks": yaml.safe_dump([popen("trace")])}}),
        "trainer.callbacks[0].class_path",
        "subprocess.Popen",
    ),
    "callable": (
        yaml.safe_dump(
            {
                "trainer": {
                    "callbacks": [
                        {
                            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                            "init_args": {"setup": "evil_of_trust.run"},
                        }
                    ]
                }
            }
        ),
        "trainer.callbacks[0].init_args.setup",
        "evil_of_trust.run",
    ),
    "module_on_the_path": ("model: {class_path: evil_of_trust.Model}\n", "model.class_path", "evil_of_trust.Model"),
    "torch_hub": ("model: {class_path: torch.hub.load}\n", "model.class_path", "torch.hub.load"),
    "function": ("model: {class_path: torch.nn.functional.relu}\n", "model.class_path", "torch.nn.functional.relu"),
    "command": (
        "model: {class_path: lightning_gr.cli.training.GRCLI}\n",
        "model.class_path",
        "lightning_gr.cli.training.GRCLI",
    ),
    "short_name": ("model: {class_path: BoringModel}\n", "model.class_path", "BoringModel"),
    "unpickles": (
        "trainer: {plugins: {class_path: lightning.pytorch.plugins.io.TorchCheckpointIO}}\n",
        "trainer.plugins.class_path",
        "lightning.pytorch.plugins.io.TorchCheckpointIO",
    ),
    "reexported": (
        "trainer: {callbacks: {class_path: lightning.pytorch.callbacks.model_checkpoint.Path}}\n",
        "trainer.callbacks.class_path",
        "pathlib",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_names_are_refused_in_one_line(
    what: str, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, key, name = HOSTILE[what]
    Path("evil_of_trust.py").write_text("open('trace', 'w')\ndef run(*_): pass\nclass Model: pass\n")
    monkeypatch.syspath_prepend(os.getcwd())
    file = export / "config.yaml"
    file.write_text(text)
    assert main(["fit", "--config", str(file)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert line.startswith(f"lightning-gr: error: {file}: {key}: {name}")
    assert line.endswith(REMEDY)
    assert not Path("trace").exists()


@pytest.mark.parametrize(
    "what", ["config: {0}\n", "fit: {{config: {0}}}\n", "model: {0}\n", "trainer: {{callbacks: {0}}}\n"]
)
def test_a_file_that_the_file_names_is_no_way_round(
    what: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("outside.yaml").absolute()
    inner = {"model": popen("trace")} if "config" in what else popen("trace")
    own.write_text(yaml.safe_dump([inner] if "callbacks" in what else inner))
    (export / "config.yaml").write_text(what.format(own))
    assert main(["fit", "--config", str(export / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert REMEDY in error
    assert "config.yaml: " in error
    assert not Path("trace").exists()


def test_tags_and_unpickling_are_refused(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = export / "config.yaml"
    file.write_text('model: !!python/object/apply:os.system ["touch trace"]\n')
    assert main(["fit", "--config", str(file)]) == 2
    assert f"{file}: came with a checkpoint or an export and is not plain YAML" in capsys.readouterr().err
    assert not Path("trace").exists()
    file.write_text("weights_only: false\n")
    assert main(["fit", "--config", str(file)]) == 2
    assert f"{file}: weights_only: False is refused" in capsys.readouterr().err


def refused(*words: str) -> str:
    with pytest.raises(Exception, match="may name") as caught:
        Parsed(args=["fit", *words])
    return str(caught.value)


def test_one_of_several_files_and_links(export: Path) -> None:
    own, file = Path("own.yaml"), export / "config.yaml"
    own.write_text(yaml.safe_dump({"model": MODEL}))
    file.write_text(yaml.safe_dump({"trainer": {"logger": {"class_path": "os.getcwd"}}}))
    link_in, link_out = Path("link.yaml"), export / "link.yaml"
    link_in.symlink_to(file)
    link_out.symlink_to(own.absolute())
    for words in (("--config", str(own), "--config", str(file)), ("--config", str(file), "--config", str(own))):
        assert refused(*words).startswith(f"{file}: trainer.logger.class_path: os.getcwd")
    assert refused("--config", str(own), "-c", str(link_in)).startswith(f"{link_in}: ")
    assert refused(f"--config={link_out}").startswith(f"{link_out}: model.class_path: ")
    assert refused("--config", str(own), f"--trainer.logger={file}").startswith(f"{file}: ")
    os.environ["LIGHTNING_GR_FIT__CONFIG"] = str(file)
    try:
        assert refused("--config", str(own)).startswith(f"{file}: ")
    finally:
        del os.environ["LIGHTNING_GR_FIT__CONFIG"]


def test_names_of_ones_own_may_stand_beside(export: Path) -> None:
    """Only what the untrusted file names is kept to the list."""
    own, file = Path("own.yaml"), export / "config.yaml"
    own.write_text(yaml.safe_dump({"model": MODEL}))
    file.write_text(yaml.safe_dump({"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}}}))
    settings = ["fit", "--config", str(own), "--config", str(file), "--trainer.logger.init_args.save_dir=logs"]
    cli = Parsed(args=settings)
    assert type(cli.model).__name__ == "BoringModel"
    assert type(cli.trainer.logger).__name__ == "CSVLogger"
    assert type(Parsed(args=["fit", "--model", MODEL["class_path"], "--config", str(file), *settings[5:]]).model)


def test_all_is_open_again_afterwards(export: Path) -> None:
    (export / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    refused("--config", str(export / "config.yaml"))
    assert type(Parsed(args=["fit", "--model", MODEL["class_path"]]).model).__name__ == "BoringModel"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_trust_can_be_given_on_the_command_line_alone(how: str, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export / "config.yaml"
    file.write_text(yaml.safe_dump({"model": MODEL}))
    assert MODEL["class_path"] in refused("--config", str(file))
    words = ["fit", "--config", str(file)]
    if how == "flag":
        words.append("--trust_config")
    else:
        monkeypatch.setenv("LIGHTNING_GR_TRUST_CONFIG", "1")
    cli = Parsed(args=words)
    assert type(cli.model).__name__ == "BoringModel"
    assert "trust_config" not in cli.config.fit
    monkeypatch.delenv("LIGHTNING_GR_TRUST_CONFIG", raising=False)
    file.write_text(yaml.safe_dump({"trust_config": True, "model": MODEL}))
    assert MODEL["class_path"] in refused("--config", str(file))


@pytest.mark.parametrize("recipe", sorted(recipes.ls()))
def test_every_recipe_passes(recipe: str, export: Path) -> None:
    file = export / "config.yaml"
    file.write_text(recipes.path(recipe).read_text())
    Trust(["fit", "--config", str(file)])


def test_a_recipe_in_an_export_is_built(export: Path) -> None:
    file = export / "config.yaml"
    file.write_text(recipes.path("hstu/tiny-dynamic").read_text())
    settings = ["--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"]
    cli = Parsed(args=["fit", "--config", str(file), *settings])
    assert type(cli.model).__name__ == "RetrievalModule"


def test_features_are_built_as_a_run_saves_them(export: Path) -> None:
    recipe = yaml.safe_load(recipes.path("mtgr/exposures").read_text())
    settings = recipe["data"]["init_args"]
    settings["features"] = [{"class_path": "lightning_gr.FeatureConfig", "init_args": x} for x in settings["features"]]
    file = export / "config.yaml"
    file.write_text(yaml.safe_dump(recipe))
    words = ["--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"]
    cli = Parsed(args=["fit", "--config", str(file), *words])
    assert [x.name for x in cli.datamodule.chosen_features] == [x["init_args"]["name"] for x in settings["features"]]


def test_where_nothing_is_trusted(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.ckpt"
    deep = checkpoint / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (checkpoint / "meta.pt").touch()
    for folder, wanted in ((checkpoint, True), (deep.parent, True), (deep, False), (tmp_path, False)):
        (folder / "config.yaml").touch()
        assert is_untrusted(str(folder / "config.yaml")) is wanted
    assert is_untrusted(f"file://{checkpoint}/config.yaml")
    assert is_untrusted(str(tmp_path / "x" / ".." / "last.ckpt" / "config.yaml"))


@pytest.mark.parametrize("name", ["subprocess.Popen", MODEL["class_path"]])
def test_hyperparameters_of_a_checkpoint_file(name: str) -> None:
    """Lightning makes them the model's settings."""
    torch.save({"hyper_parameters": {"_class_path": name, "args": ["touch", "trace"]}, "state_dict": {}}, "plain.ckpt")
    with pytest.raises(Exception, match="may name") as caught:
        Parsed(
            args=[
                "test",
                "--model",
                "lightning_gr.models.RetrievalModule",
                "--ckpt_path",
                "plain.ckpt",
                "--model.encoder",
                "lightning_gr.layers.HSTUEncoder",
            ]
        )
    assert str(caught.value).startswith(f"plain.ckpt (hyper_parameters): class_path: {name}")
    assert not Path("trace").exists()
    if name == MODEL["class_path"]:
        torch.save({"hyper_parameters": {"_class_path": name}, "state_dict": {}}, "plain.ckpt")
        cli = Parsed(args=["test", "--model", name, "--ckpt_path", "plain.ckpt"])
        assert type(cli.model).__name__ == "BoringModel"
