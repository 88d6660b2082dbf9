"""lightning-gr as a whole beside what a user would write instead: a plain loop, and the plain Lightning way.

python benchmarks/bench_end_to_end.py [--data amazon_beauty_sequences.txt] [--parts plain_loop systems total]
    [--quick] [--repeats 5] [--epochs 3] [--tokens 2048] [--steps 24] [--json]

`plain_loop` (end_to_end_retrieval.py): `speedup_vs_plain_loop`, seconds of an epoch of the loop in plain_loop.py over
ours: HSTU, d = 64, 2 layers, histories of 50, full softmax over all items, the same tokens a batch, two cores. The loop
is padded, bucketed by length, its logits a matrix, two threads; ours is `RetrievalModule` under Lightning's Trainer
with `SequenceBalancedStrategy`. Both are tested with the same ranking: Recall@10 after as many epochs, and the memory
that training adds; each repeat has another seed. Without `--data` the log is a synthetic one of as many users, items
and events as Amazon Beauty.

`systems` (end_to_end_systems.py, plain_lightning.py): `speedup_systems`, tokens a second of two processes with all
parts of the system over those of the plain Lightning way, both with our attention; and each part's own share, from the
bottom up: dynamic tables that are merged, deduplication, balancing, pipeline. `late` is beyond that: rows are sent
ahead, a step late. Two cores of one machine have no network between them, and nothing to hide: `..._network` is the
same with a stated latency and bandwidth in all exchanges of ids and rows. `..._compute` is a size whose tables are
narrow and whose layers are wide.

`total`: `speedup_total`, the same over the plain way with padded reference attention.

Forms that are compared take turns. Intervals are Student's t at 95 %: of `plain_loop` over the ratios of each epoch but
the first; of the others, of tokens a second, by the spread of the steps, each step's time the median of the repeats.
Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PARTS = ("plain_loop", "systems", "total")


def systems(parts: list[str], *, quick: bool, repeats: int, steps: int) -> dict[str, Any]:
    """The figures of `systems` and `total`."""
    from end_to_end_systems import (
        BANDWIDTH,
        LATENCY,
        SIZES,
        SWITCHES,
        WHOLE,
        compare,
        figure,
        speedup,
        speedup_of_repeats,
        table,
        train,
    )
    from gloo_processes import World, cores_of_two

    result: dict[str, Any] = {"network_ms": LATENCY * 1e3, "network_mb_per_s": BANDWIDTH / 1e6, "steps": steps}
    world = World(cores_of_two(), train)
    every, ahead = ["base", *SWITCHES], ["base", "balancing", "pipeline", "late"]
    # The columns' ending, the size, whether there is a network, what is compared, in how many steps.
    tables: list[tuple[str, str, bool, list[str], int]] = []
    if "systems" in parts:
        tables.append(("", "lookups", False, every, steps))
        tables.append(("_network", "lookups", True, ahead if quick else every, steps))
        if not quick:
            tables.append(("_compute", "compute", False, every, steps))
    if "total" in parts:
        tables.append(("_padded", "lookups", False, ["base", WHOLE, "padded"], max(steps // 4, 4)))
    for suffix, name, slow, compared, num_steps in tables:
        size = SIZES[name]
        between = f"{LATENCY * 1e3:g} ms and {BANDWIDTH / 1e6:g} MB/s between them" if slow else "no network"
        print(
            f"\n{name}: tables {size.embedding_dim} wide, encoder {size.dim} wide, {size.num_layers} layers; "
            f"2 processes, {between}; {repeats} times {num_steps} steps of {size.samples} samples a process",
            flush=True,
        )
        found = compare(world, size, compared, steps=num_steps, repeats=repeats, slow=slow)
        shown = table(found, suffix)
        if "padded" in found:
            result |= figure("speedup_total", speedup_of_repeats(found[WHOLE], found["padded"]))
        else:
            result |= shown | figure(f"speedup_systems{suffix}", speedup(found[WHOLE], found["base"]))
    world.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Amazon Beauty, `user item item ...` a line; else a synthetic log")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all by default")
    parser.add_argument("--repeats", type=int, help="5, or 3 with --quick; of plain_loop 3, or 2")
    parser.add_argument("--epochs", type=int, help="of each training of plain_loop: 5, or 3 with --quick; at least 2")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch of plain_loop")
    parser.add_argument("--steps", type=int, help="that are timed, of each training of systems: 32, or 24 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and no other ways, batches and sizes")
    parser.add_argument("--dry", action="store_true", help="leave no row in the results")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.epochs is not None and args.epochs < 2:
        parser.error(f"--epochs={args.epochs}: expected at least 2; the first is not timed")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data={args.data}: no such file")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import json

    import torch
    from end_to_end_retrieval import compare, synthetic_log
    from reporting import commit, device, publish

    print(f"{device()}; commit {commit()}; torch {torch.__version__}")
    result: dict[str, Any] = {"parts": " ".join(x for x in PARTS if x in args.parts), "quick": int(args.quick)}
    with tempfile.TemporaryDirectory() as folder:
        if "plain_loop" in args.parts:
            path = args.data or synthetic_log(Path(folder))
            result["log"] = args.data.stem if args.data else "synthetic, of Beauty's shape"
            print(f"\n{result['log']}, {args.tokens:,} tokens a batch", flush=True)
            result |= compare(
                str(path),
                tokens=args.tokens,
                epochs=args.epochs or (3 if args.quick else 5),
                repeats=args.repeats or (2 if args.quick else 3),
                thorough=not args.quick,
            )
    if "systems" in args.parts or "total" in args.parts:
        repeats = args.repeats or (3 if args.quick else 5)
        result |= systems(args.parts, quick=args.quick, repeats=repeats, steps=args.steps or (24 if args.quick else 32))
        result["repeats"] = repeats
    print()
    for name, goal in (("speedup_vs_plain_loop", 1.5), ("speedup_systems", 1.6), ("speedup_total", None)):
        if name in result:
            aim = f"   goal {goal}" if goal else ""
            print(f"  {name:<26}{result[name]:>7.2f} ± {result[f'{name}_half_width']:.2f}{aim}")
    if not args.dry:
        publish("end_to_end", result, as_json=args.json)
    elif args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
