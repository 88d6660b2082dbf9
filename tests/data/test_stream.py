"""Streams: global batches that hold on any number of ranks, an exact cursor, and a run that goes on day by day."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.balancing.cost import TOKENS
from lightning_gr.balancing.global_batches import GlobalBatches
from lightning_gr.balancing.token_budget import closest_prefix
from lightning_gr.data import ParquetDays, StreamDataModule, StreamLoader, UserRows
from lightning_gr.data.stream import Block

Users = list[tuple[list[int], int]]  # items oldest first, how many are new


class Days:
    """A user's own stream, out of plain lists: days of blocks of users."""

    def __init__(self, days: list[list[Users]]) -> None:
        self.of_days = days

    def days(self) -> list[str]:
        return [str(i) for i in range(len(self.of_days))]

    def blocks(self, day: str, first: int = 0) -> Any:
        for users in self.of_days[int(day)][first:]:
            items = np.array([item for own, _ in users for item in own], dtype=np.int64)
            offsets = np.concatenate([[0], np.cumsum([len(own) for own, _ in users])]).astype(np.int64)
            yield Block(UserRows(offsets, items, items * 10), np.array([new for _, new in users], dtype=np.int64))


def make_days(lengths: list[list[tuple[int, int]]]) -> Days:
    """One day; every event is an item of its own."""
    item, blocks = 0, []
    for block in lengths:
        users = []
        for length, new in block:
            users.append((list(range(item, item + length)), min(new, length)))
            item += length
        blocks.append(users)
    return Days([blocks])


def loader(days: Any, *, day: int = 0, **changes: Any) -> StreamLoader:
    given_: dict[str, Any] = {"global_tokens": 12, "max_length": 5} | changes
    return StreamLoader(days, lambda: (day, str(day)), **given_)


def content(batch: Any) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """By sample: its id, its items and its targets."""
    items = torch.split(batch.features["item_id"].values(), batch.features["item_id"].lengths().tolist())
    labels = batch.labels["next_item"]
    of = batch.layout.sequence_T[labels.tokens_N]
    return [
        (sample, tuple(own.tolist()), tuple(labels.values_N[of == i].tolist()))
        for i, (sample, own) in enumerate(zip(batch.sample_ids_B.tolist(), items, strict=True))
        if sample >= 0
    ]


BLOCKS = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5), max_size=4)


@settings(deadline=None, max_examples=60)
@given(BLOCKS)
def test_every_new_event_is_a_target_once_with_its_history(lengths: list[list[tuple[int, int]]]) -> None:
    days = make_days(lengths)
    wanted = []
    for block in days.of_days[0]:
        for items, new in block:
            history = items[:-1][-5:]
            targets = items[1:][-5:][-new:] if new else []
            if targets and history:
                wanted.append((tuple(history), tuple(targets)))
    batches = list(loader(days))
    found = [(items, targets) for batch in batches for _, items, targets in content(batch)]
    assert found == wanted
    assert all(batch.num_tokens <= 12 for batch in batches)
    assert all(batch.denominators["next_item"] == batch.labels["next_item"].num_labels for batch in batches)
    ids = [sample for batch in batches for sample, _, _ in content(batch)]
    assert len(set(ids)) == len(ids)


@settings(deadline=None, max_examples=30)
@given(BLOCKS)
def test_ranks_share_the_batches_of_one(lengths: list[list[tuple[int, int]]]) -> None:
    days = make_days(lengths)
    one = list(loader(days))
    for world_size in (2, 3):
        ranks = [list(loader(days, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {len(one)}
        for whole, *parts in zip(one, *ranks, strict=True):
            assert sorted(x for part in parts for x in content(part)) == sorted(content(whole))
            assert all(part.denominators == whole.denominators for part in parts)


@settings(deadline=None, max_examples=30)
@given(BLOCKS, st.data())
def test_the_cursor_goes_on_where_it_stood(lengths: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    days = make_days(lengths)
    whole = [content(batch) for batch in loader(days)]
    done = data.draw(st.integers(0, len(whole)))
    first = loader(days)
    batches = iter(first)
    for _ in range(done):
        next(batches)
    second = loader(days, rank=0)
    second.load_state_dict(first.state_dict())
    assert [content(batch) for batch in second] == whole[done:]
    assert [content(batch) for batch in second] == whole  # the saved place counts once


def test_a_worker_changes_nothing() -> None:
    days = make_days([[(7, 3), (5, 5)], [(9, 9), (4, 1)]])
    assert [content(b) for b in loader(days, num_workers=1)] == [content(b) for b in loader(days)]


# ---- ranks that share a day by blocks ----------------------------------------------------------------------------


def shared(
    days: Any, rank: int, world_size: int, *, mode: Any = "local", tokens: int | None = 7, **changes: Any
) -> Any:
    own = loader(days, rank=rank, world_size=world_size, **changes)
    own.share(mode, tokens_per_rank=tokens)
    return own


@settings(deadline=None, max_examples=40)
@given(BLOCKS, st.integers(1, 3), st.integers(1, 12))
def test_ranks_share_a_day_by_blocks(lengths: list[list[tuple[int, int]]], world_size: int, budget: int) -> None:
    days = make_days(lengths)
    everything = {sample[0]: sample for batch in loader(days) for sample in content(batch)}
    seen = []
    for rank in range(world_size):
        batches = list(shared(days, rank, world_size, tokens=budget))
        mine = [sample for sample in everything if (sample >> 20) % world_size == rank]
        assert [x for batch in batches for x in content(batch)] == [everything[sample] for sample in mine]
        tokens = [len(everything[sample][1]) for sample in mine]
        counts = []
        while tokens:
            counts.append(closest_prefix(np.array(tokens), budget))
            tokens = tokens[counts[-1] :]
        assert [batch.num_sequences for batch in batches] == counts
        assert all(batch.denominators["next_item"] == batch.labels["next_item"].num_labels for batch in batches)
        seen += mine
    assert sorted(seen) == sorted(everything)


def test_a_rank_reads_its_own_blocks_only() -> None:
    class Striding(Days):
        def __init__(self, days: list[list[Users]]) -> None:
            super().__init__(days)
            self.asked: list[tuple[int, int]] = []

        def blocks(self, day: str, first: int = 0, step: int = 1) -> Any:
            self.asked.append((first, step))
            for number, block in enumerate(super().blocks(day, first)):
                if number % step == 0:
                    yield block

    plain = make_days([[(4, 2)], [(5, 5)], [(3, 3)], [(6, 1)], [(7, 4)]])
    days = Striding(plain.of_days)
    for rank in range(2):
        assert [content(b) for b in shared(days, rank, 2)] == [content(b) for b in shared(plain, rank, 2)]
    resumed = shared(days, 1, 2)
    resumed.load_state_dict(resumed.state_dict() | {"cursors": [[0, 3, 0], [0, 4, 0]]})
    assert list(resumed) == []
    assert days.asked == [(0, 2), (1, 2), (5, 2)]


def test_an_equal_share_of_the_budget_is_a_ranks_own() -> None:
    days = make_days([[(3, 2)] * 9])
    assert [b.num_tokens for b in shared(days, 0, 1, tokens=None)] == [12, 6]
    assert [b.num_tokens for b in shared(days, 0, 3, tokens=None, mode="exchange")] == [4, 4, 4, 4, 2]


def iterate_stream(
    blocks: list[list[tuple[int, int]]],
    mode: str,
    accumulate: int,
    lookahead: int,
    stop_after: int | None,
    state: dict[str, Any] | None,
) -> tuple[list[Any], dict[str, Any]]:
    """This rank's global batches of a day, and the loader's state behind the last one."""
    group = dist.new_group(backend="gloo")
    days = make_days(blocks)
    own = shared(days, dist.get_rank(), dist.get_world_size(), mode=mode, lookahead=lookahead)
    if state is not None:
        own.load_state_dict(state)
    batches = GlobalBatches(
        own,
        mode=mode,  # type: ignore[arg-type]
        group=group,
        accumulate=accumulate,
        tokens_per_rank=None,
        cost=TOKENS,
        method="lpt",
        cursor=own.cursor,
    )
    found = []
    for batch in batches:
        found.append((content(batch), batch.denominators))
        own.handed_out(batches.cursors)
        if len(found) == stop_after:
            break
    else:
        own.handed_out(None)
    dist.destroy_process_group(group)
    return found, own.state_dict()


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["local", "exchange"])
@pytest.mark.parametrize(("accumulate", "lookahead"), [(1, 0), (2, 0), (1, 1)])
def test_ranks_go_on_exactly_where_they_stood(gloo: Any, mode: str, accumulate: int, lookahead: int) -> None:
    rng = np.random.default_rng(3)
    blocks = [[(int(n), int(n)) for n in rng.integers(2, 9, size)] for size in (6, 2, 5, 0, 4, 1, 7)]
    job = (iterate_stream, blocks, mode, accumulate, lookahead)
    whole = gloo(2).run(*job, None, None)
    count = len(whole[0][0])
    assert count > 4
    ids = [sample[0] for batches, _ in whole for batch, _ in batches for sample in batch]
    assert sorted(ids) == sorted(x[0] for batch in loader(make_days(blocks)) for x in content(batch))
    for done in range(0, count + 1, accumulate):
        if done:
            stopped = gloo(2).run(*job, done + lookahead if done < count else None, None)
            states = [state for _, state in stopped]
        else:
            fresh = shared(make_days(blocks), 0, 2, mode=mode)
            states = [fresh.state_dict()] * 2
        assert states[0] == states[1]  # rank 0's is saved for all
        resumed = gloo(2).run(*job, None, states[0])
        for (batches, _), (rest, last) in zip(whole, resumed, strict=True):
            assert rest == batches[done:], done
            assert last == whole[0][1]


def test_a_state_of_ranks_holds_for_as_many_and_for_its_mode() -> None:
    days = make_days([[(7, 3)]])
    of_two = shared(days, 0, 2).state_dict()
    with pytest.raises(ValueError, match=r"world_size=3: .* over 2 process\(es\); resume on as many .*planned"):
        shared(days, 0, 3).load_state_dict(of_two)
    with pytest.raises(ValueError, match=r"mode=planned: .* read in mode local or exchange"):
        loader(days, world_size=2).load_state_dict(of_two)
    with pytest.raises(ValueError, match=r"mode=local: .* read in mode planned"):
        shared(days, 0, 2).load_state_dict(loader(days).state_dict())
    with pytest.raises(ValueError, match=r"tokens_per_rank: the checkpoint's data plan has 7, this run has 8"):
        shared(days, 0, 2, tokens=8).load_state_dict(of_two)
    shared(days, 1, 2, mode="exchange").load_state_dict(of_two)  # reads as local does
    with pytest.raises(ValueError, match=r"mode='auto': expected one of planned, local, exchange"):
        shared(days, 0, 2, mode="auto")
    with pytest.raises(ValueError, match=r"tokens_per_rank=0: expected at least 1"):
        shared(days, 0, 2, tokens=0)


def test_another_cut_is_refused() -> None:
    days = make_days([[(7, 3)]])
    with pytest.raises(ValueError, match=r"global_tokens: the checkpoint's data plan has 12, this run has 14"):
        loader(days, global_tokens=14).load_state_dict(loader(days).state_dict())
    with pytest.raises(ValueError, match=r"global_tokens=9: samples may have max_length=5.*at least 10"):
        loader(days, global_tokens=9)


def write_day(folder: Path, day: str, users: Users, *, closed: bool = True, times: bool = True) -> None:
    place = folder / f"day={day}"
    place.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"item_id": [items for items, _ in users], "new_events": [new for _, new in users]}
    if times:
        columns["timestamp"] = [[item * 10 for item in items] for items, _ in users]
    half = len(users) // 2
    table = pa.table(columns)
    pq.write_table(table.slice(0, half), place / "a.parquet")
    pq.write_table(table.slice(half), place / "b.parquet", row_group_size=2)
    if closed:
        (place / "_SUCCESS").touch()


def users_of(day: int) -> Users:
    rng = np.random.default_rng(day)
    return [(rng.integers(0, 50, int(n)).tolist(), int(rng.integers(1, n + 1))) for n in rng.integers(2, 9, 11)]


def test_a_day_is_read_when_it_is_complete(tmp_path: Path) -> None:
    write_day(tmp_path, "2024-05-01", users_of(0), closed=False)
    stream = ParquetDays(tmp_path)
    assert stream.days() == []
    write_day(tmp_path, "2024-05-02", users_of(1), closed=False)
    assert stream.days() == ["2024-05-01"]
    (tmp_path / "day=2024-05-02" / "_SUCCESS").touch()
    assert stream.days() == ["2024-05-01", "2024-05-02"]
    blocks = list(stream.blocks("2024-05-01"))
    assert [len(block.new_U) for block in blocks] == [5, 2, 2, 2]
    read = [items.tolist() for block in blocks for items in np.split(block.rows.items, block.rows.offsets[1:-1])]
    assert read == [items for items, _ in users_of(0)]
    assert [new for block in blocks for new in block.new_U] == [new for _, new in users_of(0)]
    for first, step in [(2, 1), (1, 2), (0, 3)]:
        some = [b.rows.items.tolist() for b in stream.blocks("2024-05-01", first, step)]
        assert some == [b.rows.items.tolist() for b in blocks[first::step]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item": [[1]]}, r"a\.parquet: has no column item_id; it has item"),
        ({"item_id": [[1, 2]], "new_events": [3]}, r"a\.parquet: row 0 has 3 new events of 2"),
        ({"item_id": [[1, 2]], "timestamp": [[1]]}, r"a\.parquet: columns item_id and timestamp have lists of diff"),
    ],
)
def test_a_bad_file_is_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "day=1" / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(ParquetDays(tmp_path).blocks("1"))
    (tmp_path / "day=1" / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"a\.parquet: no Parquet file"):
        list(ParquetDays(tmp_path).blocks("1"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ParquetDays(tmp_path / "nowhere")


class Watcher(pl.LightningModule):
    """Writes down what it is trained and evaluated on, and saves after every batch."""

    def __init__(self, saves: Path | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[Any] = []
        self.evaluated: list[Any] = []
        self.saves = saves

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained.append((self.current_epoch, content(batch)))
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append((self.current_epoch, content(batch)))

    def on_train_batch_end(self, *args: Any) -> None:
        if self.saves is not None:
            self.trainer.save_checkpoint(self.saves / f"{len(self.trained)}.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    module: Watcher,
    *,
    epochs: int,
    ckpt_path: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Watcher:
    given_: dict[str, Any] = {"global_tokens": 16, "max_length": 6, "num_items": 50} | changes
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(trainer or {}),
    )
    run.fit(module, datamodule=StreamDataModule(folder=str(folder), **given_), ckpt_path=ckpt_path)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for day in range(4):
        write_day(tmp_path / "log", f"2024-05-0{day + 1}", users_of(day))
    return tmp_path / "log"


def day_of(folder: Path, day: int) -> list[Any]:
    stream = ParquetDays(folder)
    one = StreamLoader(stream, lambda: (day, stream.days()[day]), global_tokens=16, max_length=6)
    return [content(batch) for batch in one]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_is_a_day_and_is_evaluated_on_the_next(folder: Path, num_workers: int) -> None:
    module = fit(folder, Watcher(), epochs=3, num_workers=num_workers)
    assert module.trained == [(day, batch) for day in range(3) for batch in day_of(folder, day)]
    assert module.evaluated == [(day, batch) for day in range(3) for batch in day_of(folder, day + 1)]


def test_a_run_stopped_anywhere_goes_on_with_the_first_batch_not_trained(folder: Path, tmp_path: Path) -> None:
    whole = fit(folder, Watcher(tmp_path), epochs=3).trained
    for done in range(1, len(whole)):
        resumed = fit(folder, Watcher(), epochs=3, ckpt_path=tmp_path / f"{done}.ckpt").trained
        assert resumed == whole[done:], done


@pytest.mark.parametrize("trainer", [{}, {"limit_val_batches": 0}, {"max_steps": 1000}], ids=str)
def test_a_run_saved_when_a_day_is_over_goes_on_with_the_next(folder: Path, tmp_path: Path, trainer: Any) -> None:
    class AtTheEnd(Watcher):
        def on_train_batch_end(self, *args: Any) -> None:
            pass

        def on_train_epoch_end(self) -> None:
            if self.saves is not None:
                self.trainer.save_checkpoint(self.saves / f"{self.current_epoch}.ckpt")

    whole = fit(folder, AtTheEnd(tmp_path), epochs=3, trainer=trainer)
    for day in range(3):
        resumed = fit(folder, AtTheEnd(), epochs=3, ckpt_path=tmp_path / f"{day}.ckpt", trainer=trainer)
        assert resumed.trained == [x for x in whole.trained if x[0] > day]
        assert resumed.evaluated == [x for x in whole.evaluated if x[0] > day]


def test_training_stops_where_the_log_stops_and_goes_on_another_day(folder: Path, tmp_path: Path) -> None:
    module = fit(folder, Watcher(tmp_path), epochs=9)
    assert module.trained == [(day, batch) for day in range(4) for batch in day_of(folder, day)]
    assert {day for day, _ in module.evaluated} == {0, 1, 2}
    write_day(folder, "2024-05-05", users_of(4))
    last = tmp_path / f"{len(module.trained)}.ckpt"
    resumed = fit(folder, Watcher(), epochs=5, ckpt_path=last)
    assert resumed.trained == [(4, batch) for batch in day_of(folder, 4)]


def test_it_waits_for_a_day_that_is_being_written(folder: Path) -> None:
    def write_later() -> None:
        time.sleep(1.0)
        write_day(folder, "2024-05-05", users_of(4))

    writer = threading.Thread(target=write_later)
    writer.start()
    module = fit(folder, Watcher(), epochs=5, wait_s=20, poll_s=0.1)
    writer.join()
    assert module.trained[-1] == (4, day_of(folder, 4)[-1])


def test_accumulation_of_batches_dealt_out_one_by_one_is_refused(folder: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=2: .* to local or exchange"):
        fit(folder, Watcher(), epochs=1, trainer={"accumulate_grad_batches": 2})


def test_settings_that_cannot_work() -> None:
    with pytest.raises(MisconfigurationException, match=r"give the one or the other"):
        StreamDataModule(num_items=3)
