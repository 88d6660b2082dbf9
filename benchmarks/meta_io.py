"""How fast episodes of support and query are read: from a store of tasks, and from the log that it was made of.

python benchmarks/meta_io.py [--tasks 100000] [--records 50] [--repeats 3] [--json]

The same records, with the same columns, lie in a Parquet file in the order of time, as logs do, and in a store that is
grouped by task. Both readers run in the training process, on one core, and make their batches by the same code
(`RankingColumns.batch`), so that what differs is how the records of an episode come together:

- Meta-IO: the loader of `TaskDataModule`, whose plan knows every episode from an index and reads whole tasks.
- Shuffle buffer: row groups in a random order go into a buffer; with each half million new records, all are sorted by
  task, the columns gathered, and the episodes that are whole given in a random order; the rest stays, and comes as
  smaller episodes at the end. It works on whole columns. `..._by_record` is the same reader as it is mostly written:
  records one by one into a list for each task, which is emptied when an episode is whole.

An epoch of each, in turn, `repeats` times, of the reader by record once; medians. `records_per_s` counts records of
support and query that were given, `speedup_meta_io` is against the reader of columns, the harder one, `read_mb` the
bytes of the column chunks that were read. What the buffer sorts again and again are the unfinished episodes of all
tasks, so that its cost grows with their number; with 20,000 tasks the two are closer. The buffer's batches depend on
what else is in it, so that reader can neither be resumed at a batch nor give the same batches to another number of
ranks; that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reporting import commit, device

from lightning_gr.batch import SequenceBatch
from lightning_gr.data import EventStore, PlannedLoader, Task, TaskDataModule
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.formats import Columns, open_log, with_tasks
from lightning_gr.data.prepare import prepare
from lightning_gr.data.sample_cuts import SampleEvents

Array = np.ndarray[Any, Any]
SUPPORT, QUERY, GLOBAL_TOKENS = 10, 10, 32768
ITEMS, SHOPS, SCENES = 100_000, 500, 20
ROW_GROUP, BUFFER, WINDOW = 1 << 17, 1 << 19, 1 << 13
"""Records of a row group of the log, new records with which the buffer gives episodes, and Meta-IO's tasks at a time.

Meta-IO holds about 0.8 million records of the default log, the buffer about 1.5 million: an unfinished episode of each
task, and the new ones."""
LABELS, SPARSE, DENSE = ("click", "order"), ("shop", "scene"), ("price", "distance")
COLUMNS = ("user_id", "item_id", "timestamp", *SPARSE, *DENSE, *LABELS)


def write_log(path: Path, *, tasks: int, records: int, seed: int = 0) -> None:
    """Records of all tasks in the order of time; as many of a task as a log-normal with that mean says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(records) - 0.5, 1.0, tasks), 2, 5000).astype(np.int64)
    total = int(lengths.sum())
    order = rng.permutation(total)
    columns = {
        "user_id": np.repeat(np.arange(tasks), lengths)[order],
        "item_id": np.minimum(rng.zipf(1.3, total) - 1, ITEMS - 1),
        "timestamp": 1_700_000_000 + np.sort(rng.integers(0, 30 * 86_400, total)),
        "shop": rng.integers(0, SHOPS, total),
        "scene": rng.integers(0, SCENES, total),
        "price": rng.random(total, dtype=np.float32),
        "distance": rng.random(total, dtype=np.float32),
        "click": (rng.random(total) < 0.3).astype(np.float32),
        "order": (rng.random(total) < 0.05).astype(np.float32),
    }
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP, compression="zstd", compression_level=1)


def make_data(store: Path) -> TaskDataModule:
    """Every task is trained on."""
    return TaskDataModule(
        path=str(store),
        tasks={name: Task(name) for name in LABELS},
        global_tokens=GLOBAL_TOKENS,
        support=SUPPORT,
        query=QUERY,
        shots=[0],
        val_tasks=0.0,
        test_tasks=0.0,
        shuffle_window=WINDOW,
        seed=1,
    )


class ShuffleBuffer:
    """Episodes of a log in the order of time, by a buffer in which tasks are brought together.

    Args:
        log: the Parquet file.
        columns: makes batches of records.
        store: says which code each id has, as a log of codes would.
        episodes: of a batch.
        by_record: whether records go into the buffer one by one.
    """

    def __init__(self, log: Path, columns: Any, store: EventStore, *, episodes: int, by_record: bool) -> None:
        self._log, self._columns, self._episodes, self._by_record = log, columns, episodes, by_record
        self._item_code = np.full(ITEMS, -1)
        self._item_code[store.item_ids] = np.arange(len(store.item_ids))
        self.num_bytes = 0

    def epoch(self, epoch: int) -> Iterator[SequenceBatch]:
        """The batches of an epoch."""
        rng = np.random.default_rng([7, epoch])
        grouped = self._grouped_by_record(rng) if self._by_record else self._grouped(rng)
        for records, lengths in grouped:
            order = rng.permutation(len(lengths))
            starts = np.cumsum(lengths) - lengths
            for first in range(0, len(order), self._episodes):
                chosen = order[first : first + self._episodes]
                yield self._batch(records, starts[chosen], lengths[chosen], epoch)

    def _row_groups(self, rng: np.random.Generator) -> Iterator[dict[str, Array]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._log) as file:
            for group in rng.permutation(file.num_row_groups).tolist():
                table = file.read_row_group(group, columns=list(COLUMNS), use_threads=False)
                found = {name: table[name].to_numpy() for name in COLUMNS}
                found["item_id"] = self._item_code[found["item_id"]]
                meta = file.metadata.row_group(group)
                self.num_bytes += sum(meta.column(i).total_compressed_size for i in range(meta.num_columns))
                yield found

    def _grouped(self, rng: np.random.Generator) -> Iterator[tuple[dict[str, Array], Array]]:
        """Records of whole episodes, one episode after the other, and how long each is."""
        held: list[dict[str, Array]] = []
        new, most = 0, SUPPORT + QUERY
        for group in self._with_end(rng):
            if group is not None:
                held.append(group)
                new += len(group["user_id"])
                if new < BUFFER:
                    continue
            records = {name: np.concatenate([part[name] for part in held]) for name in COLUMNS}
            order = np.lexsort((records["timestamp"], records["user_id"]))
            tasks = records["user_id"][order]
            firsts = np.flatnonzero(np.diff(tasks, prepend=-1))
            counts = np.diff(firsts, append=len(tasks))
            place = np.arange(len(tasks)) - np.repeat(firsts, counts)
            whole = counts // most * most if group is not None else np.where(counts % most == 1, counts - 1, counts)
            given = place < np.repeat(whole, counts)
            pieces = -(-whole // most)
            lengths = np.full(int(pieces.sum()), most)
            lengths[np.cumsum(pieces)[pieces > 0] - 1] -= (pieces * most - whole)[pieces > 0]
            yield {name: values[order[given]] for name, values in records.items()}, lengths
            held = [{name: values[order[~given]] for name, values in records.items()}]
            new = 0

    def _with_end(self, rng: np.random.Generator) -> Iterator[dict[str, Array] | None]:
        yield from self._row_groups(rng)
        yield None

    def _grouped_by_record(self, rng: np.random.Generator) -> Iterator[tuple[dict[str, Array], Array]]:
        buffer: dict[int, list[tuple[Any, ...]]] = {}
        ready: list[list[tuple[Any, ...]]] = []
        for group in self._with_end(rng):
            if group is not None:
                for record in zip(*(group[name].tolist() for name in COLUMNS), strict=True):
                    own = buffer.setdefault(record[0], [])
                    own.append(record)
                    if len(own) == SUPPORT + QUERY:
                        ready.append(buffer.pop(record[0]))
            else:
                ready += [own for own in buffer.values() if len(own) > 1]
            if sum(map(len, ready)) < BUFFER and group is not None:
                continue
            columns = zip(*(record for own in ready for record in own), strict=True)
            types = {name: np.float32 if name in (*DENSE, *LABELS) else np.int64 for name in COLUMNS}
            yield (
                {name: np.array(x, dtype=types[name]) for name, x in zip(COLUMNS, columns, strict=True)},
                np.array([len(own) for own in ready]),
            )
            ready = []

    def _batch(self, records: dict[str, Array], starts: Array, lengths: Array, epoch: int) -> SequenceBatch:
        """The batch of some episodes, each of which is a row with records of its own."""
        import torch

        offsets = np.concatenate([[0], np.cumsum(lengths)])
        at = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        rows = UserRows(
            offsets=offsets,
            items=records["item_id"][at],
            timestamps=records["timestamp"][at],
            event_fields={name: records[name][at] for name in (*SPARSE, *DENSE, *LABELS)},
        )
        support = np.clip(lengths * SUPPORT // (SUPPORT + QUERY), 1, lengths - 1)
        candidates = np.stack([support, lengths - support], 1).ravel()
        counts = np.zeros((len(candidates), 3), dtype=np.int64)
        counts[:, 2] = candidates
        twice = np.repeat(np.arange(len(lengths)), 2)
        batch: SequenceBatch = self._columns.batch(
            twice,
            records["user_id"][starts][twice],
            SampleEvents(np.arange(offsets[-1]), counts),
            rows,
            twice,
            epoch=epoch,
            denominators=dict.fromkeys(LABELS, float((lengths - support).sum())),
            gradient_divisor=1.0,
        )
        batch.shots_B = torch.tensor([SUPPORT, 0]).repeat(len(lengths))
        return batch


class CountedStore(EventStore):
    """A store that counts the bytes of what is read."""

    num_bytes = 0

    def read_group(self, group: int, columns: Any = ()) -> UserRows:  # noqa: D102
        import pyarrow.parquet as pq

        part, within, _ = self._groups[group].tolist()
        meta = pq.read_metadata(self.parts[part]).row_group(within)
        chunks = [meta.column(i) for i in range(meta.num_columns)]
        wanted = {"item_id", "timestamp", *columns}
        CountedStore.num_bytes += sum(
            x.total_compressed_size for x in chunks if x.path_in_schema.split(".")[0] in wanted
        )
        return super().read_group(group, columns)


def measure(*, tasks: int = 100_000, records: int = 50, repeats: int = 3, by_record: bool = True) -> dict[str, Any]:
    """Records a second of each reader, the ratio, and the bytes they read.

    Args:
        tasks: tasks of the log.
        records: about the mean records of a task.
        repeats: epochs of each reader; of the buffer of single records one.
        by_record: whether the buffer of single records is timed too.
    """
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "log.parquet", tasks=tasks, records=records)
        columns = Columns(sparse=SPARSE, dense=DENSE, labels=LABELS)
        prepared = prepare(with_tasks(open_log(folder / "log.parquet", columns=columns), "user_id"), folder / "store")
        data = make_data(prepared.path)
        data._table = CountedStore(prepared.path)
        loader = data.train_dataloader()
        episodes = round(loader.plan.num_samples / len(loader))
        buffers = {
            kind: ShuffleBuffer(
                folder / "log.parquet", loader._source._columns, prepared, episodes=episodes, by_record=kind == "rows"
            )
            for kind in ("columns", *(["rows"] if by_record else []))
        }
        rates: dict[str, list[float]] = {"meta_io": [], **{kind: [] for kind in buffers}}
        counted: dict[str, int] = {}
        CountedStore.num_bytes = 0
        for epoch in range(repeats):
            for kind, found in rates.items():
                if kind == "rows" and found:
                    continue
                started = time.perf_counter()
                count = 0
                for batch in _epoch_of(loader, epoch) if kind == "meta_io" else buffers[kind].epoch(epoch):
                    count += batch.labels["click"].num_labels
                found.append(count / (time.perf_counter() - started))
                counted[kind] = count
        medians = {kind: statistics.median(found) for kind, found in rates.items()}
        result = {
            "meta_io_records_per_s": round(medians["meta_io"]),
            "buffer_records_per_s": round(medians["columns"]),
            "speedup_meta_io": round(medians["meta_io"] / medians["columns"], 2),
            "meta_io_read_mb": round(CountedStore.num_bytes / repeats / 1e6, 1),
            "buffer_read_mb": round(buffers["columns"].num_bytes / repeats / 1e6, 1),
            "meta_io_records": counted["meta_io"],
            "buffer_records": counted["columns"],
            "episodes_a_batch": episodes,
        }
        if by_record:
            result["buffer_by_record_records_per_s"] = round(medians["rows"])
            result["speedup_meta_io_by_record"] = round(medians["meta_io"] / medians["rows"], 2)
        return result


def _epoch_of(loader: PlannedLoader, epoch: int) -> Iterator[SequenceBatch]:
    loader.set_epoch(epoch)
    yield from loader


def main() -> None:
    import json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--records", type=int, default=50, help="about the mean records of a task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    result = measure(tasks=args.tasks, records=args.records, repeats=args.repeats)
    print(f"{device()}; commit {commit()}; {result['meta_io_records']:,} records of {args.tasks:,} tasks")
    for name, kind in (("Meta-IO", "meta_io"), ("shuffle buffer", "buffer"), ("  by record", "buffer_by_record")):
        read = result.get(f"{kind}_read_mb", result["buffer_read_mb"])
        print(f"{name:<16}{result[f'{kind}_records_per_s']:>12,} records/s   {read:,.1f} MB an epoch")
    print(f"speedup_meta_io {result['speedup_meta_io']:>11.2f}   by record {result['speedup_meta_io_by_record']:.2f}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
