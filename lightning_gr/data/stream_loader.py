"""StreamLoader: batches out of a day of a stream, global ones or a rank's own, with a cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import signature
from itertools import count, islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gr.balancing.cost import TOKENS, SequenceCost
from lightning_gr.balancing.partition import Method, partition
from lightning_gr.batch import SequenceBatch
from lightning_gr.data.event_table import UserRows
from lightning_gr.data.loader import difference
from lightning_gr.data.raw_ids import raw_key
from lightning_gr.data.row_windows import take_users
from lightning_gr.data.source import RetrievalSource, next_item_batch
from lightning_gr.data.stream import Block, EventStream

Array = np.ndarray[Any, Any]
Mode = Literal["planned", "local", "exchange"]
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

    In mode `planned` every rank reads the day and takes its share of each global batch, so batches do not depend on the
    number of ranks, all have as many, and the position in the data is three integers: day, block and user.

    In modes `local` and `exchange`, see `share`, each rank reads blocks of its own and cuts batches of its own, with
    the denominators of that batch alone; `lightning_gr.balancing.global_batches.GlobalBatches` makes global ones of
    them. The position is then three integers for each rank, and holds on that number of ranks.

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
        self.lookahead = lookahead
        self.mode: Mode = "planned"
        self._cost: SequenceCost = TOKENS
        self._method: Method = "lpt"
        self._budget = global_tokens
        # Day, block and user; in mode planned all ranks have one cursor, else each its own.
        self._cursor = [0, 0, 0]
        self._handed_out: list[list[list[int]]] = [self._alike(self._cursor)]
        self._resume_from: list[list[int]] | None = None

    def balance(self, *, cost: SequenceCost, method: Method) -> None:
        """Sets how mode `planned` deals global batches out; which samples a global batch has stays the same.

        Args:
            cost: what a sequence costs.
            method: the partitioner.
        """
        self._cost, self._method = cost, method

    def share(self, mode: Mode, *, tokens_per_rank: int | None = None) -> None:
        """Says how ranks share a day; called before a state is loaded and before iterating.

        Args:
            mode: `planned`: all read the day and take their share of each global batch. `local` and `exchange`: rank r
                reads the blocks r, r + world size, ... and cuts them alone, to the closest prefix of its budget; a
                sample longer than that is a batch alone.
            tokens_per_rank: that budget; None means an equal share of `global_tokens`.

        Raises:
            ValueError: there is no such mode, or no budget below 1.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(get_args(Mode))}")
        if tokens_per_rank is not None and tokens_per_rank < 1:
            raise ValueError(f"tokens_per_rank={tokens_per_rank}: expected at least 1")
        self.mode = mode
        self._budget = self.global_tokens
        if mode != "planned":
            self._budget = tokens_per_rank or -(-self.global_tokens // self._world_size)
        self._handed_out = [self._alike(self._cursor)]

    def _alike(self, cursor: list[int]) -> list[list[int]]:
        return [cursor] * (1 if self.mode == "planned" else self._world_size)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_day": None}

    def __iter__(self) -> Iterator[SequenceBatch]:
        found = self._day()
        if found is None:
            return
        number, name = found
        cursors = self._alike([number, 0, 0])
        if self._resume_from is not None and self._resume_from[0][0] == number:
            cursors = self._resume_from
        self._resume_from = None
        self._handed_out, self._cursor = [cursors], cursors[0 if self.mode == "planned" else self._rank]
        loader = torch.utils.data.DataLoader(
            _DayBatches(self, name, self._cursor),
            batch_size=None,
            num_workers=self._num_workers,
            generator=torch.Generator(),
        )
        for cursor, batch in loader:
            self._cursor = [number, *cursor]
            if self.mode == "planned":
                self.handed_out([self._cursor])
            yield batch
        if self.mode == "planned":
            self.handed_out(None)

    def cursor(self) -> list[int]:
        """This rank's position after the last batch of its own: day, block and user."""
        return self._cursor

    def handed_out(self, cursors: list[list[int]] | None) -> None:
        """Moves the position that is saved; called by whoever makes global batches of the ranks' own.

        Args:
            cursors: by rank, the position behind the last global batch, as ``GlobalBatches.cursors`` has it; empty
                leaves it where it was. None says that no more batches come, so none is looked at ahead.
        """
        if cursors is None:
            self._handed_out = self._handed_out[-1:]
        else:
            self._handed_out = [*self._handed_out, cursors or self._handed_out[-1]][-1 - self.lookahead :]

    def state_dict(self) -> dict[str, Any]:
        """The cursor: the day and the user after the last batch handed out; of each rank where not in mode planned."""
        cursors = self._handed_out[0]
        if self.mode != "planned":
            return {"cursors": cursors, **self._identity()}
        day, block, user = cursors[0]
        return {"day": day, "block": block, "user": user, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        identity = {"global_tokens": self.global_tokens, "max_length": self.max_length}
        return identity if self.mode == "planned" else identity | {"tokens_per_rank": self._budget}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a saved cursor stood.

        Args:
            state: of `state_dict`; with ``on_other_plan: restart_epoch`` in it, a day that was cut otherwise begins
                anew.

        Raises:
            ValueError: batches were cut otherwise, or shared by blocks over another number of ranks.
        """
        shared = self.mode != "planned"
        if ("cursors" in state) is not shared:
            modes = ("planned", "local or exchange")
            raise ValueError(
                f"mode={self.mode}: the checkpoint's stream was read in mode {modes[not shared]}; resume in that mode"
            )
        if shared and len(state["cursors"]) != self._world_size:
            raise ValueError(
                f"world_size={self._world_size}: the checkpoint's stream was shared by blocks over "
                f"{len(state['cursors'])} process(es); resume on as many (a run in mode planned resumes on any number)"
            )
        cursors = state["cursors"] if shared else [[state["day"], state["block"], state["user"]]]
        if (other := difference(state, self._identity())) is not None:
            if state.get("on_other_plan") != "restart_epoch":
                raise ValueError(
                    f"{other}; resume with the same, or let the day begin anew (ResumeCheckpoint's on_other_plan: "
                    "restart_epoch)"
                )
            rank_zero_warn(f"{other}; the day begins anew with this run's batches")
            cursors = [[cursor[0], 0, 0] for cursor in cursors]
        self._resume_from = [[int(x) for x in cursor] for cursor in cursors]
        self._handed_out = [self._resume_from]

    # ---- cutting -----------------------------------------------------------------------------------------------

    def day_batches(
        self, number: int, name: str, first_block: int, first_user: int
    ) -> Iterator[tuple[tuple[int, int], SequenceBatch]]:
        """A rank's batches of a day, each with the cursor behind it."""
        held: dict[int, UserRows] = {}
        waiting: list[_Sample] = []
        tokens = block = 0
        shared = self.mode != "planned"
        for block, content in self._blocks(name, first_block):
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
                over = tokens + sample.tokens - self._budget
                # A rank's own batches: as `token_budget_batches` cuts them.
                closer = shared and (not waiting or over < self._budget - tokens)
                if over > 0 and not closer:
                    yield (block, place), self._batch(number, waiting, held)
                    waiting, tokens, held = [], 0, {block: rows}
                waiting.append(sample)
                tokens += sample.tokens
                if tokens > self._budget:
                    yield (block, place + 1), self._batch(number, waiting, held)
                    waiting, tokens, held = [], 0, {block: rows}
            if not waiting:
                held = {}
        if waiting:
            yield (block + 1, 0), self._batch(number, waiting, held)

    def _blocks(self, name: str, first: int) -> Iterator[tuple[int, Block]]:
        """The blocks that this rank reads, from a number on, with their numbers."""
        if self.mode == "planned" or self._world_size == 1:
            yield from enumerate(self._stream.blocks(name, first), start=first)
            return
        step = self._world_size
        first += (self._rank - first) % step
        if "step" in signature(self._stream.blocks).parameters:
            blocks = self._stream.blocks(name, first, step=step)  # type: ignore[call-arg]
        else:
            blocks = islice(self._stream.blocks(name, first), 0, None, step)
        yield from zip(count(first, step), blocks, strict=False)

    def _batch(self, number: int, samples: list[_Sample], held: dict[int, UserRows]) -> SequenceBatch:
        mine, divisor = samples, 1.0
        if self.mode == "planned":
            costs = self._cost(np.array([sample.tokens for sample in samples]))
            mine = [samples[i] for i in partition(costs, self._world_size, method=self._method)[self._rank].tolist()]
            divisor = float(self._world_size)
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
            gradient_divisor=divisor,
        )


class _DayBatches(torch.utils.data.IterableDataset[tuple[tuple[int, int], SequenceBatch]]):
    """A day's batches as what a DataLoader's worker can make."""

    def __init__(self, loader: StreamLoader, name: str, cursor: list[int]) -> None:
        self._loader, self._name, self._cursor = loader, name, cursor

    def __iter__(self) -> Iterator[tuple[tuple[int, int], SequenceBatch]]:
        number, block, user = self._cursor
        return self._loader.day_batches(number, self._name, block, user)
