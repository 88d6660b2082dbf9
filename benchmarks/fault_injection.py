"""Kills a training run with SIGKILL, again and again, and checks after each kill that no checkpoint was lost or torn.

python benchmarks/fault_injection.py [--kills 100] [--seconds 600] [--processes 2] [--seed 0] [--json]

A small model with static and dynamic tables (admission, budget, expiry) trains on real processes and saves in the
background every few steps, every third checkpoint in full, those between with what has changed. At a random moment one
process or all get `kill -9`; in half of the runs writing is slowed, so that about half of the moments lie in a save.
After each kill another process looks at the folder:

`lost`: the newest complete checkpoint is older than one that the run had reported as published, or there is none.
`partial`: a checkpoint that counts as complete does not pass its checksums or cannot be read.
`wrong`: one reads, and weights, optimisers, rows, counters, clocks, generators or the loader's position are not, bit by
bit, those of an uninterrupted run at that step; or the next run resumed from another one than the newest.

Then the run is started again with ``ckpt_path="last"``. The exit code is 1 if one of the three is not 0.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from gloo_processes import free_port
from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["lightning.pytorch", "torchrec", "lightning_gr.callbacks", "lightning_gr.plugins.dynamic_sharding"]
STEPS, SAVE_EVERY, EPOCH, IDS, SAMPLES = 120, 4, 30, 400, 64
STEP_SECONDS, SLOW_SECONDS = 0.02, 0.008
"""What each step waits, and each write of a slowed run: so that kills come at all moments of both."""


# ---- the run -----------------------------------------------------------------------------------------------------


def make_module() -> Any:
    import lightning.pytorch as pl
    import torch
    from torchrec import EmbeddingCollection, EmbeddingConfig

    from lightning_gr.embeddings.dynamic import Admission, DynamicTableConfig, DynamicTables, TablePolicy

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            policy = TablePolicy(admission=Admission(min_count=2), max_rows=200, rows_per_group=50, ttl_steps=15)
            dynamic = DynamicTables(virtual_shards=16, policy=policy)
            fixed = EmbeddingConfig(name="fixed", num_embeddings=IDS, embedding_dim=8, feature_names=["id"])
            self.fixed = EmbeddingCollection(tables=[fixed], device=torch.device("cpu"))
            self.own = dynamic.collection([DynamicTableConfig("own", 8, ["id"])])
            self.head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found = torch.cat([self.fixed(batch)["id"].values(), self.own(batch)["id"].values()], 1)
            losses = (self.head(found).squeeze(1) - (batch.values() % 7)) ** 2
            time.sleep(STEP_SECONDS)
            return {"loss": losses.mean(), "loss_sums": {"all": (losses.sum(), len(losses))}}

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Model()


class Batches:
    """A rank's own ids, which move on, so that rows come and go; a loader with a position."""

    def __init__(self, rank: int) -> None:
        self.rank, self.next = rank, 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[Any]:
        import torch
        from torchrec import KeyedJaggedTensor

        self.next %= EPOCH
        while self.next < EPOCH:
            self.next += 1
            generator = torch.Generator().manual_seed(1000 * self.rank + self.next)
            ids = torch.randint(0, IDS // 4, (SAMPLES,), generator=generator) + IDS * self.next // EPOCH // 2
            yield KeyedJaggedTensor(keys=["id"], values=ids, lengths=torch.ones(SAMPLES, dtype=torch.int64))

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position."""
        self.next = state["next"]


def work(rank: int, processes: int, port: int, folder: str, tell: Connection, slow: bool, reference: bool) -> None:
    """One process of a run; tells what it does."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
        **{"TORCHELASTIC_RUN_ID": "faults", "OMP_NUM_THREADS": "1"},
    }
    import lightning.pytorch as pl
    import torch

    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.checkpoint.storage import Storage, SummedFile
    from lightning_gr.checkpoint.writer import CheckpointWriter
    from lightning_gr.plugins import SequenceBalancedStrategy

    class Tells(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            tell.send(("training", trainer.global_step))

    def before(owner: type, name: str, do: Any) -> None:
        method = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (do(), method(*args, **kwargs))[1])

    def committed(self: CheckpointWriter, *args: Any, **kwargs: Any) -> Any:
        manifest = commit_(self, *args, **kwargs)
        tell.send(("published", manifest.step))
        return manifest

    commit_ = CheckpointWriter.commit
    CheckpointWriter.commit = committed  # type: ignore[method-assign]
    before(CheckpointWriter, "__init__", lambda: tell.send(("saving", -1)))
    if slow:
        for owner, name in ((SummedFile, "write"), (Storage, "publish")):
            before(owner, name, lambda: time.sleep(SLOW_SECONDS))
    torch.set_num_threads(1)
    pl.seed_everything(1)
    saver = ResumeCheckpoint(
        dirpath=folder,
        filename="{step}",
        every_n_steps=SAVE_EVERY,
        keep_last=-1 if reference else 2,
        full_every=1 if reference else 3,
        background=not reference,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=SequenceBalancedStrategy(),
        callbacks=[Tells(), saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=STEPS,
    )
    trainer.fit(make_module(), Batches(rank), ckpt_path=None if reference else "last")
    tell.send(("ended", trainer.global_step))


class Run:
    """The processes of one run, and what they told."""

    def __init__(self, folder: Path, processes: int, *, slow: bool = False, reference: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self._pipes: list[Connection] = []
        self._ranks: list[Any] = []
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            args = (rank, processes, port, str(folder), theirs, slow, reference)
            process = context.Process(target=work, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._ranks.append(process)
        self.resumed_from: int | None = None
        self.published: list[int] = []
        self.saving = self.ended = False

    def listen(self, seconds: float = 0.0) -> None:
        """Takes what the first process tells within some time; after its death, all that is left."""
        pipe, deadline = self._pipes[0], time.monotonic() + seconds
        while pipe.poll(max(deadline - time.monotonic(), 0.0)):
            try:
                what, step = pipe.recv()
            except EOFError:
                return
            if what == "training":
                self.resumed_from = step
                return
            if what == "published":
                self.published.append(step)
            self.saving = what == "saving" or (self.saving and what != "published")
            self.ended |= what == "ended"

    def join(self, seconds: float) -> bool:
        """Waits for the end; whether all ended by themselves and well."""
        wait([x.sentinel for x in self._ranks[:1]], seconds)
        for process in self._ranks:
            process.join(seconds)
        return all(process.exitcode == 0 for process in self._ranks)

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL to some of them."""
        for rank in ranks:
            self._ranks[rank].kill()
        for rank in ranks:
            self._ranks[rank].join()


# ---- the contents ------------------------------------------------------------------------------------------------


def digest(reader: Any) -> str:
    """Of all that a checkpoint holds of a run, however it is laid out in files."""
    import torch

    from lightning_gr.embeddings.dynamic.table_files import read_columns, table_names
    from lightning_gr.embeddings.dynamic.table_parts import table_parts

    found = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for place, each in enumerate(value):
                add(f"{name}.{place}", each)
        else:
            data = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            found.update(f"{name} {len(data)} ".encode() + data)

    add("tensors", reader.tensors())
    add("ranks", reader.rank_states())
    meta = reader.meta()
    add("meta", {name: meta[name] for name in ("loops", "global_step", "epoch", "lr_schedulers", "dense_param_groups")})
    for path, folders in reader.collections().items():
        for name in table_names(folders):
            columns = ["ids", "values", "state", "counts", "last_steps"]
            add(f"{path}.{name}", dict(zip(columns, read_columns(folders, name, columns).values(), strict=True)))
            waiting = [part.columns(part.names) for part in table_parts(folders[-1] / name, "waiting", may_lack=True)]
            add(f"{path}.{name} waiting", waiting)
    return found.hexdigest()


def reference(folder: Path, processes: int) -> dict[int, str]:
    """By step, the contents of the checkpoints of a run that nobody interrupts."""
    from lightning_gr.checkpoint.reader import complete_checkpoints

    run = Run(folder, processes, reference=True)
    if not run.join(300):
        raise SystemExit(f"the reference run failed:\n{Path(f'{folder}.log').read_text()[-3000:]}")
    return {reader.manifest.step: digest(reader) for reader in complete_checkpoints(folder)}


# ---- kill and look -----------------------------------------------------------------------------------------------


class Tally:
    """What was found, by the names of the table."""

    def __init__(self, truth: dict[int, str]) -> None:
        self.truth = truth
        self.counts = Counter[str]()
        self.faults: list[str] = []

    def fault(self, kind: str, text: str) -> None:
        """Counts what must not be, and says it."""
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {text}")
        print(self.faults[-1], file=sys.stderr)

    def look(self, folder: Path, published: int | None) -> int | None:
        """Reads every complete checkpoint of a folder; the step of the newest."""
        from lightning_gr.checkpoint.reader import complete_checkpoints

        found = complete_checkpoints(folder)
        newest = found[0].manifest.step if found else None
        if published is not None and (newest is None or newest < published):
            self.fault("lost", f"step {published} was published, the newest complete one is {newest}")
        for reader in found:
            self.counts["verified"] += 1
            try:
                reader.verify()
                same = digest(reader) == self.truth[reader.manifest.step]
            except Exception:
                self.fault("partial", f"{reader.storage}\n{traceback.format_exc()}")
                continue
            if not same:
                self.fault("wrong", f"{reader.storage} is not what the uninterrupted run had")
        return newest


def inject(args: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """Starts, kills and looks, until enough was killed or time is over."""
    draw = random.Random(args.seed)
    deadline = time.monotonic() + args.seconds
    counts, rounds = tally.counts, 0
    place, newest, published = folder / "run-0", None, None
    while counts["kills"] < args.kills and time.monotonic() < deadline:
        run = Run(place, args.processes, slow=draw.random() < 0.5)
        counts["starts"] += 1
        counts["restarts"] += newest is not None
        if draw.random() < 0.1:
            run.listen(draw.uniform(0.0, 1.0))  # while it starts and loads
        else:
            run.listen(60.0)
            if run.resumed_from is None:
                log = Path(f"{place}.log").read_text()[-3000:]
                tally.fault("wrong", f"a run did not begin to train from step {newest}\n{log}")
                return
            enough, late = draw.randrange(4), time.monotonic() + 30.0
            while len(run.published) < enough and not run.ended and time.monotonic() < late:
                run.listen(0.01)
            run.listen(draw.uniform(0.0, 2 * SAVE_EVERY * STEP_SECONDS))
        if run.resumed_from is not None and run.resumed_from != (newest or 0):
            tally.fault("wrong", f"the newest complete one was of step {newest}, resumed was {run.resumed_from}")
        everybody = list(range(args.processes))
        if draw.random() < 0.5:
            run.kill([draw.choice(everybody)])
            counts["one process"] += 1
            time.sleep(draw.uniform(0.0, 0.3))  # others go on for a moment
        run.kill(everybody)
        run.listen(0.1)
        if run.ended and not run.saving:
            counts["ended"] += 1
        else:
            counts["kills"] += 1
            moment = "starting" if run.resumed_from is None else "saving" if run.saving else "training"
            counts[moment] += 1
        published = max([*run.published, *([] if published is None else [published])], default=None)
        newest = tally.look(place, published)
        if run.ended:
            shutil.rmtree(place)
            rounds += 1
            place, newest, published = folder / f"run-{rounds}", None, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=600.0, help="ends earlier if it takes longer")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine's own timing remains")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = Tally(reference(Path(folder) / "reference", args.processes))
        inject(args, Path(folder), tally)
    counts = tally.counts
    result = {
        "processes": args.processes,
        **{name: counts[name] for name in ("kills", "training", "saving", "starting", "restarts", "verified")},
        **{name: counts[name] for name in ("lost", "partial", "wrong")},
        "seconds": round(time.monotonic() - began),
    }
    print(f"{device()}; commit {commit()}; {args.processes} processes, seed {args.seed}")
    for name, text in (
        ("kills", f"of one process {counts['one process']}, of all at once otherwise"),
        ("training", "moments in which no save was under way"),
        ("saving", "moments in a save"),
        ("starting", "moments before training had begun"),
        ("restarts", "from the newest complete checkpoint"),
        ("verified", "checkpoints read in full and compared with the uninterrupted run"),
        ("lost", "must be 0"),
        ("partial", "must be 0"),
        ("wrong", "must be 0"),
        ("seconds", ""),
    ):
        print(f"{name:<12}{result[name]:>8,}   {text}")
    publish("fault_injection", result, as_json=args.json)
    return int(any(counts[name] for name in ("lost", "partial", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
