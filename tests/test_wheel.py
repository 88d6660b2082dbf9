"""The wheel holds plain files, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("lightning_gr", "plugins", "callbacks", "recipes", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy with the links left as links, as in a checkout."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    run = subprocess.run(build, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], capture_output=True, check=True)
    return target


def _expected() -> set[str]:
    """Every Python file and recipe of the checkout, by the path it must have in the wheel."""
    files = set()
    for room in ("lightning_gr", "plugins", "callbacks", "recipes"):
        for folder, _, names in os.walk(ROOT / room):  # does not follow the links
            at = Path(folder).relative_to(ROOT)
            inside = at if room == "lightning_gr" else "lightning_gr" / at
            files |= {str(inside / x) for x in names if x.endswith((".py", ".yaml", ".html")) or x == "py.typed"}
    return files


def test_it_holds_every_module_and_recipe_as_a_plain_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    names = {x.filename for x in entries}
    assert not _expected() - names
    assert "lightning_gr/plugins/__init__.py" in names
    assert "lightning_gr/recipes/hstu/tiny.yaml" in names
    assert not [x.filename for x in entries if stat.S_ISLNK(x.external_attr >> 16)]
    # A top-level `recipes` or `callbacks` would overwrite that of another distribution.
    assert {x.partition("/")[0].partition("-")[0] for x in names} == {"lightning_gr"}


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = next(x.partition("/")[0] for x in archive.namelist() if ".dist-info/" in x)
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert "lightning-gr = lightning_gr.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    lines = metadata.splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert {x.removeprefix("Provides-Extra: ") for x in lines if x.startswith("Provides-Extra")} >= {
        "gpu",
        "wandb",
        "mlflow",
    }
    assert any(x.startswith("Requires-Dist: lightning<2.7,>=2.6.4") for x in lines)


def test_it_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert not [x for x in installed.rglob("*") if x.is_symlink()]
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_gr", "recipes", "ls"]
    listed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert "\nhstu/tiny " in listed
    code = (
        "import lightning_gr.plugins, lightning_gr.callbacks, lightning_gr.recipes as r, lightning_gr\n"
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "assert 'sequence_balanced' in StrategyRegistry and r.path('hstu/tiny').is_file()\n"
        "print(lightning_gr.plugins.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()).is_relative_to(installed)
