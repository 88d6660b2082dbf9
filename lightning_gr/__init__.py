"""lightning-gr: generative recommenders on TorchRec and PyTorch Lightning.

Importing the package costs nothing; the names below load torch when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gr.batch import Labels, SequenceBatch, TokenKind
    from lightning_gr.feature_config import FeatureConfig

__version__ = "0.1.0"

__all__ = ["FeatureConfig", "Labels", "SequenceBatch", "TokenKind", "__version__"]

_HOMES = {
    "FeatureConfig": "lightning_gr.feature_config",
    "Labels": "lightning_gr.batch",
    "SequenceBatch": "lightning_gr.batch",
    "TokenKind": "lightning_gr.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
