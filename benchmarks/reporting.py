"""What every benchmark does at its end: the machine and commit on top, a row in benchmarks/results, JSON last."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


VERSIONS = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "lightning", "triton")


def processor() -> str:
    """The processor's model with its widest vectors, as Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")
    return " ".join(filter(None, (told.get("model name", platform.machine()), vectors)))


def device() -> str:
    """The GPU's name where there is one, else the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def versions() -> str:
    """What a figure depends on and is installed: Python and the packages below the project."""
    found = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def commit() -> str:
    """The short name of the commit that is checked out, with a plus where code was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cpp", "*.h", "*.yaml")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")
    except OSError:
        return "unknown"


def publish(name: str, result: dict[str, Any], *, as_json: bool) -> None:
    """Appends a row to ``benchmarks/results/<name>.csv``, widened where it has new columns; prints it if asked."""
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": device(),
        "versions": versions(),
        **result,
    }
    path = ROOT / "benchmarks" / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for each in rows for key in each)))
        writer.writeheader()
        writer.writerows(rows)
    if as_json:
        print(json.dumps(row))
