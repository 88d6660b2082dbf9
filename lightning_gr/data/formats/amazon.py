"""Amazon reviews: JSON lines of 2014, 2018 and 2023, ratings-only CSV, and the metadata of products beside them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.formats.text import first_line, first_lines, lines, scan_fields, scan_json

if TYPE_CHECKING:
    import polars as pl

_NAMES = ("user_id", "item_id", "rating", "timestamp")
_OLD = ("reviewerID", "asin", "overall", "unixReviewTime")
_NEW = ("user_id", "parent_asin", "rating", "timestamp")
_USER, _ITEM = r"A[0-9A-Z]{10,19}", r"[0-9A-Z]{10}"
_RATED = r"[1-5](\.0)?,\d{9,10}"
_SNIFFED = 50
_META_ROWS = 1 << 16
"""Products that are held as Python objects at a time."""


def _keys(line: str) -> tuple[str, ...] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return next((keys for keys in (_OLD, _NEW) if isinstance(found, dict) and set(keys) <= set(found)), None)


def _order(path: Path) -> tuple[str, ...] | None:
    """The columns of ratings without a header: of 2018 the product comes first, before that the reviewer."""
    found = first_lines(path, _SNIFFED)
    for ids, names in (((_USER, _ITEM), _NAMES), ((_ITEM, _USER), ("item_id", "user_id", "rating", "timestamp"))):
        if any(re.fullmatch(f"{ids[0]},{ids[1]},{_RATED}", line.strip()) for line in found):
            return names
    return None


def _headed(line: str) -> bool:
    return tuple(line.split(",")[: len(_NEW)]) == _NEW


def recognise(path: Path) -> str | None:
    """`amazon`, or None."""
    if path.is_dir():
        return "amazon" if _reviews(path) else None
    line = first_line(path)
    known = _keys(line) if line.startswith("{") else _headed(line) or _order(path)
    return "amazon" if known else None


def _reviews(folder: Path) -> list[Path]:
    files = (file for kind in ("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz") for file in folder.glob(kind))
    return sorted(file for file in files if not file.name.startswith("meta_") and _keys(first_line(file)))


def open_amazon(path: Path, *, meta: str | bool = True) -> EventLog:
    """Reviews with their rating as a label; categories, brand and price of products; plain or compressed by gzip.

    Args:
        path: the file of reviews or ratings, or a folder with one file of reviews.
        meta: the file of products; true takes the one beside the reviews, as ``meta_Beauty.json.gz`` beside
            ``reviews_Beauty_5.json.gz``, if there is one; false none.

    Raises:
        FileNotFoundError: the file of products is not there.
        ValueError: the file has not the form of Amazon reviews.
    """
    if path.is_dir():
        files = _reviews(path)
        if len(files) != 1:
            found = f"{len(files)} files of reviews: {', '.join(file.name for file in files)}"[:200]
            raise ValueError(f"{path}: the folder has {found.rstrip(': ')}; give one file")
        path = files[0]
    products = None
    if isinstance(meta, str):
        products = Path(meta)
        if not products.is_file():
            raise FileNotFoundError(f"meta={meta}: no such file")
    elif meta:
        products = _beside(path)
    line = first_line(path)
    keys = _keys(line) if line.startswith("{") else None
    order = None if line.startswith("{") or _headed(line) else _order(path)
    if keys is None and order is None and not _headed(line):
        raise ValueError(
            f"{path}: line 1 {line[:40]!r} is no Amazon review; expected JSON with {', '.join(_OLD)} or with "
            f"{', '.join(_NEW)}, or user,item,rating,seconds"
        )

    def scan(file: Path) -> pl.LazyFrame:
        import polars as pl

        if keys is not None:
            return scan_json(file, keys).rename(dict(zip(keys, _NAMES, strict=True)))
        if order is not None:
            return scan_fields(file, ",", order)
        frame = pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy").with_row_index("row", 2)
        return frame.rename({"parent_asin": "item_id"})

    items = None
    if products is not None:
        sparse, dense = ("categories", "brand"), ("price",)
        items = Features(frame=lambda: _read_products(products), key="item_id", sparse=sparse, dense=dense)
    return EventLog(form="amazon", files=(path,), scan=scan, labels=("rating",), row="row", items=items)


def _beside(reviews: Path) -> Path | None:
    stem = reviews.name.split(".")[0]
    # "reviews_Beauty_5", "All_Beauty_5", "All_Beauty" and "ratings_Beauty" all go with the products of "Beauty".
    stem = re.sub(r"^(reviews|ratings)_|_5$", "", stem)
    names = [f"meta_{stem}{kind}{packed}" for kind in (".json", ".jsonl") for packed in ("", ".gz")]
    return next((reviews.with_name(name) for name in names if reviews.with_name(name).is_file()), None)


def _read_products(path: Path) -> pl.DataFrame:
    import polars as pl

    schema: dict[str, Any] = {"item_id": pl.String, "categories": pl.List(pl.String)}
    schema |= {"brand": pl.String, "price": pl.Float32}
    blocks = [pl.DataFrame(schema=schema)]
    rows: list[tuple[Any, ...]] = []
    for number, line in lines(path):
        product = _product(path, number, line)
        item = product.get("parent_asin") or product.get("asin")
        if not isinstance(item, str):
            raise ValueError(f"{path}: line {number} has no asin; give the file of products")
        brand = product.get("brand") or product.get("store")
        categories = _flat(product.get("categories") or product.get("category") or ())
        rows.append((item, categories, str(brand).strip() if brand else None, _price(product.get("price"))))
        if len(rows) == _META_ROWS:
            blocks.append(pl.DataFrame(rows, schema=schema, orient="row"))
            rows = []
    return pl.concat([*blocks, pl.DataFrame(rows, schema=schema, orient="row")])


def _product(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        product = json.loads(line)
    except json.JSONDecodeError:
        # Those of 2014 are written as Python literals.
        try:
            product = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path}: line {number} is no JSON: {line[:40]!r}; get the file again") from error
    if not isinstance(product, dict):
        raise ValueError(f"{path}: line {number} is no JSON object: {line[:40]!r}; get the file again")
    return product


def _flat(categories: Any) -> list[str]:
    """Each category once; those of 2014 are paths of them."""
    paths: Iterable[Any] = categories if isinstance(categories, Sequence) and not isinstance(categories, str) else ()
    names = (name for part in paths for name in (part if isinstance(part, list | tuple) else (part,)))
    return list(dict.fromkeys(name.strip() for name in names if isinstance(name, str) and name.strip()))


def _price(price: Any) -> float | None:
    """The amount, the lower one of a range; None where the page held no price."""
    if isinstance(price, int | float):
        return float(price)
    found = re.match(r"(?:from )?\$? ?(\d[\d,]*(?:\.\d+)?)", price.strip()) if isinstance(price, str) else None
    return float(found[1].replace(",", "")) if found else None
