"""MFUMonitor: how much of the machine training uses, by the operations that its model needs for real tokens."""

from __future__ import annotations

import math
import resource
import time
from contextlib import ExitStack
from numbers import Real
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.observability.batch_counts import BatchCounts
from lightning_gr.observability.batch_work import work_of
from lightning_gr.observability.by_rank import by_rank, is_log_step, log_values
from lightning_gr.observability.peak_rate import PeakRate, compute_dtype, peak_rate

if TYPE_CHECKING:
    from lightning_gr.observability.product_counter import ProductCounter

_COUNTS = ("samples", "tokens", "padding", "rectangle")
_FLOPS = ("model", "hardware", "attention", "forward")
_TOTALS = {"flops": "model", "tokens": "tokens"}
_GIB = 1 << 30


class MFUMonitor(pl.Callback):
    """Logs throughput and the share of the devices' peak rate that training reaches, over all ranks.

    Operations are those of a module's ``flops(batch)`` (`lightning_gr.models.forward_flops.ForwardFlops`): of real
    tokens and visible pairs, backward twice the forward. A module without it is measured: torch counts the matrix
    products of one batch, padding included, and further batches are scaled by their tokens or samples. A plain number
    counts as the forward's.

    Written to every logger whenever Lightning logs, under the names of docs/observability.md: ``gr/mfu``, ``gr/hfu``,
    ``gr/tflops_per_device``, ``gr/samples_per_second``, ``gr/tokens_per_second``, ``gr/padding_share``,
    ``gr/padding_avoided``, ``gr/attention_share``, ``gr/flops_total``, ``gr/tokens_total``, ``gr/peak_memory_gib``.
    A window runs from one log step to the next, evaluations left out. On a GPU its ends are device events, and the host
    waits for the device there and nowhere else. Totals go on after a resume.

    Args:
        peak_tflops: rate of one device in TFLOP/s; None takes a table's by device and precision, and measures one
            where no table has it, as on a CPU.

    Raises:
        MisconfigurationException: a rate that is not above 0.
    """

    def __init__(self, *, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not 0 < peak_tflops < math.inf:
            raise MisconfigurationException(f"peak_tflops={peak_tflops}: expected a rate above 0, or none")
        self.peak_tflops = peak_tflops
        self.peak: PeakRate | None = None
        self.totals = dict.fromkeys(_TOTALS, 0.0)
        self._counted = dict.fromkeys(self.totals, 0.0)  # of this rank's window, in the totals already
        self._window: dict[str, float | Tensor] = {}
        self._spans: list[tuple[_Mark, _Mark]] = []
        self._began: _Mark | None = None
        self._device = torch.device("cpu")
        self._measuring: tuple[ExitStack, ProductCounter] | None = None
        self._flops_per_unit: float | None = None
        self._is_uncounted = False
        self._uncounted_units = 0

    # ---- hooks -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:  # a run of its own; a checkpoint's totals are loaded later
            self.totals = dict.fromkeys(_TOTALS, 0.0)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = pl_module.device
        if self.peak_tflops is not None:
            self.peak = PeakRate(self.peak_tflops * 1e12, "peak_tflops")
        else:
            self.peak = peak_rate(self._device, compute_dtype(str(trainer.precision)))
        rank_zero_info(
            f"MFUMonitor: a device's peak rate is taken as {self.peak.flops / 1e12:.4g} TFLOP/s ({self.peak.source})"
        )
        self._flops_per_unit, self._is_uncounted, self._uncounted_units = None, False, 0
        self._begin_window()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        unknown = self._flops_per_unit is None and (self._is_uncounted or not hasattr(pl_module, "flops"))
        if unknown and self._measuring is None:
            from lightning_gr.observability.product_counter import ProductCounter

            stack = ExitStack()
            self._measuring = (stack, stack.enter_context(ProductCounter()))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch is not None:  # which Lightning passes over
            self._count(pl_module, batch)
        if is_log_step(trainer):
            self._log(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_measuring()
        if self._began is not None:
            self._spans.append((self._began, _Mark(self._device)))
            self._began = None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._window:
            self._began = _Mark(self._device)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_measuring()
        if self._window:
            self._add_to_totals(by_rank(self._not_in_totals()))
        self._window, self._spans, self._began = {}, [], None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_measuring()
        # Other ranks may not come here: what is saved now has the totals of the last log step, without a collective.
        self._window, self._spans, self._began = {}, [], None

    # ---- operations --------------------------------------------------------------------------------------------

    def _count(self, module: pl.LightningModule, batch: Any) -> None:
        counts, found = work_of(module, batch)
        for name in _COUNTS:
            count = getattr(counts, name)
            self._window[name] += math.nan if count is None else count
        flops = self._flops_of(module, found, counts)
        for name in _FLOPS:
            count = getattr(flops, name)
            # A sum with a number of Python's would be one of float32.
            self._window[name] += count.double() if isinstance(count, Tensor) else count

    def _flops_of(self, module: pl.LightningModule, found: Any, counts: BatchCounts) -> ForwardFlops:
        if isinstance(found, ForwardFlops):
            return found
        if isinstance(found, Real | Tensor):
            return ForwardFlops(projections=found)  # type: ignore[arg-type]
        self._is_uncounted = True
        units = counts.samples if counts.tokens is None else counts.tokens
        if (counter := self._stop_measuring()) is not None and units:
            self._flops_per_unit = counter.flops / units
            what = "samples" if counts.tokens is None else "tokens"
            rank_zero_info(
                f"MFUMonitor: {type(module).__name__} has no flops(batch); taken are the matrix products that torch "
                f"counts in one batch, padding included: {self._flops_per_unit:.4g} operations for each of its {what}"
            )
        if self._flops_per_unit is None:
            self._uncounted_units += units  # until a batch is measured
        else:
            units, self._uncounted_units = units + self._uncounted_units, 0
        # Forward and backward together, of which ForwardFlops makes three times the forward.
        return ForwardFlops(projections=(self._flops_per_unit or 0.0) * units / 3)  # type: ignore[arg-type]

    def _stop_measuring(self) -> ProductCounter | None:
        if self._measuring is None:
            return None
        (stack, counter), self._measuring = self._measuring, None
        stack.close()
        return counter

    # ---- windows -----------------------------------------------------------------------------------------------

    def _begin_window(self) -> None:
        self._window = dict.fromkeys((*_COUNTS, *_FLOPS), 0.0)
        self._counted = dict.fromkeys(self.totals, 0.0)
        self._spans, self._began = [], _Mark(self._device)

    def _log(self, trainer: pl.Trainer) -> None:
        assert self.peak is not None
        if self._began is not None:
            self._spans.append((self._began, _Mark(self._device)))
        own = {name: float(value) for name, value in self._window.items()}
        own["seconds"] = sum(begin.seconds_to(end) for begin, end in self._spans)
        if self.peak.source == "measured" and own["hardware"] > self.peak.flops * own["seconds"] > 0:
            self._raise_peak(own["hardware"] / own["seconds"])
        own["peak"], own["memory"] = self.peak.flops, _peak_memory(self._device) / _GIB
        ranks = by_rank(own | self._not_in_totals())
        self._add_to_totals(ranks)
        log_values(trainer, {name: value for name, value in self._values(ranks).items() if not math.isnan(value)})
        self._begin_window()

    def _raise_peak(self, reached: float) -> None:
        """Takes the rate that training has reached for the peak, which other work must have lowered when measured."""
        assert self.peak is not None
        rank_zero_warn(
            f"MFUMonitor: training reached {reached / 1e12:.4g} TFLOP/s, above the {self.peak.flops / 1e12:.4g} "
            "measured for a peak at its start, when the machine must have been busy; that is the peak now. For an "
            "MFU that can be compared give peak_tflops, or measure on a quiet machine",
            category=RuntimeWarning,
        )
        self.peak = PeakRate(reached, "measured")

    def _values(self, ranks: dict[str, list[float]]) -> dict[str, float]:
        total = {name: sum(values) for name, values in ranks.items()}
        seconds = max(ranks["seconds"]) or math.nan
        slots, rectangle = total["tokens"] + total["padding"], total["rectangle"]
        return {
            "gr/mfu": total["model"] / (seconds * total["peak"]),
            "gr/hfu": total["hardware"] / (seconds * total["peak"]),
            "gr/tflops_per_device": total["model"] / (seconds * len(ranks["seconds"]) * 1e12),
            "gr/samples_per_second": total["samples"] / seconds,
            "gr/tokens_per_second": total["tokens"] / seconds,
            "gr/padding_share": total["padding"] / slots if slots else math.nan,
            "gr/padding_avoided": 1 - slots / rectangle if rectangle else math.nan,
            "gr/attention_share": total["attention"] / total["forward"] if total["forward"] else math.nan,
            "gr/flops_total": self.totals["flops"],
            "gr/tokens_total": math.nan if math.isnan(total["tokens"]) else self.totals["tokens"],
            "gr/peak_memory_gib": max(ranks["memory"]),
        }

    def _not_in_totals(self) -> dict[str, float]:
        """Of this rank's window, what the totals lack."""
        return {f"total {name}": self._in_window(name) - self._counted[name] for name in self.totals}

    def _in_window(self, name: str) -> float:
        found = float(self._window[_TOTALS[name]])
        return 0.0 if math.isnan(found) else found

    def _add_to_totals(self, ranks: dict[str, list[float]]) -> None:
        for name in self.totals:
            self.totals[name] += sum(ranks[f"total {name}"])
            self._counted[name] = self._in_window(name)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Lightning asks all ranks for it at once."""
        if self._window:
            self._add_to_totals(by_rank(self._not_in_totals()))
        return dict(self.totals)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = {name: float(state_dict[name]) for name in self.totals}


class _Mark:
    """A moment: of the host, or of a device's stream."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._at = time.perf_counter()

    def seconds_to(self, later: _Mark) -> float:
        """How long until another moment; waits for a device to get there."""
        if self._event is None or later._event is None:
            return later._at - self._at
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3


def _peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU what tensors took at most, of a host the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
