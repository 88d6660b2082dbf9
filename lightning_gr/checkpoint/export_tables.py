"""Rows of exported dynamic tables back in an engine, whatever number of processes it is spread over.

Shape suffixes: N rows of a piece, D width, V virtual shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_gr.checkpoint.export_format import Export, ExportedTable
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.embeddings.dynamic.keyed_rows import KeyRows
from lightning_gr.embeddings.dynamic.row_storage import Metadata
from lightning_gr.embeddings.dynamic.table_snapshot import agree, local_table


def load_export(
    location: str | Path | Storage, weights: Mapping[str, Any], engines: Mapping[str, DynamicEngine]
) -> Any:
    """Puts an export's weights and tables into a module in place; every process calls it.

    Every file is verified before anything changes.

    Args:
        location: of the export.
        weights: the module's state, tensors and sharded tensors by name.
        engines: its dynamic tables by collection path.

    Returns:
        What the module and others keep in checkpoints, as Lightning's dictionary.

    Raises:
        ValueError: it is damaged or of another model; names the file.
    """
    export = Export(location)
    export.verify()
    collections = export.collections()
    if collections.keys() != engines.keys():
        path = min(collections.keys() ^ engines.keys())
        said = "has dynamic tables of" if path in collections else "lacks dynamic tables of"
        raise ValueError(f"{export.storage}: {said} {path}, unlike the model; use its own config.yaml")
    meta = export.meta()
    export.load_weights(weights)
    for path in sorted(engines):  # every process in one order
        load_exported_tables(engines[path], collections[path])
    return meta


@torch.no_grad()
def load_exported_tables(
    engine: DynamicEngine, tables: Mapping[str, ExportedTable], *, values_only: bool = False
) -> None:
    """Puts the rows of exported tables into an engine in place of its own, between two steps.

    Optimiser state, counters and clocks begin anew. Every process calls it and keeps the rows that it owns; after an
    error an engine is as it was.

    Args:
        engine: with the same tables.
        tables: of its collection, by name, rows that keys share among them.
        values_only: keeps the run's own seed, from which keys without a row get their first values, for training that
            begins with these rows; otherwise lookups answer as they did where the export was made.

    Raises:
        ValueError: the tables are not the same, or a file cannot be read.
        RuntimeError: a step is under way.
    """
    engine.require_idle("load_exported_tables")
    failure = None
    try:
        _check(engine, tables)
        seed = engine.seed if values_only else next(iter(tables.values())).info.seed
        loaded = _loaded(engine, tables, seed)
    except Exception as error:  # the others must hear of it
        failure = error
    agree(engine, failure, "export: could not be read")
    engine.tables[:] = loaded
    engine.next_step, engine.time, engine.seed = 0, 0, seed


def _loaded(engine: DynamicEngine, tables: Mapping[str, ExportedTable], seed: int) -> list[DynamicTable]:
    loaded = []
    for p, old in enumerate(engine.tables):
        new = DynamicTable(
            configs=old.configs,
            optimizer=old.optimizer,
            seed=seed,
            virtual_shards=engine.virtual_shards,
            device=engine.device,
            encode_ids=engine.encode_ids,
        )
        for k, name in enumerate(new.key_names):
            _add(engine, p, new, k, tables[name])
        for local in range(len(new.configs)):
            new.trim(local, step=1, time=0)
        loaded.append(new)
    return loaded


def _check(engine: DynamicEngine, tables: Mapping[str, ExportedTable]) -> None:
    wanted = {name for table in engine.tables for name in table.key_names}
    if tables.keys() != wanted:
        name = min(tables.keys() ^ wanted)
        said = f"has table {name}, and the model has not" if name in tables else f"lacks table {name} of the model"
        raise ValueError(f"export: {said}; use its own config.yaml")
    for table in engine.tables:
        for k, name in enumerate(table.key_names):
            info = tables[name].info
            settings = {"width": (info.width, table.dim)}
            if k >= len(table.configs):  # shared rows are numbered by these
                local = local_table(table, k)
                settings["group_bits"] = (info.group_bits, table.group_bits[local])
                per_group = table.configs[local].policy.buckets_per_group
                settings["buckets_per_group"] = (info.buckets_per_group, per_group)
            for setting, (have, want) in settings.items():
                if have != want:
                    raise ValueError(
                        f"{info.file}: exported with {setting}={have}, this run has {want}; use its own config.yaml"
                    )


def _add(engine: DynamicEngine, p: int, table: DynamicTable, k: int, exported: ExportedTable) -> None:
    owned_V = engine.owned_shards(engine.logical.index((p, local_table(table, k)))).to(engine.device)
    is_mixed = table.configs[0].precision == "mixed"
    for ids_N, values_ND in exported.pieces():
        own_N = owned_V[table.shards(k, ids_N.to(engine.device))].cpu()
        ids_N, values_ND = ids_N[own_N], values_ND[own_N]
        if not len(ids_N):
            continue
        if len(ids_N.unique()) != len(ids_N) or bool((table.find(ids_N.to(engine.device), k) >= 0).any()):
            raise ValueError(f"{exported.info.file}: has an id twice; export again")
        zeros_N = torch.zeros_like(ids_N)
        scores_N = zeros_N.float() if table.storage.has_scores else None
        # A value that fp16 does not have is of a row in fp32; any other reads the same from either.
        hot_N = (values_ND != values_ND.half().float()).any(1) if is_mixed else None
        state_NS = torch.zeros(len(ids_N), table.storage.state_width)
        metadata = Metadata(zeros_N, zeros_N, zeros_N, scores_N)
        table.add_rows(k, KeyRows(ids_N, values_ND, state_NS, metadata, hot_N))
