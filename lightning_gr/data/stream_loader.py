"""StreamLoader: global batches out of a day of a stream, the same on any number of ranks, with a cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lightning_gr.batch import SequenceBatch
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.partition import longest_processing_time
from lightning_gr.data.raw_ids import raw_key
from lightning_gr.data.row_windows import take_users
from lightning_gr.data.source import RetrievalSource, next_item_batch
from lightning_gr.data.stream import EventStream

Array = np.ndarray[Any, Any]
_DAY_BITS = 40


@dataclass(frozen=True)
class _Sample:
    """One user of a block: where it lies, and its first, last and first asking token."""

    block: int
    place: int
    first: int
    last: int
    asking: int

    @property
    def tokens(self) -> int:
        return self.last - self.first + 1

    @property
    def labels(self) -> int:
        return self.last - max(self.asking, self.first) + 1


class StreamLoader:
    """Iterates over one day of a stream in the order of arrival, in global batches by token budget.

    Every rank reads the day and takes its share of each global batch, so batches do not depend on the number of ranks,
    all have as many, and the position in the data is three integers: day, block and user.

    Args:
        stream: the days.
        day: number of the day that an iteration goes through, and its name; None where there is none.
        global_tokens: budget of a global batch, on all ranks together.
        max_length: longest sample in tokens; longer histories keep the most recent.
        raw_ids: whether items are raw ids, text among them, of which batches carry the keys.
        rank: this process.
        world_size: how many processes share each global batch.
        num_workers: 1 reads and collates in a background process.
        lookahead: batches that the consumer takes before it works on the first; they do not count as handed out.
            Lightning takes one from a loader whose length it cannot know.

    Raises:
        ValueError: the budget is below twice the longest sample.
    """

    def __init__(
        self,
        stream: EventStream,
        day: Callable[[], tuple[int, str] | None],
        *,
        global_tokens: int,
        max_length: int,
        raw_ids: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        lookahead: int = 0,
    ) -> None:
        if global_tokens < 2 * max_length:
            raise ValueError(
                f"global_tokens={global_tokens}: samples may have max_length={max_length} tokens, and a batch must "
                f"have room for two; raise the budget to at least {2 * max_length}, or lower max_length"
            )
        if num_workers not in (0, 1):
            raise ValueError(f"num_workers={num_workers}: a stream is read by one process; expected 0 or 1")
        self._stream, self._day = stream, day
        self.global_tokens, self.max_length = global_tokens, max_length
        self._raw_ids = raw_ids
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers
        self._lookahead = lookahead
        self._cursors: list[tuple[int, int, int]] = [(0, 0, 0)]
        self._resume_from: tuple[int, int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_day": None}

    def __iter__(self) -> Iterator[SequenceBatch]:
        found = self._day()
        if found is None:
            return
        number, name = found
        block, user = 0, 0
        if self._resume_from is not None and self._resume_from[0] == number:
            _, block, user = self._resume_from
        self._resume_from = None
        batches = _DayBatches(self, number, name, block, user)
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=self._num_workers, generator=torch.Generator()
        )
        self._cursors = [(number, block, user)]
        for cursor, batch in loader:
            self._cursors = [*self._cursors, (number, *cursor)][-1 - self._lookahead :]
            yield batch
        # Nothing is left to be looked at ahead.
        self._cursors = self._cursors[-1:]

    def state_dict(self) -> dict[str, Any]:
        """The cursor: the day and the user after the last batch handed out."""
        day, block, user = self._cursors[0]
        return {"day": day, "block": block, "user": user, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {"global_tokens": self.global_tokens, "max_length": self.max_length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a saved cursor stood.

        Raises:
            ValueError: batches were cut otherwise.
        """
        for name, present in self._identity().items():
            if state.get(name) != present:
                raise ValueError(
                    f"{name}: the checkpoint's stream was cut with {state.get(name)!r}, this run has {present!r}; "
                    "resume with the same"
                )
        self._resume_from = (int(state["day"]), int(state["block"]), int(state["user"]))
        self._cursors = [self._resume_from]

    # ---- cutting -----------------------------------------------------------------------------------------------

    def day_batches(
        self, number: int, name: str, first_block: int, first_user: int
    ) -> Iterator[tuple[tuple[int, int], SequenceBatch]]:
        """A rank's batches of a day, each with the cursor behind it."""
        held: dict[int, UserRows] = {}
        waiting: list[_Sample] = []
        tokens = 0
        block = first_block - 1
        for block, content in enumerate(self._stream.blocks(name, first_block), start=first_block):
            rows = content.rows
            if self._raw_ids:
                rows = replace(rows, items=raw_key(rows.items))
            held[block] = rows
            lengths = np.diff(rows.offsets)
            last_U = lengths - 2
            first_U = np.maximum(last_U - self.max_length + 1, 0)
            asking_U = np.maximum(lengths - content.new_U - 1, 0)
            begin = first_user if block == first_block else 0
            for place in range(begin, len(lengths)):
                last, asking = int(last_U[place]), int(asking_U[place])
                if last < asking:
                    continue
                sample = _Sample(block, place, int(first_U[place]), last, asking)
                if tokens + sample.tokens > self.global_tokens:
                    yield (block, place), self._batch(number, waiting, held)
                    waiting, tokens = [], 0
                    held = {block: rows}
                waiting.append(sample)
                tokens += sample.tokens
            if not waiting:
                held = {}
        if waiting:
            yield (block + 1, 0), self._batch(number, waiting, held)

    def _batch(self, number: int, samples: list[_Sample], held: dict[int, UserRows]) -> SequenceBatch:
        costs = np.array([sample.tokens for sample in samples])
        mine = [samples[i] for i in longest_processing_time(costs, self._world_size)[self._rank].tolist()]
        blocks = sorted({sample.block for sample in mine}) or sorted(held)[:1]
        of_block = {block: np.array([s.place for s in mine if s.block == block], dtype=np.int64) for block in blocks}
        rows = UserRows.concatenate([take_users(held[block], of_block[block]) for block in blocks])
        columns = np.array([[s.first, s.last, s.asking] for s in mine], dtype=np.int64).reshape(-1, 3).T
        ids = [(number << _DAY_BITS) + (sample.block << 20) + sample.place for sample in mine]
        return next_item_batch(
            rows,
            np.arange(len(mine)),
            tokens_B3=(columns[0], columns[1], columns[2]),
            sample_ids=np.array(ids, dtype=np.int64),
            labelled=True,
            fields=[],
            item_keys=None,
            epoch=number,
            denominators={RetrievalSource.TASK: float(sum(sample.labels for sample in samples))},
            gradient_divisor=float(self._world_size),
        )


class _DayBatches(torch.utils.data.IterableDataset[tuple[tuple[int, int], SequenceBatch]]):
    """A day's batches as what a DataLoader's worker can make."""

    def __init__(self, loader: StreamLoader, number: int, name: str, block: int, user: int) -> None:
        self._loader, self._at = loader, (number, name, block, user)

    def __iter__(self) -> Iterator[tuple[tuple[int, int], SequenceBatch]]:
        return self._loader.day_batches(*self._at)
