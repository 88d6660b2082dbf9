"""From an event log to balanced batches."""

from lightning_gr.data.datamodule import SequenceDataModule
from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.event_store import EventStore, Field, StoreWriter, check_store
from lightning_gr.data.event_table import EventTable, UserRows
from lightning_gr.data.interactions import Interactions
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.data.plan import ArraySamples, EpochPlan, GlobalBatchPlan, SampleIndex
from lightning_gr.data.readers import read_events
from lightning_gr.data.source import RetrievalSource, SequenceSource
from lightning_gr.data.splits import ByTime, ByUser, LeaveOneOut, Split
from lightning_gr.data.synthetic import SyntheticLog, write_synthetic_log

__all__ = [
    "ArraySamples",
    "ByTime",
    "ByUser",
    "EpochPlan",
    "EventLog",
    "EventStore",
    "EventTable",
    "Features",
    "Field",
    "GlobalBatchPlan",
    "Interactions",
    "LeaveOneOut",
    "PlannedLoader",
    "RetrievalSource",
    "SampleIndex",
    "SequenceDataModule",
    "SequenceSource",
    "Split",
    "StoreWriter",
    "SyntheticLog",
    "UserRows",
    "check_store",
    "read_events",
    "write_synthetic_log",
]
