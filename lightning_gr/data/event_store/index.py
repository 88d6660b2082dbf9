"""The index of a store: what plans need of each user, made by one pass over the Parquet files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gr.data.event_store.fields import (
    EVENTS,
    INDEX,
    ITEM,
    RESERVED,
    STORE_FORMAT,
    STORE_VERSION,
    TIME,
    USER,
    VOCABULARY,
    WINDOWS,
    Field,
    fits,
)
from lightning_gr.data.event_store.store import jagged, manifest_path, read_manifest

Array = np.ndarray[Any, Any]


def complete_store(path: str | Path, *, labels: Sequence[str] = ()) -> None:
    """Indexes a store whose Parquet files anybody wrote, and completes its manifest.

    A manifest that is there says what the fields are. Without one they are inferred: lists of whole numbers are sparse
    fields of events, lists of floats dense ones, or labels where `labels` says so; scalars are fields of users.

    Args:
        path: the store; its ``events`` folder holds the Parquet files, which are taken in the order of their names.
        labels: list columns of floats that tasks predict, where there is no manifest.

    Raises:
        FileNotFoundError: there are no Parquet files.
        ValueError: a file or column cannot be used; the message names it.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    parts = sorted(p.name for p in (path / EVENTS).glob("*.parquet")) if (path / EVENTS).is_dir() else []
    if not parts:
        raise FileNotFoundError(f"{path / EVENTS}: no Parquet files; write one row a user there, see docs/data.md")
    if manifest_path(path).is_file():
        manifest = read_manifest(path)
        fields = [Field(**field) for field in manifest["fields"]]
    else:
        manifest = {"format": STORE_FORMAT, "version": STORE_VERSION}
        fields = _inferred(path / EVENTS / parts[0], labels)
    has_timestamps = True
    lengths: list[Array] = []
    groups: list[tuple[int, int, int]] = []
    counts: dict[str, list[Array]] = {field.name: [] for field in fields if field.kind == "label"}
    largest = {ITEM: -1} | {f.name: -1 for f in fields if f.kind == "sparse" and f.per != "item"}
    digest = hashlib.blake2b(digest_size=16)
    first_row = 0
    for number, name in enumerate(parts):
        file = path / EVENTS / name
        try:
            parquet = pq.ParquetFile(file, memory_map=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: no Parquet file that can be read ({str(error).splitlines()[0]})") from error
        _check_schema(file, parquet, fields)
        has_timestamps &= TIME in parquet.schema_arrow.names
        names = [USER, ITEM, *([TIME] if has_timestamps else []), *counts, *(x for x in largest if x != ITEM)]
        rows_before = 0
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group, columns=names)
            except (OSError, ValueError) as error:
                raise ValueError(f"{file}: row group {group} is damaged ({str(error).splitlines()[0]})") from error
            if table.num_rows == 0:
                continue
            _refuse_nulls(file, table, rows_before)
            rows_before += table.num_rows
            items, offsets = jagged(table.column(ITEM))
            groups.append((number, group, first_row))
            lengths.append(np.diff(offsets).astype(np.int32))
            first_row += table.num_rows
            for task in counts:
                values, ends = jagged(table.column(task))
                labelled = np.concatenate([[0], np.cumsum(~np.isnan(values))])
                counts[task].append(np.diff(labelled[ends]).astype(np.int32))
                digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
            for field in largest:
                values, _ = jagged(table.column(field))
                if len(values):
                    least = int(values.min())
                    if least < 0:
                        raise ValueError(f"{file}: column {field} has the code {least}; codes count from 0")
                    largest[field] = max(largest[field], int(values.max()))
            digest.update(np.ascontiguousarray(lengths[-1], dtype="<i4").tobytes())
            digest.update(np.ascontiguousarray(items, dtype="<i8").tobytes())
            if has_timestamps:
                digest.update(np.ascontiguousarray(jagged(table.column(TIME))[0], dtype="<i8").tobytes())
            digest.update("\n".join(map(str, table.column(USER).to_pylist())).encode())
    fields = [_sized(field, largest) for field in fields]
    num_items = _vocabulary_size(path, ITEM) or largest[ITEM] + 1
    _write_index(path, lengths, groups, counts)
    manifest |= {
        "has_timestamps": has_timestamps,
        "fields": [field.to_dict() for field in fields],
        "parts": parts,
        "num_users": first_row,
        "num_events": int(sum(int(part.sum()) for part in lengths)),
        "num_items": num_items,
        "fingerprint": digest.hexdigest(),
    }
    _write_whole(manifest_path(path), (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def _inferred(file: Path, labels: Sequence[str]) -> list[Field]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = []
    schema = pq.read_schema(file)
    for column in schema:
        if column.name in RESERVED:
            continue
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        value = column.type.value_type if is_list else column.type
        per: Any = "event" if is_list else "user"
        if pa.types.is_integer(value):
            fields.append(Field(column.name, "sparse", per, cardinality=0))
        elif pa.types.is_floating(value):
            fields.append(Field(column.name, "label" if column.name in labels else "dense", per))
        else:
            raise ValueError(f"{file}: column {column.name} has type {column.type}; expected numbers or lists of them")
    if missing := set(labels) - {field.name for field in fields}:
        raise ValueError(f"labels={sorted(missing)}: {file} has no such columns; it has {schema.names}")
    return fields


def _check_schema(file: Path, parquet: Any, fields: Sequence[Field]) -> None:
    import pyarrow as pa

    schema = parquet.schema_arrow
    for name in (USER, ITEM):
        if name not in schema.names:
            raise ValueError(f"{file}: has no column {name}; it has {', '.join(schema.names)}")
    for name in (ITEM, TIME):
        if name in schema.names:
            column = schema.field(name).type
            if not (pa.types.is_list(column) or pa.types.is_large_list(column)) or not pa.types.is_integer(
                column.value_type
            ):
                raise ValueError(f"{file}: column {name} has type {column}; expected lists of whole numbers")
    for field in fields:
        if field.per == "item":
            continue
        if field.name not in schema.names:
            raise ValueError(f"{file}: has no column {field.name}, a {field.kind} field of each {field.per}")
        if not fits(field, schema.field(field.name).type):
            raise ValueError(
                f"{file}: column {field.name} has type {schema.field(field.name).type}, which does not hold a "
                f"{field.kind} field of each {field.per}"
            )


def _refuse_nulls(file: Path, table: Any, rows_before: int) -> None:
    import pyarrow.compute as pc

    for name in table.column_names:
        column = table.column(name)
        missing = column.is_null().to_numpy()
        if not missing.any() and hasattr(column.type, "value_type"):
            flat = pc.list_flatten(column)
            if flat.null_count:
                missing = np.zeros(len(column), dtype=bool)
                missing[pc.list_parent_indices(column).to_numpy()[flat.is_null().to_numpy()]] = True
        if missing.any():
            row = rows_before + int(np.flatnonzero(missing)[0])
            raise ValueError(f"{file}: row {row}, column {name}: a value is missing; every user and event needs one")


def _sized(field: Field, largest: dict[str, int]) -> Field:
    if field.kind != "sparse" or field.name not in largest:
        return field
    return Field(field.name, field.kind, field.per, max(field.cardinality or 0, largest[field.name] + 1))


def _vocabulary_size(path: Path, field: str) -> int:
    import pyarrow.parquet as pq

    file = path / VOCABULARY / f"{field}.parquet"
    return int(pq.read_metadata(file).num_rows) if file.is_file() else 0


def _write_index(
    path: Path, lengths: list[Array], groups: list[tuple[int, int, int]], counts: dict[str, list[Array]]
) -> None:
    (path / INDEX).mkdir(exist_ok=True)
    # Samples that were cut from what lay here before.
    for stale in (path / INDEX).glob(f"{WINDOWS}*"):
        shutil.rmtree(stale)
    arrays = {"lengths": np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int32)}
    arrays["row_groups"] = np.array(groups, dtype=np.int64).reshape(-1, 3)
    for task, parts in counts.items():
        arrays[f"labels.{task}"] = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    for name, array in arrays.items():
        temporary = path / INDEX / f"{name}.tmp"
        with temporary.open("wb") as file:
            np.save(file, array)
        os.replace(temporary, path / INDEX / f"{name}.npy")


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
