"""Saving dynamic tables: what they hold at one moment, written in any thread while training goes on.

Shape suffixes: N rows, V virtual shards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.row_snapshot import CopyLimit, SavedColumn, StorageSnapshot
from lightning_gr.embeddings.dynamic.safetensors_stream import Column, rows_of_a_piece
from lightning_gr.embeddings.dynamic.table_journal import TableJournal
from lightning_gr.embeddings.dynamic.table_parts import (
    BUCKET,
    REMOVED,
    Kind,
    TableHeader,
    file_name,
    files_of,
    write_part,
)

MAX_COPIED_BYTES = 1 << 30
"""So much is copied aside at most where nobody says another number."""


def begin_save(
    engine: DynamicEngine,
    *,
    touched_since: int | None = None,
    journals: bool = False,
    max_copied_bytes: int | None = None,
) -> TablesSnapshot:
    """Holds on to what an engine's tables have now, between two steps; not a collective call.

    Of several groups with a full set of tables the first one writes; the snapshots of others are empty.

    Args:
        engine: its tables; lookups whose step is still to come are not in the way.
        touched_since: saves only rows that were used in this step or later, or changed by hand, and the ids of those
            that were removed: what is new since the save before the step.
        journals: whether this save may become the base of one that saves what is new.
        max_copied_bytes: of rows that are changed before they were written, so many bytes are copied at most; then
            those who change rows wait for the writer. None means 1 GiB.

    Raises:
        RuntimeError: another save of these tables is under way.
        ValueError: what was removed since that step is not known.
    """
    engine.join()
    limit = CopyLimit(MAX_COPIED_BYTES if max_copied_bytes is None else max_copied_bytes)
    return TablesSnapshot(engine, touched_since, journals, limit)


class TablesSnapshot:
    """What an engine's tables hold at one moment; `begin_save` makes it.

    Each physical table's rows are copied aside where they change before they were written, so `write` belongs into
    another thread than the one that trains, which may wait for it. `close` must be called at the end.

    Attributes:
        num_rows: that were written; of the first moment on those that may be.
        num_removed: ids written as removed.
    """

    def __init__(self, engine: DynamicEngine, touched_since: int | None, journals: bool, limit: CopyLimit) -> None:
        self._rank, self._world_size, self._device = engine.rank, engine.world_size, engine.device
        self._limit = limit
        self._base_step = engine.next_step if journals else None
        tables = engine.tables if engine.is_first_replica else []
        for table in tables:
            if table.storage.is_being_saved:
                raise RuntimeError(f"table {table.names[0]}: another save of it is under way; wait until it has ended")
            known = None if table.journal is None else table.journal.base_step
            if touched_since is not None and known != touched_since:
                raise ValueError(
                    f"table {table.names[0]}: what was removed since step {touched_since} is not known"
                    f"{'' if known is None else f', but since step {known}'}; save all rows"
                )
        self._tables: list[_Frozen] = []
        try:
            for p in range(len(tables)):
                self._tables.append(_Frozen(engine, p, touched_since, journals, limit))
        except BaseException:
            self.close()
            raise
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies are read in another stream
        self.num_rows = sum(len(table.index) for table in self._tables)
        self.num_removed = 0

    @property
    def copied_bytes(self) -> int:
        """Of rows that were copied since they changed before they were written."""
        return self._limit.copied_bytes

    @property
    def waited_seconds(self) -> float:
        """How long those who change rows were held up, by copying and by `max_copied_bytes`."""
        return self._limit.waited_seconds

    @torch.no_grad()
    def write(self, folder: Storage) -> dict[str, FileSum]:
        """Writes this process's files, in any thread.

        Args:
            folder: of the collection; without files of an earlier save.

        Returns:
            The files by their names in the folder.

        Raises:
            OSError: one cannot be written; nothing is left of them.
            ValueError: files of another number of processes are there.
        """
        sums: dict[str, FileSum] = {}
        self.num_rows = self.num_removed = 0
        try:
            with self._own_stream():
                for table in self._tables:
                    for name, kind, header, columns, ends_V in table.files():
                        place = folder / name
                        _check_world(place, self._world_size)
                        file = file_name(kind, self._rank, self._world_size)
                        sums[f"{name}/{file}"] = write_part(place, file, header, columns, ends_V)
                    table.rows.close()
                    self.num_rows += table.num_rows
                    self.num_removed += table.num_removed
        except BaseException:
            for name in sums:
                with contextlib.suppress(OSError):
                    folder.remove(name)
            raise
        return sums

    def _own_stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))

    def published(self) -> None:
        """The checkpoint is complete: with `journals`, the next incremental save begins here."""
        for table in self._tables:
            if self._base_step is not None:
                assert table.journal is not None
                table.journal.forget(table.journal_end, self._base_step)

    def close(self) -> None:
        """Ends it, whether it was written or not: nobody waits for it any more, and copies are freed."""
        for table in self._tables:
            table.rows.close()
        self._tables = []


class _Frozen:
    """A physical table at one moment."""

    def __init__(
        self, engine: DynamicEngine, p: int, touched_since: int | None, journals: bool, limit: CopyLimit
    ) -> None:
        self._table = table = engine.tables[p]
        if journals and table.journal is None:
            table.journal = TableJournal()
        self.journal = table.journal
        self.journal_end = 0 if self.journal is None else self.journal.end
        self._touched_since = touched_since
        self._headers = [header_of(engine, p, k, touched_since) for k in range(len(table.key_names))]
        self._waiting = [table.freeze_counter(k) for k in range(len(table.configs))]
        self.index = table.index.copy()
        self.rows: StorageSnapshot = table.storage.snapshot(limit)
        self.num_rows = self.num_removed = 0

    def files(self) -> Iterator[tuple[str, Kind, TableHeader, list[Column], Tensor]]:
        """Each file's table, kind, header, columns and ends of virtual shards."""
        ids_N, tables_N, rows_N = self._table.entries_of(self.index)
        del self.index
        keys = [(ids_N[tables_N == k].cpu(), rows_N[tables_N == k].cpu()) for k in range(len(self._headers))]
        del ids_N, tables_N, rows_N
        if self._touched_since is not None:
            keys = [self._touched(k, *x) for k, x in enumerate(keys)]
        self.rows.want_only(torch.cat([rows for _, rows in keys]).to(self._table.device))
        for k, header in enumerate(self._headers):
            ids_N, rows_N = keys[k]
            shards_N = self._table.shards(k, ids_N)
            order_N = _order(ids_N, shards_N)
            ids_N, rows_N = ids_N[order_N], rows_N[order_N].to(self._table.device)
            ends_V = torch.bincount(shards_N, minlength=header.virtual_shards).cumsum(0)
            keys[k] = ids_N[:0], rows_N[:0]
            del shards_N, order_N
            self.num_rows += len(ids_N)
            columns = self._columns(ids_N, rows_N)
            if self._touched_since is not None:
                removed = self._noted(k, removed=True)
                self.num_removed += len(removed)
                columns.append(Column.of(REMOVED, removed))
            yield header.table, "part", header, columns, ends_V
            waiting = self._waiting[k] if k < len(self._waiting) else None
            if waiting is not None:
                state, offsets = waiting()
                own = [Column.of(name, x) for name, x in state.items()]
                yield header.table, "waiting", header, own, torch.tensor(offsets[1:])

    def _noted(self, k: int, *, removed: bool) -> Tensor:
        assert self.journal is not None
        return self.journal.ids(k, removed=removed, end=self.journal_end)

    def _touched(self, k: int, ids_N: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        assert self._touched_since is not None
        touched_N = self.rows.last_steps(rows_N.to(self._table.device)) >= self._touched_since
        touched_N |= torch.isin(ids_N, self._noted(k, removed=False))
        return ids_N[touched_N], rows_N[touched_N]

    def _columns(self, ids_N: Tensor, rows_N: Tensor) -> list[Column]:
        """What a file has of rows, made while it is written."""

        def pieces(of: SavedColumn) -> Iterator[Tensor]:
            for own_N in rows_N.split(rows_of_a_piece(math.prod(of.shape) * of.dtype.itemsize)):
                yield of.take(own_N)

        saved = [Column(x.name, x.dtype, (len(ids_N), *x.shape), pieces(x)) for x in self.rows.columns]
        return [Column.of("ids", ids_N), *saved]


def _order(ids_N: Tensor, shards_N: Tensor) -> Tensor:
    """By virtual shard, then by id. Numpy sorts numbers of 16 bits by their digits."""
    by_id_N = np.argsort(ids_N.numpy())
    shards = shards_N.numpy()[by_id_N]
    if not len(shards) or shards.max() < 1 << 16:
        shards = shards.astype(np.uint16)
    return torch.from_numpy(by_id_N[np.argsort(shards, kind="stable")])


def save_tables(folder: Path | Storage, engine: DynamicEngine) -> dict[str, FileSum]:
    """Writes all that an engine holds between two steps; every process calls it, and returns when all have written.

    Of several groups with a full set of tables the first one writes.

    Args:
        folder: of the collection; without files of an earlier save.
        engine: its tables.

    Returns:
        This process's files by their names in the folder.

    Raises:
        ValueError: files of another number of processes are there, or another process failed.
        OSError: a file cannot be written.
    """
    failure, sums = None, {}
    try:
        snapshot = begin_save(engine)
        try:
            sums = snapshot.write(Storage(folder))
        finally:
            snapshot.close()
    except Exception as error:  # the others must hear of it
        failure = error
    agree(engine, failure, f"{folder}: could not be written")
    return sums


def agree(engine: DynamicEngine, failure: Exception | None, what: str) -> None:
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


def _check_world(folder: Storage, world_size: int) -> None:
    kinds: tuple[Kind, ...] = ("part", "waiting")
    for kind in kinds:
        for (_, world), name in files_of(folder, kind).items():
            if world != world_size:
                raise ValueError(
                    f"{folder.path_of(name)}: of an earlier save by {world} processes; save to an empty folder"
                )


def local_table(table: DynamicTable, k: int) -> int:
    """The logical table of keys, whose shared rows may be meant."""
    return k if k < len(table.configs) else table.names.index(table.key_names[k].removesuffix(BUCKET))


def header_of(engine: DynamicEngine, p: int, k: int, touched_since: int | None = None) -> TableHeader:
    """What a file of a physical table's keys says of it now."""
    table = engine.tables[p]
    local = local_table(table, k)
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
        touched_since=touched_since,
    )
