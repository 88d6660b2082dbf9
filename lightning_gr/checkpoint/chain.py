"""A chain of checkpoints as one: the newest with all rows of its dynamic tables, so that those before can go.

Shape suffixes: N rows, V virtual shards.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gr.checkpoint.manifest import Manifest
from lightning_gr.checkpoint.reader import META_FILENAME, TABLES_FOLDER, CheckpointReader
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.checkpoint.writer import CheckpointWriter

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.table_parts import Kind, TableHeader

_COPY_BYTES = 8 << 20


def compact(reader: CheckpointReader, out: Storage) -> Manifest:
    """Writes a checkpoint that needs no other one; a table is in memory at a time.

    Args:
        reader: of the chain's end.
        out: the directory to make.

    Raises:
        FileExistsError: something is there.
        ValueError: a file is damaged; every checksum is verified before.
    """
    if out.location.startswith(f"{reader.storage.location}/"):
        raise ValueError(f"{out}: lies inside the checkpoint; choose another place")
    reader.verify()
    if out.names():
        raise FileExistsError(f"{out}: is there already; choose another name")
    writer = CheckpointWriter(out)
    try:
        files: dict[str, FileSum] = {}
        for name in reader.manifest.files:
            if name != META_FILENAME and not name.startswith(f"{TABLES_FOLDER}/"):
                files[name] = _copied(reader.storage, name, writer.where)
        for collection, folders in reader.collections().items():
            files |= _merged(folders, writer.where, f"{TABLES_FOLDER}/{collection}")
        manifest = reader.manifest
        return writer.commit(
            reader.storage.read_bytes(META_FILENAME),
            files,
            step=manifest.step,
            epoch=manifest.epoch,
            world_size=manifest.world_size,
            attempt=manifest.attempt,
        )
    except BaseException:
        writer.give_up()
        raise


def _copied(source: Storage, name: str, to: Storage) -> FileSum:
    buffer = memoryview(bytearray(_COPY_BYTES))
    with source.open(name) as file, to.create(name) as copy:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            copy.write(buffer[:count])
    return copy.sum


def _merged(folders: list[Storage], out: Storage, prefix: str) -> dict[str, FileSum]:
    """Files of a collection, one a table and kind."""
    from lightning_gr.embeddings.dynamic.table_chain import links_of
    from lightning_gr.embeddings.dynamic.table_files import read_columns, table_names
    from lightning_gr.embeddings.dynamic.table_parts import REMOVED, joint_header, table_parts

    files: dict[str, FileSum] = {}
    for name in table_names(folders):
        newest = links_of(folders, name)[-1]
        header = dataclasses.replace(newest.header, world_size=1, touched_since=None)
        names = [column for column in newest.parts[0].names if column != REMOVED]
        columns = read_columns(folders, name, names)
        place = f"{prefix}/{name}"
        files |= _write(out, place, "part", header, columns, _shards_of(name, header, columns["ids"]))
        waiting = table_parts(folders[-1] / name, "waiting", may_lack=True)
        if waiting:
            header = dataclasses.replace(joint_header(waiting), world_size=1, touched_since=None)
            every = torch.ones(header.virtual_shards, dtype=torch.bool)
            shards_N = torch.cat([part.shards(part.ranges(every)) for part in waiting])
            columns = {x: torch.cat([part.read(x) for part in waiting]) for x in waiting[0].names}
            files |= _write(out, place, "waiting", header, columns, shards_N)
    return files


def _shards_of(name: str, header: TableHeader, ids_N: Tensor) -> Tensor:
    from lightning_gr.embeddings.dynamic.admission import salts_of
    from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
    from lightning_gr.embeddings.dynamic.table_parts import BUCKET

    if name.endswith(BUCKET):
        return (ids_N // header.buckets_per_group) << (header.shard_bits - header.group_bits)
    return top_bits(key_hash(ids_N, salts_of([name])[0]), header.shard_bits)


def _write(
    out: Storage, place: str, kind: Kind, header: TableHeader, columns: dict[str, Tensor], shards_N: Tensor
) -> dict[str, FileSum]:
    """Rows by virtual shard; within one they keep their order."""
    from lightning_gr.embeddings.dynamic.safetensors_stream import Column
    from lightning_gr.embeddings.dynamic.table_parts import file_name, write_part

    order_N = shards_N.argsort(stable=True)
    ends_V = torch.bincount(shards_N, minlength=header.virtual_shards).cumsum(0)
    own = [Column.of(name, x[order_N]) for name, x in columns.items()]
    file = file_name(kind, 0, 1)
    return {f"{place}/{file}": write_part(out / place, file, header, own, ends_V)}
