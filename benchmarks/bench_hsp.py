"""What hierarchical sparse parallelism exchanges: one group of four ranks against two groups of two.

python benchmarks/bench_hsp.py [--ids 4096] [--steps 10] [--json]

Four gloo processes train two dynamic tables, of items and of their authors, on a synthetic log: each of a process's
batches has so many items by Zipf's law (exponent 1.05, 2**20 items, seeded), whose authors follow. After five steps,
calls and bytes are counted over `--steps` steps at the collectives themselves, by their process group and the rank that
each piece is addressed to; the engines' own `traffic` must say the same. Ranks 0 and 1 are a node, and 2 and 3.

`alltoall_bytes_leaving_group`: bytes of lookups (keys, rows, gradients) that two groups send to a rank of the other.
`rows_exchanged_ratio`: floats of gradients sent between groups over what the batches' ids alone predict: each group
sends those of its distinct keys to the other groups' replicas. `union_ratio`: distinct keys of all groups over the sum
of the groups'. `inter_group_bytes`: sent a step from node to node in keys and gradients, mean of ranks;
`..._flat` with one group, whose lookups cross nodes; `..._dense`: a ring's all-reduce of gradients of all rows that the
tables have at the end, which is what replicas would send without ids.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RANKS, GROUPS, WARM_UP = 4, 2, 5
ITEMS, AUTHORS, EXPONENT = 1 << 20, 1 << 16, 1.05
DIMS = {"item": 64, "author": 16}
LOOKUPS = ("keys", "rows", "gradients", "flags")
BETWEEN = ("replica_keys", "replica_gradients")
KINDS = (*LOOKUPS, *BETWEEN)
Array = np.ndarray[Any, Any]


def batch(rank: int, step: int, ids: int, popularity: Array) -> dict[str, Array]:
    """Items and their authors of a process's batch; the `popularity` is cumulated."""
    items = np.searchsorted(popularity, np.random.default_rng([rank, step]).random(ids)).astype(np.int64)
    return {"item": items, "author": items * 2_654_435_761 % AUTHORS}


def zipf() -> Array:
    shares = np.arange(1, ITEMS + 1, dtype=np.float64) ** -EXPONENT
    cumulated: Array = np.cumsum(shares / shares.sum())
    return cumulated


# ---- a process -------------------------------------------------------------------------------------------------------


@contextmanager
def counted(kinds: dict[int, str], calls: dict[str, int], sent: dict[str, Array]) -> Iterator[None]:
    """Inside, adds up calls, and bytes by the rank they are addressed to, of each kind of wire.

    Args:
        kinds: by the identity of their counters, which say what a wire is for.
        calls: to add to.
        sent: to add to.
    """
    from lightning_gr.embeddings.dynamic.peers import Wire

    through, collective = Wire.all_to_all, dist.all_to_all_single
    present = [""]

    def all_to_all(self: Wire, *args: Any) -> Any:
        present[0] = kinds[id(self.traffic)]
        return through(self, *args)

    def all_to_all_single(output: Any, pieces: Any, received: Any, lengths: Any, *, group: Any, async_op: bool) -> Any:
        kind = present[0]
        calls[kind] += 1
        row = pieces[0].numel() * pieces.element_size() if len(pieces) else 0
        for to, length in zip(dist.get_process_group_ranks(group), lengths, strict=True):
            sent[kind][to] += length * row * (to != dist.get_rank())
        return collective(output, pieces, received, lengths, group=group, async_op=async_op)

    Wire.all_to_all, dist.all_to_all_single = all_to_all, all_to_all_single  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Wire.all_to_all, dist.all_to_all_single = through, collective  # type: ignore[method-assign]


def train(num_groups: int, ids: int, steps: int) -> dict[str, Any]:
    """Calls by kind and bytes by kind and rank over the counted steps, and floats of the rows at the end."""
    from torchrec import KeyedJaggedTensor

    from lightning_gr.embeddings.dynamic import (
        DynamicEmbeddingCollection,
        DynamicTableConfig,
        SparseOptimizerConfig,
    )
    from lightning_gr.plugins.dynamic_sharding import ShardedDynamicCollection
    from lightning_gr.plugins.process_groups import peers_named

    collection = ShardedDynamicCollection(
        DynamicEmbeddingCollection(tables=[DynamicTableConfig(name, dim, [name]) for name, dim in DIMS.items()]),
        optimizer=SparseOptimizerConfig(name="rowwise_adagrad", lr=0.05),
        seed=0,
        device=torch.device("cpu"),
        peers=peers_named("tables", num_groups=num_groups, timeout=timedelta(minutes=5)),
    )
    engine, popularity = collection.engine, zipf()

    def step(number: int) -> None:
        drawn = batch(dist.get_rank(), number, ids, popularity)
        values = torch.from_numpy(np.concatenate([drawn[name] for name in DIMS]))
        found = collection(KeyedJaggedTensor(list(DIMS), values, lengths=torch.full((2,), ids)))
        torch.stack([found[name].values().sum() for name in DIMS]).sum().backward()
        engine.step()

    for number in range(WARM_UP):
        step(number)
    before = {kind: (x.calls, x.bytes) for kind, x in engine.traffic.items()}
    calls, sent = dict.fromkeys(KINDS, 0), {kind: np.zeros(RANKS, np.int64) for kind in KINDS}
    with counted({id(x): kind for kind, x in engine.traffic.items()}, calls, sent):
        for number in range(WARM_UP, WARM_UP + steps):
            step(number)
    for kind, x in engine.traffic.items():
        assert (x.calls - before[kind][0], x.bytes - before[kind][1]) == (calls[kind], sent[kind].sum()), kind
    rows = [(table, len(table.rows_of(k)[0].ids_N)) for table in engine.tables for k in range(len(table.key_names))]
    return {"calls": calls, "sent": sent, "floats": sum(table.dim * n for table, n in rows)}


def work(rank: int, directory: str, ids: int, steps: int) -> None:
    """One process; the first one leaves what all have counted in the directory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    counts: dict[int, Any] = {}
    for num_groups in (1, GROUPS):
        counts[num_groups] = [None] * RANKS
        dist.all_gather_object(counts[num_groups], train(num_groups, ids, steps))
    if rank == 0:
        torch.save(counts, Path(directory, "counts"))
    dist.barrier()
    dist.destroy_process_group()


# ---- what was counted ------------------------------------------------------------------------------------------------


def predicted(ids: int, steps: int) -> tuple[int, float]:
    """By sets of ids (of R ranks, N each): floats of gradients sent between groups, and the ratio of the union."""
    popularity, floats, union, parts = zipf(), 0, 0, 0
    for number in range(WARM_UP, WARM_UP + steps):
        drawn = [batch(rank, number, ids, popularity) for rank in range(RANKS)]
        for name, dim in DIMS.items():
            ids_RN = np.stack([x[name] for x in drawn])
            keys = [set(of_group.ravel().tolist()) for of_group in np.split(ids_RN, GROUPS)]
            floats += dim * (GROUPS - 1) * sum(map(len, keys))
            parts += sum(map(len, keys))
            union += len(set.union(*keys))
    return floats, union / parts


def leaving(runs: list[dict[str, Any]], kinds: tuple[str, ...]) -> float:
    """Bytes of these kinds that all ranks sent to the other node."""
    size = RANKS // GROUPS
    nodes = np.arange(RANKS) // size
    return float(sum(run["sent"][kind][nodes != rank // size].sum() for rank, run in enumerate(runs) for kind in kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=4096, help="items of each process's batch")
    parser.add_argument("--steps", type=int, default=10, help="that are counted")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    print(f"{device()}; commit {commit()}; torch {torch.__version__}; {RANKS} gloo processes")
    print(
        f"{args.ids:,} items a process and step, and their authors; widths {DIMS['item']} and {DIMS['author']}, float32"
    )
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(work, (directory, args.ids, args.steps), nprocs=RANKS)
        counts = dict(torch.load(Path(directory, "counts"), weights_only=False))
    flat, grouped = counts[1], counts[GROUPS]
    each = RANKS * args.steps  # of ranks and steps
    result: dict[str, Any] = {"ids": args.ids}
    print(f"\n{'a step, mean of ranks':<24}{'1 group: calls':>16}{'MB':>9}{f'{GROUPS} groups: calls':>18}{'MB':>9}")
    for kind in KINDS:
        line = f"{kind:<24}"
        for num_groups, runs in counts.items():
            calls = sum(run["calls"][kind] for run in runs) / each
            sent = float(sum(run["sent"][kind].sum() for run in runs)) / each
            line += f"{calls:>{16 if num_groups == 1 else 18}.1f}{sent / 1e6:>9.3f}"
            result |= {f"{kind}_calls_{num_groups}": calls, f"{kind}_bytes_{num_groups}": round(sent)}
        print(line)

    floats, union = predicted(args.ids, args.steps)
    measured = sum(float(run["sent"]["replica_gradients"].sum()) for run in grouped) / 4
    dense = 2 * (GROUPS - 1) / GROUPS * 4 * sum(run["floats"] for run in grouped) / RANKS
    result |= {
        "alltoall_bytes_leaving_group": leaving(grouped, LOOKUPS),
        "rows_exchanged_ratio": round(measured / floats, 4),
        "union_ratio": round(union, 4),
        "inter_group_bytes": round(leaving(grouped, KINDS) / each),
        "inter_group_bytes_flat": round(leaving(flat, KINDS) / each),
        "inter_group_bytes_dense": round(dense),
    }
    print("\nfrom node to node, MB a step, mean of ranks")
    whole = 4e-6 * sum(run["floats"] for run in flat)
    for name, of in (
        ("one group: lookups", "_flat"),
        (f"{GROUPS} groups: keys and gradients of the rows that a step touches", ""),
        (f"{GROUPS} groups: all-reduce of gradients of all rows, {whole:,.1f} MB", "_dense"),
    ):
        print(f"  {name:<68}{result[f'inter_group_bytes{of}'] / 1e6:>9.3f}")
    print(f"\n{'alltoall_bytes_leaving_group':<32}{result['alltoall_bytes_leaving_group']:>10}   goal 0")
    print(f"{'rows_exchanged_ratio':<32}{result['rows_exchanged_ratio']:>10}   goal within .05 of 1")
    print(f"{'union_ratio':<32}{result['union_ratio']:>10}")
    publish("hsp", result | {"goal": 0, "goal_rows_exchanged_within": 0.05}, as_json=args.json)


if __name__ == "__main__":
    main()
