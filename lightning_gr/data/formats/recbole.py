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
        return "recbole" if len(list(path.glob("*.inter"))) == 1 else None
    return "recbole" if path.suffix == ".inter" else None


def open_recbole(path: Path) -> EventLog:
    """Interactions, and features from the ``.user`` and ``.item`` files beside them.

    The first token of each file names its user or item; of interactions, the first two. Numbers called rating, label or
    click become labels, others dense fields; sequences of numbers are left out.

    Args:
        path: the ``.inter`` file, or its folder.
    """
    inter = path if path.is_file() else next(iter(sorted(path.glob("*.inter"))), None)
    if inter is None:
        raise FileNotFoundError(f"{path}: no .inter file is there")
    header = _header(inter)
    tokens = [name for name, kind in header.items() if kind == "token"]
    if len(tokens) < 2:
        raise ValueError(f"{inter}: the header has {len(tokens)} token(s); expected a user and an item")
    user = "user_id" if "user_id" in tokens else tokens[0]
    item = "item_id" if "item_id" in tokens else next(name for name in tokens if name != user)
    floats = [name for name, kind in header.items() if kind == "float"]
    labels = tuple(name for name in floats if name in ("rating", "label", "click"))

    def scan(file: Path) -> pl.LazyFrame:
        return _scan(file, list(_header(file)))

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
        first_row=2,
        users=_features(inter.with_suffix(".user"), user),
        items=_features(inter.with_suffix(".item"), item),
    )


def _header(path: Path) -> dict[str, str]:
    kinds = {}
    for field in first_line(path).split("\t"):
        name, _, kind = field.strip().partition(":")
        if kind not in _TYPES:
            raise ValueError(
                f"{path}: line 1 has the field {field!r}; expected name:type with one of {', '.join(_TYPES)}"
            )
        kinds[name] = kind
    return kinds


def _scan(path: Path, names: list[str]) -> pl.LazyFrame:
    import polars as pl

    return pl.scan_csv(
        path,
        separator="\t",
        skip_rows=1,
        has_header=False,
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
        return _scan(path, list(header)).with_columns(split).collect()

    sparse = tuple(name for name, kind in header.items() if kind in ("token", "token_seq") and name != key)
    return Features(frame=read, key=key, sparse=sparse, dense=tuple(n for n, kind in header.items() if kind == "float"))
