"""One saved file of a dynamic table: its header, its rows by virtual shard, and which files belong together.

Shape suffixes: N rows, V virtual shards, V1 virtual shards + 1.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

BUCKET = "#bucket"
"""Ends the name of the rows that a table's keys share."""
OFFSETS = "shard_offsets"
"""The tensor that says where each virtual shard's rows begin."""
DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
"""Of saved values by a table's precision: safetensors' name and torch's."""
DTYPES["mixed"] = DTYPES["fp32"]

Kind = Literal["part", "waiting"]
"""Of files: rows, and keys that wait for admission."""

_FORMAT = "lightning-gr dynamic table 1"
_FILE = re.compile(r"(part|waiting)-(\d{5})-of-(\d{5})\.safetensors")
_PIECE_ROWS = 1 << 18


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
                raise ValueError(f"no {field.name}")
            has_none = field.name == "budget" and not text
            values[field.name] = None if has_none else text if field.type == "str" else int(text)
        if values["precision"] not in DTYPES:
            raise ValueError(f"precision {values['precision']!r}")
        return cls(**values)


class TablePart:
    """One file that was looked through, and is opened again for each reading.

    Args:
        path: of it.

    Raises:
        ValueError: it is torn or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.header = TableHeader.from_metadata(file.metadata() or {})
                self.offsets_V1: Tensor = file.get_tensor(OFFSETS)
                self._check(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: torn, or no saved table ({error}); use another checkpoint") from error

    def _check(self, file: Any) -> None:
        header, offsets_V1 = self.header, self.offsets_V1
        if offsets_V1.dtype != torch.int64 or offsets_V1.shape != (header.virtual_shards + 1,):
            raise ValueError(f"{OFFSETS} are not of {header.virtual_shards} virtual shards")
        if int(offsets_V1[0]) != 0 or bool((offsets_V1.diff() < 0).any()):
            raise ValueError(f"{OFFSETS} do not ascend from 0")
        self.names = [name for name in file.keys() if name != OFFSETS]  # noqa: SIM118  # it is no dictionary
        wanted: dict[str, tuple[str, list[int]]] = {}
        if self.path.name.startswith("part"):
            wanted = {
                "ids": ("I64", []),
                "values": (DTYPES[header.precision][0], [header.dim]),
                "state": ("F32", [header.state_width]),
                **dict.fromkeys(("counts", "last_steps", "last_times"), ("I64", [])),
            }
            if header.precision == "mixed":
                wanted["hot"] = ("U8", [])
        for name in {*self.names, *wanted}:
            rows = file.get_slice(name)
            dtype, shape = wanted.get(name, (rows.get_dtype(), rows.get_shape()[1:]))
            if (rows.get_dtype(), rows.get_shape()) != (dtype, [self.num_rows, *shape]):
                raise ValueError(
                    f"{name} is {rows.get_dtype()} {rows.get_shape()}, expected {dtype} {[self.num_rows, *shape]}"
                )

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return int(self.offsets_V1[-1])

    def read(self, names: Sequence[str], owned_V: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """Some columns of the rows of the flagged virtual shards, or of all, piece by piece; `shards` numbers these."""
        owned_V = torch.ones(self.header.virtual_shards, dtype=torch.bool) if owned_V is None else owned_V
        edges_V1 = torch.nn.functional.pad(owned_V.to(torch.int8), (1, 1)).diff()
        begins, ends = (self.offsets_V1[edges_V1 == edge].tolist() for edge in (1, -1))
        bounds = [
            (start, min(start + _PIECE_ROWS, end))
            for begin, end in zip(begins, ends, strict=True)
            for start in range(begin, end, _PIECE_ROWS)
        ]
        if not bounds:
            return
        with safe_open(self.path, framework="pt") as file:
            for start, end in bounds:
                piece = {name: file.get_slice(name)[start:end] for name in names}
                piece["shards"] = torch.bucketize(torch.arange(start, end), self.offsets_V1[1:], right=True)
                yield piece

    def columns(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some columns of all rows."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}


def files_of(folder: Path, kind: Kind) -> dict[tuple[int, int], Path]:
    """Files of a table by process and number of processes."""
    found = [(_FILE.fullmatch(x.name), x) for x in folder.iterdir()] if folder.is_dir() else []
    return {(int(m[2]), int(m[3])): path for m, path in found if m is not None and m[1] == kind}


def table_parts(folder: Path, kind: Kind, *, may_lack: bool = False) -> list[TablePart]:
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
    parts = [TablePart(files[rank, world]) for rank in range(world)]
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
            raise ValueError(f"{part.path}: from another save than {parts[0].path.name}; use another checkpoint")
    return dataclasses.replace(first, time=max(part.header.time for part in parts))


def write_part(path: Path, header: TableHeader, columns: dict[str, Tensor], ends_V: Tensor) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.cpu().contiguous() for name, x in columns.items()}
    tensors[OFFSETS] = torch.nn.functional.pad(ends_V, (1, 0))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, header.to_metadata())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
