"""The event store: Parquet with one row a user, and an index that is read without touching the rows."""

from lightning_gr.data.event_store.check import Problem, check_store
from lightning_gr.data.event_store.fields import STORE_FORMAT, STORE_VERSION, Field
from lightning_gr.data.event_store.index import complete_store
from lightning_gr.data.event_store.store import EventStore, is_store
from lightning_gr.data.event_store.writer import StoreWriter

__all__ = [
    "STORE_FORMAT",
    "STORE_VERSION",
    "EventStore",
    "Field",
    "Problem",
    "StoreWriter",
    "check_store",
    "complete_store",
    "is_store",
]
