"""``lightning-gr report``: one page of one or several runs, and what is said of what is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_gr.cli import main
from lightning_gr.report.run_files import RunFiles


def write(folder: Path, *, name: str = "", value: float = 1.0) -> Path:
    files = RunFiles(folder / "report")
    files.begin(step=0)
    for step in (10, 20):
        files.append(step=step, seconds=step / 10, values={"train/loss": value / step, "val/HR@10": value})
    files.write_facts({"name": name, "state": "finished", "config": f"lr: {value}\n"})
    return folder


def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", name="hstu/tiny")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "report.html: 1 run\n"
    text = (tmp_path / "report.html").read_text()
    assert "<h1>hstu/tiny</h1>" in text
    assert "Settings that differ" not in text


def test_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a", name="same"), write(tmp_path / "b", name="same", value=2.0), write(tmp_path / "c")]
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,train/loss\n9,0.5\n")
    with (runs[2] / "report" / "run.jsonl").open("a") as file:
        file.write('{"step": 3')
    output = tmp_path / "new" / "page.html"
    assert main(["report", *map(str, runs), str(tmp_path / "csv"), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "c: 1 line was torn or foreign in run.jsonl and left out." in said
    assert "csv: Read from metrics.csv" in said
    assert said.endswith("page.html: 4 runs\n")
    text = output.read_text()
    assert f"{runs[0]}</li>" in text  # two have the same name
    assert f"{runs[1]}</li>" in text
    assert "Settings that differ" in text
    assert "<code>lr</code>" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent"], "absent: no such folder; give the folder of a run"),
        (["none"], "none: holds no run; looked for report/run.jsonl, run.jsonl (ReportCallback) or metrics.csv"),
        (["empty"], "empty: the run is empty, not one number was logged; train for at least one log step"),
        (["good", "./good"], "good, good: a run is there twice; name every run once"),
        (["good", "--output", "none"], "--output none: is a folder; give a file, as none/report.html"),
        ([], "report: the following arguments are required: RUN; see lightning-gr report --help"),
    ],
)
def test_what_is_no_run(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good")
    (tmp_path / "none").mkdir()
    RunFiles(tmp_path / "empty").begin(step=0)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lightning-gr: error: {said}")
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["report", str(write(tmp_path / "a")), "--output", str(tmp_path / "locked" / "x.html")]) == 2
    assert "permission denied" in capsys.readouterr().err
