"""ExportWriter: brings an export into being piece by piece, whole or not at all.

Shape suffixes: N rows of a piece, D width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_gr.checkpoint.export_format import (
    CONFIG_FILENAME,
    EXPORT_FILENAME,
    MODULE_FILENAME,
    PIECE_ROWS,
    WEIGHTS_FILENAME,
    ExportInfo,
    Pieces,
    TableFormat,
    TableInfo,
)
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.embeddings.dynamic.safetensors_stream import Column, write_safetensors

if TYPE_CHECKING:
    import pyarrow as pa


class ExportWriter:
    """An export that is being written; a context that leaves nothing behind after an error.

    Args:
        output: a directory that is empty or not there.
        info: without weights, tables and files.
        tables: format of their files.

    Raises:
        FileExistsError: `output` has something in it.
    """

    def __init__(self, output: Storage, info: ExportInfo, *, tables: TableFormat) -> None:
        if output.is_file() or output.names():
            raise FileExistsError(f"{output}: exists and is not empty; give another directory")
        self._output, self._info, self._format = output, info, tables
        self._was_there = output.is_directory()
        self._weights: list[str] = []
        self._static: dict[str, TableInfo] = {}
        self._dynamic: dict[str, TableInfo] = {}
        self._files: dict[str, FileSum] = {}

    def __enter__(self) -> ExportWriter:
        self._output.make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            info = {**vars(self._info), "weights": self._weights, "files": self._files}
            info |= {"static_tables": self._static, "dynamic_tables": self._dynamic}
            self._output.publish(EXPORT_FILENAME, ExportInfo(**info).to_bytes())
            return
        self._output.remove_all()
        if self._was_there:
            self._output.make()

    def add_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Writes the dense weights, by name."""
        self._weights = sorted(weights)
        own = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}  # may share memory
        self._add(WEIGHTS_FILENAME, safetensors.torch.save(own))

    def add_module(self, meta: Mapping[str, Any]) -> None:
        """Writes what the module and others keep in checkpoints: plain containers and tensors."""
        buffer = io.BytesIO()
        torch.save(dict(meta), buffer)
        self._add(MODULE_FILENAME, buffer.getvalue())

    def add_config(self, text: str) -> None:
        """Writes the run's settings."""
        self._add(CONFIG_FILENAME, text.encode())

    def add_static_table(self, name: str, values: Tensor) -> None:
        """Writes a whole table of the module's weights, row i as id i."""
        rows, width = values.shape
        numbers = range(0, rows, PIECE_ROWS)

        def pieces() -> Pieces:
            for start in numbers:
                piece_ND = values[start : start + PIECE_ROWS].detach().cpu()
                yield torch.arange(start, start + len(piece_ND)), piece_ND.float()

        precision = str(values.dtype).removeprefix("torch.")
        info = TableInfo(self._table_file(name), rows, width, precision)
        self._static[name] = self._add_table(info, pieces)

    def add_dynamic_table(
        self,
        name: str,
        pieces: Callable[[], Pieces],
        *,
        width: int,
        precision: str,
        seed: int,
        group_bits: int = 0,
        buckets_per_group: int = 0,
    ) -> None:
        """Writes a table piece by piece.

        Args:
            name: ``collection path/table``.
            pieces: its rows from the first on; of safetensors it is asked three times.
            width: see `TableInfo`, as all that follows.
            precision: of values in training.
            seed: of the run.
            group_bits: of a key's hash.
            buckets_per_group: shared rows of a group.
        """
        file = self._table_file(name.replace("/", "."))
        info = TableInfo(file, 0, width, precision, seed, group_bits, buckets_per_group)
        self._dynamic[name] = self._add_table(info, pieces)

    def _table_file(self, name: str) -> str:
        # '#' would begin a URL's fragment.
        file = f"tables/{re.sub(r'[^A-Za-z0-9_.=@,+~ -]', '_', name.replace('#', '.'))}"
        while f"{file}.{self._format}" in self._files:
            file += "_"
        return f"{file}.{self._format}"

    def _add(self, name: str, data: bytes) -> None:
        with self._output.create(name) as file:
            file.write(data)
        self._files[name] = file.sum

    def _add_table(self, info: TableInfo, pieces: Callable[[], Pieces]) -> TableInfo:
        write = self._write_parquet if self._format == "parquet" else self._write_safetensors
        rows, self._files[info.file] = write(info, pieces)
        return TableInfo(**{**vars(info), "rows": rows})

    def _write_safetensors(self, info: TableInfo, pieces: Callable[[], Pieces]) -> tuple[int, FileSum]:
        rows = sum(len(ids_N) for ids_N, _ in pieces())
        columns = [
            Column("ids", torch.int64, (rows,), (ids_N for ids_N, _ in pieces())),
            Column("values", torch.float32, (rows, info.width), (values_ND.float() for _, values_ND in pieces())),
        ]
        return rows, write_safetensors(self._output, info.file, {}, columns)

    def _write_parquet(self, info: TableInfo, pieces: Callable[[], Pieces]) -> tuple[int, FileSum]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), info.width)})
        rows = 0
        with self._output.create(info.file) as file:
            # Vectors do not compress, and each is as good as unique.
            settings = {"compression": "none", "use_dictionary": False, "write_statistics": ["id"]}
            with pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, **settings) as writer:
                for group in _regrouped(pieces()):
                    rows += sum(len(ids_N) for ids_N, _ in group)
                    writer.write_table(_arrow(group, schema, info.width), row_group_size=PIECE_ROWS)
        return rows, file.sum


def _regrouped(pieces: Pieces) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pieces together until they are a row group; copies, since what follows may take a piece's place in memory."""
    held: list[tuple[Tensor, Tensor]] = []
    for ids_N, values_ND in pieces:
        held.append((ids_N.clone(), values_ND.float().clone()))
        if sum(len(ids_N) for ids_N, _ in held) >= PIECE_ROWS:
            yield held
            held = []
    if held:
        yield held


def _arrow(group: list[tuple[Tensor, Tensor]], schema: pa.Schema, width: int) -> pa.Table:
    import pyarrow as pa

    ids_N = torch.cat([ids_N for ids_N, _ in group])
    values_ND = torch.cat([values_ND for _, values_ND in group])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values_ND.reshape(-1).numpy()), width)
    return pa.table([pa.array(ids_N.numpy()), vectors], schema=schema)
