"""The key index of dynamic tables: ids a second, growth, memory, and against TorchRec's managed collisions.

python benchmarks/bench_hash_table.py [--keys 10_000_000] [--batches 10] [--threads 2] [--json]

Ids are 63 random bits. `ids_per_s`: `KeyIndex.find_or_insert` of batches of a tenth as many ids as there are keys,
drawn by Zipf's law (exponent 1.05) from the keys that are there, 1 % of them new. `insert_per_s`: new keys only, in
such batches, from an empty index of 64 slots on, growth included. `pause_...`: an insertion of 10,000 new keys, from
an empty index to all keys. `speedup_vs_mch`: against `MCHManagedCollisionModule` (profile and remap) with least
frequently used ids evicted, of as many rows as there are keys at the end, filled with the same keys and given the same
batches in turn; it takes new ids in every tenth batch only (`mch_interval`), since it sorts all ids to do so.
`unique_ids_per_s`: `unique_keys` of the same batches, beside `torch.unique`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from reporting import commit, device, publish
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ALPHA, NEW_SHARE, PAUSE_BATCH, MCH_INTERVAL = 1.05, 0.01, 10_000, 10


def ids_of(numbers_N: Tensor) -> Tensor:
    """63 random bits for each number: neither our sign nor the baseline's largest id, which marks its free rows."""
    from lightning_gr.counter_random import mix64

    return mix64(numbers_N + 1) & ((1 << 63) - 1)


def batches(keys: int, count: int, size: int) -> Iterator[Tensor]:
    """Ids of the keys 0 ... `keys` - 1 by Zipf's law, with new ones strewn in."""
    generator = torch.Generator().manual_seed(0)
    cumulated = torch.arange(1, keys + 1, dtype=torch.float64).pow_(-ALPHA).cumsum_(0)
    for _ in range(count):
        drawn_N = torch.rand(size, generator=generator, dtype=torch.float64) * cumulated[-1]
        numbers_N = torch.searchsorted(cumulated, drawn_N).clamp_(max=keys - 1)
        new = int(size * NEW_SHARE)
        numbers_N[torch.randperm(size, generator=generator)[:new]] = torch.arange(keys, keys + new)
        keys += new
        yield ids_of(numbers_N)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def build(keys: int, size: int) -> tuple[Any, list[float]]:
    """An index that was empty, with so many keys, and the seconds of each insertion."""
    from lightning_gr.embeddings.dynamic.key_index import KeyIndex

    index, times = KeyIndex(salts=[1]), []
    for first in range(0, keys, size):
        ids_N = ids_of(torch.arange(first, min(first + size, keys)))
        times.append(seconds(lambda ids_N=ids_N, first=first: index.find_or_insert(ids_N, 0, first)))  # type: ignore[misc]
    assert len(index) == keys
    return index, times


def mch(keys: int, rows: int) -> Callable[[Tensor], object]:
    """TorchRec's remap of ids to so many rows, filled with the keys as if each had been seen once."""
    from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule
    from torchrec.sparse.jagged_tensor import JaggedTensor

    module = MCHManagedCollisionModule(
        zch_size=rows,
        device=torch.device("cpu"),
        eviction_policy=LFU_EvictionPolicy(),
        eviction_interval=MCH_INTERVAL,
        input_hash_size=(1 << 63) - 1,
    )
    module._mch_sorted_raw_ids[:keys] = ids_of(torch.arange(keys)).sort()[0]
    module._mch_counts[:keys] = 1

    def step(ids_N: Tensor) -> object:
        features = {"id": JaggedTensor(values=ids_N, lengths=torch.ones_like(ids_N))}
        return module.remap(module.profile(features))

    return step


def measure(keys: int, count: int) -> dict[str, Any]:
    from lightning_gr.embeddings.dynamic.unique_keys import unique_keys

    size = keys // 10
    _, pauses = build(keys, PAUSE_BATCH)
    pauses_ms = torch.tensor(pauses) * 1e3
    index, inserted = build(keys, size)
    result: dict[str, Any] = {
        "insert_per_s": round(keys / sum(inserted)),
        "bytes_per_key": round(index.nbytes / len(index), 1),
        **{f"pause_p{p}_ms": round(float(pauses_ms.quantile(p / 100)), 2) for p in (50, 99)},
        "pause_max_ms": round(float(pauses_ms.max()), 1),
    }
    unique_keys(ids_of(torch.arange(10)), [0, 10])  # once, compiles
    baseline = mch(keys, keys + count * int(size * NEW_SHARE))
    times = {"index": 0.0, "mch": 0.0, "unique": 0.0, "torch_unique": 0.0}
    for ids_N in batches(keys, count, size):
        for name, call in (
            ("index", lambda ids_N: index.find_or_insert(ids_N, 0, len(index))),
            ("mch", baseline),
            ("unique", lambda ids_N: unique_keys(ids_N, [0, len(ids_N)])),
            ("torch_unique", lambda ids_N: torch.unique(ids_N, return_inverse=True, return_counts=True)),
        ):
            times[name] += seconds(lambda call=call, ids_N=ids_N: call(ids_N))  # type: ignore[misc]
    assert len(index) == keys + count * int(size * NEW_SHARE)
    rates = {name: count * size / spent for name, spent in times.items()}
    return result | {
        "ids_per_s": round(rates["index"]),
        "mch_ids_per_s": round(rates["mch"]),
        "speedup_vs_mch": round(rates["index"] / rates["mch"], 1),
        "mch_interval": MCH_INTERVAL,
        "unique_ids_per_s": round(rates["unique"]),
        "torch_unique_ids_per_s": round(rates["torch_unique"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--batches", type=int, default=MCH_INTERVAL, help="a multiple of 10, so that all take new ids")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(args.threads)
    result = {"keys": args.keys, "threads": args.threads, **measure(args.keys, args.batches)}
    print(f"{device()}; commit {commit()}; {args.keys:,} keys, {args.threads} threads")
    for name, limit in (
        ("ids_per_s", "goal 8,000,000"),
        ("insert_per_s", "goal 3,500,000"),
        ("speedup_vs_mch", "goal 3"),
        ("bytes_per_key", "goal 24 at most"),
        ("mch_ids_per_s", f"managed collisions, new ids in every {MCH_INTERVAL}th batch"),
        ("pause_p50_ms", f"insertion of {PAUSE_BATCH:,} keys"),
        ("pause_p99_ms", ""),
        ("pause_max_ms", "with the last growth"),
        ("unique_ids_per_s", ""),
        ("torch_unique_ids_per_s", ""),
    ):
        print(f"{name:<24}{result[name]:>14,}   {limit}")
    publish("hash_table", result, as_json=args.json)


if __name__ == "__main__":
    main()
