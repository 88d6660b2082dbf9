"""All targets, by name."""

from __future__ import annotations

import importlib

from tests.fuzz.outcome import Target

MODULES = {"logs": "READ", "prepare": "PREPARE", "configs": "CONFIGS", "masks": "MASKS", "checkpoints": "CHECKPOINTS"}
_FILES = {"prepare": "logs"}


def target(name: str) -> Target:
    """One of `MODULES`; only what it needs is imported."""
    return getattr(importlib.import_module(f"tests.fuzz.{_FILES.get(name, name)}"), MODULES[name])
