"""The LightningCLI: recipes by name, and one line for every mistake in a setting or in a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr import recipes
from lightning_gr.cli import main
from lightning_gr.cli.training import GRCLI

QUIET = [f"--trainer.{x}=false" for x in ("logger", "enable_checkpointing", "enable_progress_bar")]
QUIET += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=1"]


class ToyCliEncoder(nn.Module):
    """A part with settings of its own."""

    def __init__(self, *, dim: int = 3, depth: int | None = None) -> None:
        super().__init__()


class ToyCliModel(pl.LightningModule):
    """A module whose `fails` picks the mistake that it makes."""

    def __init__(
        self,
        *,
        encoder: ToyCliEncoder | None = None,
        kind: Literal["red", "green"] = "red",
        width: int = 2,
        fails: str = "",
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.fails = fails
        if fails == "init":
            raise ValueError(f"fails={fails!r}: no good; leave it out")
        if fails == "init bug":
            raise TypeError("a bug")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.fails == "value":
            raise ValueError("width: 2 is\ntoo small; take 3")
        if self.fails == "misconfigured":
            raise MisconfigurationException("precision: no; take 32-true")
        if self.fails == "file":
            open("no-such-file.csv")  # noqa: SIM115
        if self.fails == "import":
            import no_such_package_of_ours  # noqa: F401
        if self.fails == "unpacking":
            _a, _b = (1, 2, 3)  # type: ignore[misc]
        if self.fails == "type":
            raise TypeError("of the user's own code")
        if self.fails == "torch":
            torch.optim.SGD(self.parameters(), lr=-1.0)
        return self.layer(batch).sum()

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.zeros(4, 2), batch_size=2)  # type: ignore[arg-type]

    predict_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs save their configuration where they stand."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2 and one line, and returns what follows the prefix."""

    def run(*args: str) -> str:
        assert main(args) == 2
        errors = [x for x in capsys.readouterr().err.splitlines() if "Warning" not in x and x.strip()]
        assert len([x for x in errors if "lightning-gr: error:" in x]) == 1
        assert not any("Traceback" in x for x in errors)
        return errors[-1].removeprefix("lightning-gr: error: ")

    return run


MODEL = ["--model", "ToyCliModel"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            [*MODEL, "--trainer.max_epocs", "3"],
            "--trainer.max_epocs: no such option; did you mean --trainer.max_epochs?",
        ),
        ([*MODEL, "--trainer.max_epochs", "many"], "trainer.max_epochs: expected int or null, got 'many'"),
        (["--model", "ToyCliModle"], "model: ToyCliModle: no such class; did you mean ...ToyCliModel"),
        (
            ["--model", "lightning_gr.models.RetrievalModul"],
            "model: lightning_gr.models.RetrievalModul: no such class...you mean lightning_gr.models.RetrievalModule?",
        ),
        (["--model", "torch.nn.Linear"], "model: torch.nn.Linear: not the right kind of class; "),
        ([*MODEL, "--model.widht", "3"], "model.init_args.widht: ToyCliModel has no such option; did you mean width?"),
        ([*MODEL, "--model.width", "x"], "model.init_args.width: expected int, got 'x'"),
        (
            [*MODEL, "--model.width", "null"],
            "model.init_args.width: expected int, got null; give a value, or leave it out",
        ),
        (
            [*MODEL, "--data", "SequenceDataModule", "--data.path", "x.csv", "--data.max_length", "null"],
            "data.init_args.max_length: expected int, got null",
        ),
        (
            [*MODEL, "--trainer.strategy", "SequenceBalancedStrategy", "--trainer.strategy.pipeline_depth", "null"],
            "trainer.strategy.init_args.pipeline_depth: expected int, got null",
        ),
        ([*MODEL, "--model.kind", "blue"], "model.init_args.kind: expected one of red, green, got 'blue'"),
        (
            [*MODEL, "--model.encoder", "ToyCliEncoder", "--model.encoder.dim", "x"],
            "model.init_args.encoder.init_args.dim: expected int, got 'x'",
        ),
        (
            [*MODEL, "--model.encoder", "ToyCliEncoder", "--model.encoder.dimm", "1"],
            "model.init_args.encoder.init_args.dimm: ToyCliEncoder has no such option; did you mean dim?",
        ),
        (
            [*MODEL, "--trainer.callbacks", "TopKWrite"],
            "trainer.callbacks: TopKWrite: no such class; did you mean lightning_gr.callbacks.TopKWriter?",
        ),
        ([*MODEL, "--data", "lightning_gr.data.SequenceDataModule"], "data.init_args.path: missing"),
        ([], "fit.model: missing; give it"),
        ([*MODEL, "stray"], "stray: unexpected argument"),
    ],
)
def test_a_wrong_setting(args: list[str], said: str, fails: Callable[..., str]) -> None:
    line = fails("fit", *args)
    start, _, rest = said.partition("...")
    assert line.startswith(start), line
    assert rest in line, line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "trainer:\n  max_epochs: many\n",
            "trainer.max_epochs: expected int or null, got 'many'; correct the value (in --config {file})",
        ),
        ("trainer:\n  max_epocs: 3\n", "trainer.max_epocs: no such setting of 'fit'; did you mean trainer.max_epochs?"),
        (
            "model:\n  class_path: ToyCliModel\n  init_args:\n    width: [1]\n",
            "model.init_args.width: expected int, got '[1]'",
        ),
        ("trainer: [\n  max_epochs: 3\n", "--config {file}: not valid YAML: "),
        ("just words\n", "--config {file}: not settings: 'just words'; "),
    ],
)
def test_a_wrong_file(text: str, said: str, fails: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    line = fails("fit", *(MODEL if "model:" not in text else []), "--config", str(file))
    assert line.startswith(said.format(file=file)), line


def test_a_missing_file_and_an_unknown_recipe(fails: Callable[..., str], tmp_path: Path) -> None:
    missing = tmp_path / "run.yaml"
    assert fails("fit", "--config", str(missing)).startswith(f"--config {missing}: no such file; ")
    assert "did you mean the recipe hstu/tiny" in fails("fit", "--config=hstu/tinny")
    assert "there are: dlrm/exposures, dlrm/movielens, gmeta/ablations/joint, gmeta/kuairand-1k, " in fails(
        "fit", "-c", "zzz"
    )
    assert "is a folder" in fails("fit", "--config", str(tmp_path))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            "init",
            r"fails='init': no good; leave it out \(raised in test_training.py, line \d+; LIGHTNING_GR_TRACEBACK=1",
        ),
        ("value", r"width: 2 is too small; take 3 \(raised in test_training.py, line \d+; "),
        ("misconfigured", "precision: no; take 32-true"),
        ("file", "no-such-file.csv: no such file or directory; give another path"),
        ("import", "no_such_package_of_ours: not installed; lightning-gr doctor"),
    ],
)
def test_a_mistake_in_a_run(mistake: str, said: str, fails: Callable[..., str]) -> None:
    assert re.match(said, line := fails("fit", *MODEL, "--model.fails", mistake, *QUIET)), line


def test_a_number_of_devices_that_a_processor_has_not(fails: Callable[..., str]) -> None:
    """Lightning's own word for it is a TypeError."""
    line = fails("fit", *MODEL, "--trainer.accelerator", "cpu", "--trainer.devices=-1")
    assert line.startswith("`devices` selected with `CPUAccelerator` should be an int > 0. (raised in cpu.py, line "), (
        line
    )


@pytest.mark.parametrize(
    ("bug", "kind"),
    [("unpacking", ValueError), ("torch", ValueError), ("init bug", ValueError), ("type", TypeError)],
)
def test_a_bug_keeps_its_traceback(bug: str, kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(kind):
        main(["fit", *MODEL, "--model.fails", bug, *QUIET])
    assert "lightning-gr: error:" not in capsys.readouterr().err


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LIGHTNING_GR_TRACEBACK", "1")
    assert main(["fit", "--config", "hstu/tinny"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("lightning-gr: error: ")


def test_other_ranks_wait_and_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert main(["fit", "--config", "hstu/tinny"]) == 2
    assert waited == []
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert main(["fit", "--config", "hstu/tinny"]) == 2
    assert waited == [2.0]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["fit", "--config", "hstu/tinny"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("[rank 3] ") for line in lines] == [False, True, False]


def _parse(monkeypatch: pytest.MonkeyPatch, *args: str) -> GRCLI:
    monkeypatch.setattr(GRCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(GRCLI, "_run_subcommand", lambda self, subcommand: None)
    return GRCLI(args=list(args))


@pytest.mark.recipe
@pytest.mark.parametrize("name", recipes.ls())
def test_every_recipe_parses_and_flags_win(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bases = {"mtgr/ablations/": "mtgr/exposures", "turbogr/ablations/fuxi": "turbogr/fuxi-tiny"}
    bases |= {"turbogr/ablations/negatives": "hstu/amazon-beauty", "gmeta/ablations/": "gmeta/movielens"}
    bases["gmeta/with-"] = "gmeta/movielens"
    below = [word for start, base in bases.items() if name.startswith(start) for word in ("--config", base)]
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer:\n  max_epochs: 17\n  max_steps: 5\n")
    cli = _parse(monkeypatch, "fit", *below, "--config", name, "--config", str(overlay), "--trainer.max_steps", "7")
    assert cli.config.fit.model.class_path.startswith("lightning_gr.models.")
    assert cli.config.fit.trainer.max_epochs == 17
    assert cli.config.fit.trainer.max_steps == 7


def test_a_file_wins_over_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hstu").mkdir()
    (tmp_path / "hstu" / "tiny").write_text("trainer:\n  max_epochs: 91\n")
    monkeypatch.chdir(tmp_path)
    assert _parse(monkeypatch, "fit", *MODEL, "--config", "hstu/tiny").config.fit.trainer.max_epochs == 91


def test_the_environment_is_read_and_loses_to_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_GR_FIT__TRAINER__MAX_EPOCHS", "5")
    assert _parse(monkeypatch, "fit", *MODEL).config.fit.trainer.max_epochs == 5
    file = tmp_path / "run.yaml"
    file.write_text("trainer:\n  max_epochs: 6\n")
    assert _parse(monkeypatch, "fit", *MODEL, "--config", str(file)).config.fit.trainer.max_epochs == 6


def test_predict_keeps_nothing_in_memory_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _parse(monkeypatch, "predict", *MODEL).config.predict.return_predictions is False
    asked = _parse(monkeypatch, "predict", *MODEL, "--return_predictions", "true")
    assert asked.config.predict.return_predictions is True


def test_the_saved_configuration_says_what_it_was_made_with_and_runs_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Callable[..., str]
) -> None:
    logging = ["--trainer.logger", "CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=log"]
    assert main(["fit", *MODEL, "--model.width=2", *QUIET[1:], *logging]) == 0
    saved = tmp_path / "log" / "version_0" / "config.yaml"
    header = [line for line in saved.read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith("# lightning_gr==")
    assert any(line.startswith("# torch==") for line in header)
    assert _parse(monkeypatch, "fit", "--config", str(saved)).config.fit.model.init_args.width == 2


def test_private_names_are_still_there() -> None:
    import importlib

    from lightning_gr._compat import PRIVATE_NAMES

    for name, reason in PRIVATE_NAMES.items():
        module, _, path = name.partition(":")
        found = importlib.import_module(module)
        for part in path.split("."):
            # What a constructor sets is not on the class; the parser's options are such.
            found = getattr(found, part) if hasattr(found, part) else getattr(found(), part)
        assert reason


A, B, C = {"name": "a", "group": "candidate", "dim": 3}, {"name": "b", "group": "candidate"}, {"name": "c"}
NEW = "[{name: b}, {name: a, dim: 5}]"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--data.init_args.features", NEW], [{"name": "b"}, {"name": "a", "dim": 5}]),
        ([f"--data.init_args.features={NEW}"], [{"name": "b"}, {"name": "a", "dim": 5}]),
        (["--data.features", NEW], [{"name": "b"}, {"name": "a", "dim": 5}]),
        (["--data.init_args", f"{{features: {NEW}}}"], [{"name": "b"}, {"name": "a", "dim": 5}]),
        (["--data", f"{{init_args: {{features: {NEW}}}}}"], [{"name": "b"}, {"name": "a", "dim": 5}]),
        (["--data.features=[{name: b}]", f"--data.features={NEW}"], [{"name": "b"}, {"name": "a", "dim": 5}]),
        (["--data.init_args.features", NEW, "--config=one.yaml"], [A, B]),
        (["--data.init_args.features+", "{name: c}"], [A, B, C]),
        (["--data.init_args.features", NEW, "--data.init_args.features+", "[{name: c}]"],
         [{"name": "b"}, {"name": "a", "dim": 5}, C]),
        (["--data.init_args.features.dim", "7"], [A, B | {"dim": 7}]),
    ],
)  # fmt: skip
def test_a_list_on_the_command_line_replaces_that_of_a_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    wanted: list[dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(
        "data:\n  init_args:\n    features: [{name: a, group: candidate, dim: 3}, {name: b, group: candidate}]\n"
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config=mtgr/tiny", "--config=one.yaml", *words, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    found = [
        {key: value for key, value in each.items() if value is not None}
        for each in printed["data"]["init_args"]["features"]
    ]
    assert found == wanted
    assert "replace_lists" not in printed


def test_callbacks_on_the_command_line_take_nothing_from_those_of_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    of_class = "lightning_gr.callbacks.ResumeCheckpoint"
    first = f"[{{class_path: {of_class}, init_args: {{monitor: x, mode: max}}}}]"
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                "--config=mtgr/tiny",
                "--trainer.callbacks",
                first,
                "--trainer.callbacks",
                f"[{of_class}]",
                "--print_config",
            ]
        )
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["init_args"]["monitor"] != "x"


def test_a_list_in_a_further_file_replaces_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lists = ("[{name: a, group: candidate, dim: 3}, {name: b, group: candidate}]", "[{name: b}, {name: a, dim: 5}]")
    for name, features in zip(("one", "two"), lists, strict=True):
        Path(f"{name}.yaml").write_text(f"data:\n  init_args:\n    features: {features}\n")
    words = ["fit", "--config=mtgr/tiny", "--config=one.yaml", "--config=two.yaml", "--print_config"]
    with pytest.raises(SystemExit):
        main(words)
    settings = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    found = [{key: value for key, value in each.items() if value is not None} for each in settings["features"]]
    assert found == [{"name": "b"}, {"name": "a", "dim": 5}]
    assert settings["cross_task"] == "click"
