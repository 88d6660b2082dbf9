"""JSON files that say what they are and hold a checksum of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_gr.checkpoint.storage import FileSum


def to_json(content: Mapping[str, Any], *, format: str) -> bytes:
    """The file of a dictionary of plain values."""
    content = {"format": format, **content}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode()


def from_json(data: bytes, *, format: str) -> dict[str, Any]:
    """The dictionary of a file.

    Raises:
        ValueError: it is no JSON, of another format, or damaged.
    """
    content = json.loads(data.decode())  # of bytes, UTF-16 and UTF-32 would be taken, too
    if not isinstance(content, dict) or content.get("format") != format:
        raise ValueError(f"its format is not {format!r}")
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise ValueError("its checksum is wrong")
    del content["format"]
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return FileSum.of(json.dumps(content, sort_keys=True).encode()).checksum
