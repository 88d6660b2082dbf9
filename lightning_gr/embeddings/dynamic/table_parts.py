"""One saved file of a dynamic table: its header, its rows by virtual shard, and which files belong together.

Shape suffixes: N rows, V virtual shards, V1 virtual shards + 1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.embeddings.dynamic.safetensors_stream import Column, Ranges, SafetensorsFile, write_safetensors

BUCKET = "#bucket"
"""Ends the name of the rows that a table's keys share."""
OFFSETS = "shard_offsets"
"""The tensor that says where each virtual shard's rows begin."""
REMOVED = "removed"
"""The tensor with the ids that are there no more, where a file has only what is new."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.float32}
"""Of saved values by a table's precision."""

Kind = Literal["part", "waiting"]
"""Of files: rows, and keys that wait for admission."""

_FORMAT = "lightning-gr dynamic table 1"
_FILE = re.compile(r"(part|waiting)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class TableHeader:
    """What a file says of its table.

    Args:
        table: its name.
        dim: width of a row.
        optimizer: name of its optimiser.
        state_width: float32 numbers of optimiser state of a row.
        precision: of stored values; those of `mixed` are saved in float32, with a mask of the rows that are in it.
        virtual_shards: into how many shards hash bits cut its keys.
        group_bits: how many of these bits cut it into groups, each with its share of the budget.
        buckets_per_group: shared rows of each group; 0 of a table without.
        budget: most rows on all processes; None without a limit.
        counter: `exact` or `sketch` counters of keys that wait for admission; empty without.
        next_step: number of the step that follows.
        time: the data's clock in seconds.
        seed: of the run.
        world_size: how many processes saved it.
        touched_since: the file has only what is new since before this step; None where it has all.
    """

    table: str
    dim: int
    optimizer: str
    state_width: int
    precision: str
    virtual_shards: int
    group_bits: int
    buckets_per_group: int
    budget: int | None
    counter: str
    next_step: int
    time: int
    seed: int
    world_size: int
    touched_since: int | None = None

    @property
    def shard_bits(self) -> int:
        """Hash bits that number the virtual shards."""
        return self.virtual_shards.bit_length() - 1

    def to_metadata(self) -> dict[str, str]:
        """The text that a file has."""
        fields = {name: "" if x is None else str(x) for name, x in dataclasses.asdict(self).items()}
        return {"format": _FORMAT, **fields}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> TableHeader:
        """The reverse.

        Raises:
            ValueError: it is of something else.
        """
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, expected {_FORMAT!r}")
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if (text := metadata.get(field.name)) is None:
                if field.default is None:
                    continue  # written before there was such a field
                raise ValueError(f"no {field.name}")
            has_none = field.type == "int | None" and not text
            values[field.name] = None if has_none else text if field.type == "str" else int(text)
        if values["precision"] not in DTYPES:
            raise ValueError(f"precision {values['precision']!r}")
        return cls(**values)


class TablePart:
    """One file that was looked through, and is opened again for each reading.

    Args:
        folder: of the table.
        name: of the file.

    Attributes:
        header: what it says of its table.
        offsets_V1: where each virtual shard's rows begin.
        names: of what it has of rows.

    Raises:
        ValueError: it is torn or something else.
    """

    def __init__(self, folder: Storage, name: str) -> None:
        self.folder, self.name, self.path = folder, name, folder.path_of(name)
        try:
            self._file = SafetensorsFile(folder, name)
            self.header = TableHeader.from_metadata(self._file.metadata)
            if OFFSETS not in self._file.names:
                raise ValueError(f"no {OFFSETS}")
            self.offsets_V1: Tensor = self._file.read(OFFSETS)
            self._check()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: torn, or no saved table ({error}); use another checkpoint") from error

    def _check(self) -> None:
        header, offsets_V1 = self.header, self.offsets_V1
        if offsets_V1.dtype != torch.int64 or offsets_V1.shape != (header.virtual_shards + 1,):
            raise ValueError(f"{OFFSETS} are not of {header.virtual_shards} virtual shards")
        if int(offsets_V1[0]) != 0 or bool((offsets_V1.diff() < 0).any()):
            raise ValueError(f"{OFFSETS} do not ascend from 0")
        self.names = [name for name in self._file.names if name not in (OFFSETS, REMOVED)]
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.name.startswith("part"):
            wanted = {
                "ids": (torch.int64, ()),
                "values": (DTYPES[header.precision], (header.dim,)),
                "state": (torch.float32, (header.state_width,)),
                **dict.fromkeys(("counts", "last_steps", "last_times"), (torch.int64, ())),
            }
            if header.precision == "mixed":
                wanted["hot"] = (torch.uint8, ())
            if header.touched_since is not None and REMOVED not in self._file.names:
                raise ValueError(f"no {REMOVED}")
            if REMOVED in self._file.names and self._file.dtype(REMOVED) != torch.int64:
                raise ValueError(f"{REMOVED} are {self._file.dtype(REMOVED)}")
        for name in {*self.names, *wanted}:
            if name not in self.names:
                raise ValueError(f"no {name}")
            found = self._file.dtype(name), self._file.shape(name)
            dtype, shape = wanted.get(name, (found[0], found[1][1:]))
            if found != (dtype, (self.num_rows, *shape)):
                raise ValueError(f"{name} is {found}, expected {(dtype, (self.num_rows, *shape))}")

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return int(self.offsets_V1[-1])

    def ranges(self, owned_V: Tensor) -> Ranges:
        """Where the rows of the flagged virtual shards are."""
        edges_V1 = torch.nn.functional.pad(owned_V.to(torch.int8), (1, 1)).diff()
        begins, ends = (self.offsets_V1[edges_V1 == edge].tolist() for edge in (1, -1))
        return [(begin, end) for begin, end in zip(begins, ends, strict=True) if end > begin]

    def shards(self, ranges: Ranges) -> Tensor:
        """The virtual shard of each row, int64."""
        shards_N = torch.arange(self.header.virtual_shards).repeat_interleave(self.offsets_V1.diff())
        return torch.cat([shards_N[:0], *(shards_N[start:stop] for start, stop in ranges)])

    def read(self, name: str, ranges: Ranges | None = None) -> Tensor:
        """Something of the rows of some ranges, or of all.

        Raises:
            ValueError: the file is torn.
        """
        try:
            return self._file.read(name, ranges)
        except (OSError, ValueError) as error:
            raise self._torn(error) from error

    def pieces(self, name: str, ranges: Ranges | None = None) -> Iterator[Tensor]:
        """As `read`, a few rows at a time, in memory that the next ones overwrite."""
        try:
            yield from self._file.pieces(name, ranges)
        except (OSError, ValueError) as error:
            raise self._torn(error) from error

    def _torn(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: cannot be read ({error}); use another checkpoint")

    def columns(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of what it has of all rows."""
        return {name: self.read(name) for name in names}

    @property
    def removed(self) -> Tensor:
        """Ids that are there no more, where the file has only what is new."""
        return self.read(REMOVED) if REMOVED in self._file.names else torch.zeros(0, dtype=torch.int64)


def file_name(kind: Kind, rank: int, world_size: int) -> str:
    """Of a process's file."""
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def files_of(folder: Storage, kind: Kind) -> dict[tuple[int, int], str]:
    """Names of a table's files by process and number of processes."""
    found = [(_FILE.fullmatch(name), name) for name in folder.names()]
    return {(int(m[2]), int(m[3])): name for m, name in found if m is not None and m[1] == kind}


def table_parts(folder: Storage, kind: Kind, *, may_lack: bool = False) -> list[TablePart]:
    """The files of a table, one of each process that saved it.

    Raises:
        ValueError: one is missing or torn.
    """
    files = files_of(folder, kind)
    worlds = sorted({world for _, world in files})
    if not files and may_lack:
        return []
    if len(worlds) != 1:
        there = f"files of {' and of '.join(map(str, worlds))} processes" if worlds else "no files"
        raise ValueError(f"{folder}: {there} ({kind}-...); use another checkpoint")
    world = worlds[0]
    if missing := [rank for rank in range(world) if (rank, world) not in files]:
        raise ValueError(f"{folder}: {kind}-{missing[0]:05d}-of-{world:05d} is missing; use another checkpoint")
    parts = [TablePart(folder, files[rank, world]) for rank in range(world)]
    for part in parts:
        if (part.header.table, part.header.world_size) != (folder.name, world):
            raise ValueError(
                f"{part.path}: holds table {part.header.table} of {part.header.world_size} processes; use another "
                "checkpoint"
            )
    return parts


def joint_header(parts: Sequence[TablePart]) -> TableHeader:
    """What all parts say, with the latest of their clocks, since a process may have heard of later data."""
    first = parts[0].header
    for part in parts:
        if dataclasses.replace(part.header, time=first.time) != first:
            raise ValueError(f"{part.path}: from another save than {parts[0].name}; use another checkpoint")
    return dataclasses.replace(first, time=max(part.header.time for part in parts))


def write_part(folder: Storage, name: str, header: TableHeader, columns: Sequence[Column], ends_V: Tensor) -> FileSum:
    """Writes a file.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    offsets_V1 = torch.nn.functional.pad(ends_V, (1, 0))
    return write_safetensors(folder, name, header.to_metadata(), [Column.of(OFFSETS, offsets_V1), *columns])
