"""EventStore: a store opened for reading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.data import parquet_file
from lightning_gr.data.event_store.fields import (
    EVENTS,
    INDEX,
    ITEM,
    ITEMS,
    MANIFEST,
    STORE_FORMAT,
    STORE_VERSION,
    TIME,
    USER,
    VOCABULARY,
    Field,
    is_file_name,
)
from lightning_gr.data.event_table import UserRows

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq

Array = np.ndarray[Any, Any]
_OPEN_FILES = 64


def manifest_path(path: Path) -> Path:
    """The file whose presence, with an index, makes a folder a store."""
    return path / MANIFEST


def is_store(path: str | Path) -> bool:
    """Whether a folder holds a store's manifest."""
    return manifest_path(Path(path)).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked to be one that this version reads.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no manifest, or of another version.
    """
    file = manifest_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no event store ({MANIFEST} is missing); make one with `lightning-gr prepare`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged ({error}); prepare the store again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != STORE_FORMAT:
        raise ValueError(f'{file}: not the manifest of an event store; its "format" is not {STORE_FORMAT!r}')
    if manifest.get("version") != STORE_VERSION:
        raise ValueError(
            f"{file}: the store has version {manifest.get('version')!r}, this lightning-gr reads {STORE_VERSION}; "
            "prepare it again, or use the lightning-gr that wrote it"
        )
    return manifest


class EventStore:
    """A store on disk. Opening reads the manifest and maps the index; events are read by row group.

    Args:
        path: the store.

    Attributes:
        path: the store.
        fields: columns beside user, item and time.
        lengths: int32 events of each user, mapped from disk.
        group_bounds: int64 first user row of each row group, and the number of users.
        has_timestamps: whether events have times.
        num_items: item rows.
        num_users: users.
        num_events: events.
        fingerprint: digest of users, items, times and labels.
        summary: what became of the log it was prepared from.

    Raises:
        FileNotFoundError: there is no store, or a part of it is missing.
        ValueError: it is damaged, unfinished or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if "fingerprint" not in manifest:
            raise ValueError(f"{path}: the store has no index yet; run `lightning-gr store index {path}`")
        self.fields = tuple(Field(**field) for field in manifest["fields"])
        self.has_timestamps = bool(manifest["has_timestamps"])
        self.num_items, self.num_users = int(manifest["num_items"]), int(manifest["num_users"])
        self.num_events = int(manifest["num_events"])
        self.fingerprint = str(manifest["fingerprint"])
        self.summary: dict[str, Any] = manifest.get("summary", {})
        if strange := [name for name in manifest["parts"] if not is_file_name(name)]:
            raise ValueError(f"{manifest_path(self.path)}: parts: {strange[0]!r} is no name of a file in {EVENTS}")
        self.parts = tuple(self.path / EVENTS / name for name in manifest["parts"])
        self.lengths = self._index("lengths")
        self._groups = self._index("row_groups")
        self.group_bounds: Array = np.append(self._groups[:, 2], self.num_users).astype(np.int64)
        if len(self.lengths) != self.num_users:
            raise ValueError(
                f"{path}: the index has {len(self.lengths)} users, the manifest {self.num_users}; run "
                f"`lightning-gr store index {path}`"
            )
        self._file = lru_cache(maxsize=_OPEN_FILES)(_open_parquet)

    def _index(self, name: str) -> Array:
        file = self.path / INDEX / f"{name}.npy"
        try:
            array: Array = np.load(file, mmap_mode="r")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}: missing; run `lightning-gr store index {self.path}`") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: damaged ({error}); run `lightning-gr store index {self.path}`") from error
        return array

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def label_counts(self, task: str) -> Array:
        """int32 labelled events of each user, mapped from disk."""
        return self._index(f"labels.{task}")

    def read_group(self, group: int, columns: Sequence[str] = ()) -> UserRows:
        """One row group: items, times and the named fields of events and users.

        Raises:
            ValueError: a name is no field of events or users, or the file is damaged.
        """
        part, within, _ = self._groups[group].tolist()
        wanted = {field.name: field for field in self.fields if field.per != "item"}
        if unknown := [name for name in columns if name not in wanted]:
            raise ValueError(f"{self.path}: has no field {unknown[0]!r} of events or users; it has {list(wanted)}")
        names = [ITEM, *([TIME] if self.has_timestamps else []), *columns]
        file = self.parts[part]
        try:
            table = self._file(file).read_row_group(within, columns=names, use_threads=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}: missing; prepare the store again") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: row group {within} cannot be read ({_first_line(error)})") from error
        items, offsets = jagged(table.column(ITEM))
        return UserRows(
            offsets=offsets,
            items=items,
            timestamps=jagged(table.column(TIME))[0] if self.has_timestamps else None,
            event_fields={name: jagged(table.column(name))[0] for name in columns if wanted[name].per == "event"},
            user_fields={name: jagged(table.column(name)) for name in columns if wanted[name].per == "user"},
        )

    def located(self, row: int) -> tuple[Path, int]:
        """The Parquet file that holds a user, and the row within it, counted from 0."""
        part = int(self._groups[int(np.searchsorted(self._groups[:, 2], row, side="right")) - 1, 0])
        first = int(self._groups[self._groups[:, 0] == part, 2][0])
        return self.parts[part], row - first

    @cached_property
    def item_ids(self) -> Array:
        """Raw item id of each item row."""
        return self.vocabulary(ITEM)

    def vocabulary(self, field: str) -> Array:
        """Raw value of each code of a sparse field; the codes themselves where the store keeps no vocabulary."""
        file = self.path / VOCABULARY / f"{field}.parquet"
        if not file.is_file():
            sizes = {f.name: f.cardinality for f in self.fields} | {ITEM: self.num_items}
            return np.arange(sizes[field] or 0)
        return parquet_file.read(file)["value"].to_numpy()

    @cached_property
    def users(self) -> Array:
        """Raw user id of each row."""
        import polars as pl

        frames = [parquet_file.read(part, [USER]) for part in self.parts]
        return pl.concat(frames)[USER].to_numpy() if frames else np.zeros(0, dtype=np.int64)

    def items(self) -> pl.DataFrame:
        """The fields of items, row i for item i; no columns where the store has none."""
        import polars as pl

        file = self.path / ITEMS
        return parquet_file.read(file) if file.is_file() else pl.DataFrame()


def jagged(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """A column's values and int64 offsets; a scalar column has one value a row."""
    import pyarrow as pa

    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        return array.to_numpy(zero_copy_only=False), np.arange(len(array) + 1, dtype=np.int64)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]


def _open_parquet(file: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, memory_map=True)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
