"""A chain of saves of one table: first one with all rows, then those that have what is new since the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_gr.checkpoint.storage import Storage
from lightning_gr.embeddings.dynamic.table_parts import TableHeader, TablePart, joint_header, table_parts

Folder = str | Path | Storage
Folders = Folder | Sequence[Folder]
"""A collection's folder, or those of a chain of saves: all rows first, the newest last."""


@dataclass(frozen=True)
class Link:
    """A table in one save.

    Args:
        header: what its files say together.
        parts: its files, one of each process that saved it.
    """

    header: TableHeader
    parts: Sequence[TablePart]

    @property
    def removed(self) -> Tensor:
        """Ids that are there no more since the save before."""
        return torch.cat([part.removed for part in self.parts])


def storages(folders: Folders) -> list[Storage]:
    """The chain's folders; one of them is a chain too."""
    chain = [folders] if isinstance(folders, str | Path | Storage) else list(folders)
    assert chain, "no folders"
    return [Storage(folder) for folder in chain]


def links_of(chain: Sequence[Storage], name: str) -> list[Link]:
    """A table in each save of a chain.

    Raises:
        ValueError: a file is missing or torn, or a save does not follow the one before.
    """
    links: list[Link] = []
    for folder in chain:
        parts = table_parts(folder / name, "part")
        link = Link(joint_header(parts), parts)
        since, path = link.header.touched_since, parts[0].path
        if not links and since is not None:
            raise ValueError(
                f"{path}: has only what is new since step {since}; give the save before it too, beginning with one "
                "that has all rows"
            )
        if links and since != links[-1].header.next_step:
            has = "all rows" if since is None else f"what is new since step {since}"
            raise ValueError(
                f"{path}: has {has}, and the save before it ends before step {links[-1].header.next_step}; use another "
                "checkpoint"
            )
        if links and (setting := _difference(links[-1].header, link.header)):
            raise ValueError(
                f"{path}: saved with {setting}={getattr(link.header, setting)}, the one before with "
                f"{getattr(links[-1].header, setting)}; use another checkpoint"
            )
        links.append(link)
    return links


def _difference(old: TableHeader, new: TableHeader) -> str:
    """The first setting that two saves do not share; clocks and the number of processes may differ."""
    for field in dataclasses.fields(TableHeader):
        may_differ = field.name in ("next_step", "time", "world_size", "touched_since", "budget")
        if not may_differ and getattr(old, field.name) != getattr(new, field.name):
            return field.name
    return ""
