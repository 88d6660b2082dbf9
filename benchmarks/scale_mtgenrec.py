"""MTGenRec's training (arXiv 2505.12663) on 8 to 1,024 A100, simulated, beside the figures of its paper.

Taken from the paper: models, batches, lengths' mean and maximum, machines, tokens a second of one GPU (table 4; 480
samples of 600 tokens over table 2's 498 ms are 578,313, so table 4 is of one GPU). Not in the paper, and assumed: four
features of an item of 64 numbers each at 1D, ids by Zipf's law, the spread of lengths. Fitted to one number of figure
12: for each of these features three that have few values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from scale_figures import Figure
from scale_ids import LogNormalLengths, ZipfIds
from scale_network import A100
from scale_step import Outcome, Training, simulate

from lightning_gr.balancing import SequenceCost

SIZES: dict[str, dict[str, Any]] = {
    "4G": {"dim": 512, "num_layers": 3, "num_heads": 2},
    "110G": {"dim": 1024, "num_layers": 22, "num_heads": 4},
}
BATCH = {"4G": (480, 496), "110G": (80, 116)}  # table 3: fixed, balanced
TOKENS_A_SECOND = {("4G", 1): 579_649, ("4G", 8): 438_190, ("4G", 64): 155_832, ("110G", 1): 68_993}  # table 4
GPUS = (16, 32, 64, 128)
SCALING = {
    ("4G", 1): (1.93, 3.76, 6.95, 12.56),
    ("110G", 1): (1.87, 3.68, 6.78, 12.24),
    ("4G", 2): (1.89, 3.57, 6.57, 11.29),
    ("4G", 64): (1.84, 3.48, 5.82, 10.04),
}
BALANCE_GPUS = (8, 16, 32, 64)
BALANCE = {"4G": (0.028, 0.039, 0.044, 0.065), "110G": (0.20, 0.227, 0.296, 0.335)}  # figure 11
DEDUP_GPUS = (16, 32, 64)
DEDUP = {  # figure 12: its three bars multiplied, which does not ask which bar is which
    1: (1.017 * 1.057 * 1.032, 1.026 * 1.150 * 1.094, 1.138 * 1.209 * 1.103),
    64: (1.255 * 2.186 * 1.049, 1.376 * 2.318 * 1.128, 1.527 * 2.416 * 1.161),
}
WIDTH = 4 * 64  # numbers of a token at 1D
LOOKUPS = 4  # of that width, of which one is of items
STALL_RATE = 1 / 512
LENGTHS = LogNormalLengths(mean=600, longest=3000)


@cache
def flops(size: str) -> tuple[SequenceCost, int]:
    """Operations of a sequence, and bytes of the blocks' gradients."""
    import torch

    from lightning_gr.layers.hstu import HSTUEncoder
    from lightning_gr.models.sequence_cost import causal

    with torch.device("meta"):
        encoder = HSTUEncoder(**SIZES[size])
    return causal(encoder.flops), sum(p.numel() for p in encoder.parameters()) * 4


def training(size: str, factor: int, seconds_a_token: float, more: float = 0.0, **changes: Any) -> Training:
    """A model with tables of a dimension factor.

    Args:
        size: of `SIZES`.
        factor: of all tables' dimensions.
        seconds_a_token: of the blocks, at the mean length.
        more: of what grows with the tables' width: seconds of a token.
        changes: of the settings.
    """
    cost, dense_bytes = flops(size)
    per_second = seconds_a_token * LENGTHS.mean / float(cost(np.array(LENGTHS.mean)))
    run = Training(
        machine=A100,
        ranks=8,
        lengths=LENGTHS,
        samples=BATCH[size][1],
        cost=SequenceCost(cost.linear * per_second + more, cost.quadratic * per_second),
        dense_bytes=dense_bytes,
        ids=ZipfIds(4_302_391, 1.05, few=1 - 1 / LOOKUPS),
        ids_per_token=LOOKUPS,
        row_bytes=WIDTH * factor * 4,
    )
    return replace(run, **changes)


def of_one_gpu(outcome: Outcome, ranks: int) -> float:
    """Tokens a second."""
    return outcome.throughput / ranks


@cache
def calibrated(size: str, stall: float) -> tuple[float, float]:
    """Seconds of a token on 8 GPUs, and what each more of the tables' dimension adds to them.

    Of 4G both, from 1D and 64D; of 110G the first, and the second is 4G's.
    """

    def token_seconds(factor: int, found: float, more: float = 0.0) -> float:
        wanted = 1 / TOKENS_A_SECOND[size, factor]
        for _ in range(3):
            outcome = run_it(training(size, factor, found, more * (factor - 1)), stall)
            found += wanted - 1 / of_one_gpu(outcome, 8)
        return found

    narrow = token_seconds(1, 1 / TOKENS_A_SECOND[size, 1])
    if size != "4G":
        return narrow, calibrated("4G", stall)[1]
    wide, more = 1 / TOKENS_A_SECOND["4G", 64], 0.0
    for _ in range(3):
        more += (wide - 1 / of_one_gpu(run_it(training(size, 64, narrow, more * 63), stall), 8)) / 63
    return narrow, more


def run_it(run: Training, stall: float, steps: int | None = None) -> Outcome:
    """Simulates, with ranks that stand still for so many seconds now and then."""
    few = steps or max(512 // run.ranks, 8)
    return simulate(replace(run, stall_rate=STALL_RATE, stall=stall), steps=few, warm_up=2)


def published_size(size: str, factor: int, stall: float, **changes: Any) -> Training:
    """A calibrated training."""
    token, more = calibrated(size, stall)
    return training(size, factor, token, more * (factor - 1), **changes)


def speedups(size: str, factor: int, stall: float, **changes: Any) -> tuple[float, ...]:
    """Throughput of `GPUS` over that of 8."""
    base = run_it(published_size(size, factor, stall, **changes), stall).throughput
    return tuple(run_it(published_size(size, factor, stall, ranks=n, **changes), stall).throughput / base for n in GPUS)


def fit_stall() -> float:
    """Seconds for which a rank stands still once in 512 steps, with which 4G 1D scales as published; least squares."""
    tokens = BATCH["4G"][1] * LENGTHS.mean
    step = tokens / TOKENS_A_SECOND["4G", 1]
    free = speedups("4G", 1, 0.0)
    # A stall of d seconds adds d times (its chance in a step) to the steps of N and of 8 ranks.
    xs, ys = [], []
    for ranks, published, simulated in zip(GPUS, SCALING["4G", 1], free, strict=True):
        chance, chance_8 = (1 - (1 - STALL_RATE) ** n for n in (ranks, 8))
        slower = ranks / 8 / published - ranks / 8 / simulated
        xs.append(chance - chance_8)
        ys.append(slower * step)
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)


def figures(stall: float) -> list[Figure]:
    """All that is compared; without stalls and with them."""
    found = []
    for (size, factor), wanted in TOKENS_A_SECOND.items():
        kind: Any = "predicted" if factor == 8 else "calibrated"
        simulated = of_one_gpu(run_it(published_size(size, factor, stall), stall), 8)
        found.append(Figure("MTGenRec table 4, tokens/s of a GPU", f"{size} {factor}D", wanted, simulated, kind))
    for (size, factor), of_gpus in SCALING.items():
        for name, seconds in (("no stalls", 0.0), ("stalls", stall)):
            kind = "fitted" if seconds and (size, factor) == ("4G", 1) else "predicted"
            for ranks, wanted, simulated in zip(GPUS, of_gpus, speedups(size, factor, seconds), strict=True):
                table = f"MTGenRec speed-up over 8 GPUs, {name}"
                found.append(Figure(table, f"{size} {factor}D, {ranks}", wanted, simulated, kind))
    for size, gains in BALANCE.items():
        for ranks, wanted in zip(BALANCE_GPUS, gains, strict=True):
            on = published_size(size, 1, stall, ranks=ranks)
            off = replace(on, deal="as_they_come", samples=BATCH[size][0])
            gain = run_it(on, stall).throughput / run_it(off, stall).throughput
            table = "MTGenRec figure 11, balanced over not"
            found.append(Figure(table, f"{size}, {ranks}", 1 + wanted, gain))
    for factor, gains in DEDUP.items():
        for ranks, wanted in zip(DEDUP_GPUS, gains, strict=True):
            run = published_size("4G", factor, stall, ranks=ranks)
            gain = run_it(run, stall).throughput / run_it(replace(run, dedup="none"), stall).throughput
            kind = "fitted" if (factor, ranks) == (64, 16) else "predicted"
            table = "MTGenRec figure 12, distinct ids over all"
            found.append(Figure(table, f"4G {factor}D, {ranks}", wanted, gain, kind))
    return found
