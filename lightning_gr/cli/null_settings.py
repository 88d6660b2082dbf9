"""Settings of null where a constructor takes none: jsonargparse passes them on, and they fail without their name."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from lightning_gr.cli.errors import UserError

_ONE = r"(?:int|float|bool|str|Literal\[[^\[\]]*\])"
_TAKES_NO_NULL = re.compile(rf"{_ONE}(?: \| {_ONE})*")


def refuse_null(settings: Any, path: str = "") -> None:
    """Refuses the first such setting of any class, however deep.

    Args:
        settings: parsed ones, as plain dictionaries and lists.
        path: where they are, in dots.

    Raises:
        UserError: a setting is null whose annotation is made of numbers, texts and choices alone.
    """
    if isinstance(settings, list):
        for value in settings:
            refuse_null(value, path)
    if not isinstance(settings, dict):
        return
    given = settings.get("init_args")
    if isinstance(given, dict) and isinstance(settings.get("class_path"), str):
        for name, annotation in _annotations(settings["class_path"]).items():
            if name in given and given[name] is None and _TAKES_NO_NULL.fullmatch(annotation):
                key = f"{path}.init_args.{name}" if path else name
                raise UserError(f"{key}: expected {annotation}, got null; give a value, or leave it out")
    for name, value in settings.items():
        refuse_null(value, f"{path}.{name}" if path else str(name))


def _annotations(class_path: str) -> dict[str, str]:
    """Those of a constructor's parameters, as they are written; none of a class that cannot be looked at."""
    module, _, name = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return {}
    # None as a default is taken, whatever the annotation says.
    typed = (x for x in parameters if x.default is not None and x.annotation is not x.empty)
    return {
        x.name: x.annotation if isinstance(x.annotation, str) else inspect.formatannotation(x.annotation) for x in typed
    }
