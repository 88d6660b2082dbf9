"""Balance of a step over 8 to 1,024 ranks, simulated by the cost model, and how long the deal takes.

python benchmarks/bench_balance.py [--batches 200] [--json]

A sequence costs what `HSTUEncoder` of MTGR-small's size (width 512, 3 layers) counts for its forward under a causal
mask. Lengths are log-normal with mean 600 and sigma 1, cut off at a cap; a global batch has 8 sequences a rank, and is
dealt out over the ranks by each partitioner. `imbalance`: (max - mean) / max of the ranks' costs, a mean over batches,
cap 2,048; `imbalance_unbalanced_R` is that of consecutive sequences, `imbalance_balanced_R` the default partitioner's.
`excess`, cap 8,192: how far the costliest rank lies above the larger of the mean and the longest sequence, below which
no deal can come. `ms per 1k`: milliseconds to deal out a thousand sequences of such batches, the best of three for each
batch, median over batches; `plan_ms_per_1k` is the worst of all numbers of ranks. `deal_ms_1024`: a rank's share of a
batch of a plan, over 1,024 ranks, its order and lengths looked up in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
RANKS, A_RANK, MEAN, SIGMA = (8, 16, 64, 1024), 8, 600, 1.0


def draw(generator: np.random.Generator, count: int, cap: int) -> np.ndarray[Any, Any]:
    lengths = generator.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(np.rint(lengths), 1, cap).astype(np.int64)


def model_cost() -> Any:
    import torch

    from lightning_gr.layers.hstu import HSTUEncoder
    from lightning_gr.models.sequence_cost import causal

    with torch.device("meta"):
        return causal(HSTUEncoder(dim=512, num_layers=3, num_heads=2).flops)


def measure(method: Any, ranks: int, batches: int, cost: Any) -> tuple[float, float, float]:
    """Imbalance at cap 2,048, excess at cap 8,192, and milliseconds for a thousand sequences."""
    from lightning_gr.balancing.partition import imbalance, partition

    generator = np.random.default_rng(ranks)
    partition(np.ones(1), 1, method=method)  # once, compiles
    imbalances, excesses, times = [], [], []
    for _ in range(batches):
        costs = cost(draw(generator, A_RANK * ranks, 2048))
        spent = []
        for _ in range(3):
            started = time.perf_counter()
            parts = partition(costs, ranks, method=method)
            spent.append(time.perf_counter() - started)
        times.append(min(spent) * 1e6 / len(costs))
        imbalances.append(imbalance(costs, parts))
        costs = cost(draw(generator, A_RANK * ranks, 8192))
        most = max(float(costs[part].sum()) for part in partition(costs, ranks, method=method))
        excesses.append(most / max(float(costs.sum()) / ranks, float(costs.max())) - 1)
    return statistics.fmean(imbalances), statistics.fmean(excesses), statistics.median(times)


def deal_ms(cost: Any, batches: int) -> float:
    """Milliseconds of a rank's share of a batch, over the most ranks."""
    from lightning_gr.data.plan import ArraySamples, Deal, GlobalBatchPlan

    lengths = draw(np.random.default_rng(0), A_RANK * RANKS[-1] * (batches + 1), 2048)
    plan = GlobalBatchPlan(ArraySamples(lengths, {"task": lengths}), global_tokens=A_RANK * RANKS[-1] * MEAN)
    epoch, times = plan.epoch(0), []
    for batch in range(batches):
        epoch.samples(batch)  # reads the window's order, which comes once for many batches
        started = time.perf_counter()
        epoch.rank_samples(batch, rank=0, world_size=RANKS[-1], deal=Deal(cost=cost))
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200, help="of each number of ranks; a tenth of it for 1,024")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from lightning_gr.balancing import Balancing, Method

    default, cost = Balancing().partitioner, model_cost()
    print(f"{device()}; commit {commit()}; {A_RANK} sequences a rank, log-normal, mean {MEAN}, sigma {SIGMA}")
    print(f"{'partitioner':<16}{'ranks':>6}{'imbalance':>12}{'excess':>10}{'ms per 1k':>11}")
    found = {}
    for method in get_args(Method):
        for ranks in RANKS:
            figures = found[method, ranks] = measure(
                method, ranks, max(args.batches // (1 + 9 * (ranks > 64)), 1), cost
            )
            print(f"{method:<16}{ranks:>6}{figures[0]:>12.4f}{figures[1]:>10.4f}{figures[2]:>11.3f}")
    result: dict[str, Any] = {"batches": args.batches, "partitioner": default}
    for ranks in RANKS:
        result[f"imbalance_balanced_{ranks}"] = round(found[default, ranks][0], 5)
        result[f"imbalance_unbalanced_{ranks}"] = round(found["contiguous", ranks][0], 4)
        result[f"imbalance_excess_{ranks}"] = round(found[default, ranks][1], 5)
    result["plan_ms_per_1k"] = round(max(found[default, ranks][2] for ranks in RANKS), 3)
    result["deal_ms_1024"] = round(deal_ms(cost, 20), 2)
    for name, goal in (("imbalance_balanced", 0.01), ("imbalance_excess", 0.005)):
        worst = max(result[f"{name}_{ranks}"] for ranks in RANKS)
        print(f"{name:<24}{worst:>10}   worst of all ranks, {default}; goal {goal} at most")
    print(f"{'plan_ms_per_1k':<24}{result['plan_ms_per_1k']:>10}   goal 1 at most")
    print(f"{'deal_ms_1024':<24}{result['deal_ms_1024']:>10}   a whole batch of a plan over 1,024 ranks")
    publish("balance", result, as_json=args.json)


if __name__ == "__main__":
    main()
