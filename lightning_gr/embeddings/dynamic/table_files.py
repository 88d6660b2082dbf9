"""Saved dynamic tables: a folder a collection, in it a folder a table, in that a safetensors file a process.

``item/part-00000-of-00002.safetensors`` has the rows that process 0 of 2 held, sorted by virtual shard and then by id;
``shard_offsets`` says where each virtual shard's begin, so that any number of processes reads just what it owns.
``item/waiting-00000-of-00002.safetensors`` has in the same way what waits for admission, and ``item#bucket`` the rows
that keys without one share.

Shape suffixes: N rows, D width, S width of optimiser state, V virtual shards, V1 virtual shards + 1, K new keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.embeddings.dynamic.admission import salts_of
from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
from lightning_gr.embeddings.dynamic.keyed_rows import KeyRows
from lightning_gr.embeddings.dynamic.row_storage import Metadata
from lightning_gr.embeddings.dynamic.table_parts import (
    BUCKET,
    DTYPES,
    Kind,
    TableHeader,
    files_of,
    joint_header,
    table_parts,
    write_part,
)

FOLDER = "dynamic"
"""Where a checkpoint directory has its collections."""


# ---- for tools: one process reads all ------------------------------------------------------------------------------


def find_tables(checkpoint: Path) -> dict[str, Path]:
    """Folders of the dynamic collections in a checkpoint directory, by the collections' module paths."""
    folder = checkpoint / FOLDER
    return {x.name: x for x in sorted(folder.iterdir()) if x.is_dir()} if folder.is_dir() else {}


def table_names(folder: Path) -> list[str]:
    """Tables in a collection's folder, ``name#bucket`` for shared rows.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a checkpoint with dynamic tables")
    return sorted(x.name for x in folder.iterdir() if x.is_dir())


def read_header(folder: Path, name: str) -> tuple[TableHeader, int]:
    """What the files say of a table, and how many rows they have.

    Raises:
        ValueError: a file is missing or torn.
    """
    parts = table_parts(folder / name, "part")
    return joint_header(parts), sum(part.num_rows for part in parts)


def read_columns(
    folder: Path, name: str, columns: Sequence[str], touched_since: int | None = None
) -> dict[str, Tensor]:
    """Some of what the files have of a table's rows, in the order of ids, whoever saved them.

    Args:
        folder: of the collection.
        name: of the table.
        columns: `ids`, `values`, `state`, `counts`, `last_steps`, `last_times`, `scores`, `hot`.
        touched_since: only rows that were used in this step or later.

    Raises:
        ValueError: a file is missing or torn.
    """
    parts = table_parts(folder / name, "part")
    read: dict[str, list[Tensor]] = {column: [] for column in {"ids", *columns}}
    for part in parts:
        for piece in part.read([*{"last_steps", *read}]):
            recent_N = None if touched_since is None else piece["last_steps"] >= touched_since
            for column, tensors in read.items():
                tensors.append(piece[column] if recent_N is None else piece[column][recent_N])
    joint = {x: torch.cat(tensors) if tensors else parts[0].columns([x])[x] for x, tensors in read.items()}
    order_N = joint["ids"].argsort()
    return {column: joint[column][order_N] for column in columns}


def read_table(folder: Path, name: str, touched_since: int | None = None) -> tuple[KeyRows, TableHeader]:
    """All rows of a table in the order of ids, whoever saved them.

    Args:
        folder: of the collection.
        name: of the table.
        touched_since: only rows that were used in this step or later.

    Raises:
        ValueError: a file is missing or torn.
    """
    parts = table_parts(folder / name, "part")
    return _key_rows(read_columns(folder, name, parts[0].names, touched_since)), joint_header(parts)


def num_waiting(folder: Path, name: str) -> int | None:
    """How many keys of a table wait for admission; None where nobody counts them one by one."""
    parts = table_parts(folder / name, "waiting", may_lack=True)
    return sum(part.num_rows for part in parts) if parts and parts[0].header.counter == "exact" else None


def upsert_rows(folder: Path, name: str, ids_K: Tensor, values_KD: Tensor) -> int:
    """Rewrites a table's files, one after the other, with these values, as `DynamicEngine.upsert` does to a table.

    Rows that are there keep optimiser state and counters; new ones begin with zeros. All of them count as used now, and
    none of them waits for admission any more. A budget is applied where the table is loaded.

    Args:
        folder: of the collection; a copy, since a failure leaves some files rewritten.
        name: of the table.
        ids_K: int64, distinct.
        values_KD: float32, which a 16-bit table rounds to the nearest.

    Returns:
        How many of them are new.

    Raises:
        ValueError: a file is missing or torn, or the table has shared rows.
    """
    if name.endswith(BUCKET):
        raise ValueError(f"table {name}: rows that keys share are numbered by the table; choose another")
    parts = table_parts(folder / name, "part")
    header = joint_header(parts)
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
        write_part(part.path, part.header, rows, torch.bincount(shards_N, minlength=header.virtual_shards).cumsum(0))
    for part in table_parts(folder / name, "waiting", may_lack=True):
        if part.header.counter == "exact":
            rows = part.columns(part.names)
            stays_N = ~torch.isin(rows["ids"], ids_K)
            ends_V = torch.nn.functional.pad(stays_N.cumsum(0), (1, 0))[part.offsets_V1[1:]]
            write_part(part.path, part.header, {column: x[stays_N] for column, x in rows.items()}, ends_V)
    return int(is_new_K.sum())


# ---- an engine saves and loads -------------------------------------------------------------------------------------


def save_tables(folder: Path, engine: DynamicEngine) -> None:
    """Writes all that an engine holds between two steps; every process calls it, and returns when all have written.

    Of several groups with a full set of tables the first one writes.

    Args:
        folder: of the collection; without files of an earlier save.
        engine: its tables.

    Raises:
        ValueError: files of another number of processes are there, or another process failed.
    """
    failure = None
    try:
        for p, table in enumerate(engine.tables if engine.is_first_replica else ()):
            for k, name in enumerate(table.key_names):
                _check_world(folder / name, engine.world_size)
                header = _header(engine, p, k)
                rows, offsets = table.rows_of(k)
                path = _path(folder / name, "part", engine)
                write_part(path, header, _columns(rows, header), torch.tensor(offsets[1:]))
                if k < len(table.configs) and (waiting := table.counter_state(k)) is not None:
                    state, offsets = waiting
                    write_part(_path(folder / name, "waiting", engine), header, state, torch.tensor(offsets[1:]))
    except Exception as error:  # the others must hear of it
        failure = error
    _agree(engine, failure, f"{folder}: could not be written")


def load_tables(folder: Path, engine: DynamicEngine, *, values_only: bool = False) -> None:
    """Puts what was saved, by however many processes, into an engine; every process calls it, between two steps.

    Rows that do not fit into a budget which was lowered since are evicted. After an error the engine is as it was.

    Args:
        folder: of the collection.
        engine: with the same tables; what they hold is dropped. New keys' first values go on as they were drawn there.
        values_only: takes keys and values alone; optimiser state, counters and clocks begin anew.

    Raises:
        ValueError: a file is missing or torn, the tables are not the same, or another process failed.
        MemoryError: there is no room; until all is read, the engine keeps its own rows too.
        RuntimeError: a step is under way.
    """
    engine.require_idle("load_tables")
    failure = None
    try:
        loaded, step, time, seed = _load(folder, engine, values_only)
    except Exception as error:  # the others must hear of it
        failure = error
    _agree(engine, failure, f"{folder}: could not be read")
    engine.tables[:] = loaded
    if values_only:
        step, time, seed = 0, 0, engine.seed
    engine.next_step, engine.time, engine.seed = step, time, seed


def _load(folder: Path, engine: DynamicEngine, values_only: bool) -> tuple[list[DynamicTable], int, int, int]:
    """New tables with what the files have, the clocks, and the seed."""
    saved, wanted = set(table_names(folder)), {name for table in engine.tables for name in table.key_names}
    if saved != wanted:
        name = min(saved ^ wanted)
        said = f"has table {name}, and the model has not" if name in saved else f"lacks table {name} of the model"
        raise ValueError(f"{folder}: {said}; use the tables it was saved with: {', '.join(sorted(saved))}")
    files = {name: table_parts(folder / name, "part") for name in wanted}
    headers = {name: joint_header(parts) for name, parts in files.items()}
    clocks = {(header.next_step, header.time) for header in headers.values()}
    if len(clocks) > 1:
        raise ValueError(f"{folder}: its tables were saved after {sorted(x for x, _ in clocks)} steps; use another")
    (step, time) = clocks.pop()
    seed = next(iter(headers.values())).seed
    waiting = {name: table_parts(folder / name, "waiting", may_lack=not headers[name].counter) for name in wanted}
    for p, table in enumerate(engine.tables):
        for k, name in enumerate(table.key_names):
            _check_fits(folder / name, headers[name], _header(engine, p, k), values_only)
    tables = []
    for p, old in enumerate(engine.tables):
        table = DynamicTable(
            configs=old.configs,
            optimizer=old.optimizer,
            seed=engine.seed if values_only else seed,
            virtual_shards=engine.virtual_shards,
            device=engine.device,
            encode_ids=engine.encode_ids,
        )
        for k, name in enumerate(table.key_names):
            owned_V = engine.owned_shards(engine.logical.index((p, _local(table, k))))
            for part in files[name]:
                for piece in part.read(part.names, owned_V):
                    if values_only:
                        piece["state"] = torch.zeros(len(piece["ids"]), table.storage.state_width)
                    _add(table, k, piece, part.path)
            for part in () if values_only else waiting[name]:
                for piece in part.read(part.names, owned_V):
                    table.load_counter_state(k, {column: piece[column] for column in part.names})
        for local in range(len(table.configs)):
            table.trim(local, step=step + 1, time=time)  # no row is in flight, even where it was set by hand
        if values_only:
            table.forget_history()
        tables.append(table)
    return tables, step, time, seed


def _add(table: DynamicTable, k: int, piece: dict[str, Tensor], path: Path) -> None:
    rows, shards_N = _key_rows(piece), piece["shards"]
    # Differences of ids may not fit into 64 bits.
    ascend_N = (rows.ids_N[1:] > rows.ids_N[:-1]) | (shards_N[1:] > shards_N[:-1])
    if not torch.equal(table.shards(k, rows.ids_N), shards_N) or not bool(ascend_N.all()):
        raise ValueError(f"{path}: its ids are not in the order of virtual shards and ids; use another checkpoint")
    storage = table.storage
    if storage.read_metadata(rows.ids_N[:0]).scores is None:
        rows.metadata = rows.metadata._replace(scores=None)
    if table.configs[0].precision != "mixed":
        rows.hot_N = None
    elif rows.hot_N is None:
        rows.hot_N = rows.metadata.counts >= storage.hot_count
    table.add_rows(k, rows)


def _agree(engine: DynamicEngine, failure: Exception | None, what: str) -> None:
    """Waits for all processes; where one has failed, all fail, so that none goes on alone."""
    own, none = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = none if failure is None else own
    for group in (engine.group, engine.replicas):
        if group is not None:
            first_failed = torch.tensor(first, device=engine.device)
            dist.all_reduce(first_failed, op=dist.ReduceOp.MIN, group=group)
            first = int(first_failed)
    if failure is not None:
        raise failure
    if first < none:
        raise ValueError(f"{what} by process {first}; its own message says why")


def _path(folder: Path, kind: Kind, engine: DynamicEngine) -> Path:
    return folder / f"{kind}-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"


def _check_world(folder: Path, world_size: int) -> None:
    kinds: tuple[Kind, ...] = ("part", "waiting")
    for kind in kinds:
        for (_, world), path in files_of(folder, kind).items():
            if world != world_size:
                raise ValueError(f"{path}: of an earlier save by {world} processes; save to an empty folder")


def _local(table: DynamicTable, k: int) -> int:
    """The logical table of keys, whose shared rows may be meant."""
    return k if k < len(table.configs) else table.names.index(table.key_names[k].removesuffix(BUCKET))


def _header(engine: DynamicEngine, p: int, k: int) -> TableHeader:
    table = engine.tables[p]
    local = _local(table, k)
    policy = table.configs[local].policy
    return TableHeader(
        table=table.key_names[k],
        dim=table.dim,
        optimizer=table.optimizer.name,
        state_width=table.optimizer.state_width(table.dim),
        precision=table.configs[local].precision,
        virtual_shards=engine.virtual_shards,
        group_bits=table.group_bits[local],
        buckets_per_group=policy.buckets_per_group if policy.on_missing == "bucket" else 0,
        budget=table.budgets[local],
        counter=policy.admission.counter if k < len(table.configs) and policy.admission.min_count > 1 else "",
        next_step=engine.next_step,
        time=engine.time,
        seed=engine.seed,
        world_size=engine.world_size,
    )


def _check_fits(folder: Path, saved: TableHeader, wanted: TableHeader, values_only: bool) -> None:
    names = ["dim", "virtual_shards"] + ["optimizer", "state_width"] * (not values_only)
    if saved.table.endswith(BUCKET):
        names += ["group_bits", "buckets_per_group"]  # shared rows are numbered by them
    if saved.counter and wanted.counter and not values_only:
        names.append("counter")
    for name in names:
        have, want = getattr(saved, name), getattr(wanted, name)
        if have != want:
            why = "; its budget decides that" if name == "group_bits" else ""
            raise ValueError(
                f"{folder}: saved with {name}={have}, this run has {want}{why}; use the setting it was saved with"
            )


def _columns(rows: KeyRows, header: TableHeader) -> dict[str, Tensor]:
    metadata = {name: x.clone() for name, x in rows.metadata._asdict().items() if x is not None}
    hot = {} if rows.hot_N is None else {"hot": rows.hot_N.to(torch.uint8)}
    values_ND = rows.values_ND.to(DTYPES[header.precision][1])
    return {"ids": rows.ids_N, "values": values_ND, "state": rows.state_NS, **metadata, **hot}


def _key_rows(columns: dict[str, Tensor]) -> KeyRows:
    metadata = Metadata(*(columns.get(name) for name in Metadata._fields))  # type: ignore[arg-type]
    hot_N = columns["hot"] > 0 if "hot" in columns else None
    return KeyRows(columns["ids"], columns["values"].float(), columns["state"], metadata, hot_N)
