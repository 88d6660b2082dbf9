"""torchrec missing or of the wrong binary version: one line with the versions found and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gr import substrate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that seem to be installed; a test changes them."""
    here = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}

    def version(name: str) -> str:
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return here


def _says(*parts: str) -> None:
    with pytest.raises(ImportError) as caught:
        substrate.require_torchrec()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_the_environment_at_hand_fits() -> None:
    substrate.require_torchrec()


def test_missing(versions: dict[str, str]) -> None:
    del versions["torchrec"]
    _says("torchrec is not installed", "pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0")
    versions["torchrec"] = "1.8.0"
    del versions["fbgemm-gpu-cpu"]
    _says("fbgemm-gpu", "is not installed", "torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0")


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("torchrec", "1.7.0", "torchrec 1.7.0 does not fit torch 2.13.0+cpu"),
        ("fbgemm-gpu-cpu", "1.6.0", "fbgemm-gpu-cpu 1.6.0 does not fit torch 2.13.0+cpu"),
        ("torch", "2.11.0+cpu", "torchrec 1.8.0 does not fit torch 2.11.0+cpu, which wants 1.6"),
    ],
)
def test_of_the_wrong_binary_version(versions: dict[str, str], name: str, version: str, said: str) -> None:
    versions[name] = version
    _says(said, "pip install --no-deps torchrec==1.")


def test_a_patch_release_fits(versions: dict[str, str]) -> None:
    versions |= {"torch": "2.13.1", "torchrec": "1.8.2", "fbgemm-gpu-cpu": "1.8.1"}
    assert substrate.problem() is None


def test_the_cuda_build_is_asked_for_beside_a_cuda_torch(versions: dict[str, str]) -> None:
    del versions["torchrec"]
    versions |= {"torch": "2.13.0", "triton": "3.7.0"}
    _says("torchrec==1.8.0 fbgemm-gpu==1.8.0")


def test_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    # A None in sys.modules makes the import fail; the distribution and its spec seem to be there all the same.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchrec", None)
    _says("torchrec cannot be imported", "pip install --no-deps")


@pytest.mark.slow
def test_a_training_command_without_torchrec_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torchrec'] = sys.modules['fbgemm_gpu'] = None\n"
        "from lightning_gr.cli import main\n"
        "sys.exit(main(['fit', '--config', 'hstu/tiny', '--data.init_args.path', 'log.csv', '--trainer.devices', '1']))"
    )
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(5)))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    (line,) = [x for x in run.stderr.splitlines() if x.startswith("lightning-gr: error: ")]
    assert line.startswith("lightning-gr: error: torchrec is not installed; run: pip install --no-deps torchrec==")
    assert [x.name for x in tmp_path.iterdir()] == ["log.csv"], "nothing half-written"
