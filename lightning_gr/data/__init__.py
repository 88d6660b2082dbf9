"""From an event log to balanced batches."""

from lightning_gr.data.datamodule import SequenceDataModule
from lightning_gr.data.interactions import Interactions
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.data.plan import EpochPlan, GlobalBatchPlan
from lightning_gr.data.readers import read_events
from lightning_gr.data.source import RetrievalSource, SequenceSource
from lightning_gr.data.synthetic import SyntheticLog, write_synthetic_log

__all__ = [
    "EpochPlan",
    "GlobalBatchPlan",
    "Interactions",
    "PlannedLoader",
    "RetrievalSource",
    "SequenceDataModule",
    "SequenceSource",
    "SyntheticLog",
    "read_events",
    "write_synthetic_log",
]
