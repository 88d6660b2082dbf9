"""How long MTGR-small takes to score many candidates of one user on this CPU, and in what memory.

python benchmarks/bench_predict.py [--candidates 1000] [--history 1000] [--micro-batch 144] [--threads 2] [--repeats 5]
                                   [--alone 20] [--profile] [--json]

Three ways to score the same candidates by `RankingModule.predict_step` in inference mode, float32: each alone with the
whole history (`--alone` of them are measured, and their time is multiplied to all), all in one pass, and all in
micro-batches (M-FALCON). The ways take turns; each time is the least of its repeats.

`speedup_one_pass` is alone by one pass, `falcon_time_ratio` and `falcon_memory_ratio` are micro-batches by one pass.
Memory is what scoring looked-up embeddings adds, at its peak, to the resident memory of a process of its own that holds
weights, batch and embeddings already. Freed memory goes back to the system at once there (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ of glibc), so the peak is that of what is in use and not of what an allocator keeps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from reporting import commit, device, publish  # noqa: E402

from lightning_gr.batch import SequenceBatch  # noqa: E402
from lightning_gr.models import MTGR, RankingModule  # noqa: E402
from lightning_gr.ranking_features import RankingFeatures  # noqa: E402

SHAPE: dict[str, Any] = {"dim": 512, "num_layers": 3, "num_heads": 2}
FEATURES = RankingFeatures(
    contextual={"user_id": 1000, "city": 50, "device": 10},
    contextual_width=0,
    tokens={"item_id": 10_000, "category": 100, "author": 1000},
    width=4,
    history_width=4,
    candidate_width=6,
    tasks=("click", "buy"),
)
SIDES = ("one_pass", "falcon")
FREES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def request(num_history: int, num_candidates: int) -> SequenceBatch:
    """One user at one time: a history of which the last tenth is real-time, and candidates."""
    from torchrec import KeyedJaggedTensor

    generator = torch.Generator().manual_seed(0)
    contextual, realtime = len(FEATURES.contextual), num_history // 10
    events = num_history + num_candidates
    tokens = contextual + events
    ids = [torch.randint(0, n, (1,), generator=generator) for n in FEATURES.contextual.values()]
    ids += [torch.randint(0, n, (events,), generator=generator) for n in FEATURES.tokens.values()]
    times = torch.arange(num_history) * 100
    asked = torch.full((num_candidates,), num_history * 100)
    return SequenceBatch(
        features=KeyedJaggedTensor(
            keys=[*FEATURES.contextual, *FEATURES.tokens],
            values=torch.cat(ids),
            lengths=torch.tensor([1] * contextual + [events] * len(FEATURES.tokens)),
        ),
        token_counts_B4=torch.tensor([[contextual, num_history - realtime, realtime, num_candidates]]),
        sample_ids_B=torch.arange(1),
        timestamps_T=torch.cat([torch.zeros(contextual, dtype=torch.int64), times, asked]),
        dense={
            "numbers": torch.randn(tokens, FEATURES.width, generator=generator),
            "actions": torch.randn(tokens, FEATURES.history_width, generator=generator),
            "cross": torch.randn(tokens, FEATURES.candidate_width, generator=generator),
        },
    )


def make_module(longest: int) -> RankingModule:
    torch.manual_seed(0)
    network = MTGR(max_length=longest, **SHAPE)
    module = RankingModule(network=network, features=FEATURES, embedding_dim=64).eval()
    module.configure_model()
    return module


def seconds(module: RankingModule, batch: SequenceBatch, micro_batch: int | None) -> float:
    """Of scoring a batch."""
    module.micro_batch = micro_batch
    started = time.perf_counter()
    module.predict_step(batch, 0)
    return time.perf_counter() - started


def status(name: str) -> float:
    """Megabytes of a line of this process's status."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) / 1024


def memory(side: str, args: argparse.Namespace) -> None:
    """Runs in a process of its own."""
    module = make_module(args.history + args.candidates + 8)
    module.micro_batch = args.micro_batch if side == "falcon" else None
    with torch.inference_mode():
        module.predict_step(request(64, 300), 0)  # libraries are loaded, code is compiled
        batch = request(args.history, args.candidates)
        embedded = module.embed(batch)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        module.score(embedded, batch)
    print(round(status("VmHWM") - before, 1))


def peak(side: str, args: argparse.Namespace) -> float:
    """Megabytes, the middle of three processes."""
    command = [sys.executable, __file__, "--memory", side]
    for name in ("candidates", "history", "micro_batch", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    runs = [
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | FREES) for _ in range(3)
    ]
    return sorted(float(run.stdout.splitlines()[-1]) for run in runs)[1]


def profile(module: RankingModule, batch: SequenceBatch, micro_batch: int | None) -> None:
    """Prints where the time of one scoring goes."""
    with torch.profiler.profile() as found:
        seconds(module, batch, micro_batch)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--micro-batch", type=int, default=144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", type=int, default=20, help="candidates that are scored alone")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of one pass and of micro-batches goes"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        memory(args.memory, args)
        return
    module = make_module(args.history + args.candidates + 8)
    batch, alone = request(args.history, args.candidates), request(args.history, 1)
    sizes = {"one_pass": None, "falcon": args.micro_batch}
    best = dict.fromkeys(("alone", *SIDES), float("inf"))
    with torch.inference_mode():
        for side, micro_batch in sizes.items():
            seconds(module, batch, micro_batch)
            if args.profile:
                print(side)
                profile(module, batch, micro_batch)
        seconds(module, alone, None)
        for _ in range(args.repeats):
            for side, micro_batch in sizes.items():
                best[side] = min(best[side], seconds(module, batch, micro_batch))
            each = sum(seconds(module, alone, None) for _ in range(args.alone)) / args.alone
            best["alone"] = min(best["alone"], each * args.candidates)
    used = {side: peak(side, args) for side in SIDES}
    result: dict[str, Any] = {f"{side}_ms": round(best[side] * 1e3, 1) for side in best}
    result |= {f"{side}_mb": used[side] for side in SIDES}
    result |= {
        "speedup_one_pass": round(best["alone"] / best["one_pass"], 1),
        "falcon_time_ratio": round(best["falcon"] / best["one_pass"], 3),
        "falcon_memory_ratio": round(used["falcon"] / used["one_pass"], 3),
    }
    given = {name: getattr(args, name) for name in ("candidates", "history", "micro_batch", "threads")}
    print(f"{device()}; commit {commit()}; {given}")
    for name, value in result.items():
        print(f"{name:26}{value:>10,}")
    publish("predict", given | result, as_json=args.json)


if __name__ == "__main__":
    main()
