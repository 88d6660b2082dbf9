"""The shipped recipes by name: YAML files that train something, listed from the files themselves."""

from __future__ import annotations

import difflib
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def ls() -> dict[str, str]:
    """Every recipe's name, such as ``hstu/tiny``, and the first line of its header comment."""
    files = {file.relative_to(_ROOT).with_suffix("").as_posix(): file for file in _ROOT.rglob("*.yaml")}
    return {name: _description(files[name]) for name in sorted(files)}


def path(name: str) -> Path:
    """The file of a recipe; its name may end in ``.yaml``.

    Raises:
        ValueError: there is no such recipe; the message names the near ones.
    """
    known = ls()
    wanted = name.removesuffix(".yaml")
    if wanted not in known:
        near = near_names(wanted, known)
        what = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise ValueError(f"recipe {name!r}: unknown; {what} (lightning-gr recipes ls)")
    return _ROOT / f"{wanted}.yaml"


def near_names(name: str, known: dict[str, str] | list[str]) -> list[str]:
    """Up to three names that are spelled like this one, or whose last part is."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = {full: full.rsplit("/", 1)[-1] for full in known}
    by_part = difflib.get_close_matches(name.rsplit("/", 1)[-1], list(last.values()), n=3, cutoff=0.75)
    near += [full for full in known if last[full] in by_part and full not in near]
    return near[:3]


def _description(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        first = next(lines, "").strip()
    return first.lstrip("# ") if first.startswith("#") else ""
