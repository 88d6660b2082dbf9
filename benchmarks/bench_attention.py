"""How fast HSTU attention is, forward and backward, and how much memory it takes, beside the simple ways to write it.

python benchmarks/bench_attention.py [--json] [--rounds 5] [--table]

64 sequences with log-normal lengths (mu = ln 150, sigma = 0.9, 8 ... 1,024; on a GPU 8 ... 8,192), 4 heads of 64,
causal. Only visible pairs count as work, backward as twice forward. The peak is the best of twenty products of
matrices of 2,048 in the same run, with the same threads and dtype. Baselines: the padded reference, and a loop of dense
attention over the sequences. `*_cost` is the time with a thing divided by the time without it, minus 1.
`--table` measures sequences of one length, for several lengths, widths and masks, instead.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import commit, device, publish

from lightning_gr.ops.hstu_attention import attention_flops, hstu_attention
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

GPU = torch.cuda.is_available()
PLACE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
LONGEST = 8192 if GPU else 1024
HEADS, WIDTH, SEQUENCES = 4, 64, 64


def seconds(call: Callable[[], Any]) -> float:
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(matrices: int = 20, size: int = 2048) -> float:
    """Floating-point operations per second of the best of these matrix products."""
    x, y = (torch.randn(size, size, device=PLACE, dtype=DTYPE) for _ in range(2))
    out = torch.empty_like(x)
    return 2 * size**3 / min(seconds(lambda: torch.mm(x, y, out=out)) for _ in range(matrices))


class Case:
    """Inputs of one call, their mask and the work in them."""

    def __init__(self, lengths: Tensor, *, heads: int = HEADS, width: int = WIDTH, mask: str = "causal") -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = layout = JaggedLayout.from_lengths(lengths, PLACE)
        host = layout.on_host()
        counts_B4 = torch.stack([lengths.clamp(max=4), 0 * lengths, lengths - lengths.clamp(max=4), 0 * lengths], 1)
        # Candidates: a tenth of the tokens, at moments among the real-time events.
        counts_B4[:, 3] = counts_B4[:, 2] // 10
        counts_B4[:, 2] -= counts_B4[:, 3]
        seen_T = host.position_T - counts_B4[host.sequence_T, 0]
        real_T = counts_B4[host.sequence_T, 2]
        moments_T = (torch.rand(host.num_tokens, generator=generator) * (real_T + 1)).long()
        earlier_T = torch.where(seen_T < real_T, seen_T, moments_T).clamp(min=0)
        on_host = IntervalMask.causal(host) if mask == "causal" else IntervalMask.dynamic(host, counts_B4, earlier_T)
        self.mask = IntervalMask(*(getattr(on_host, x).to(PLACE) for x in ("a_T", "b_T", "c_T", "self_T")))
        self.pairs = on_host.num_visible_pairs(host, host)
        self.flops = 3 * attention_flops(self.pairs, num_heads=heads, qk_dim=width, v_dim=width)
        shape = (layout.num_tokens, heads, width)
        self.qkv = [torch.randn(shape, generator=generator).to(PLACE, DTYPE).requires_grad_() for _ in range(3)]
        self.cotangent = torch.randn(shape, generator=generator).to(PLACE, DTYPE)
        self.position = torch.randn(2 * LONGEST - 1, heads, generator=generator).to(PLACE).requires_grad_()
        self.time = torch.randn(128, heads, generator=generator).to(PLACE).requires_grad_()
        gaps_T = torch.randint(1, 86_400, (layout.num_tokens,), generator=generator)
        self.times_T = (1_700_000_000 + gaps_T.cumsum(0)).to(PLACE)

    def ours(self, *, backward: bool = True, bias: str = "", **settings: Any) -> None:
        """The operator, with a bias where one is named."""
        inputs = list(self.qkv)
        if bias == "position":
            settings["position_table_PH"] = self.position
            inputs.append(self.position)
        if bias == "time":
            settings |= {"time_table_NH": self.time, "q_times_T": self.times_T, "k_times_T": self.times_T}
            inputs.append(self.time)
        out = hstu_attention(*self.qkv, q_layout=self.layout, mask=self.mask, scale=1 / LONGEST, **settings)
        if backward:
            torch.autograd.grad(out, inputs, self.cotangent)

    def by_sequence(self) -> None:
        """Dense causal attention of each sequence, one after the other."""
        lengths = self.layout.lengths_B.tolist()
        outs = []
        for q, k, v in zip(*(x.split(lengths) for x in self.qkv), strict=True):
            scores = torch.einsum("ihd,jhd->hij", q, k) * WIDTH**-0.5
            weights = F.silu(scores) * torch.ones(scores.shape[1:], dtype=DTYPE, device=PLACE).tril()
            outs.append(torch.einsum("hij,jhd->ihd", weights, v) / LONGEST)
        torch.autograd.grad(torch.cat(outs), self.qkv, self.cotangent)


def log_normal_lengths() -> Tensor:
    numbers = torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(0))
    return torch.exp(math.log(150) + 0.9 * numbers).round().long().clamp(8, LONGEST)


def memory_of(what: str) -> int:
    """Bytes that a call takes at most beyond its inputs, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", what], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def measure_memory(what: str) -> None:
    case = Case(log_normal_lengths())
    # The first call compiles and starts threads; a small one, so that its memory is not what is measured.
    Case(torch.tensor([9, 8])).ours()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    case.ours(backend=what)
    print((torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")) - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def layer_rate() -> float:
    """Operations per second of a whole HSTU layer of width 512 with 2 heads, 600 tokens a sequence on average."""
    from lightning_gr.layers.hstu import HSTULayer, hstu_layer_flops

    lengths = (600 * torch.exp(0.5 * torch.randn(16, generator=torch.Generator().manual_seed(0)) - 0.125)).long()
    layout = JaggedLayout.from_lengths(lengths, PLACE)
    mask, host = IntervalMask.causal(layout), layout.on_host()
    layer = HSTULayer(
        dim=512,
        num_heads=2,
        qk_dim=256,
        v_dim=256,
        max_length=4096,
        dropout=0.0,
        attention_dropout=0.0,
        position_bias=False,
        time_buckets=0,
        activation="silu",
        scale=1 / 4096,
    ).to(PLACE, DTYPE)
    x_TD = torch.randn(layout.num_tokens, 512, device=PLACE, dtype=DTYPE, requires_grad=True)
    pairs = IntervalMask.causal(host).num_visible_pairs(host, host)
    flops = 3 * hstu_layer_flops(layout.num_tokens, pairs, dim=512, num_heads=2, qk_dim=256, v_dim=256)

    def step() -> None:
        layer(x_TD, layout=layout, mask=mask).sum().backward()

    step()
    return flops / min(seconds(step) for _ in range(12))


def table(rounds: int, as_json: bool) -> None:
    """Share of the peak by length, width of a head and mask, forward and backward."""
    rate = peak()
    print(f"{device()}; commit {commit()}; peak {rate / 1e9:,.0f} GFLOP/s; share of it, forward and backward")
    print(f"{'length':>8} {'width':>6} {'mask':>8} {'ms':>10} {'share':>8}")
    for length in (64, 256, 1024, 4096, *((8192,) if GPU else ())):
        for width in (32, 64, 128):
            for mask in ("causal", "mtgr"):
                lengths = torch.full((max(1, (65_536 if GPU else 8_192) // length),), length)
                case = Case(lengths, width=width, mask=mask)
                case.ours()
                best = min(seconds(case.ours) for _ in range(rounds))
                share = case.flops / best / rate
                print(f"{length:>8} {width:>6} {mask:>8} {1000 * best:>10.2f} {share:>8.3f}")
                row = {"length": length, "width": width, "mask": mask, "ms": round(1000 * best, 3)}
                publish("attention_table", row | {"fraction_of_peak": round(share, 3)}, as_json=as_json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--table", action="store_true", help="lengths, widths and masks instead of the mixed lengths")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args.memory_of)
        return
    if args.table:
        table(args.rounds, args.json)
        return
    causal, mtgr = Case(log_normal_lengths()), Case(log_normal_lengths(), mask="mtgr")
    ways: dict[str, Callable[[], None]] = {
        "ours": causal.ours,
        "forward alone": lambda: causal.ours(backward=False),
        "position bias": lambda: causal.ours(bias="position"),
        "time bias": lambda: causal.ours(bias="time"),
        "softmax": lambda: causal.ours(activation="softmax"),
        "MTGR mask": mtgr.ours,
        "by sequence": causal.by_sequence,
    }
    best = dict.fromkeys(ways, math.inf)
    for way in ways.values():
        way()  # compiles, tunes, starts threads
    peaks = []
    for _ in range(args.rounds):
        peaks.append(peak(20))
        for name, way in ways.items():
            best[name] = min(best[name], seconds(way))
    rate = max(peaks)
    reference = min(seconds(lambda: causal.ours(backend="reference")) for _ in range(2))
    fused = "triton" if GPU else "cpu"
    memory, reference_memory = memory_of(fused), memory_of("reference")
    ours = best["ours"]
    result = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokens": causal.layout.num_tokens,
        "peak_gflops": round(rate / 1e9, 1),
        "ours_s": round(ours, 5),
        "fraction_of_peak": round(causal.flops / ours / rate, 3),
        "fraction_of_peak_forward": round(causal.flops / 3 / best["forward alone"] / rate, 3),
        "speedup_vs_reference": round(reference / ours, 1),
        "speedup_vs_per_sequence": round(best["by sequence"] / ours, 2),
        "peak_memory_ratio": round(memory / reference_memory, 3),
        "position_bias_cost": round(best["position bias"] / ours - 1, 3),
        "time_bias_cost": round(best["time bias"] / ours - 1, 3),
        "softmax_cost": round(best["softmax"] / ours - 1, 3),
        "mtgr_cost_per_pair": round(best["MTGR mask"] / mtgr.pairs / (ours / causal.pairs) - 1, 3),
        "layer_fraction_of_peak": round(layer_rate() / rate, 3),
    }
    limits = {
        "fraction_of_peak": ">= 0.40",
        "speedup_vs_reference": ">= 40",
        "speedup_vs_per_sequence": ">= 1.5",
        "peak_memory_ratio": "<= 0.2",
        "position_bias_cost": "<= 0.25",
        "time_bias_cost": "<= 0.40",
        "mtgr_cost_per_pair": "<= 0.25",
        "layer_fraction_of_peak": ">= 0.55",
    }
    size = f"{causal.layout.num_tokens:,} tokens, {causal.pairs:,} pairs, forward and backward"
    print(f"{device()}; commit {commit()}; {size}")
    for name, value in result.items():
        print(f"{name:<26} {value!s:>10}   {limits.get(name, '')}")
    publish("attention", result, as_json=args.json)


if __name__ == "__main__":
    main()
