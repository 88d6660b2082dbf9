"""From an event log to balanced batches. Names are imported on first use, so that stores open without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gr.data.aggregation import Aggregation
    from lightning_gr.data.cross_statistics import CrossStatistics
    from lightning_gr.data.datamodule import SequenceDataModule
    from lightning_gr.data.event_log import EventLog, Features
    from lightning_gr.data.event_store import EventStore, Field, StoreWriter, check_store
    from lightning_gr.data.event_table import EventTable, UserRows
    from lightning_gr.data.interactions import Interactions
    from lightning_gr.data.loader import PlannedLoader
    from lightning_gr.data.plan import ArraySamples, EpochPlan, GlobalBatchPlan, SampleIndex
    from lightning_gr.data.ranking_datamodule import RankingDataModule
    from lightning_gr.data.ranking_source import RankingSource
    from lightning_gr.data.readers import read_events
    from lightning_gr.data.source import RetrievalSource, SequenceSource
    from lightning_gr.data.splits import ByTime, ByUser, LastShare, LeaveOneOut, Split
    from lightning_gr.data.stream import EventStream, ParquetDays
    from lightning_gr.data.stream_datamodule import StreamDataModule
    from lightning_gr.data.stream_loader import StreamLoader
    from lightning_gr.data.synthetic import SyntheticLog, write_synthetic_log
    from lightning_gr.data.synthetic_exposures import ExposureLog, write_exposure_log
    from lightning_gr.data.synthetic_tasks import ColdStartLog, write_cold_start_log
    from lightning_gr.data.task import Task
    from lightning_gr.data.task_datamodule import TaskDataModule

_MODULES = {
    "Aggregation": "aggregation",
    "ArraySamples": "plan",
    "ByTime": "splits",
    "ByUser": "splits",
    "ColdStartLog": "synthetic_tasks",
    "CrossStatistics": "cross_statistics",
    "EpochPlan": "plan",
    "EventLog": "event_log",
    "EventStore": "event_store",
    "EventStream": "stream",
    "EventTable": "event_table",
    "ExposureLog": "synthetic_exposures",
    "Features": "event_log",
    "Field": "event_store",
    "GlobalBatchPlan": "plan",
    "Interactions": "interactions",
    "LastShare": "splits",
    "LeaveOneOut": "splits",
    "ParquetDays": "stream",
    "PlannedLoader": "loader",
    "RankingDataModule": "ranking_datamodule",
    "RankingSource": "ranking_source",
    "RetrievalSource": "source",
    "SampleIndex": "plan",
    "SequenceDataModule": "datamodule",
    "SequenceSource": "source",
    "Split": "splits",
    "StoreWriter": "event_store",
    "StreamDataModule": "stream_datamodule",
    "StreamLoader": "stream_loader",
    "SyntheticLog": "synthetic",
    "Task": "task",
    "TaskDataModule": "task_datamodule",
    "UserRows": "event_table",
    "check_store": "event_store",
    "read_events": "readers",
    "write_cold_start_log": "synthetic_tasks",
    "write_exposure_log": "synthetic_exposures",
    "write_synthetic_log": "synthetic",
}

__all__ = [
    "Aggregation",
    "ArraySamples",
    "ByTime",
    "ByUser",
    "ColdStartLog",
    "CrossStatistics",
    "EpochPlan",
    "EventLog",
    "EventStore",
    "EventStream",
    "EventTable",
    "ExposureLog",
    "Features",
    "Field",
    "GlobalBatchPlan",
    "Interactions",
    "LastShare",
    "LeaveOneOut",
    "ParquetDays",
    "PlannedLoader",
    "RankingDataModule",
    "RankingSource",
    "RetrievalSource",
    "SampleIndex",
    "SequenceDataModule",
    "SequenceSource",
    "Split",
    "StoreWriter",
    "StreamDataModule",
    "StreamLoader",
    "SyntheticLog",
    "Task",
    "TaskDataModule",
    "UserRows",
    "check_store",
    "read_events",
    "write_cold_start_log",
    "write_exposure_log",
    "write_synthetic_log",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
