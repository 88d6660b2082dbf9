"""TurboGR's training (arXiv 2605.13433) on 8 to 1,024 Ascend 910B, simulated, beside the figures of its paper.

Taken from the paper: table 1, the batches of table 9, widths, 130 lookups a token (its 1,064,960 ids are 130 for each
of 8,192 tokens: history, target, 128 negatives), machines, sixteen processors in the trial of balance. Not in the
paper, and assumed: that table 1 is of 128 processors against 32; that groups of tables were tried on two nodes,
one group on each; the distribution of lengths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from scale_figures import Figure, solve
from scale_ids import LogNormalLengths, ZipfIds
from scale_network import ASCEND
from scale_step import Outcome, Training, simulate

from lightning_gr.balancing import SequenceCost

TABLE_1 = {  # dense parameters in millions, samples of a processor, width, samples/s, linearity
    "HSTU-tiny": (0.17, 15, 128, 3475.17, 0.38),
    "HSTU-small": (1.33, 8, 256, 3508.59, 0.58),
    "HSTU-medium": (10.52, 5, 512, 2896.00, 0.70),
    "HSTU-large": (83.97, 2, 1024, 1616.83, 0.93),
    "HSTU-long": (83.97, 1, 1024, 770.79, 0.97),
    "FuXi-tiny": (0.41, 15, 128, 3441.32, 0.35),
    "FuXi-small": (3.18, 8, 256, 3218.31, 0.50),
    "FuXi-medium": (25.22, 5, 512, 2812.24, 0.74),
    "FuXi-large": (201.55, 2, 1024, 1156.26, 0.94),
    "FuXi-long": (201.55, 1, 1024, 574.39, 0.97),
}
FEW, MANY = 32, 128
STEPS, WARM_UP = 12, 6
LOOKUPS = 130
FILLED = 1 - 537_019 / 1_064_960  # of a padded batch
ITEMS = ZipfIds(5_000_000, 0.0)  # negatives are uniform
BALANCE = {"tokens": (10_726, 559), "step": (2.340, 1.540), "delay": (1.100, 0.037), "imbalance": (0.4701, 0.0240)}
GROUPS = {"step": (1.970, 1.790), "all-to-all": (0.498, 0.120), "exchange": (0.613, 0.373)}
SEMI_ASYNC = {"exposed": (0.45929, 0.02937), "share": (0.2412, 0.0219)}
PIPELINE = {"compute": 0.65639, "exchange": 0.32656, "exposed": 0.03878}
"""Of FuXi-large: seconds."""


def training(millions: float, samples: int, width: int, seconds: float, length: int = 2048, **changes: Any) -> Training:
    """A model of table 1.

    Args:
        millions: of dense parameters.
        samples: of a processor.
        width: of a row.
        seconds: that a processor computes for a sample.
        length: most tokens of a sequence.
        changes: of the settings.
    """
    tokens = round(length * FILLED)
    run = Training(
        machine=ASCEND,
        ranks=FEW,
        lengths=LogNormalLengths(mean=tokens, longest=length, sigma=0.5),
        samples=samples,
        cost=SequenceCost(seconds / tokens, 0.0),
        dense_bytes=millions * 4e6,
        ids=ITEMS,
        ids_per_token=LOOKUPS,
        row_bytes=width * 4,
        deal="lpt",
        schedule="semi_async",
        depth=5,
    )
    return replace(run, **changes)


@cache
def sample_seconds(name: str) -> float:
    """Seconds that a processor computes for a sample, with which few processors are as fast as table 1 implies."""
    *_, rate, linearity = TABLE_1[name]
    wanted = seconds = MANY * linearity / rate
    for _ in range(3):
        outcome = simulate(of_table_1(name, seconds), steps=STEPS, warm_up=WARM_UP)
        seconds *= wanted / (FEW * outcome.step / outcome.samples)
    return seconds


def of_table_1(name: str, seconds: float, **changes: Any) -> Training:
    """A model of the table, with seconds of a sample."""
    millions, samples, width, *_ = TABLE_1[name]
    return training(millions, samples, width, seconds, 4096 if "long" in name else 2048, **changes)


@cache
def host_seconds() -> float:
    """Seconds of each host for each sample of all ranks, with which HSTU-tiny scales as published; fitted.

    Where a host has more to do than its processor, the step is the host's, so this is one over the samples a second.
    """
    return 1 / TABLE_1["HSTU-tiny"][3]


def linearities() -> list[Figure]:
    """Table 1: samples a second of many processors over those of few, times their numbers. Calibrated: those of few."""
    found = []
    for name, (*_, linearity) in TABLE_1.items():
        few = simulate(of_table_1(name, sample_seconds(name)), steps=STEPS, warm_up=WARM_UP)
        for text, host in (("no host work", 0.0), ("host work", host_seconds())):
            kind: Any = "fitted" if host and name == "HSTU-tiny" else "predicted"
            run = of_table_1(name, sample_seconds(name), ranks=MANY, host_per_sample=host)
            many = simulate(run, steps=STEPS, warm_up=WARM_UP)
            share = many.samples / many.step / (few.samples / few.step) * FEW / MANY
            found.append(Figure(f"TurboGR table 1, linearity, {text}", name, linearity, share, kind))
    return found


def balance() -> list[Figure]:
    """The trial of global reallocation on 16 processors; time grows with tokens alone.

    Calibrated: seconds of a token, from the first two rows; tokens of a processor, from the balanced step; the spread
    of lengths, from the unbalanced tokens. Eight samples a processor of at most 8,192 tokens are assumed.
    """
    a_token = BALANCE["delay"][0] / BALANCE["tokens"][0]
    mean = (BALANCE["step"][1] - BALANCE["delay"][1] / 2) / a_token / 8

    def run(sigma: float, **changes: Any) -> Outcome:
        lengths = LogNormalLengths(mean=mean, longest=8192, sigma=sigma)
        made = Training(
            machine=ASCEND, ranks=16, lengths=lengths, samples=8, cost=SequenceCost(a_token, 0.0), buckets=1
        )
        return simulate(replace(made, **changes), steps=60, warm_up=1)

    sigma = solve(lambda x: run(x, deal="as_they_come").token_range, BALANCE["tokens"][0], 0.05, 2.0)
    found = []
    for place, (name, deal) in enumerate((("as they come", "as_they_come"), ("greedy", "greedy"), ("lpt", "lpt"))):
        outcome = run(sigma, deal=deal)
        simulated = {
            "tokens": outcome.token_range,
            "step": outcome.step,
            "delay": outcome.delay,
            "imbalance": outcome.delay / outcome.step,
        }
        for figure, wanted in BALANCE.items():
            kind: Any = "calibrated" if place == 0 and figure in ("tokens", "delay") else "predicted"
            published = wanted[min(place, 1)]
            found.append(
                Figure("TurboGR balance, 16 processors", f"{figure}, {name}", published, simulated[figure], kind)
            )
    return found


def table_groups() -> list[Figure]:
    """Two groups instead of one on two nodes. Calibrated: the tokens that one group's all-to-alls and its step take."""
    dense = GROUPS["step"][0] - GROUPS["all-to-all"][0]

    def run(samples: float, groups: int) -> Outcome:
        made = training(201.55, 4, 1024, dense / 4, ranks=16, schedule="ids_ahead", table_groups=groups)
        return simulate(replace(made, ids_per_token=LOOKUPS * samples), steps=10)

    factor = solve(lambda x: run(x, 1).rows_seconds, GROUPS["all-to-all"][0], 0.01, 20.0)
    found = []
    for place, groups in enumerate((1, 2)):
        outcome = run(factor, groups)
        simulated = {"step": outcome.step, "all-to-all": outcome.rows_seconds, "exchange": outcome.sparse}
        for figure, wanted in GROUPS.items():
            kind: Any = "calibrated" if place == 0 and figure != "exchange" else "predicted"
            name = f"{figure}, {groups} group{'s' * place}"
            found.append(Figure("TurboGR table groups", name, wanted[place], simulated[figure], kind))
    return found


def overlap() -> list[Figure]:
    """Semi-asynchronous training, and the shares of the six stages. Calibrated: what is computed, and what is sent."""
    step = SEMI_ASYNC["exposed"][0] / SEMI_ASYNC["share"][0]
    dense = step - SEMI_ASYNC["exposed"][0]

    def run(factor: float, schedule: Any, seconds: float = dense) -> Outcome:
        made = training(201.55, 4, 1024, seconds / 4, ranks=32, schedule=schedule)
        return simulate(replace(made, ids_per_token=LOOKUPS * factor), steps=10)

    factor = solve(lambda x: run(x, "ids_ahead").exposed, SEMI_ASYNC["exposed"][0], 0.01, 20.0)
    sync, semi = run(factor, "ids_ahead"), run(factor, "semi_async")
    table = "TurboGR semi-asynchronous"
    found = [
        Figure(table, "exposed, sync", SEMI_ASYNC["exposed"][0], sync.exposed, "calibrated"),
        Figure(table, "step, sync", step, sync.step, "calibrated"),
        Figure(table, "exposed, semi_async", SEMI_ASYNC["exposed"][1], semi.step - semi.busy),
        Figure(table, "step, semi_async", SEMI_ASYNC["exposed"][1] / SEMI_ASYNC["share"][1], semi.step),
    ]
    sent = solve(lambda x: run(x, "semi_async", PIPELINE["compute"]).sparse, PIPELINE["exchange"], 0.01, 20.0)
    six = run(sent, "semi_async", PIPELINE["compute"])
    table = "TurboGR six stages, FuXi-large"
    found.append(Figure(table, "exchange", PIPELINE["exchange"], six.sparse, "calibrated"))
    found.append(Figure(table, "exposed", PIPELINE["exposed"], six.step - six.busy))
    found.append(Figure(table, "compute over step", 0.9425, six.busy / six.step))
    return found


def figures() -> list[Figure]:
    """All that is compared."""
    return linearities() + balance() + table_groups() + overlap()
