"""How fast the fused operators of an HSTU layer are on this CPU, against the same in plain torch operations.

python benchmarks/bench_layer_ops.py [--tokens 40000] [--dim 512] [--threads 2] [--repeats 5] [--json]

Forward and backward of `uvqk_projection` (D to 4 D) and of `group_layer_norm` with a gate, with and without dropout, in
float32. The two sides take turns; each time is the least of its repeats. `peak_mb` is what a forward and backward adds
to the memory of a process of its own, inputs and their gradients aside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
OPS = ("uvqk", "norm", "norm_dropout")


def calls(op: str, num_tokens: int, dim: int) -> tuple[dict[str, Callable[[], Any]], list[Any], Any]:
    """The two sides, the tensors that want gradients, and the gradient that comes in."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    from lightning_gr.ops.group_layer_norm import group_layer_norm
    from lightning_gr.ops.uvqk_projection import uvqk_projection

    torch.manual_seed(0)
    x = torch.randn(num_tokens, dim, requires_grad=True)
    norm_weight, norm_bias = torch.ones(1, dim, requires_grad=True), torch.zeros(1, dim, requires_grad=True)
    if op == "uvqk":
        weight = (torch.randn(4 * dim, dim) * 0.02).requires_grad_()
        bias = torch.zeros(4 * dim, requires_grad=True)
        sides = {
            "eager": lambda: F.silu(F.linear(F.layer_norm(x, (dim,), norm_weight[0], norm_bias[0]), weight, bias)),
            "fused": lambda: uvqk_projection(
                x, norm_weight_GD=norm_weight, norm_bias_GD=norm_bias, weight_ED=weight, bias_E=bias
            ),
        }
        return sides, [x, norm_weight, norm_bias, weight, bias], torch.randn(num_tokens, 4 * dim)
    rate = 0.2 if op == "norm_dropout" else 0.0
    # As in the layer, the gate is a part of wider rows.
    gate = torch.randn(num_tokens, 4 * dim)[:, :dim].requires_grad_()
    sides = {
        "eager": lambda: F.dropout(F.layer_norm(x, (dim,), norm_weight[0], norm_bias[0]) * gate, rate, rate > 0),
        "fused": lambda: group_layer_norm(
            x, weight_GD=norm_weight, bias_GD=norm_bias, groups_T=None, gate_TD=gate, dropout=rate, training=True
        ),
    }
    return sides, [x, norm_weight, norm_bias, gate], torch.randn(num_tokens, dim)


def step(call: Callable[[], Any], inputs: list[Any], gradient: Any) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    started = time.perf_counter()
    out = call()
    middle = time.perf_counter()
    out.backward(gradient)
    ended = time.perf_counter()
    for tensor in inputs:
        tensor.grad = None
    return middle - started, ended - middle


def status(name: str) -> float:
    """Megabytes of a line of this process's status."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) / 1024


def memory(op: str, side: str, num_tokens: int, dim: int) -> None:
    """Runs in a process of its own."""
    small, large = calls(op, 64, dim), calls(op, num_tokens, dim)
    step(small[0][side], *small[1:])  # libraries are loaded, code is compiled
    before = status("VmRSS")
    step(large[0][side], *large[1:])
    gradients = sum(tensor.nbytes for tensor in large[1]) / 2**20
    print(round(status("VmHWM") - before - gradients))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(args.threads)
    if args.memory:
        memory(*args.memory, args.tokens, args.dim)
        return
    result: dict[str, Any] = {}
    for op in OPS:
        sides, inputs, gradient = calls(op, args.tokens, args.dim)
        best = {side: [float("inf")] * 2 for side in sides}
        for _ in range(args.repeats):
            for side, call in sides.items():
                best[side] = [min(x, y) for x, y in zip(best[side], step(call, inputs, gradient), strict=True)]
        for side, (forward, backward) in best.items():
            command = [sys.executable, __file__, "--memory", op, side, "--tokens", str(args.tokens)]
            command += ["--dim", str(args.dim), "--threads", str(args.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result |= {f"{op}_{side}_forward_ms": round(forward * 1e3, 1)}
            result |= {f"{op}_{side}_backward_ms": round(backward * 1e3, 1)}
            result |= {f"{op}_{side}_peak_mb": int(done.stdout)}
        result[f"{op}_ratio"] = round(sum(best["eager"]) / sum(best["fused"]), 2)
    sizes = {"tokens": args.tokens, "dim": args.dim, "threads": args.threads}
    print(f"{device()}; commit {commit()}; {sizes}; milliseconds, eager torch and fused")
    for op in OPS:
        for what in ("forward_ms", "backward_ms", "peak_mb"):
            print(f"{op:14}{what:14}{result[f'{op}_eager_{what}']:>10} {result[f'{op}_fused_{what}']:>10}")
        print(f"{op:14}ratio         {result[f'{op}_ratio']:>21}")
    publish("layer_ops", sizes | result, as_json=args.json)


if __name__ == "__main__":
    main()
