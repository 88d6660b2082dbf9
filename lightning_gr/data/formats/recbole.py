"""RecBole's atomic files: tab-separated, with types in the header."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.formats.text import first_line

if TYPE_CHECKING:
    import polars as pl

_TYPES = ("token", "float", "token_seq", "float_seq")


def recognise(path: Path) -> str | None:
    """`recbole`, or None."""
    if path.is_dir():
        return "recbole" if any(path.glob("*.inter")) else None
    return "recbole" if path.suffix == ".inter" else None


def open_recbole(path: Path) -> EventLog:
    """Interactions, and features from the ``.user`` and ``.item`` files beside them.

    The first token of each file names its user or item; of interactions, the first two. Numbers called rating, label or
    click become labels, others dense fields; sequences of numbers are left out.

    Args:
        path: the ``.inter`` file, or its folder.

    Raises:
        FileNotFoundError: no ``.inter`` file is in the folder.
        ValueError: a header cannot be used, or the folder has several ``.inter`` files.
    """
    found = [path] if path.is_file() else sorted(path.glob("*.inter"))
    if not found:
        raise FileNotFoundError(f"{path}: no .inter file is there")
    if len(found) > 1:
        raise ValueError(f"{path}: the folder has {', '.join(file.name for file in found)[:200]}; give one of them")
    inter = found[0]
    header = _header(inter)
    if lists := [name for name, kind in header.items() if kind == "token_seq"]:
        raise ValueError(
            f"{inter}: {lists[0]} is a sequence: samples cut beforehand; give the log with one row an event"
        )
    tokens = [name for name, kind in header.items() if kind == "token"]
    if len(tokens) < 2:
        raise ValueError(f"{inter}: the header has {len(tokens)} token(s); expected a user and an item")
    user = "user_id" if "user_id" in tokens else tokens[0]
    item = "item_id" if "item_id" in tokens else next(name for name in tokens if name != user)
    floats = [name for name, kind in header.items() if kind == "float"]
    labels = tuple(name for name in floats if name in ("rating", "label", "click"))

    def scan(file: Path) -> pl.LazyFrame:
        return _scan(file, list(_header(file))).with_row_index("__row", 2)

    return EventLog(
        form="recbole",
        files=(inter,),
        scan=scan,
        user_id=user,
        item_id=item,
        timestamp="timestamp" if "timestamp" in floats else None,
        sparse=tuple(name for name in tokens if name not in (user, item)),
        dense=tuple(name for name in floats if name != "timestamp" and name not in labels),
        labels=labels,
        row="__row",
        users=_features(inter.with_suffix(".user"), user),
        items=_features(inter.with_suffix(".item"), item),
    )


def _header(path: Path) -> dict[str, str]:
    kinds = {}
    for field in first_line(path).split("\t"):
        name, _, kind = field.strip().partition(":")
        if kind not in _TYPES or "\0" in name or not name:
            raise ValueError(
                f"{path}: line 1 has the field {field!r}; expected name:type with one of {', '.join(_TYPES)}"
            )
        if name in kinds:
            raise ValueError(f"{path}: line 1 has two fields {name}; rename one")
        kinds[name] = kind
    return kinds


def _scan(path: Path, names: list[str]) -> pl.LazyFrame:
    import polars as pl

    return pl.scan_csv(
        path,
        separator="\t",
        new_columns=names,
        infer_schema=False,
        quote_char=None,
        encoding="utf8-lossy",
    )


def _features(path: Path, key: str) -> Features | None:
    import polars as pl

    if not path.is_file():
        return None
    header = _header(path)
    if key not in header:
        raise ValueError(f"{path}: the header has no {key}; it has {', '.join(header)}")
    lists = [name for name, kind in header.items() if kind == "token_seq"]

    def read() -> pl.DataFrame:
        split = [pl.col(name).str.split(" ").list.eval(pl.element().filter(pl.element() != "")) for name in lists]
        try:
            return _scan(path, list(header)).select(key, *sparse, *dense).with_columns(split).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); get it again") from error

    sparse = tuple(name for name, kind in header.items() if kind in ("token", "token_seq") and name != key)
    dense = tuple(name for name, kind in header.items() if kind == "float")
    return Features(frame=read, key=key, sparse=sparse, dense=dense)
