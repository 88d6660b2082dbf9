"""Ids and vectors that ``lightning-gr table import`` puts into a table: of a file, or of a static table.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gr.embeddings.dynamic.table_parts import TableHeader


def read_file(path: Path) -> tuple[Tensor, Tensor]:
    """Ids, int64 (N,), and vectors, float32 (N, D).

    Raises:
        UserError: it is no such file.
    """
    if path.suffix == ".safetensors":
        tensors = _safetensors(path, ("ids", "values"))
        ids_N, values_ND = _ids(path, tensors["ids"]), tensors["values"]
        if values_ND.dim() != 2 or not values_ND.is_floating_point() or len(values_ND) != len(ids_N):
            raise UserError(
                f"{path}: values are {values_ND.dtype} {tuple(values_ND.shape)}; give float ones, a row for each of "
                f"{len(ids_N):,} ids"
            )
        return ids_N, values_ND.float()
    table = _parquet(path, ("id", "vector"))
    return _parquet_ids(path, table), _parquet_vectors(path, table)


def read_static(checkpoint: Path, key: str | None, ids_file: Path | None) -> tuple[Tensor, Tensor]:
    """The rows of a static table in a checkpoint directory, as `read_file`.

    Raises:
        UserError: there is no such table, or not one id for each of its rows.
    """
    import torch

    from lightning_gr.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(checkpoint)
    shapes = reader.shapes()
    known = [name for name, (shape, dtype) in shapes.items() if len(shape) == 2 and dtype.is_floating_point]
    if key not in known:
        said = "missing" if key is None else f"no such table in {reader.storage}"
        raise UserError(f"--key{'' if key is None else ' ' + key}: {said}; choose from {', '.join(sorted(known))}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no processes are there
        values_ND = reader.tensors(key)[key]
    if ids_file is None:
        ids_N = torch.arange(len(values_ND))
    elif ids_file.suffix == ".safetensors":
        ids_N = _ids(ids_file, _safetensors(ids_file, ("ids",))["ids"])
    else:
        ids_N = _parquet_ids(ids_file, _parquet(ids_file, ("id",)))
    if len(ids_N) != len(values_ND):
        raise UserError(
            f"--ids {ids_file}: {len(ids_N):,} ids for {len(values_ND):,} rows; give one for each, in order"
        )
    return ids_N, values_ND.float()


def check(origin: str, ids_N: Tensor, values_ND: Tensor, header: TableHeader) -> None:
    """Refuses what a table cannot hold.

    Raises:
        UserError: no rows, another width, ids that occur twice, or vectors that are not finite.
    """
    from lightning_gr.embeddings.dynamic.table_parts import DTYPES

    if not len(ids_N):
        raise UserError(f"{origin}: has no rows; give a file that has")
    if values_ND.shape[1] != header.dim:
        raise UserError(
            f"{origin}: vectors of {values_ND.shape[1]} numbers, table {header.table} has rows of {header.dim}; give "
            "vectors of that width"
        )
    unique, counts = ids_N.unique(return_counts=True)
    if len(unique) < len(ids_N):
        twice = unique[counts > 1]
        raise UserError(
            f"{origin}: {len(twice):,} ids occur more than once, {int(twice[0])} for one; keep one row of each"
        )
    bad_N = ~values_ND.isfinite().all(1)
    if bool(bad_N.any()):
        raise UserError(
            f"{origin}: {int(bad_N.sum()):,} vectors are not finite, that of id {int(ids_N[bad_N][0])} first; leave "
            "them out"
        )
    # Rows of mixed precision are in fp16 until they are hot.
    dtype = DTYPES["fp16" if header.precision == "mixed" else header.precision]
    bad_N = ~values_ND.to(dtype).isfinite().all(1)
    if bool(bad_N.any()):
        raise UserError(
            f"{origin}: {int(bad_N.sum()):,} vectors do not fit into {header.precision}, that of id "
            f"{int(ids_N[bad_N][0])} first; scale them"
        )


def _safetensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give another file") from error
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path}: has no {missing[0]}, only {', '.join(tensors) or 'nothing'}; name it so")
    return tensors


def _ids(path: Path, ids_N: Tensor) -> Tensor:
    import torch

    if ids_N.dim() != 1 or ids_N.dtype not in (torch.int64, torch.int32):
        raise UserError(f"{path}: ids are {ids_N.dtype} {tuple(ids_N.shape)}; give int64 ids of shape (N,)")
    return ids_N.to(torch.int64)


def _parquet(path: Path, names: tuple[str, ...]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        if missing := [name for name in names if name not in schema.names]:
            raise UserError(f"{path}: has no column {missing[0]}, only {', '.join(schema.names)}; name it so")
        return pq.read_table(path, columns=list(names))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({reason}); give another file") from error


def _parquet_ids(path: Path, table: Any) -> Tensor:
    import pyarrow as pa
    import torch

    column = table["id"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise UserError(f"{path}: column id is {column.type} with {column.null_count:,} nulls; give whole numbers")
    try:
        return torch.from_numpy(column.cast(pa.int64()).to_numpy().copy())
    except pa.ArrowException as error:
        raise UserError(f"{path}: column id: {error}; give ids of 64 bits with a sign") from error


def _parquet_vectors(path: Path, table: Any) -> Tensor:
    import pyarrow as pa
    import pyarrow.compute as pc
    import torch

    column = table["vector"]
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise UserError(f"{path}: column vector is {kind}; give lists of float")
    flat = pc.list_flatten(column)
    if column.null_count or flat.null_count:
        raise UserError(f"{path}: column vector has {column.null_count + flat.null_count:,} nulls; leave them out")
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) > 1:
        raise UserError(f"{path}: column vector has lists of {min(widths)} to {max(widths)} numbers; give equal ones")
    values = torch.from_numpy(flat.cast(pa.float32()).to_numpy().copy())
    return values.view(len(column), widths[0] if widths else getattr(kind, "list_size", 0))
