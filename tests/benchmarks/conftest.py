"""Benchmarks are scripts that import their neighbours by name; their tests do as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
