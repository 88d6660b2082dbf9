"""How quickly a large dynamic table is saved and loaded, against plain writing and reading of as many bytes.

python benchmarks/bench_checkpoint.py [--gigabytes 2] [--rounds 3] [--directory DIR] [--json]

Two gloo processes train a dynamic table of 128 float32 a row (row-wise Adagrad) under `SequenceBalancedStrategy`; it is
filled before. In each round, one after the other on the same disk:

- plain: each process writes one file of its share of the checkpoint's bytes, 8 MiB at a time, and `fdatasync`;
- saved: `Trainer.save_checkpoint`, up to the commit mark; then once more in the background, while training goes on;
- the caches of all files are dropped by `posix_fadvise`; each process reads its plain file through;
- the caches are dropped; the strategy loads the checkpoint: every checksum is verified, every key inserted.

`save_ratio`, `load_ratio`: plain seconds over seconds, medians over rounds. `blocking_ratio`: seconds that training
stood still for a background save (the call, copies of rows about to change, waits for the writer) over those of a
synchronous one; `step_ratio`: a training step while it runs over one without. `delta_ratio`: bytes of the tables' files
in an incremental checkpoint over rows touched since its base times the bytes of a row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gloo_processes import be_a_rank, free_port
from reporting import commit, device, publish
from torch import Tensor, nn
from typing_extensions import override

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RANKS, DIM, IDS = 2, 128, 4096
ROW_BYTES = 8 + 4 * DIM + 4 + 3 * 8  # id, values, optimiser state, counter and clocks
FILL, BLOCK = 1 << 18, 8 << 20
QUIET_STEPS, DELTA_STEPS = 20, 20
GOALS = {"save_ratio": 0.7, "load_ratio": 0.5, "blocking_ratio": 0.2}


class Batches:
    """Batches of random ids of the table, as many as are asked for."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        from torchrec import KeyedJaggedTensor

        rng = np.random.default_rng(dist.get_rank())
        while True:
            ids = torch.from_numpy(rng.integers(self._rows, size=IDS))
            yield KeyedJaggedTensor(["item"], ids, lengths=torch.tensor([IDS]))


# ---- what is compared with -------------------------------------------------------------------------------------------


def plain_write(path: Path, num_bytes: int) -> float:
    """Seconds until every process has its bytes on the disk."""
    block = os.urandom(BLOCK)
    dist.barrier()
    began = time.perf_counter()
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for start in range(0, num_bytes, BLOCK):
        os.write(handle, block[: num_bytes - start])
    os.fdatasync(handle)
    os.close(handle)
    dist.barrier()
    return time.perf_counter() - began


def plain_read(path: Path) -> float:
    """Seconds until every process has read its bytes."""
    buffer = bytearray(BLOCK)
    dist.barrier()
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    dist.barrier()
    return time.perf_counter() - began


def drop_caches(*folders: Path) -> None:
    dist.barrier()
    for folder in folders if dist.get_rank() == 0 else ():
        for path in folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
    dist.barrier()


# ---- a process -------------------------------------------------------------------------------------------------------


def measure(rows: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Trains, saves and loads; what it took."""
    import lightning.pytorch as pl

    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.embeddings.dynamic import DynamicEmbeddingCollection, DynamicTableConfig
    from lightning_gr.plugins import SequenceBalancedStrategy
    from lightning_gr.plugins.save_options import SaveOptions

    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> float:
        found.setdefault(name, []).append(seconds)
        return seconds

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.rows = DynamicEmbeddingCollection(tables=[DynamicTableConfig("item", DIM, ["item"])])
            self.head = nn.Linear(DIM, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.head(self.rows(batch)["item"].values()).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Measures(pl.Callback):
        """Does everything between steps; while a background save runs it lets training go on."""

        def __init__(self) -> None:
            self.script = self._script()
            self.wanted: Any = None

        @override
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            engine = trainer.strategy.dynamic.engines["rows"]
            for start in range(0, rows, FILL):
                ids = torch.arange(start, min(start + FILL, rows))
                engine.upsert(ids, torch.randn(len(ids), DIM, generator=torch.Generator().manual_seed(start)), "item")
            self.trainer, self.engine = trainer, engine

        @override
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            next(self.script, None)

        def _steps(self, number: int) -> Iterator[float]:
            """Lets so many steps go by; the seconds each took."""
            for _ in range(number):
                began = time.perf_counter()
                yield 0.0
                note("steps", time.perf_counter() - began)

        def _save(self, name: str, **options: Any) -> tuple[Path, float]:
            path = directory / f"{name}.ckpt"
            dist.barrier()
            began = time.perf_counter()
            self.trainer.save_checkpoint(path, storage_options=SaveOptions(**options))
            return path, time.perf_counter() - began

        def _script(self) -> Iterator[float]:
            yield from self._steps(QUIET_STEPS)
            own = directory / f"plain-{dist.get_rank()}"
            own.mkdir()
            checkpoints = self.trainer.strategy.checkpoints
            path, _ = self._save("warm")
            share = CheckpointReader(path).manifest.num_bytes // RANKS
            found["bytes"] = [share * RANKS]
            for number in range(rounds):
                note("plain_write", plain_write(own / "file", share))
                path, seconds = self._save(f"save-{number}")
                note("save", seconds)
                blocked = checkpoints.blocked_seconds
                _, seconds = self._save(f"background-{number}", background=True)
                note("call", seconds)
                while True:
                    began = time.perf_counter()
                    yield 0.0
                    note("steps_beside", time.perf_counter() - began)
                    saving = torch.tensor(int(checkpoints.is_saving))
                    dist.all_reduce(saving)
                    if not int(saving):
                        break
                checkpoints.wait()
                note("blocked", checkpoints.blocked_seconds - blocked)
                drop_caches(*directory.iterdir())
                note("plain_read", plain_read(own / "file"))
                drop_caches(*directory.iterdir())
                dist.barrier()
                began = time.perf_counter()
                self.trainer.strategy.load_checkpoint(path)
                note("load", time.perf_counter() - began)
            base, _ = self._save("base", full_every=2)
            first = self.engine.next_step
            yield from self._steps(DELTA_STEPS)
            touched = sum(int((table.rows_of(0)[0].metadata.last_steps >= first).sum()) for table in self.engine.tables)
            all_touched = torch.tensor(touched)
            dist.all_reduce(all_touched)
            delta, _ = self._save("delta", full_every=2)
            files = CheckpointReader(delta).manifest.files
            note("delta_bytes", sum(x.size for name, x in files.items() if name.startswith("dynamic/")))
            note("touched", float(all_touched))
            assert CheckpointReader(delta).manifest.base is not None
            self.trainer.should_stop = True

    pl.seed_everything(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=SequenceBalancedStrategy(),
        max_steps=10_000,
        callbacks=[Measures()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), Batches(rows))
    return found


def work(rank: int, port: int, rows: int, rounds: int, directory: str) -> None:
    """One process; the first one leaves what it measured in the directory."""
    be_a_rank(rank, RANKS, port)
    found = measure(rows, rounds, Path(directory, "run"))
    if rank == 0:
        torch.save(found, Path(directory, "found"))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the table, on both processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the one of temporary files")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    rows = int(args.gigabytes * 1e9 / ROW_BYTES)
    print(f"{device()}; commit {commit()}; torch {torch.__version__}; {RANKS} gloo processes")
    print(f"{rows:,} rows of {DIM} float32, {ROW_BYTES} bytes each: {rows * ROW_BYTES / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        port = free_port()
        Path(directory, "run").mkdir()
        torch.multiprocessing.spawn(work, (port, rows, args.rounds, directory), nprocs=RANKS)
        found = torch.load(Path(directory, "found"), weights_only=False)
    median = {name: statistics.median(values) for name, values in found.items()}
    size = median["bytes"] / 1e9
    for name in ("plain_write", "save", "plain_read", "load"):
        print(f"  {name:<14}{median[name]:>8.2f} s{size / median[name]:>8.2f} GB/s   of {found[name]}")
    print(f"  {'blocked':<14}{median['blocked']:>8.2f} s, of that {median['call']:.2f} s in the call")
    result = {
        "gigabytes": round(size, 3),
        "save_ratio": round(median["plain_write"] / median["save"], 3),
        "load_ratio": round(median["plain_read"] / median["load"], 3),
        "blocking_ratio": round(median["blocked"] / median["save"], 3),
        "step_ratio": round(median["steps_beside"] / median["steps"], 3),
        "delta_ratio": round(median["delta_bytes"] / (median["touched"] * ROW_BYTES), 3),
        "plain_write_s": round(median["plain_write"], 3),
        "save_s": round(median["save"], 3),
        "plain_read_s": round(median["plain_read"], 3),
        "load_s": round(median["load"], 3),
        "blocked_s": round(median["blocked"], 3),
    }
    print(f"  delta: {median['touched']:,.0f} rows touched, {median['delta_bytes'] / 1e6:.1f} MB")
    for name, goal in GOALS.items():
        print(f"  {name:<16}{result[name]:>8}   goal {goal} at {'most' if name == 'blocking_ratio' else 'least'}")
    print(f"  {'delta_ratio':<16}{result['delta_ratio']:>8}   goal within .1 of 1")
    publish("checkpoint", result, as_json=args.json)


if __name__ == "__main__":
    main()
