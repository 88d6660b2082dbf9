"""Settings of a gin file, as far as they are plain values; nothing in it is imported or called."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

_BINDING = re.compile(r"([A-Za-z_][\w./]*\.[A-Za-z_]\w*)\s*=\s*")
_LONGEST = 1 << 20


def read_gin(path: str | Path) -> dict[str, Any]:
    """Bindings ``scope.name = value`` whose value is a literal of Python, by their full names.

    Comments and blank lines are left out. Whatever else gin knows (``import``, ``include``, macros, references) is
    refused: it would need code or files that are not here.

    Raises:
        ValueError: a line that is no such binding, with its number; or no such text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text; give the gin file of the run") from error
    if len(text) > _LONGEST:
        raise ValueError(f"{path}: longer than {_LONGEST:,} characters; give the gin file of the run")
    found: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}: {line[:80]!r}"
        match = _BINDING.match(line)
        if match is None:
            raise ValueError(f"{where}: expected `name.setting = value`; leave the line out")
        try:
            found[match[1]] = ast.literal_eval(line[match.end() :])
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError(f"{where}: its value is no number, text, True, False or None; write it out") from error
    return found
