"""A training step of embedding tables alone: dynamic tables against TorchRec's row-wise sharded ones.

python benchmarks/bench_lookup.py [--ids 4096] [--blocks 8] [--json]

A step is forward, backward of a weighted sum of all values, and the update by row-wise Adagrad, of 8 features with a
table each, 128 wide, on two processes of one thread that talk by gloo. Ours looks up raw 64-bit ids in
`DynamicEmbeddingCollection` as `SequenceBalancedStrategy` shards it, and steps after backward; all ids are in the
tables before. TorchRec's looks up row numbers in an `EmbeddingCollection` under `DistributedModelParallel`, planned as
the strategy does, and steps inside backward. Both see the same rows in the same order, take turns in blocks of steps,
and times and ratios are medians of blocks.

`speedup_vs_torchrec`: TorchRec's time over ours, where an id occurs 8 times in a process's batch on average, by a power
law, so that the processes share hot ids too. `..._dedup`: over TorchRec's with its own deduplication before the
exchange, off there by default, for which this package has the CPU kernel. `..._dup1`: where no id occurs twice.
`..._1_process`: the same on one process. Then what each stage of deduplication moves, where our step's time goes, and
the share of gloo in it: sending, and waiting for the other process and its data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from reporting import commit, device, publish
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FEATURES, DIM, ROWS = 8, 128, 1 << 17  # rows of a table: 2**20 in all
BATCHES, STEPS, LR = 4, 4, 0.05  # different batches; steps of a block
KEYS = [f"f{i}" for i in range(FEATURES)]
Step = Callable[[int], None]


def popularity(ids: int, duplication: float) -> Tensor:
    """Shares of rows by a power law whose exponent makes `ids` draws hold `ids / duplication` distinct rows."""
    low, high = 0.0, 4.0
    for _ in range(50):
        exponent = (low + high) / 2
        share = torch.arange(1, ROWS + 1, dtype=torch.float64).pow(-exponent)
        share /= share.sum()
        distinct = float((1 - (1 - share).pow(ids)).sum())
        low, high = (exponent, high) if distinct > ids / duplication else (low, exponent)
    return share


def batches(rank: int, ids: int, duplication: int) -> list[Tensor]:
    """Row numbers (FEATURES, ids) of this process's batches."""
    generator = torch.Generator().manual_seed(rank)
    if duplication == 1:
        return [torch.stack([torch.randperm(ROWS, generator=generator)[:ids] for _ in KEYS]) for _ in range(BATCHES)]
    share = popularity(ids, duplication)
    spread = torch.randperm(ROWS, generator=torch.Generator().manual_seed(99))  # hot rows are not neighbours
    draw = lambda: spread[torch.multinomial(share, ids * FEATURES, True, generator=generator)]  # noqa: E731
    return [draw().view(FEATURES, ids) for _ in range(BATCHES)]


def jagged(rows: Tensor) -> Any:
    from torchrec import KeyedJaggedTensor

    lengths = torch.full((FEATURES * 64,), rows.shape[1] // 64, dtype=torch.int32)
    return KeyedJaggedTensor(keys=KEYS, values=rows.flatten(), lengths=lengths)


def loss_of(output: Any, weights: Tensor) -> Tensor:
    return torch.stack([(output[key].values() * weights).sum() for key in KEYS]).sum()


def dynamic_step(data: list[Tensor], weights: Tensor) -> tuple[Step, Any]:
    """Our step, and its engine."""
    from lightning_gr.counter_random import mix64
    from lightning_gr.embeddings.dynamic import (
        DynamicEmbeddingCollection,
        DynamicTableConfig,
        SparseOptimizerConfig,
    )
    from lightning_gr.embeddings.dynamic.peers import Peers
    from lightning_gr.plugins.dynamic_sharding import ShardedDynamicCollection

    tables = [DynamicTableConfig(name=key, embedding_dim=DIM, feature_names=[key]) for key in KEYS]
    group = dist.new_group()
    assert group is not None
    collection = ShardedDynamicCollection(
        DynamicEmbeddingCollection(tables=tables),
        optimizer=SparseOptimizerConfig(name="rowwise_adagrad", lr=LR),
        seed=0,
        device=torch.device("cpu"),
        peers=Peers(own=group),
    )
    features = [jagged(mix64(rows)) for rows in data]

    def step(i: int) -> None:
        loss_of(collection(features[i % BATCHES]), weights).backward()
        collection.engine.step()

    return step, collection.engine


def torchrec_step(data: list[Tensor], weights: Tensor, *, dedup: bool = False) -> Step:
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv

    from lightning_gr.embeddings.dynamic import SparseOptimizerConfig
    from lightning_gr.plugins.sharding import attach_sparse_optimizer, make_plan

    tables = [EmbeddingConfig(name=k, embedding_dim=DIM, num_embeddings=ROWS, feature_names=[k]) for k in KEYS]
    model = nn.ModuleDict({"tables": EmbeddingCollection(tables=tables, device=torch.device("meta"))})
    attach_sparse_optimizer(model, optimizer="rowwise_adagrad", lr=LR)
    cpu, group = torch.device("cpu"), dist.group.WORLD
    assert group is not None
    plan, sharders = make_plan(
        model,
        sharding="row_wise",
        device=cpu,
        num_local=dist.get_world_size(),
        dynamic_optimizer=SparseOptimizerConfig(),
        seed=0,
        timeout=timedelta(minutes=5),
        dedup=dedup,
    )
    env = ShardingEnv.from_process_group(group)
    sharded = DistributedModelParallel(model, env=env, device=cpu, plan=plan, sharders=sharders).module["tables"]
    features = [jagged(rows) for rows in data]

    def step(i: int) -> None:
        loss_of(sharded(features[i % BATCHES]), weights).backward()

    return step


def seconds(steps: dict[str, Step], blocks: int) -> dict[str, list[float]]:
    """Seconds of a step by form and block; the forms take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for i in range(BATCHES):
            step(i)
    for _ in range(blocks):
        for name, step in steps.items():
            dist.barrier()
            started = time.perf_counter()
            for i in range(STEPS):
                step(i)
            times[name].append((time.perf_counter() - started) / STEPS)
    return times


# ---- where the time goes -------------------------------------------------------------------------------------------

STAGES = ("sizes", "keys", "rows", "gradients")  # the order of a step's exchanges


@contextmanager
def stopwatches(spent: dict[str, float]) -> Iterator[None]:
    """Inside, seconds of our stages add up in `spent`; the time of an inner stage is not its outer one's."""
    from lightning_gr.embeddings.dynamic import (
        collection,
        dynamic_table,
        engine,
        exchange,
        gather_rows,
        key_index,
        pending_gradients,
        row_storage,
        row_travel,
    )

    inner = [0.0]

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            took = time.perf_counter() - started
            spent[name] = spent.get(name, 0.0) + took - inner.pop()
            inner[-1] += took
            return result

        return call

    started = [0]

    def all_to_all(*args: Any, **kwargs: Any) -> Any:
        stage = f"gloo: {STAGES[started[0] % len(STAGES)]}"
        started[0] += 1
        work = watched(stage, original_all_to_all)(*args, **kwargs)
        return type("Work", (), {"wait": staticmethod(watched(stage, work.wait))})

    original_all_to_all = dist.all_to_all_single
    watch: list[tuple[Any, str, str]] = [
        (exchange, "unique_keys", "unique"),
        (exchange, "route", "route"),
        (key_index.KeyIndex, "find", "find"),
        (row_storage.RowStorage, "touch", "counters"),
        (row_storage.RowStorage, "read_metadata", "counters"),
        (row_storage.RowStorage, "read", "read"),
        (collection, "gather_pieces", "expand"),
        (gather_rows._GatherPieces, "backward", "backward sum"),
        (row_travel, "sum_rows", "second sum"),
        (dynamic_table, "update_rows", "update"),
        (engine.DynamicEngine, "begin", "pack keys"),
        (engine.DynamicEngine, "find", "pack rows"),
        (engine.DynamicEngine, "received", "unpack rows"),
        (engine.DynamicEngine, "_send_gradients", "pack gradients"),
        (engine.DynamicEngine, "flush", "unpack gradients"),
        (pending_gradients.PendingGradients, "merged", "merge"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in watch]
    try:
        for owner, name, stage in watch:
            setattr(owner, name, watched(stage, getattr(owner, name)))
        dist.all_to_all_single = all_to_all  # type: ignore[assignment]
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
        dist.all_to_all_single = original_all_to_all


def profile(step: Step, blocks: int) -> dict[str, float]:
    """Seconds of a step by stage; `rest` is the loss, its own gradients, and the expanded rows' sum in backward."""
    spent: dict[str, float] = {}
    dist.barrier()
    with stopwatches(spent):
        started = time.perf_counter()
        for i in range(blocks * STEPS):
            step(i)
        total = time.perf_counter() - started
    spent["rest"] = total - sum(spent.values())
    return {name: took / (blocks * STEPS) for name, took in spent.items()}


# ---- the processes -------------------------------------------------------------------------------------------------


def work(rank: int, world_size: int, directory: str, ids: int, blocks: int) -> None:
    """One process; the first one leaves what it measured in the directory."""
    from lightning_gr.embeddings.dynamic.exchange import Dedup, ExchangeStatistics

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    weights = torch.rand(ids, DIM, generator=torch.Generator().manual_seed(5)) + 0.5
    measured: dict[str, Any] = {}
    for duplication in (8, 1):
        data = batches(rank, ids, duplication)
        ours, engine = dynamic_step(data, weights)
        forms = {
            "torchrec": torchrec_step(data, weights),
            "torchrec_dedup": torchrec_step(data, weights, dedup=True),
            "ours": ours,
        }
        of: dict[str, Any] = {"seconds": seconds(forms, blocks)}
        if world_size > 1:
            of["profile"] = profile(ours, blocks)
            of["moved"] = {}
            for dedup in reversed(get_args(Dedup)):
                engine.dedup, engine.statistics = dedup, ExchangeStatistics()
                took = statistics.median(seconds({dedup: ours}, 3)[dedup])
                engine.statistics = ExchangeStatistics()
                for i in range(BATCHES):
                    ours(i)
                of["moved"][dedup] = {k: v // BATCHES for k, v in vars(engine.statistics).items()} | {"seconds": took}
        measured[str(duplication)] = of
    if rank == 0:
        torch.save(measured, Path(directory, "measured"))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, ids: int, blocks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(work, (world_size, directory, ids, blocks), nprocs=world_size)
        return dict(torch.load(Path(directory, "measured")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=4096, help="of each feature in each process's batch")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    print(f"{device()}; commit {commit()}; torch {torch.__version__}; 2 processes of 1 thread, gloo")
    print(f"{FEATURES} features of {args.ids:,} ids a process, {DIM} wide, {ROWS:,} rows a table, float32")
    result: dict[str, Any] = {"ids": args.ids}
    for world_size in (2, 1):
        for duplication, of in measure(world_size, args.ids, args.blocks).items():
            suffix = ("" if duplication == "8" else f"_dup{duplication}") + ("" if world_size > 1 else "_1_process")
            print(f"\nduplication {duplication}, {world_size} process{'es' if world_size > 1 else ''}")
            ours = of["seconds"].pop("ours")
            print(f"  {'ours':<16}{statistics.median(ours) * 1e3:>8.1f} ms a step")
            result[f"ours_ms{suffix}"] = round(statistics.median(ours) * 1e3, 2)
            for name, times in of["seconds"].items():
                ratio = statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True))
                print(f"  {name:<16}{statistics.median(times) * 1e3:>8.1f} ms a step, {ratio:.2f} times ours")
                result[f"{name}_ms{suffix}"] = round(statistics.median(times) * 1e3, 2)
                result[f"speedup_vs_{name}{suffix}"] = round(ratio, 2)
            for dedup, moved in of.get("moved", {}).items():
                print(
                    f"  dedup {dedup:<16}{moved['ids']:>7,} ids,{moved['sent_keys']:>7,} keys sent,"
                    f"{moved['received_keys']:>7,} received,{moved['looked_up_keys']:>7,} looked up; to others"
                    f"{moved['id_bytes'] / 1e6:>6.2f} MB of keys,{moved['row_bytes'] / 1e6:>6.2f} MB of rows;"
                    f"{moved['seconds'] * 1e3:>7.1f} ms a step"
                )
            if "profile" in of:
                total = sum(of["profile"].values())
                for name, each in sorted(of["profile"].items(), key=lambda x: -x[1]):
                    print(f"  {name:<18}{each * 1e3:>8.2f} ms{each / total:>8.1%}")
                gloo = sum(each for name, each in of["profile"].items() if name.startswith("gloo"))
                result[f"gloo_share{suffix}"] = round(gloo / total, 3)
                print(f"  gloo in all {gloo / total:.0%}")
    result |= {"goal": 2, "goal_dup1": 0.7}
    publish("lookup", result, as_json=args.json)


if __name__ == "__main__":
    main()
