"""Equal work for every rank: what a sequence costs, and how samples are dealt out. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of, fit_cost
    from lightning_gr.balancing.partition import Method, imbalance, micro_batches, micro_step_count
    from lightning_gr.balancing.settings import Balancing

# Not `partition`: the function would hide the module of its name.
_MODULES = {
    "Balancing": "settings",
    "Method": "partition",
    "SequenceCost": "cost",
    "TOKENS": "cost",
    "cost_of": "cost",
    "fit_cost": "cost",
    "imbalance": "partition",
    "micro_batches": "partition",
    "micro_step_count": "partition",
}

__all__ = [
    "TOKENS",
    "Balancing",
    "Method",
    "SequenceCost",
    "cost_of",
    "fit_cost",
    "imbalance",
    "micro_batches",
    "micro_step_count",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
