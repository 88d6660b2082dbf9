"""The command's front: dispatch without torch, help, near names, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gr
from lightning_gr.cli import main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchrec", "lightning", "jsonargparse", "numpy", "polars", "pyarrow", "fbgemm_gpu"}
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "command",
    [["--help"], ["--version"], ["recipes", "ls"], ["recipes", "show", "hstu/tiny"], ["fit", "--config", "hstu/tinny"]],
)
def test_light_commands_import_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_gr", *command],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=tmp_path,
        check=False,
    )
    imported = {x.rpartition("|")[2].strip().partition(".")[0] for x in run.stderr.splitlines() if "import time:" in x}
    assert "lightning_gr" in imported
    assert not imported & HEAVY


def test_signatures_are_read_without_torchrec() -> None:
    code = "import sys, lightning_gr.cli.training; print(sorted({x.partition('.')[0] for x in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    assert "'lightning'" in run.stdout
    for name in ("torchrec", "fbgemm_gpu", "polars", "pyarrow"):
        assert f"'{name}'" not in run.stdout


def test_the_package_root_is_lazy_and_complete() -> None:
    code = "import sys, lightning_gr; assert 'torch' not in sys.modules; print(lightning_gr.SequenceBatch.__module__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    assert run.stdout.strip() == "lightning_gr.batch"
    assert set(lightning_gr.__all__) <= set(dir(lightning_gr))
    with pytest.raises(AttributeError, match="no attribute 'SequenceBach'"):
        _ = lightning_gr.SequenceBach


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text
    for command in ("fit", "validate", "test", "predict", "recipes", "demo", "doctor"):
        assert f"\n  {command} " in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-gr {lightning_gr.__version__}\n"


@pytest.mark.parametrize(("typed", "said"), [("fti", "did you mean fit?"), ("xyz", "choose from fit, validate")])
def test_an_unknown_command(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lightning-gr: error: {typed}: no such command; {said}")
    assert error.count("\n") == 1


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_gr.cli._dispatch", interrupted)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "lightning-gr: interrupted\n"
