"""docs/recipes.md, followed by somebody who types what it says; its table is what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_gr import recipes
from lightning_gr.cli import main
from lightning_gr.data.synthetic import write_synthetic_log
from tests.guide_blocks import ROOT, commands_of, files_of, words_of
from tests.test_readme import run

TEXT, FILES, COMMANDS = (ROOT / "docs/recipes.md").read_text(), files_of("recipes.md"), commands_of("recipes.md")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    main(list(words))
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_synthetic_log(tmp_path / "events.csv", num_users=60, num_items=30, mean_length=8, max_length=15)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    table = printed(capsys, "recipes", "ls", "--markdown")
    assert table in TEXT, "paste what `lightning-gr recipes ls --markdown` prints under `All of them`"
    assert len(table.splitlines()) == len(recipes.ls()) + 2


def test_the_recipes_that_it_advises_exist() -> None:
    for name in re.findall(r"`((?:hstu|sasrec|mtgr|dlrm|gmeta|grm|turbogr)/[\w/-]+)`", TEXT):
        assert name in recipes.ls()


def test_every_fit_of_the_page_parses_and_means_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cp", "hstu/tiny", "mine.yaml"]) == 0
    capsys.readouterr()
    seen = {}
    for line in COMMANDS:
        words = shlex.split(line)[1:]
        if words[0] == "fit":
            with pytest.raises(SystemExit):
                main([*words, "--print_config"])
            seen[line] = yaml.safe_load(capsys.readouterr().out)
    flags, stacked = seen[COMMANDS[3]], seen["lightning-gr fit --config hstu/tiny --config longer.yaml"]
    assert (flags["trainer"]["max_epochs"], flags["model"]["init_args"]["encoder"]["init_args"]["dim"]) == (2, 64)
    encoder = stacked["model"]["init_args"]["encoder"]["init_args"]
    assert (encoder["num_layers"], encoder["dim"], stacked["trainer"]["max_epochs"]) == (3, 128, 3)


def test_a_wrong_name_is_refused_with_the_near_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (wrong,) = re.findall(r"a wrong one is refused with the near ones \| `(.*?)` \|", TEXT)
    assert main(["fit", "--config", "hstu/tiny", *wrong.split()]) == 2
    assert "max_epochs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.dist
def test_the_anatomy_trains(folder: Path) -> None:
    said = run([*words_of("lightning-gr fit --config anatomy.yaml"), "--trainer.max_epochs", "1"], folder)
    assert "val/NDCG@10" in said


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.dist
def test_compare_takes_a_recipe_with_a_file_on_top(folder: Path) -> None:
    (line,) = [x for x in COMMANDS if x.startswith("lightning-gr compare")]
    said = run([*words_of(line.replace("--seeds 2", "--seeds 1")), "--trainer.max_epochs", "1"], folder)
    assert "hstu/tiny+longer.yaml" in said
