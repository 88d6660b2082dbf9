"""A run's files: what is read is what was written, also after a crash, a resume, and from other loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.report.environment import HIDDEN, without_secrets
from lightning_gr.report.lengths import FIRST_LENGTHS, bucket_name, count_lengths
from lightning_gr.report.run import read_run
from lightning_gr.report.run_files import RunFiles


def test_what_was_written_is_read(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    files.begin(step=0)
    counts = [0] * len(FIRST_LENGTHS)
    files.append(step=10, seconds=1.5, values={"a": 1.0, "b": math.nan}, lengths=counts)
    files.append(step=10, seconds=1.6, values={"a": 2.0})
    files.append(step=20, seconds=2.5, values={"a": 3.0, "b": math.inf}, lengths=[7, *counts[1:]])
    files.append(step=30, seconds=3.0)
    files.write_facts({"name": "x", "state": "running"})
    assert len((tmp_path / "run" / "run.jsonl").read_text().splitlines()) == 3
    run = read_run(tmp_path / "run")
    assert (run.name, run.lengths[0], run.last_step, run.notes) == ("x", 7, 20, [])
    a, b = run.series["a"], run.series["b"]
    assert (a.steps, a.values, a.seconds) == ([10, 20], [2.0, 3.0], [1.6, 2.5])
    assert b.steps == [10, 20]
    assert all(map(math.isnan, b.values))
    assert b.finite == []


def test_a_resumed_run_goes_on_without_doubled_steps(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.begin(step=0)
    for step in (10, 20, 30):
        files.append(step=step, seconds=float(step), values={"a": float(step)})
    kept = RunFiles(tmp_path).begin(step=20)
    assert [line["step"] for line in kept] == [10, 20]
    files.append(step=30, seconds=31.0, values={"a": -30.0})
    assert read_run(tmp_path).series["a"].values == [10.0, 20.0, -30.0]

    other = RunFiles(tmp_path / "other")
    assert [line["step"] for line in other.begin(step=20, earlier=tmp_path)] == [10, 20]
    assert [line["step"] for line in other.begin(step=10, earlier=tmp_path)] == [10]  # its own come first
    assert other.begin(step=0, earlier=tmp_path) == []
    assert not other.has_lines


@pytest.mark.parametrize("torn", ['{"step": 30, "val', "{}", "[1]", "\xff\n{"])
def test_a_torn_line_is_left_out_and_said(tmp_path: Path, torn: str) -> None:
    files = RunFiles(tmp_path)
    files.begin(step=0)
    files.append(step=10, seconds=1.0, values={"a": 1.0})
    with (tmp_path / "run.jsonl").open("a", encoding="latin-1") as file:
        file.write(torn)
    run = read_run(tmp_path)
    assert run.series["a"].values == [1.0]
    assert "torn or foreign in run.jsonl" in run.notes[0]
    assert "run.json is missing" in run.notes[1]


@pytest.mark.parametrize("facts", ["{", "[]", ""])
def test_facts_that_cannot_be_read_are_said(tmp_path: Path, facts: str) -> None:
    files = RunFiles(tmp_path)
    files.begin(step=0)
    files.append(step=10, seconds=1.0, values={"a": 1.0})
    (tmp_path / "run.json").write_text(facts)
    assert "run.json cannot be read" in read_run(tmp_path).notes[0]


def test_no_run_and_an_empty_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such folder; give the folder of a run"):
        read_run(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no run; looked for report/run.jsonl, run.jsonl .* or metrics.csv"):
        read_run(tmp_path)
    RunFiles(tmp_path).begin(step=0)
    with pytest.raises(ValueError, match="the run is empty, not one number was logged"):
        read_run(tmp_path)


def test_the_folder_of_a_csv_logger(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,epoch,step,val/b\n1.5,0,9,\n,0,9,0.25\n2.5,1,19,\nx,1,29,\n3,1,,\n")
    (tmp_path / "hparams.yaml").write_text("lr: 1\n")
    run = read_run(tmp_path)
    assert (run.series["a"].steps, run.series["a"].values) == ([9, 19], [1.5, 2.5])
    assert (run.series["val/b"].steps, run.series["val/b"].values) == ([9], [0.25])
    assert run.facts["config"] == "lr: 1\n"
    assert "2 lines of metrics.csv cannot be read" in run.notes[1]


@pytest.mark.parametrize(("folder", "name"), [("a/csv", "a/csv"), ("a/version_12", "a/version_12"), ("a/b", "b")])
def test_a_loggers_version_is_no_name_without_what_it_is_of(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "metrics.csv").write_text("a,epoch,step\n1.5,0,9\n")
    assert read_run(tmp_path / folder).name == name


def test_every_place_of_a_run(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    folder = write_run(tmp_path / "named")
    assert read_run(folder).name == read_run(folder / "report").name == "a run"
    facts = json.loads((folder / "report" / "run.json").read_text())
    (folder / "report" / "run.json").write_text(json.dumps(facts | {"name": ""}))
    assert read_run(folder).name == read_run(folder / "report").name == "named"


@given(st.lists(st.integers(0, 1 << 22), max_size=50))
def test_every_length_is_in_its_bucket(lengths: list[int]) -> None:
    counts = count_lengths(np.array(lengths, dtype=np.int64))
    ends = [*FIRST_LENGTHS[1:], math.inf]
    expected = [sum(first <= x < end for x in lengths) for first, end in zip(FIRST_LENGTHS, ends, strict=True)]
    assert counts.tolist() == expected


def test_names_of_buckets() -> None:
    names = [bucket_name(i) for i in range(len(FIRST_LENGTHS))]
    assert names[:9] == ["0", "1", "2", "3", "4-5", "6-7", "8-11", "12-15", "16-23"]
    assert names[-1] == "1048576+"


def test_secrets_are_left_out() -> None:
    settings = {
        "logger": {"api_key": "abc", "wandb.token": "abc", "password": None, "uri": "https://me:abc@host/x"},
        "data": [{"global_tokens": 5, "tokens_per_rank": "7", "path": Path("events.csv"), "hf_token": "abc"}],
        "odd": object,
    }
    assert without_secrets(settings) == {
        "logger": {
            "api_key": HIDDEN,
            "wandb.token": HIDDEN,
            "password": None,
            "uri": f"https://{HIDDEN}@host/x",
        },
        "data": [{"global_tokens": 5, "tokens_per_rank": "7", "path": "events.csv", "hf_token": HIDDEN}],
        "odd": "<class 'object'>",
    }
