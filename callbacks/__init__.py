"""Lightning callbacks and a logger: one a file, for the `Trainer` or a recipe's ``class_path``."""

from lightning_gr.callbacks.balance_monitor import BalanceMonitor
from lightning_gr.callbacks.csv_logger import ResumableCSVLogger
from lightning_gr.callbacks.ema import ExponentialMovingAverage
from lightning_gr.callbacks.init_from import InitFrom
from lightning_gr.callbacks.mfu_monitor import MFUMonitor
from lightning_gr.callbacks.progress_bar import GRProgressBar
from lightning_gr.callbacks.report import ReportCallback
from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
from lightning_gr.callbacks.step_profiler import StepProfiler
from lightning_gr.callbacks.table_monitor import TableMonitor
from lightning_gr.callbacks.top_k_writer import TopKWriter

__all__ = [
    "BalanceMonitor",
    "ExponentialMovingAverage",
    "GRProgressBar",
    "InitFrom",
    "MFUMonitor",
    "ReportCallback",
    "ResumableCSVLogger",
    "ResumeCheckpoint",
    "StepProfiler",
    "TableMonitor",
    "TopKWriter",
]
