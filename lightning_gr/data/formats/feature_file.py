"""Features of users or items in a table of their own beside a log: CSV, Parquet or JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.data import parquet_file
from lightning_gr.data.event_log import Features

if TYPE_CHECKING:
    import polars as pl

_KEYS = ("path", "sparse", "dense")


def open_features(option: str, settings: Mapping[str, Any] | None, key: str) -> Features | None:
    """The features that an option of a table form names; None without it.

    Args:
        option: its name, for messages: `users` or `items`.
        settings: ``path``, a file with one row an id, and ``sparse`` and ``dense``, the columns that are read. Sparse
            ones may be lists, in CSV with a bar between their values.
        key: column of the id, in this file as in the log.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the option cannot be used, by name.
    """
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or "path" not in settings or set(settings) - set(_KEYS):
        raise ValueError(
            f"options.{option}={settings!r}: expected path, and sparse or dense, as "
            f"{{path: {option}.csv, sparse: [city], dense: [age]}}"
        )
    path, sparse, dense = Path(settings["path"]), settings.get("sparse") or (), settings.get("dense") or ()
    for kind, names in (("sparse", sparse), ("dense", dense)):
        if isinstance(names, str):
            raise ValueError(f"options.{option}.{kind}={names}: expected a list, as [{names}]")
    if not (sparse or dense):
        raise ValueError(f"options.{option}: neither sparse nor dense names a column; name one, or leave it out")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (options.{option}.path)")
    names = [key, *sparse, *dense]

    def read() -> pl.DataFrame:
        import polars as pl

        try:
            if path.suffix in (".parquet", ".pq"):
                frame = parquet_file.read(path)
            elif path.suffix in (".jsonl", ".ndjson"):
                frame = pl.read_ndjson(path)
            else:
                frame = pl.read_csv(path, infer_schema=False, encoding="utf8-lossy")
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); get it again") from error
        frame = frame.rename({name: name.strip() for name in frame.columns})
        if missing := [name for name in names if name not in frame.columns]:
            raise ValueError(
                f"{path}: has no column {missing[0]} (options.{option}); it has {', '.join(frame.columns)[:200]}"
            )
        frame = frame.select(names)
        for name in dense:
            if frame[name].dtype == pl.String:
                numbers = frame[name].str.strip_chars().cast(pl.Float64, strict=False)
                wrong = (numbers.is_null() & frame[name].is_not_null()).arg_true()
                if len(wrong):
                    row = int(wrong[0])
                    raise ValueError(
                        f"{path}: row {row + 1} has {name}={frame[name][row]!r}, which is no number "
                        f"(options.{option}.dense); correct it, or name the column under sparse"
                    )
        barred = [n for n in sparse if frame[n].dtype == pl.String and frame[n].str.contains("|", literal=True).any()]
        split = [pl.col(n).str.split("|").list.eval(pl.element().filter(pl.element() != "")) for n in barred]
        return frame.with_columns(split)

    return Features(frame=read, key=key, sparse=tuple(sparse), dense=tuple(dense))
