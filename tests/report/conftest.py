"""Runs with everything that a report shows, written as ReportCallback writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gr.report.lengths import count_lengths
from lightning_gr.report.run_files import RunFiles

NASTY = "<script>alert('&')</script> $x_1$ \"quoted\""


def _row(tokens: float, waits: float) -> dict[str, float]:
    found = {"tokens": tokens, "flops": 1e6 * tokens, "waits": waits}
    return {
        f"{name}_{kind}": x for name, value in found.items() for kind, x in (("mean", value), ("most", 1.5 * value))
    }


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """``write_run(folder, name=, lr=, steps=)`` writes ``folder/report`` and returns the folder."""

    def write(folder: Path, *, name: str = "a run", lr: float = 0.1, steps: int = 700) -> Path:
        files = RunFiles(folder / "report")
        files.begin(step=0)
        lengths = count_lengths(np.random.default_rng(0).integers(0, 300, 1000))
        for step in range(10, steps + 1, 10):
            noise = math.sin(step)
            values = {
                "train/loss": 5 * math.exp(-lr * step / 50) + 0.1 * noise,
                "train/broken": math.nan if step == 20 else 1.0,
                "gr/mfu": 0.3 + 0.01 * noise,
                "gr/hfu": 0.35 + 0.01 * noise,
                "gr/tokens_per_second": 4e4 + 1e3 * noise,
                "gr/wait_share": 0.04,
                "gr/exposed_exchange_share": 0.13,
                "gr/data_wait_share": 0.02,
                "gr/imbalance_flops": 1.02,
                "gr/imbalance_tokens": 1.1,
                f"gr/table/{NASTY}/rows": 100.0 * step,
                "gr/table/user/rows": 40.0 * step,
                "gr/table/user/load_factor": 0.5,
            }
            counts = [int(x) for x in lengths * step // steps]
            files.append(step=step, seconds=0.1 * step, values=values, lengths=counts)
            if step % 100 == 0:
                validated = {
                    "val/loss": 3 - step / 1000,
                    "val/NDCG@10": 0.4 * (1 - math.exp(-step / 200)) - (step == steps),
                }
                files.append(step=step, seconds=0.1 * step, values=validated)
        note = NASTY.replace("'", "")
        facts: dict[str, Any] = {
            "name": name,
            "state": "finished",
            "started": "2026-01-01 00:00 UTC",
            "seconds": 0.1 * steps,
            "step": steps,
            "ranks": 2,
            "monitor": {"name": "val/NDCG@10", "mode": "max"},
            "config": f"trainer:\n  max_epochs: 3\nmodel:\n  lr: {lr}\n  layers: [1, 2]\n  note: '{note}'\n",
            "environment": {"torch": "2.13.0", "device": "a device"},
            "histograms": {"gr/table/user/age": [10.0, 5.0, 2.0]},
            "balance": {
                "steps": 70,
                "partitioner": "lpt",
                "dealt": {"contiguous": [_row(520, 0.11), _row(500, 0.14)], "lpt": [_row(511, 0.002), _row(509, 0.0)]},
                "stages": {},
            },
        }
        files.write_facts(facts)
        return folder

    return write
