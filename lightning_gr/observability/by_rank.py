"""Numbers of every rank, brought together by one collective; and what loggers are told of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from weakref import WeakSet

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gr.plugins.process_groups import group_named

_TIMEOUT = timedelta(minutes=30)
_failed_loggers: WeakSet[Logger] = WeakSet()


def by_rank(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Each rank's value under each name; all ranks call it with the same names in the same order.

    It has a group of its own on the host, so that it neither waits for a device nor meets another collective.

    Args:
        values: this rank's, by name.
    """
    own = torch.tensor(list(values.values()), dtype=torch.float64)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return {name: [value] for name, value in zip(values, own.tolist(), strict=True)}
    group = group_named("monitors", timeout=_TIMEOUT, backend="gloo")
    ranks = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(ranks, own, group=group)
    columns = torch.stack(ranks, 1).tolist()
    return dict(zip(values, columns, strict=True))


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether metrics are logged after the batch that has just been trained; the same on all ranks.

    Args:
        trainer: the one that trains.
    """
    stepped = not trainer.fit_loop._should_accumulate()
    return bool(stepped and trainer._logger_connector.should_update_logs)


def log_values(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Writes to every logger of rank 0, at the step of Lightning's own metrics, and into ``trainer.callback_metrics``.

    A logger that fails costs one warning; training goes on.

    Args:
        trainer: the one that trains.
        values: numbers by the names of their metrics.
    """
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in values.items()})
    if not trainer.is_global_zero:
        return
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        try:
            logger.log_metrics(dict(values), step=step)
        except Exception as error:  # whatever a service or a disk throws: a metric is not worth the run
            if logger not in _failed_loggers:
                _failed_loggers.add(logger)
                rank_zero_warn(
                    f"{type(logger).__name__}: cannot write {next(iter(values), 'metrics')} and others "
                    f"({type(error).__name__}: {error}); training goes on, and this is said once"
                )
