"""Softmax over sampled negatives and over all items: the fused losses against the materialised form.

python benchmarks/bench_softmax.py [--threads 2] [--rounds 5] [--json]

`softmax_speedup`, `softmax_memory_ratio`: sampled softmax, forward and backward, against gathering the embeddings of
all negatives (T, R, D), `einsum` and `cross_entropy`. `full_softmax_...`: against `cross_entropy` of the matrix (T, C).
Times are minima of rounds in which the forms take turns. Memory is the growth of the resident set to its peak, each
form in a process of its own, gradients included, inputs not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import commit, device, publish
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = {"tokens": 16_384, "negatives": 128, "rows": 20_000, "dim": 64}
FULL = {"tokens": 4_096, "items": 50_000, "dim": 64}


def sampled(tokens: int, negatives: int, rows: int, dim: int) -> dict[str, Callable[[], Tensor]]:
    """The two forms of the loss on the same inputs; calling one returns the sum of losses."""
    from lightning_gr.ops.sampled_softmax import sampled_softmax_loss

    torch.manual_seed(0)
    queries_TD, rows_UD = (torch.randn(n, dim, requires_grad=True) for n in (tokens, rows))
    targets_T, negatives_TR = torch.randint(rows, (tokens,)), torch.randint(rows, (tokens, negatives))

    def materialised() -> Tensor:
        indices_TK = torch.cat([targets_T[:, None], negatives_TR], 1)
        logits_TK = torch.einsum("td,tkd->tk", queries_TD, F.embedding(indices_TK, rows_UD))
        collides_TK = F.pad(negatives_TR == targets_T[:, None], (1, 0))
        masked_TK = logits_TK.masked_fill(collides_TK, -torch.inf)
        return F.cross_entropy(masked_TK, torch.zeros_like(targets_T), reduction="sum")

    def fused() -> Tensor:
        return sampled_softmax_loss(queries_TD, rows_UD, targets_T=targets_T, negatives_TR=negatives_TR).sum()

    return {"materialised": materialised, "fused": fused}


def full(tokens: int, items: int, dim: int) -> dict[str, Callable[[], Tensor]]:
    from lightning_gr.ops.full_softmax import full_softmax_loss

    torch.manual_seed(0)
    queries_TD, items_CD = (torch.randn(n, dim, requires_grad=True) for n in (tokens, items))
    targets_T = torch.randint(items, (tokens,))
    return {
        "materialised": lambda: F.cross_entropy(queries_TD @ items_CD.T, targets_T, reduction="sum"),
        "fused": lambda: full_softmax_loss(queries_TD, items_CD, targets_T=targets_T).sum(),
    }


LOSSES: dict[str, tuple[Callable[..., dict[str, Callable[[], Tensor]]], dict[str, int]]] = {
    "sampled": (sampled, SAMPLED),
    "full": (full, FULL),
}


def seconds(loss: str, rounds: int) -> dict[str, float]:
    """Least seconds of forward and backward by form."""
    make, sizes = LOSSES[loss]
    forms, best = make(**sizes), {}
    for form in forms.values():
        form().backward()  # loads and, once, compiles
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form().backward()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    return best


def peak_bytes(loss: str, form: str) -> int:
    """Growth of the resident set to its peak; in a process of its own."""
    make, sizes = LOSSES[loss]
    make(**dict.fromkeys(sizes, 64))[form]().backward()  # loads libraries
    forms = make(**sizes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    forms[form]().backward()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_bytes(*args.memory))
        return
    print(f"{device()}; commit {commit()}; torch {torch.__version__}, {args.threads} threads, float32")
    result: dict[str, Any] = {"threads": args.threads}
    for loss, (_, sizes) in LOSSES.items():
        times = seconds(loss, args.rounds)
        peaks = {}
        for form in times:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--memory", loss, form]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[form] = int(done.stdout)
        print(f"{loss} softmax: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()))
        for form in times:
            print(f"  {form:<14}{times[form] * 1e3:>10,.0f} ms{peaks[form] / 1e6:>10,.0f} MB")
            result[f"{loss}_{form}_ms"] = round(times[form] * 1e3, 1)
            result[f"{loss}_{form}_mb"] = round(peaks[form] / 1e6, 1)
        prefix = "softmax" if loss == "sampled" else "full_softmax"
        speedup, ratio = times["materialised"] / times["fused"], peaks["fused"] / peaks["materialised"]
        result |= {f"{prefix}_speedup": round(speedup, 2), f"{prefix}_memory_ratio": round(ratio, 4)}
        limits = "   (limits 2 and 0.1)" if loss == "sampled" else ""
        print(f"  speedup {speedup:.1f}, memory ratio {ratio:.3f}{limits}")
    publish("softmax", result, as_json=args.json)


if __name__ == "__main__":
    main()
