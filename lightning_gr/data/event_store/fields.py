"""What the columns of a store mean, and the names of its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import pyarrow as pa

STORE_FORMAT = "lightning-gr event store"
STORE_VERSION = 1
MANIFEST = "store.json"
EVENTS = "events"
ITEMS = "items.parquet"
VOCABULARY = "vocabulary"
INDEX = "index"
WINDOWS = "windows-"
"""How folders of the index begin that hold samples cut by windows of time."""
EXPOSED = "exposed"
"""Sparse field of events: 1 was shown to the user and may be a candidate, 0 is history alone."""

USER = "user_id"
ITEM = "item_id"
TIME = "timestamp"
RESERVED = (USER, ITEM, TIME)

Kind = Literal["sparse", "dense", "label"]
Per = Literal["event", "user", "item"]


def is_file_name(name: object) -> bool:
    """Whether a name is that of a file in a folder, and not a path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


@dataclass(frozen=True)
class Field:
    """One column beside user, item and time.

    Args:
        name: the column.
        kind: `sparse` categories, coded 0 ... cardinality - 1; `dense` numbers; `label` numbers that tasks predict,
            NaN where there is no label.
        per: whether each event, each user or each item has one.
        cardinality: categories of a sparse field.

    Raises:
        ValueError: the field contradicts itself; the message names it.
    """

    name: str
    kind: Kind
    per: Per
    cardinality: int | None = None

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise ValueError(f"field {self.name}: the name is the store's own; rename the column")
        if not is_file_name(self.name):
            raise ValueError(
                f"field {self.name!r}: files are named after fields, and this is no name; rename the column"
            )
        if self.kind not in get_args(Kind) or self.per not in get_args(Per):
            raise ValueError(f"field {self.name}: kind={self.kind!r} per={self.per!r} is no such field")
        if self.kind == "label" and self.per != "event":
            raise ValueError(f"field {self.name}: labels belong to events, not to each {self.per}")
        if (self.cardinality is not None) != (self.kind == "sparse"):
            raise ValueError(f"field {self.name}: cardinality={self.cardinality}; sparse fields and no others have one")

    def to_dict(self) -> dict[str, Any]:
        """The field as the manifest spells it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def fits(field: Field, column: pa.DataType) -> bool:
    """Whether a Parquet column can hold a field of events or users."""
    import pyarrow as pa

    is_list = pa.types.is_list(column) or pa.types.is_large_list(column)
    value = column.value_type if is_list else column
    if field.per == "event" and not is_list:
        return False
    if field.kind == "sparse":
        return bool(pa.types.is_integer(value))
    return (field.per == "event") == is_list and bool(pa.types.is_floating(value))
