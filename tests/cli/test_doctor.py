"""`lightning-gr doctor`: the verdict, and what it says of a broken environment."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from lightning_gr import substrate
from lightning_gr.cli import doctor, main

HEALTHY = '{"devices": [], "backends": ["gloo"], "cuda": null}\n{"operators": true}\n'


def _pretend(monkeypatch: pytest.MonkeyPatch, output: str = HEALTHY, *, code: int = 0, errors: str = "") -> None:
    """Replaces the probe's process: loading torch takes seconds, and a broken binary cannot be had."""

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(doctor.subprocess, "run", run)


def _findings(capsys: pytest.CaptureFixture[str], expected_code: int) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == expected_code
    report = json.loads(capsys.readouterr().out)
    assert report["can_train"] is (expected_code == 0)
    return {finding["name"]: finding for finding in report["findings"]}


@pytest.mark.slow
def test_this_environment_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "torchrec", "fbgemm-gpu", "lightning", "polars", "gloo", "load and compute"):
        assert name in text
    assert "A training run can work here." in text


def test_what_is_optional_does_not_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _pretend(monkeypatch)
    version_of = substrate.version_of
    monkeypatch.setattr(substrate, "version_of", lambda name: None if name == "wandb" else version_of(name))
    found = _findings(capsys, 0)
    assert found["wandb"]["state"] == "optional"
    assert "lightning-gr[wandb]" in found["wandb"]["remedy"]


@pytest.mark.parametrize(
    ("name", "version", "state", "remedy"),
    [
        ("torchrec", None, "missing", "torchrec==1.8.0"),
        ("torchrec", "1.6.0", "wrong", "torchrec==1.8.0"),
        ("lightning", "2.6.3", "wrong", 'pip install "lightning>=2.6.4,<2.7"'),
        ("polars", None, "missing", 'pip install "polars"'),
    ],
)
def test_what_is_missing_or_wrong_comes_with_its_command(
    name: str,
    version: str | None,
    state: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _pretend(monkeypatch)
    version_of = substrate.version_of
    monkeypatch.setattr(substrate, "version_of", lambda x: version if x == name else version_of(x))
    found = _findings(capsys, 1)
    assert found[name]["state"] == state
    assert remedy in found[name]["remedy"]
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert remedy in text
    assert "cannot work here" in text


@pytest.mark.parametrize(
    ("output", "code", "errors", "name", "note"),
    [
        (
            HEALTHY.splitlines()[0],
            1,
            "Traceback\nOSError: undefined symbol: _ZN3c10",
            "FBGEMM operators",
            "undefined symbol",
        ),
        (HEALTHY.splitlines()[0], -11, "", "FBGEMM operators", "killed by signal 11"),
        ("", 1, "ImportError: libcudart.so", "torch loads", "libcudart"),
    ],
)
def test_binaries_that_do_not_load(
    output: str,
    code: int,
    errors: str,
    name: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _pretend(monkeypatch, output, code=code, errors=errors)
    finding = _findings(capsys, 1)[name]
    assert finding["state"] == "wrong"
    assert note in finding["note"]
    assert "pip install" in finding["remedy"]
