"""Saved dynamic tables: a folder a collection, in it a folder a table, in that a safetensors file a process.

``item/part-00000-of-00002.safetensors`` has the rows that process 0 of 2 held, sorted by virtual shard and then by id;
``shard_offsets`` says where each virtual shard's begin, so that any number of processes reads just what it owns.
``item/waiting-00000-of-00002.safetensors`` has in the same way what waits for admission, and ``item#bucket`` the rows
that keys without one share. A save of what is new has the rows that were used since the one before, and in ``removed``
the ids that went. Here is what one process reads of them; engines save in `table_snapshot` and load in `table_loading`.

Shape suffixes: N rows, D width, S width of optimiser state, V virtual shards, K new keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gr.checkpoint.storage import Storage
from lightning_gr.embeddings.dynamic.admission import salts_of
from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
from lightning_gr.embeddings.dynamic.keyed_rows import KeyRows
from lightning_gr.embeddings.dynamic.row_storage import Metadata
from lightning_gr.embeddings.dynamic.safetensors_stream import Column
from lightning_gr.embeddings.dynamic.table_chain import Folder, Folders, links_of, storages
from lightning_gr.embeddings.dynamic.table_loading import load_static_rows, load_tables
from lightning_gr.embeddings.dynamic.table_loading import table_names as _table_names
from lightning_gr.embeddings.dynamic.table_parts import (
    BUCKET,
    TableHeader,
    TablePart,
    table_parts,
    write_part,
)
from lightning_gr.embeddings.dynamic.table_snapshot import TablesSnapshot, begin_save, save_tables

__all__ = [
    "FOLDER",
    "TablesSnapshot",
    "begin_save",
    "find_tables",
    "load_static_rows",
    "load_tables",
    "num_waiting",
    "read_columns",
    "read_header",
    "read_table",
    "save_tables",
    "table_names",
    "upsert_rows",
]

FOLDER = "dynamic"
"""Where a checkpoint directory has its collections."""


def find_tables(checkpoint: Folder) -> dict[str, Storage]:
    """Folders of the dynamic collections in a checkpoint directory, by the collections' module paths."""
    folder = Storage(checkpoint) / FOLDER
    return {name: folder / name for name in folder.names() if folder.is_directory(name)}


def table_names(folders: Folders) -> list[str]:
    """Tables in a collection's folder, ``name#bucket`` for shared rows.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return _table_names(storages(folders)[-1])


def read_header(folders: Folders, name: str) -> tuple[TableHeader, int]:
    """What the files say of a table, and how many rows they have.

    Args:
        folders: of the collection, or of a chain of saves.
        name: of the table.

    Raises:
        ValueError: a file is missing or torn, or a save does not follow the one before.
    """
    links = links_of(storages(folders), name)
    if len(links) == 1:
        return links[0].header, sum(part.num_rows for part in links[0].parts)
    return links[-1].header, len(read_columns(folders, name, ["ids"])["ids"])


def read_columns(
    folders: Folders, name: str, columns: Sequence[str], touched_since: int | None = None
) -> dict[str, Tensor]:
    """Some of what the files have of a table's rows, in the order of ids, whoever saved them.

    Args:
        folders: of the collection, or of a chain of saves.
        name: of the table.
        columns: `ids`, `values`, `state`, `counts`, `last_steps`, `last_times`, `scores`, `hot`.
        touched_since: only rows that were used in this step or later.

    Raises:
        ValueError: a file is missing or torn, or a save does not follow the one before.
    """
    links = links_of(storages(folders), name)
    read: dict[str, list[Tensor]] = {column: [] for column in {"ids", *columns}}
    newer = torch.zeros(0, dtype=torch.int64)  # ids that later saves have, or know to be gone
    for link in reversed(links):
        for part in link.parts:
            ids_N = part.read("ids")
            keeps_N = ~torch.isin(ids_N, newer)
            if touched_since is not None:
                keeps_N &= part.read("last_steps") >= touched_since
            read["ids"].append(ids_N[keeps_N])
            for column in read.keys() - {"ids"}:
                read[column].append(_chosen(part, column, keeps_N))
        if link is not links[0]:
            newer = torch.cat([newer, link.removed, *(part.read("ids") for part in link.parts)])
    joint = {column: torch.cat(tensors) for column, tensors in read.items()}
    order_N = joint["ids"].argsort()
    return {column: joint[column][order_N] for column in columns}


def _chosen(part: TablePart, column: str, keeps_N: Tensor) -> Tensor:
    if bool(keeps_N.all()):
        return part.read(column)
    chosen, start = [part.read(column, [])], 0
    for piece in part.pieces(column):
        chosen.append(piece[keeps_N[start : start + len(piece)]])
        start += len(piece)
    return torch.cat(chosen)


def read_table(folders: Folders, name: str, touched_since: int | None = None) -> tuple[KeyRows, TableHeader]:
    """All rows of a table in the order of ids, whoever saved them.

    Args:
        folders: of the collection, or of a chain of saves.
        name: of the table.
        touched_since: only rows that were used in this step or later.

    Raises:
        ValueError: a file is missing or torn, or a save does not follow the one before.
    """
    newest = links_of(storages(folders), name)[-1]
    return _key_rows(read_columns(folders, name, newest.parts[0].names, touched_since)), newest.header


def num_waiting(folders: Folders, name: str) -> int | None:
    """How many keys of a table wait for admission; None where nobody counts them one by one."""
    parts = table_parts(storages(folders)[-1] / name, "waiting", may_lack=True)
    return sum(part.num_rows for part in parts) if parts and parts[0].header.counter == "exact" else None


def upsert_rows(folder: Folder, name: str, ids_K: Tensor, values_KD: Tensor) -> int:
    """Rewrites a table's files, one after the other, with these values, as `DynamicEngine.upsert` does to a table.

    Rows that are there keep optimiser state and counters; new ones begin with zeros. All of them count as used now, and
    none of them waits for admission any more. A budget is applied where the table is loaded.

    Args:
        folder: of the collection, with all rows; a copy, since a failure leaves some files rewritten.
        name: of the table.
        ids_K: int64, distinct.
        values_KD: float32, which a 16-bit table rounds to the nearest.

    Returns:
        How many of them are new.

    Raises:
        ValueError: a file is missing or torn, has not all rows, or the table has shared rows.
    """
    if name.endswith(BUCKET):
        raise ValueError(f"table {name}: rows that keys share are numbered by the table; choose another")
    (link,) = links_of([Storage(folder)], name)
    parts, header = link.parts, link.header
    if values_KD.shape != (len(ids_K), header.dim):
        raise ValueError(f"table {name}: expected {(len(ids_K), header.dim)} values, got {tuple(values_KD.shape)}")
    order_K = ids_K.argsort()
    ids_K, values_KD = ids_K[order_K], values_KD[order_K]
    is_new_K = torch.ones_like(ids_K, dtype=torch.bool)
    for part in reversed(parts):  # the first one takes what no other has
        rows = part.columns(part.names)
        place_N = torch.searchsorted(ids_K, rows["ids"]).clamp(max=max(len(ids_K) - 1, 0))
        has_N = ids_K[place_N] == rows["ids"] if len(ids_K) else torch.zeros_like(rows["ids"], dtype=torch.bool)
        is_new_K[place_N[has_N]] = False
        if part is parts[0]:
            new = int(is_new_K.sum())
            rows = {x: torch.cat([rows[x], rows[x].new_zeros(new, *rows[x].shape[1:])]) for x in part.names}
            rows["ids"][len(rows["ids"]) - new :] = ids_K[is_new_K]
            place_N = torch.cat([place_N, is_new_K.nonzero()[:, 0]])
            has_N = torch.cat([has_N, has_N.new_ones(new)])
        if not bool(has_N.any()):
            continue
        values_ND = values_KD[place_N[has_N]]
        if header.precision == "mixed":
            values_ND = torch.where(rows["hot"][has_N, None] > 0, values_ND, values_ND.half().float())
        rows["values"][has_N] = values_ND.to(rows["values"].dtype)
        rows["last_steps"][has_N] = header.next_step
        rows["last_times"][has_N] = rows["last_times"][has_N].clamp(min=header.time)
        shards_N = top_bits(key_hash(rows["ids"], salts_of([name])[0]), header.shard_bits)
        order_N = rows["ids"].argsort()
        order_N = order_N[shards_N[order_N].argsort(stable=True)]
        rows = {column: x[order_N] for column, x in rows.items()}
        _rewrite(part, rows, torch.bincount(shards_N, minlength=header.virtual_shards).cumsum(0))
    for part in table_parts(Storage(folder) / name, "waiting", may_lack=True):
        if part.header.counter == "exact":
            rows = part.columns(part.names)
            stays_N = ~torch.isin(rows["ids"], ids_K)
            ends_V = torch.nn.functional.pad(stays_N.cumsum(0), (1, 0))[part.offsets_V1[1:]]
            _rewrite(part, {column: x[stays_N] for column, x in rows.items()}, ends_V)
    return int(is_new_K.sum())


def _rewrite(part: TablePart, rows: dict[str, Tensor], ends_V: Tensor) -> None:
    write_part(part.folder, part.name, part.header, [Column.of(name, x) for name, x in rows.items()], ends_V)


def _key_rows(columns: dict[str, Tensor]) -> KeyRows:
    metadata = Metadata(*(columns.get(name) for name in Metadata._fields))  # type: ignore[arg-type]
    hot_N = columns["hot"] > 0 if "hot" in columns else None
    return KeyRows(columns["ids"], columns["values"].float(), columns["state"], metadata, hot_N)
