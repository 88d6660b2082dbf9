"""Exports: weights, tables and configuration of a checkpoint in files that need neither this package nor torch.

An export is a directory: ``weights.safetensors`` has the dense weights by their names in the module, ``tables/`` a
Parquet or safetensors file a table, ``module.pt`` what the module itself keeps in checkpoints, ``config.yaml`` the
run's settings, and ``export.json``, written last, says what all of it is.

Shape suffixes: N rows of a piece, D width.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from lightning_gr.checkpoint.checksummed_json import from_json, to_json
from lightning_gr.checkpoint.manifest import Manifest, check_name
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.embeddings.dynamic.safetensors_stream import SafetensorsFile

EXPORT_FILENAME = "export.json"
"""The commit mark: without it a directory is no export."""
CONFIG_FILENAME = "config.yaml"
WEIGHTS_FILENAME = "weights.safetensors"
MODULE_FILENAME = "module.pt"
FORMAT = "lightning-gr export 1"
PIECE_ROWS = 1 << 16

TableFormat = Literal["parquet", "safetensors"]
Pieces = Iterable[tuple[Tensor, Tensor]]
"""Ids, int64 (N,), and values (N, D), a few rows at a time."""


@dataclass(frozen=True)
class TableInfo:
    """What an export says of a table.

    Args:
        file: path of its file in the export.
        rows: how many it has.
        width: numbers of a row.
        precision: of the values in training, which are float32 in the file: `float32`, `bfloat16` or `float16` of a
            static table; `fp32`, `bf16`, `fp16` or `mixed` of a dynamic one.
        seed: of the run, from which first values of keys without a row are drawn; dynamic tables have it and what
            follows.
        group_bits: how many bits of a key's hash number its group.
        buckets_per_group: shared rows of a group.
    """

    file: str
    rows: int
    width: int
    precision: str
    seed: int = 0
    group_bits: int = 0
    buckets_per_group: int = 0


@dataclass(frozen=True)
class ExportInfo:
    """What an export consists of.

    Args:
        checkpoint: where it was made from.
        checkpoint_id: of that checkpoint's manifest.
        step: optimizer steps done.
        epoch: epochs done.
        versions: by package.
        weights: names of the dense weights.
        static_tables: by the name that the whole table has among the module's weights.
        dynamic_tables: by ``collection path/table``; ``#bucket`` ends the name of rows that keys without one share.
        files: every other file of the directory.
    """

    checkpoint: str
    checkpoint_id: str
    step: int
    epoch: int
    versions: Mapping[str, str]
    weights: list[str] = field(default_factory=list)
    static_tables: Mapping[str, TableInfo] = field(default_factory=dict)
    dynamic_tables: Mapping[str, TableInfo] = field(default_factory=dict)
    files: Mapping[str, FileSum] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's contents, with a checksum of themselves."""
        return to_json(asdict(self), format=FORMAT)

    @classmethod
    def from_bytes(cls, data: bytes) -> ExportInfo:
        """The reverse.

        Raises:
            ValueError: it is damaged, or of something else.
        """
        content = from_json(data, format=FORMAT)
        for name in ("static_tables", "dynamic_tables"):
            content[name] = {key: TableInfo(**table) for key, table in content[name].items()}
        content["files"] = {
            check_name(name): FileSum(int(found["size"]), str(found["checksum"]))
            for name, found in content["files"].items()
        }
        info = cls(**content)
        wanted = set()
        for table in (*info.static_tables.values(), *info.dynamic_tables.values()):
            wanted.add(check_name(table.file))
            numbers = (table.rows, table.width, table.seed, table.group_bits, table.buckets_per_group)
            if any(type(x) is not int for x in numbers) or table.rows < 0 or table.width < 1:
                raise ValueError(f"{table.file}: {table.rows!r} rows of {table.width!r} numbers")
        if lacks := sorted(wanted - info.files.keys()):
            raise ValueError(f"it does not list {lacks[0]}")
        for table in info.static_tables.values():
            size = info.files[table.file].size
            # Parquet packs what repeats; a thousandth of the plain size it does not reach.
            if table.rows * table.width * 4 > (1000 * size if table.file.endswith(".parquet") else size):
                raise ValueError(f"{table.file}: {table.rows:,} rows of {table.width} numbers in {size:,} bytes")
        return info


def is_export(location: str | Path | Storage) -> bool:
    """Whether an export is there, whole or damaged.

    Args:
        location: a directory or a URL.
    """
    return Storage(location).is_file(EXPORT_FILENAME)


class ExportedTable:
    """A table of an export.

    Args:
        storage: the export.
        info: of the table.

    Attributes:
        info: as given.
    """

    def __init__(self, storage: Storage, info: TableInfo) -> None:
        self._storage, self.info = storage, info

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids, int64 (N,), and values, float32 (N, D), a few rows at a time.

        Raises:
            ValueError: the file cannot be read, or is another table's.
        """
        rows = 0
        try:
            for ids_N, values_ND in self._parquet() if self.info.file.endswith(".parquet") else self._safetensors():
                if values_ND.shape != (len(ids_N), self.info.width):
                    raise ValueError(f"its rows are not {self.info.width} wide")
                rows += len(ids_N)
                yield ids_N, values_ND
            if rows != self.info.rows:
                raise ValueError(f"it has {rows:,} rows of {self.info.rows:,}")
        except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among them
            path = self._storage.path_of(self.info.file)
            raise ValueError(f"{path}: cannot be read ({error}); export again") from error

    def _safetensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        file = SafetensorsFile(self._storage, self.info.file)
        for start in range(0, self.info.rows, PIECE_ROWS):
            rows = [(start, min(start + PIECE_ROWS, self.info.rows))]
            yield file.read("ids", rows), file.read("values", rows)

    def _parquet(self) -> Iterator[tuple[Tensor, Tensor]]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        with self._storage.open(self.info.file) as file:
            parquet = pq.ParquetFile(file)
            id_type, vector_type = (parquet.schema_arrow.field(name).type for name in ("id", "vector"))
            is_list = pa.types.is_list(vector_type) or pa.types.is_fixed_size_list(vector_type)
            if not (pa.types.is_int64(id_type) and is_list and pa.types.is_float32(vector_type.value_type)):
                raise ValueError(f"its columns are {id_type} and {vector_type}, expected int64 and a list of float")
            for group in range(parquet.num_row_groups):  # batches of all would keep what was read before
                rows = parquet.read_row_group(group, columns=["id", "vector"])
                vectors = rows["vector"].combine_chunks()
                lengths = pc.unique(pc.list_value_length(vectors)).to_pylist()
                if rows["id"].null_count or vectors.flatten().null_count or lengths not in ([], [self.info.width]):
                    raise ValueError(f"some id is missing, or some vector has not {self.info.width} numbers")
                values = torch.from_numpy(vectors.flatten().to_numpy().copy())
                ids_N = torch.from_numpy(rows["id"].to_numpy().copy())
                yield ids_N, values.view(len(ids_N), self.info.width)


class Export:
    """A complete export.

    Args:
        location: of its directory; a path or a URL.

    Attributes:
        storage: the directory.
        info: what it consists of.

    Raises:
        ValueError: it is no export, or some file is missing or cut off; names the file.
    """

    def __init__(self, location: str | Path | Storage) -> None:
        self.storage = Storage(location)
        path = self.storage.path_of(EXPORT_FILENAME)
        try:
            self.info = ExportInfo.from_bytes(self.storage.read_bytes(EXPORT_FILENAME))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing; give the directory of an export") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({error}); export again") from error
        self._contents = Manifest(id="", step=0, epoch=0, world_size=1, saved_at="", attempt=0, files=self.info.files)
        self._contents.check_sizes(self.storage)

    def files(self) -> dict[str, FileSum]:
        """Every file but the commit mark, for those who share out their verification over processes."""
        return dict(self.info.files)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Reads files through and compares their checksums.

        Args:
            names: which ones; None means all.

        Raises:
            ValueError: names the first that is damaged.
        """
        self._contents.check_contents(self.storage, names)

    def meta(self) -> dict[str, Any]:
        """What the module and others keep in checkpoints; nothing is unpickled but tensors and plain containers.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.storage.path_of(MODULE_FILENAME)
        try:
            data = io.BytesIO(self._listed(MODULE_FILENAME))
            meta: dict[str, Any] = torch.load(data, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: holds other objects than tensors and plain containers; export again") from error
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); export again") from error
        if not isinstance(meta, dict):
            raise ValueError(f"{path}: holds no state of a module; export again")
        return meta

    def dense_weights(self) -> dict[str, Tensor]:
        """The dense weights, by name."""
        return safetensors.torch.load(self._listed(WEIGHTS_FILENAME))

    def _listed(self, name: str) -> bytes:
        """A file that `verify` has looked at."""
        if name not in self.info.files:
            path = self.storage.path_of(EXPORT_FILENAME)
            raise ValueError(f"{path}: does not list {name}; export again")
        return self.storage.read_bytes(name)

    def weights(self) -> dict[str, Tensor]:
        """All of the module's weights in memory, static tables among them, in the types they had in training."""
        weights = self.dense_weights()
        for name, table in self.static_tables().items():
            weights[name] = torch.empty(table.info.rows, table.info.width, dtype=_dtype(table.info))
            _copy_rows(table, weights[name])
        return weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the module's weights, by name."""
        shapes = {name: tuple(value.shape) for name, value in self.dense_weights().items()}
        return shapes | {name: (table.rows, table.width) for name, table in self.info.static_tables.items()}

    def static_tables(self) -> dict[str, ExportedTable]:
        """By the name of the whole table among the module's weights; row i has id i."""
        return {name: ExportedTable(self.storage, info) for name, info in self.info.static_tables.items()}

    def tables(self) -> dict[str, ExportedTable]:
        """The dynamic tables by ``collection path/table``."""
        return {name: ExportedTable(self.storage, info) for name, info in self.info.dynamic_tables.items()}

    def collections(self) -> dict[str, dict[str, ExportedTable]]:
        """The dynamic tables by collection path, then by table."""
        found: dict[str, dict[str, ExportedTable]] = {}
        for name, table in self.tables().items():
            path, _, of_collection = name.rpartition("/")
            found.setdefault(path, {})[of_collection] = table
        return found

    def load_weights(self, into: Mapping[str, Any]) -> None:
        """Copies weights in place, static tables a few rows at a time, whole ones and local shards alike.

        Args:
            into: a module's state, tensors and sharded tensors by name.

        Raises:
            ValueError: a weight is missing or has another shape; nothing has changed then.
        """
        shapes = self.shapes()
        for name, weight in into.items():
            if name not in shapes:
                raise ValueError(
                    f"{self.storage}: has no {name}; it was exported from another model, so use its own "
                    f"{CONFIG_FILENAME}"
                )
            if tuple(weight.size()) != shapes[name]:
                raise ValueError(
                    f"{self.storage}: {name} has shape {shapes[name]}, the model wants {tuple(weight.size())}; use its "
                    f"own {CONFIG_FILENAME}, and the data it was trained on"
                )
        dense, tables = self.dense_weights(), self.static_tables()
        with torch.no_grad():
            for name, weight in into.items():
                if name in tables:
                    _copy_rows(tables[name], weight)
                else:
                    for part, rows, columns in _local_parts(weight):
                        part.copy_(dense[name][rows, columns] if columns is not None else dense[name])


def _dtype(info: TableInfo) -> torch.dtype:
    dtype = getattr(torch, info.precision, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{info.file}: precision {info.precision!r} is none of a static table; export again")
    return dtype


def _local_parts(weight: Any) -> Iterator[tuple[Tensor, slice, slice | None]]:
    """What of a weight is in this process, and which rows and columns of it they are; no columns of a whole one."""
    if not hasattr(weight, "local_shards"):
        yield weight, slice(None), None
        return
    for shard in weight.local_shards():
        (row, *column), (rows, *columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        yield shard.tensor, slice(row, row + rows), slice(column[0], column[0] + columns[0])


def _copy_rows(table: ExportedTable, weight: Any) -> None:
    parts = [
        (part, rows.indices(table.info.rows)[:2], columns or slice(None))
        for part, rows, columns in _local_parts(weight)
    ]
    first = 0
    for _, values_ND in table.pieces():
        for part, (start, stop), columns in parts:
            low, high = max(first, start), min(first + len(values_ND), stop)
            if low < high:
                part[low - start : high - start].copy_(values_ND[low - first : high - first, columns])
        first += len(values_ND)
