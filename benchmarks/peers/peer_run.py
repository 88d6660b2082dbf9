"""One training of one peer in a process of its own: its clock, its memory, its lists, written as JSON.

A run is of speed (`--seconds`: trains that long behind `WARM_UP_STEPS` steps, mid-epoch or over several epochs) or of
quality (`--epochs`: after each epoch the lists for validation, and for the test where validation is the best so far; no
epoch begins once `--budget` seconds of training are spent). Each script run_PEER.py gives `main` a function that builds
its `System`, and imports at its top all that it trains with.

Seconds of an epoch are, in a run of speed, those from one step's end to another's, times the steps of an epoch; in a
run of quality, those between `Meter.begin` and `Meter.end`. Memory is the most resident until training ends or is first
evaluated, beyond what is resident when imports are done.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peer_log import Array, Part, PeerLog
from peer_quality import quality

WARM_UP_STEPS = 5
TOP_K = 10


class EnoughError(Exception):
    """Raised out of a step when the seconds of a run are over."""


class System(Protocol):
    """A peer, ready to train.

    `steps_per_epoch` is of its own batches; `settings` says in a line what it trains with.
    """

    steps_per_epoch: int
    settings: str

    def train(self, epochs: int, meter: Meter) -> None:
        """Trains; calls `Meter.begin` and `Meter.end` about the training of each epoch and `Meter.evaluate` after it.

        Args:
            epochs: at most.
            meter: to call; in a run of speed it evaluates nothing.
        """
        ...


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` resident now, ``VmHWM`` the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


class Meter:
    """Clock, memory and lists of a run.

    Args:
        log: whose items are asked for.
        seconds: of a run of speed; None for a run of quality.
        budget: seconds of training after which a run of quality begins no other epoch.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        log: PeerLog,
        seconds: float | None,
        budget: float = float("inf"),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        gc.collect()
        self.log, self.seconds, self.budget, self.clock = log, seconds, budget, clock
        self.imports_bytes = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        self.peak_bytes = 0
        self.steps: list[float] = []
        self.trained = 0.0
        self.epochs: list[dict[str, Any]] = []
        self._began: float | None = None

    def watch_optimizers(self) -> None:
        """Takes every step of every torch optimizer of this process for a step of training."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """A step of training is done.

        Raises:
            EnoughError: when the seconds of a run of speed are over.
        """
        self.steps.append(self.clock())
        measured = self.steps[WARM_UP_STEPS:]
        if self.seconds is not None and len(measured) > 1 and measured[-1] - measured[0] >= self.seconds:
            raise EnoughError

    def begin(self) -> None:
        """Training begins or goes on."""
        self._began = self.clock()

    def end(self) -> None:
        """Training pauses. A second call in a row has no effect."""
        if self._began is not None:
            self.trained += self.clock() - self._began
            self._began = None
        self.note_peak()

    def note_peak(self) -> None:
        """Looks at the memory, the first time it is called."""
        self.peak_bytes = self.peak_bytes or memory("VmHWM") - self.imports_bytes

    def evaluate(self, lists: Callable[[Part], Array]) -> bool:
        """Judges the lists of an epoch; whether another epoch may begin.

        Args:
            lists: item ids (U, K) by part of the log.
        """
        if self.seconds is not None:
            return True
        found = {f"val_{name}": x for name, x in quality(lists("val"), self.log.asked("val")).items()}
        best = max((x["val_recall"] for x in self.epochs), default=-1.0)
        if found["val_recall"] > best:
            found |= {f"test_{name}": x for name, x in quality(lists("test"), self.log.asked("test")).items()}
        self.epochs.append({"epoch": len(self.epochs) + 1, "trained_s": self.trained, **found})
        print(json.dumps(self.epochs[-1]), flush=True)
        return self.trained < self.budget

    def step_seconds(self) -> float | None:
        """Seconds a step in a run of speed, the first ones left out."""
        measured = self.steps[WARM_UP_STEPS:]
        return (measured[-1] - measured[0]) / (len(measured) - 1) if len(measured) > 1 else None


def in_batches(rows: Array, size: int) -> list[Array]:
    """Rows in pieces of `size`."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def samples_of(tokens: int, log: PeerLog) -> int:
    """Users whose targets are about `tokens`, for a peer whose batch is a number of users."""
    return max(1, round(tokens * len(log.sequences) / log.num_targets))


def parser() -> argparse.ArgumentParser:
    """Of the options that every peer takes; the driver gives them."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", required=True, help="the log, as the driver cut it")
    found.add_argument("--out", required=True, help="the JSON file to write")
    found.add_argument("--model", default="", help="where a package has several")
    found.add_argument("--seconds", type=float, help="a run of speed: how long to measure")
    found.add_argument("--epochs", type=int, default=1, help="a run of quality: epochs")
    found.add_argument("--budget", type=float, default=float("inf"), help="seconds of training; see above")
    found.add_argument("--tokens", type=int, default=2048, help="targets of a batch, about")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--max-length", type=int, default=50)
    found.add_argument("--dim", type=int, default=64)
    found.add_argument("--layers", type=int, default=2)
    found.add_argument("--heads", type=int, default=2)
    found.add_argument("--seed", type=int, default=1)
    return found


def main(build: Callable[[PeerLog, argparse.Namespace], System], *, packages: Sequence[str]) -> None:
    """Runs a peer by the command line.

    Args:
        build: makes the system.
        packages: whose versions the result names.
    """
    import torch

    args = parser().parse_args()
    sys.argv = sys.argv[:1]  # a peer may read the command line too
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    log = PeerLog.read(args.data)
    meter = Meter(log=log, seconds=args.seconds, budget=args.budget)
    system = build(log, args)
    try:
        system.train(args.epochs if args.seconds is None else 10**6, meter)
    except EnoughError:
        meter.note_peak()
    result = {
        "settings": system.settings,
        "versions": ", ".join([f"Python {sys.version.split()[0]}", *(f"{x} {metadata.version(x)}" for x in packages)]),
        "targets": log.num_targets,
        "steps_per_epoch": system.steps_per_epoch,
        "measured_steps": max(0, len(meter.steps) - WARM_UP_STEPS - 1),
        "step_s": meter.step_seconds(),
        "peak_bytes": meter.peak_bytes,
        "epochs": meter.epochs,
    }
    unfinished = Path(f"{args.out}.part")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    os.replace(unfinished, args.out)
