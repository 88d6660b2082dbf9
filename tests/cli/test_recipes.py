"""The shipped recipes by name, and `recipes ls|show|cp`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gr import recipes
from lightning_gr.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_ls_is_what_lies_in_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    files = {x.relative_to(ROOT / "recipes").as_posix().removesuffix(".yaml") for x in ROOT.glob("recipes/**/*.yaml")}
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == files
    assert all(len(line.split()) > 3 for line in lines), "every recipe says in its first comment what it trains"


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    name = next(iter(recipes.ls()))
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("typed", "near"), [("hstu/tinny", "hstu/tiny"), ("tiny", "hstu/tiny"), ("hstu/tinny.yaml", "hstu/tiny")]
)
def test_an_unknown_recipe_names_the_near_ones(typed: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", typed]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert typed in output.err
    (said,) = [line for line in output.err.splitlines() if "did you mean" in line]
    assert near in said.partition("did you mean")[2]


def test_cp_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "mine.yaml"
    assert main(["recipes", "cp", "hstu/tiny", str(dest)]) == 0
    assert dest.read_text() == recipes.path("hstu/tiny").read_text()
    dest.write_text("mine\n")
    capsys.readouterr()
    assert main(["recipes", "cp", "hstu/tiny", str(dest)]) == 2
    assert "--force" in capsys.readouterr().err
    assert dest.read_text() == "mine\n"
    assert main(["recipes", "cp", "hstu/tiny", str(dest), "--force"]) == 0
    assert dest.read_text() == recipes.path("hstu/tiny").read_text()
    assert list(tmp_path.iterdir()) == [dest]


def test_cp_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["recipes", "cp", "hstu/tiny", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert main(["recipes", "cp", "hstu/tiny", str(tmp_path / "no" / "where.yaml")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_cp_into_a_folder_keeps_the_name(tmp_path: Path) -> None:
    assert main(["recipes", "cp", "hstu/tiny", str(tmp_path)]) == 0
    assert (tmp_path / "tiny.yaml").is_file()
