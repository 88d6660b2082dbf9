"""Every private name of Lightning, TorchRec, torch or jsonargparse that the project uses, each with its reason.

A test looks all of them up, so that an upgrade which moves one fails here and by name.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

PRIVATE_NAMES = {
    "lightning.pytorch.cli:LightningCLI._prepare_subcommand_parser": (
        "overridden: the only place where a default of a Trainer method's own argument (predict's return_predictions) "
        "can be set"
    ),
    "lightning.pytorch.cli:LightningCLI._run_subcommand": (
        "overridden: the only call that encloses a run, so that rank 0 can end the processes it started when it fails"
    ),
    "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher": (
        "its list of child processes (procs) is read to end them, and to see whether one has reported an error already"
    ),
    "lightning.pytorch:LightningModule._on_before_batch_transfer": (
        "replaced on a module whose loader is pipelined: the hook has been called when the batch went into flight"
    ),
    "torchrec.distributed.embedding:ShardedEmbeddingCollection._create_input_dist": (
        "with what it sets (_input_dists) and reads (_sharding_type_to_sharding, _embedding_shardings, _pg): a second "
        "set of input dists, on a process group of their own, exchanges ids while the first serves evaluation"
    ),
    "torchrec.distributed.embeddingbag:ShardedEmbeddingBagCollection._create_input_dist": "as above",
    "lightning.fabric.strategies.launchers.subprocess_script:_ChildProcessObserver": (
        "its _run is delayed, since it kills all processes before they could say which rank failed"
    ),
    "torch.distributed.distributed_c10d:_get_default_store": (
        "read: the store that the ranks met at; RankWatch keeps its marks there and needs no port of its own"
    ),
    "lightning.pytorch.callbacks:ModelCheckpoint._find_last_checkpoints": (
        "overridden, with _ModelCheckpoint__resolve_ckpt_dir, _monitor_candidates and "
        "_get_metric_interpolated_filepath_name: what `ckpt_path: last` means for ResumeCheckpoint"
    ),
    "lightning.fabric.loggers.csv_logs:_ExperimentWriter._check_log_dir_exists": (
        "overridden: it deletes the metrics of the run before; with _experiment of the logger, and _fs of both, a file "
        "is gone on with"
    ),
    "lightning.pytorch.loops.fit_loop:_FitLoop._load_combined_loader_states": (
        "called where Lightning forgets it (its issue 20550); with _combined_loader_states_to_load and _data_fetcher"
    ),
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._should_check_val_fx": (
        "asked: a checkpoint waits for a validation that is about to run; _results and _batches_that_stepped are read "
        "and set, since Lightning saves neither"
    ),
    "lightning.pytorch.loops.fit_loop:_FitLoop._should_accumulate": (
        "asked: whether a batch ends an optimizer step; with _logger_connector.should_update_logs and "
        "_batches_that_stepped of the Trainer, by which Lightning's own monitors log"
    ),
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._on_before_fetch": (
        "wrapped on a loop, with _on_after_fetch: the only calls around the training loop's wait for its next batch"
    ),
    "torch.distributed._shard.sharded_tensor:ShardedTensor._init_from_local_shards_and_global_metadata": (
        "called: a copy of sharded weights, to be written while training goes on"
    ),
    "torchmetrics:MeanMetric._update_count": "read and set, with _defaults, _reductions, _computed: metrics under way",
    "jsonargparse._common:parsing_settings": (
        "read and put back around a configuration that is not trusted: the public setter cannot be undone"
    ),
    "argparse:ArgumentParser._option_string_actions": "read: the names of all options, to list near ones of a typo",
}
"""By ``module:qualified name``, why a private name is used."""


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The spellings of all options of a parser."""
    return list(parser._option_string_actions)


def child_processes(trainer: Any) -> list[Any]:
    """The processes that this one's Trainer has started, as ``subprocess.Popen`` objects."""
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    launcher = trainer.strategy.launcher
    return list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []


def give_ranks_time_to_explain(seconds: float) -> None:
    """Lets Lightning's observer of child processes wait this long before it kills all because one has failed."""
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver) and "_run" not in thread.__dict__:
            thread.__dict__["_run"] = functools.partial(_observe, thread, thread._run, seconds, [])


def _observe(thread: Any, look: Callable[[], bool], seconds: float, failed_at: list[float]) -> bool:
    """One look of the observer; True ends it."""
    if not any(child.poll() for child in thread._child_processes):
        return look()
    failed_at.append(time.monotonic())
    return time.monotonic() - failed_at[0] >= seconds and look()


def end_children(trainer: Any, *, seconds: float) -> None:
    """Waits for the processes that this one's Trainer has started, and kills those that are still there."""
    until = time.monotonic() + seconds
    for child in child_processes(trainer):
        try:
            child.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()


def default_store() -> Store:
    """The store of the default process group."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def collection_on_group(collection: Any, group: ProcessGroup) -> Any:
    """A sharded static collection whose ids travel on another group of the same processes; it shares all else.

    Args:
        collection: a sharded ``EmbeddingCollection`` or ``EmbeddingBagCollection`` that has looked up once.
        group: the processes of its own group.
    """
    if hasattr(collection, "_sharding_type_to_sharding"):
        shardings = list(collection._sharding_type_to_sharding.values())
    else:
        shardings = list(collection._embedding_shardings)
    input_dists = []
    for sharding in shardings:
        own = sharding.__dict__.get("_pg")
        sharding._pg = group
        try:
            input_dists.append(sharding.create_input_dist())
        finally:
            sharding._pg = own
    twin = object.__new__(type(collection))
    twin.__dict__.update(collection.__dict__, _input_dists=input_dists)
    return twin


def skip_hook_of_staged_batches(module: Any, staged: type) -> None:
    """Leaves `on_before_batch_transfer` out for batches of a type; for all others it is called as before."""
    if "_on_before_batch_transfer" in module.__dict__:
        return
    hook = module._on_before_batch_transfer

    def hook_unless_staged(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, staged) else hook(batch, dataloader_idx)

    module.__dict__["_on_before_batch_transfer"] = hook_unless_staged
