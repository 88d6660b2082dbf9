"""The data of a recipe that runs with nothing else: made where the path that the recipe names is not there."""

from __future__ import annotations

import sys
from pathlib import Path

COLD_START = "outputs/gmeta/cold-start/store"
"""The store of ``gmeta/tiny``."""


def makes(path: str | None) -> bool:
    """Whether `make_where_absent` makes what lies there."""
    return path == COLD_START


def make_where_absent(path: str | None) -> None:
    """Writes the synthetic cold-start log and its store, if this is their path and nothing is there.

    Args:
        path: the data's path, as a recipe or a user gives it.
    """
    if not makes(path) or Path(COLD_START).exists():
        return
    from lightning_gr.data.synthetic_tasks import write_cold_start_store

    folder = Path(COLD_START).parent
    written = write_cold_start_store(folder)
    if written is not None:
        sys.stderr.write(f"{folder}: not there, so a synthetic log was written: {written}\n")
