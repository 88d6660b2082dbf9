"""Loading dynamic tables: what any number of processes saved, into the tables of this one; and rows of static tables.

Shape suffixes: N rows, D width, S width of optimiser state, V virtual shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_gr.checkpoint.storage import Storage
from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.table_chain import Folders, Link, links_of, storages
from lightning_gr.embeddings.dynamic.table_parts import BUCKET, TableHeader, TablePart, table_parts
from lightning_gr.embeddings.dynamic.table_snapshot import agree, header_of, local_table


def table_names(folder: Storage) -> list[str]:
    """Tables in a collection's folder, ``name#bucket`` for shared rows.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not (names := [name for name in folder.names() if folder.is_directory(name)]):
        raise FileNotFoundError(f"{folder}: no such folder; give a checkpoint with dynamic tables")
    return names


def load_tables(
    folders: Folders,
    engine: DynamicEngine,
    *,
    values_only: bool = False,
    confirm: Callable[[], None] | None = None,
) -> None:
    """Puts what was saved, by however many processes, into an engine; every process calls it, between two steps.

    Rows that do not fit into a budget which was lowered since are evicted. After an error the engine is as it was.
    The next save must be one of all rows.

    Args:
        folders: of the collection; or of a chain of saves, one of all rows first, then those of what is new.
        engine: with the same tables; what they hold is dropped. New keys' first values go on as they were drawn there.
        values_only: takes keys and values alone; optimiser state, counters and clocks begin anew.
        confirm: called when all is read and before the engine changes; raises, on all processes alike, where the files
            turn out to be damaged.

    Raises:
        ValueError: a file is missing or torn, the tables are not the same, a save does not follow the one before, or
            another process failed.
        MemoryError: there is no room; until all is read, the engine keeps its own rows too.
        RuntimeError: a step is under way.
    """
    engine.require_idle("load_tables")
    chain, failure = storages(folders), None
    try:
        loaded, step, time, seed = _load(chain, engine, values_only)
    except Exception as error:  # the others must hear of it
        failure = error
    if confirm is not None:
        confirm()
    agree(engine, failure, f"{chain[-1]}: could not be read")
    engine.tables[:] = loaded
    if values_only:
        step, time, seed = 0, 0, engine.seed
    engine.next_step, engine.time, engine.seed = step, time, seed


def _load(
    chain: Sequence[Storage], engine: DynamicEngine, values_only: bool
) -> tuple[list[DynamicTable], int, int, int]:
    """New tables with what the files have, the clocks, and the seed."""
    wanted = {name for table in engine.tables for name in table.key_names}
    for folder in chain:
        saved = set(table_names(folder))
        if saved != wanted:
            name = min(saved ^ wanted)
            said = f"has table {name}, and the model has not" if name in saved else f"lacks table {name} of the model"
            raise ValueError(f"{folder}: {said}; use the tables it was saved with: {', '.join(sorted(saved))}")
    links = {name: links_of(chain, name) for name in sorted(wanted)}
    headers = {name: of[-1].header for name, of in links.items()}
    clocks = {(header.next_step, header.time) for header in headers.values()}
    if len(clocks) > 1:
        raise ValueError(f"{chain[-1]}: its tables were saved after {sorted(x for x, _ in clocks)} steps; use another")
    (step, time) = clocks.pop()
    seed = next(iter(headers.values())).seed
    waiting = {
        name: table_parts(chain[-1] / name, "waiting", may_lack=not headers[name].counter) for name in sorted(wanted)
    }
    for p, table in enumerate(engine.tables):
        for k, name in enumerate(table.key_names):
            _check_fits(chain[-1] / name, headers[name], header_of(engine, p, k), values_only)
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
        owned = [
            engine.owned_shards(engine.logical.index((p, local_table(table, k)))) for k in range(len(old.key_names))
        ]
        first = [
            (part, part.ranges(owned_V))
            for name, owned_V in zip(old.key_names, owned, strict=True)
            for part in links[name][0].parts
        ]
        table.reserve(sum(stop - start for _, ranges in first for start, stop in ranges), 0)
        for k, (name, owned_V) in enumerate(zip(table.key_names, owned, strict=True)):
            for link in links[name]:
                _add(table, k, link, owned_V, values_only)
            for part in () if values_only else waiting[name]:
                ranges = part.ranges(owned_V)
                table.load_counter_state(k, {column: part.read(column, ranges) for column in part.names})
        for local in range(len(table.configs)):
            table.trim(local, step=step + 1, time=time)  # no row is in flight, even where it was set by hand
        if values_only:
            table.forget_history()
        tables.append(table)
    return tables, step, time, seed


def _add(table: DynamicTable, k: int, link: Link, owned_V: Tensor, values_only: bool) -> None:
    """Puts the rows of some virtual shards into a table; of a save of what is new, after those that went have gone."""
    if len(removed := link.removed):
        table.remove(removed.to(table.device), k)
    for part in link.parts:
        ranges = part.ranges(owned_V)
        ids_N, shards_N = part.read("ids", ranges), part.shards(ranges)
        # Differences of ids may not fit into 64 bits.
        ascend_N = (ids_N[1:] > ids_N[:-1]) | (shards_N[1:] > shards_N[:-1])
        if not torch.equal(table.shards(k, ids_N), shards_N) or not bool(ascend_N.all()):
            raise ValueError(
                f"{part.path}: its ids are not in the order of virtual shards and ids; use another checkpoint"
            )
        del shards_N, ascend_N
        _fill(table, table.rows_for(k, ids_N.to(table.device)), part, ranges, values_only)


def _fill(
    table: DynamicTable, rows_N: Tensor, part: TablePart, ranges: Sequence[tuple[int, int]], values_only: bool
) -> None:
    """Sets all that a file has of rows, a column after the other, as they lie there."""
    storage = table.storage

    def column(name: str) -> Tensor:
        return part.read(name, ranges).to(table.device)

    if not values_only or storage.precision == "mixed":
        counts_N = column("counts")
    if not values_only:
        has_scores = "scores" in part.names and storage.has_scores
        storage.write_metadata(
            rows_N,
            counts=counts_N,
            last_steps=column("last_steps"),
            last_times=column("last_times"),
            scores=column("scores") if has_scores else None,
        )
    if storage.precision == "mixed":
        hot_N = column("hot") > 0 if "hot" in part.names else counts_N >= storage.hot_count
        storage.promote_hot(rows_N[hot_N])
    for name in ("values",) if values_only else ("values", "state"):
        start = 0
        for piece in part.pieces(name, ranges):
            own_N, rows_ND = rows_N[start : start + len(piece)], piece.to(table.device, torch.float32)
            start += len(piece)
            if name == "values":
                storage.write(own_N, rows_ND)
            else:
                storage.write_state(own_N, rows_ND)


def _check_fits(folder: Storage, saved: TableHeader, wanted: TableHeader, values_only: bool) -> None:
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


@torch.no_grad()
def load_static_rows(engine: DynamicEngine, name: str, values_ND: Tensor, state_NS: Tensor | None) -> None:
    """Puts the rows of a static table into a dynamic one, row i as id i, as if they were used now.

    Rows that do not fit into the budget are evicted. Every process calls it with all rows and keeps its own.

    Args:
        engine: its tables, between two steps.
        name: of the dynamic table.
        values_ND: float, all rows.
        state_NS: float32 optimiser state of all rows; None begins with zeros.

    Raises:
        ValueError: there is no such table, or the rows are not as wide as its own.
        MemoryError: there is no room.
        RuntimeError: a step is under way.
    """
    engine.require_idle("load_static_rows")
    t = engine.table_number(name)
    p, local = engine.logical[t]
    table = engine.tables[p]
    for what, rows, width in (("values", values_ND, table.dim), ("state", state_NS, table.storage.state_width)):
        if rows is not None and rows.shape != (len(values_ND), width):
            raise ValueError(
                f"table {name}: expected {what} of shape {(len(values_ND), width)}, got {tuple(rows.shape)}"
            )
    ids_N = torch.arange(len(values_ND), device=engine.device)
    ids_N = ids_N[engine.owned(t, ids_N)]
    table.remove(ids_N, local)
    if (counter := table.counters[local]) is not None:
        counter.forget(ids_N)
    rows_N = table.rows_for(local, ids_N)
    table.storage.write(rows_N, values_ND[ids_N.to(values_ND.device)].to(engine.device, torch.float32))
    if state_NS is not None:
        table.storage.write_state(rows_N, state_NS[ids_N.to(state_NS.device)].to(engine.device, torch.float32))
    table.storage.touch(rows_N, torch.zeros_like(rows_N), step=engine.next_step, time=engine.time)
    table.trim(local, step=engine.next_step + 1, time=engine.time)
