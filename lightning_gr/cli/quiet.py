"""Messages of libraries that a user of the command can do nothing about, kept off the terminal."""

from __future__ import annotations

import logging
import warnings

# Each with who says it and why it does not concern the user.
_WARNINGS = (
    "Please use DTensor instead",  # torch, of the ShardedTensors that TorchRec 1.8 still makes
    ".*broadcast_buffers",  # torch, of how TorchRec calls DDP
    ".*find_unused_parameters=True was specified",  # torch; set for a fixed order of summation
    ".*isinstance\\(treespec, LeafSpec\\)",  # torch, of Lightning's own pytree code
    ".*split_table_batched_embeddings_ops",  # fbgemm, of how TorchRec imports it
    ".*Failed to import: fbgemm_gpu",  # fbgemm, of optional kernels
    "Couldn't infer the batch indices",  # Lightning; sample ids travel in the batch
    "You have overridden `on_before_batch_transfer` in `LightningModule`",  # Lightning; meant so
    ".*but there is no last checkpoint available",  # Lightning; ResumeCheckpoint says so itself
    "The dirpath has changed from",  # Lightning, when testing a checkpoint of another run's folder
    ".*does not have many workers",  # Lightning; planned loaders collate fast enough in-process
)
_LOGGERS = ("torch.fx._symbolic_trace", "torchrec")
_ADVERTS = ("litlogger", "litmodels")  # Lightning's tips of its own paid services


def quiet_library_noise() -> None:
    """Filters known messages; whatever is not listed still shows."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advert)


def _is_no_advert(record: logging.LogRecord) -> bool:
    return not any(word in str(record.msg) for word in _ADVERTS)
