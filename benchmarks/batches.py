"""A loader of batches that a benchmark has made beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Batches:
    """A loader of batches that are there; Lightning takes a list for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)
