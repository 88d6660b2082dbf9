"""What each process keeps for itself in a checkpoint: random generators, metrics under way, sums of logged values.

Of another number of processes the first one gets the metrics and sums of all, and generators are those of the process
with the same number; processes that did not exist draw from what the first one had, moved on by their number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    import lightning.pytorch as pl


def rank_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Plain containers and tensors."""
    return {"generators": _generators(), "metrics": _metrics(trainer), "logged": _logged(trainer)}


# ---- random generators ---------------------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    name, keys, place, has_gauss, gauss = cast("tuple[Any, ...]", np.random.get_state())
    version, numbers, second = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss],
        "python": [version, list(numbers), second],
    }


def restore_generators(states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Sets this process's generators."""
    state = states[rank if rank < len(states) else 0]["generators"]
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    version, numbers, second = state["python"]
    random.setstate((version, tuple(numbers), second))
    if rank >= len(states):
        # Moved on, not seeded anew: what is drawn by counters (dropout, negatives) asks for the run's one seed.
        torch.rand(rank)
        np.random.random_sample(rank)
        for _ in range(rank):
            random.random()


# ---- metrics -------------------------------------------------------------------------------------------------------


def _module_metrics(trainer: pl.Trainer) -> dict[str, Metric]:
    return {name: x for name, x in trainer.lightning_module.named_modules() if isinstance(x, Metric)}


def _metrics(trainer: pl.Trainer) -> dict[str, Any]:
    over = []
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        # Lightning is about to reset those that are logged.
        results = (trainer.fit_loop.epoch_loop._results or {}).values()
        over = [id(result.value) for result in results if not result.is_tensor]
    return {
        name: {
            "updates": metric._update_count,
            "states": {key: _copied(getattr(metric, key)) for key in metric._defaults},
        }
        for name, metric in _module_metrics(trainer).items()
        if metric._update_count and id(metric) not in over
    }


def _copied(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [x.detach().cpu().clone() for x in value] if isinstance(value, list) else value.detach().cpu().clone()


def restore_metrics(trainer: pl.Trainer, states: Sequence[Mapping[str, Any]]) -> None:
    """Puts back what metrics had taken in when the checkpoint was saved."""
    rank, world = trainer.global_rank, trainer.world_size
    for name, metric in _module_metrics(trainer).items():
        saved = [state["metrics"][name] for state in states if name in state["metrics"]]
        if not saved:
            continue
        if world == len(states):
            own = states[rank]["metrics"].get(name)
            if own is not None:
                _set_metric(metric, own["updates"], own["states"])
            continue
        merged = {key: _merged(name, metric, key, [x["states"][key] for x in saved]) for key in metric._defaults}
        if rank == 0:
            _set_metric(metric, sum(x["updates"] for x in saved), merged)


def _merged(name: str, metric: Metric, key: str, values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [x for value in values for x in value]
    reduction: Any = metric._reductions[key]
    if not callable(reduction):
        rank_zero_warn(
            f"metric {name}: its {key} has no reduction over processes, so it begins anew at a resume on another "
            "number of them"
        )
        return metric._defaults[key]
    return reduction(torch.stack(values))


def _set_metric(metric: Metric, updates: int, states: Mapping[str, Any]) -> None:
    for key, value in states.items():
        if isinstance(value, list):
            setattr(metric, key, [x.to(metric.device) for x in value])
        else:
            setattr(metric, key, value.to(metric.device))
    metric._update_count = updates
    metric._computed = None


# ---- values logged with on_epoch -----------------------------------------------------------------------------------


def _logged(trainer: pl.Trainer) -> dict[str, Any]:
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return {}  # the next batch is of another epoch
    return {
        key: {
            name: _copied(getattr(result, name)) for name in ("value", "cumulated_batch_size") if hasattr(result, name)
        }
        for key, result in (trainer.fit_loop.epoch_loop._results or {}).items()
        if result.is_tensor and result.meta.on_epoch and isinstance(result.value, Tensor) and result._update_count
    }


class LoggedSums:
    """Sums of a run's logged epoch values up to its checkpoint, which the resumed run takes up.

    Lightning makes an entry where a value is first logged; what was saved is added to it then.

    Args:
        states: of all processes that saved.
        rank: of this one.
        world_size: of this run.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]], *, rank: int, world_size: int) -> None:
        own = [states[rank]] if world_size == len(states) else states if rank == 0 else []
        self._saved: list[dict[str, Any]] = [dict(state["logged"]) for state in own]

    def take_up(self, trainer: pl.Trainer) -> None:
        """Adds what was saved to the entries that are there by now; called after each batch."""
        if not any(self._saved):
            return
        results: Any = trainer.fit_loop.epoch_loop._results
        for saved in self._saved:
            for key in [key for key in saved if key in results]:
                result, before = results[key], saved.pop(key)
                value = before["value"].to(result.value)
                if result.meta.is_max_reduction or result.meta.is_min_reduction:
                    result.value = result.meta.reduce_fx(value, result.value)
                    continue
                result.value = value + result.value
                if "cumulated_batch_size" in before:
                    result.cumulated_batch_size = before["cumulated_batch_size"] + result.cumulated_batch_size.cpu()
