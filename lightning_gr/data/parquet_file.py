"""Parquet files as tables of polars, read by pyarrow, which refuses damage at which polars' reader ends the process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_BATCH_ROWS = 1 << 16
_BUFFER_BYTES = 1 << 20


def column_names(file: Path) -> list[str]:
    """The columns of a file.

    Raises:
        ValueError: it is no Parquet file that can be read.
    """
    return list(_schema(file))


def scan(file: Path) -> pl.LazyFrame:
    """A file as a lazy table, which is read in batches and with the columns that are asked for.

    Raises:
        ValueError: it is no Parquet file that can be read; what is damaged behind its schema raises this as it is read.
    """
    from polars.io.plugins import register_io_source

    def batches(
        columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        for frame in _frames(file, columns, size or _BATCH_ROWS):
            if rows is not None:
                frame = frame.head(rows)
                rows -= len(frame)
            yield frame if predicate is None else frame.filter(predicate)
            if rows == 0:
                return

    return register_io_source(batches, schema=_schema(file))


def read(file: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A whole file.

    Args:
        file: where it is.
        columns: those needed; None means all.

    Raises:
        ValueError: it is no Parquet file that can be read.
    """
    import polars as pl

    empty = pl.DataFrame(schema=_schema(file))
    return pl.concat([empty if columns is None else empty.select(columns), *_frames(file, columns, _BATCH_ROWS)])


def _schema(file: Path) -> pl.Schema:
    import polars as pl
    import pyarrow.parquet as pq

    with _refused(file):
        # What a file says of itself may be anything, and polars takes it for text.
        return pl.DataFrame(pq.read_schema(file).remove_metadata().empty_table()).schema


def _frames(file: Path, columns: Sequence[str] | None, rows: int) -> Iterator[pl.DataFrame]:
    import polars as pl
    import pyarrow.parquet as pq

    wanted = None if columns is None else list(columns)
    # Buffered, so that a row group need not fit in memory.
    with _refused(file), pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
        for batch in parquet.iter_batches(batch_size=rows, columns=wanted):
            # Of text that is no UTF-8, which Parquet's reader does not look at, polars would make strings.
            batch.validate(full=True)
            # A column whose name begins with another one's and a dot comes with it.
            batch = batch if wanted is None else batch.select(wanted)
            yield pl.DataFrame(batch.replace_schema_metadata(None))


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    """Whatever reading a file that is there raises names the file."""
    import polars as pl
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (
        *(pa.ArrowException, OSError, ValueError, MemoryError),
        *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
    ) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{file}: no Parquet file that can be read ({said[0]}); get it again") from error
