"""GlobalBatches: batches of ranks that each read a stream of their own, in step, weighted, and balanced if wished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate as running_sums
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from lightning_gr.balancing.batch_exchange import destinations, exchange
from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.partition import Method, check_method
from lightning_gr.balancing.token_budget import token_budget_batches
from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch
from lightning_gr.batch_samples import (
    check_same_structure,
    concatenate,
    from_bytes,
    padding_like,
    structure,
    take,
    to_bytes,
)

_FIRST_ROOM = 2048
_SIZE_BYTES = 8
# Parts of equal cost have unequal numbers of tokens; with no room for that, parts have equal tokens and unequal cost.
_TOKENS_ABOVE_LARGEST = 1.25
# How well a rank knows what padding looks like.
_UNKNOWN, _GUESSED, _KNOWN = 0, 1, 2


class GlobalBatches:
    """Iterates over this rank's batches; every rank has as many, and losses are weighted by the labels of all.

    Ranks draw `accumulate` batches each, a window, and tell each other what they hold in one small collective. It gives
    each batch the denominators of the whole window. A rank that has run out takes part with padding until all have, so
    all stop after the same batch. In mode `exchange` the window's sequences are then dealt out anew, by cost, over
    ranks and micro-steps; a rank gets at most a quarter more tokens at once than the window's largest batch had, where
    whole sequences allow it. No sequence is dropped, cut or given twice; padding in the stream is left out.

    It uses no process group but its own, so that a thread may run it beside training. An exception of one rank's stream
    is raised there as it is, and on the others as a RuntimeError that names the rank.

    Args:
        batches: this rank's stream, on the host. Denominators and divisors in it count for nothing.
        mode: `local` leaves sequences where they are, `exchange` reallocates them.
        group: a CPU process group (gloo) that nothing else uses; None means one process.
        accumulate: batches that make one optimizer step.
        tokens_per_rank: token budget by which the stream is cut anew; None takes batches as they come.
        cost: what a sequence of so many tokens costs.
        method: the partitioner of mode `exchange`.
        cursor: this rank's position in its stream after the last batch drawn, as whole numbers.

    Attributes:
        cursors: by rank, the position behind the last window whose batches were all handed out; empty before that.

    Raises:
        ValueError: a setting that cannot work, or batches that do not fit together, by name.
        TypeError: the stream yields something else than a `SequenceBatch`.
        RuntimeError: another rank failed.
    """

    def __init__(
        self,
        batches: Iterable[SequenceBatch],
        *,
        mode: Literal["local", "exchange"],
        group: dist.ProcessGroup | None,
        accumulate: int,
        tokens_per_rank: int | None,
        cost: SequenceCost,
        method: Method,
        cursor: Callable[[], list[int]] | None = None,
    ) -> None:
        if mode not in ("local", "exchange"):
            raise ValueError(f"mode={mode!r}: expected local or exchange")
        check_method(method)
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: expected at least 1")
        if tokens_per_rank is not None and cursor is not None:
            raise ValueError(
                f"tokens_per_rank={tokens_per_rank}: batches cut anew do not end where the stream's cursor stands; let "
                "the stream cut by that budget, and leave it out here"
            )
        self._mode, self._group, self._accumulate = mode, group, accumulate
        self._cost, self._method, self._cursor = cost, method, cursor
        self._rank = 0 if group is None else dist.get_rank(group)
        self._world_size = 1 if group is None else dist.get_world_size(group)
        self._room = _FIRST_ROOM
        self._padding_known, self._padding_bytes = _UNKNOWN, _bytes(b"")
        own = self._without_padding(batches)
        self._own = own if tokens_per_rank is None else token_budget_batches(own, tokens_per_rank)
        self._windows = self._all_windows()
        self.cursors: list[list[int]] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> SequenceBatch:
        return next(self._windows)

    # ---- this rank's stream ------------------------------------------------------------------------------------

    def _without_padding(self, batches: Iterable[SequenceBatch]) -> Iterator[SequenceBatch]:
        for batch in batches:
            if not isinstance(batch, SequenceBatch):
                raise TypeError(
                    f"the training loader yields {type(batch).__name__}: mode {self._mode} counts and moves the "
                    "sequences of a lightning_gr.batch.SequenceBatch; yield those, or balance in the loader itself"
                )
            if batch.shots_B is not None:
                raise ValueError(
                    f"mode={self._mode}: counts and moves single sequences, but those of an episode of meta learning "
                    "belong together; set mode to planned, which deals out whole episodes of TaskDataModule"
                )
            if self._padding_known < _KNOWN:
                tells = not batch.dense or batch.num_tokens != batch.num_sequences
                self._padding_known = _KNOWN if tells else _GUESSED
                # As bytes at once: what fails here is told to the other ranks.
                self._padding_bytes = to_bytes(padding_like(batch))
            if batch.num_samples == batch.num_sequences:
                yield batch
            elif batch.num_samples:
                yield take(batch, (batch.sample_ids_B != PADDING_SAMPLE_ID).nonzero()[:, 0])

    def _draw(self) -> tuple[list[SequenceBatch], dict[str, Any]]:
        """The window's batches of this rank, and what the other ranks have to know of them."""
        drawn: list[SequenceBatch] = []
        while len(drawn) < self._accumulate and (batch := next(self._own, None)) is not None:
            drawn.append(batch)
        for batch in drawn[1:]:
            check_same_structure("batches of one window", structure(drawn[0]), structure(batch))
        tasks = drawn[0].labels if drawn else {}
        return drawn, {
            "batches": len(drawn),
            "weights": {task: sum(_weight(batch.labels[task]) for batch in drawn) for task in tasks},
            "structure": structure(drawn[0]) if drawn else None,
            "padding": self._padding_known,
            "cursor": [] if self._cursor is None else self._cursor(),
            "largest": max((batch.num_tokens for batch in drawn), default=0),
            "tokens": [x for b in drawn for x in b.layout.lengths_B.tolist()] if self._mode == "exchange" else [],
        }

    # ---- windows -----------------------------------------------------------------------------------------------

    def _all_windows(self) -> Iterator[SequenceBatch]:
        while True:
            drawn, ranks = self._agree()
            steps = max(rank["batches"] for rank in ranks)
            if not steps:
                return
            self._learn_padding([rank["padding"] for rank in ranks])
            mine: list[SequenceBatch | None] = [*drawn, *[None] * (steps - len(drawn))]
            if self._mode == "exchange":
                tokens = [np.array(rank["tokens"], dtype=np.int64) for rank in ranks]
                capacity = int(_TOKENS_ABOVE_LARGEST * max(rank["largest"] for rank in ranks))
                rank_S, step_S = destinations(
                    tokens, steps=steps, cost=self._cost, method=self._method, capacity=capacity
                )
                own = concatenate(drawn) if drawn else None
                bounds = [0, *running_sums(len(x) for x in tokens)]
                mine = exchange(own, bounds, rank_S=rank_S, step_S=step_S, steps=steps, group=self._group)
            padding = from_bytes(self._padding_bytes)
            denominators = {task: float(sum(rank["weights"].get(task, 0) for rank in ranks)) for task in padding.labels}
            epoch = next(int(rank["structure"]["epoch"]) for rank in ranks if rank["structure"])
            for step, batch in enumerate(mine):
                if step == steps - 1:
                    self.cursors = [rank["cursor"] for rank in ranks]
                yield replace(
                    padding if batch is None else batch,
                    epoch=epoch,
                    denominators=denominators.copy(),
                    gradient_divisor=float(self._world_size * self._accumulate),
                )

    def _agree(self) -> tuple[list[SequenceBatch], list[dict[str, Any]]]:
        """Draws a window and learns what the other ranks drew; fails on all ranks if it fails on one."""
        failure: Exception | None = None
        try:
            drawn, mine = self._draw()
        except Exception as error:  # the others wait: they are told, and it is raised below
            failure, mine = error, {"failure": f"{type(error).__name__}: {error}"}
        ranks = [json.loads(x.numpy().tobytes()) for x in self._gather(_bytes(json.dumps(mine).encode()))]
        if failure is not None:
            raise failure
        for number, rank in enumerate(ranks):
            if "failure" in rank:
                raise RuntimeError(
                    f"rank {number}: its training batches failed with {rank['failure']}; the traceback is there, and "
                    "without its batches no rank can go on"
                )
        held = [(number, rank["structure"]) for number, rank in enumerate(ranks) if rank["structure"]]
        for number, other in held[1:]:
            check_same_structure(f"ranks {held[0][0]} and {number}", held[0][1], other)
        return drawn, ranks

    def _learn_padding(self, known: list[int]) -> None:
        """Ranks that cannot know what padding looks like, since they had no batch yet, learn it from one that does."""
        if min(known) == max(known):
            return
        teacher = known.index(max(known))
        lesson = self._gather(self._padding_bytes if self._rank == teacher else _bytes(b""))[teacher]
        if self._padding_known < known[teacher]:
            self._padding_known, self._padding_bytes = known[teacher], lesson

    def _gather(self, message: Tensor) -> list[Tensor]:
        """Every rank's bytes: one collective, and another one the first time that there is no room for a message."""
        if self._group is None:
            return [message]
        while True:
            row = torch.zeros(_SIZE_BYTES + self._room, dtype=torch.uint8)
            row[:_SIZE_BYTES] = torch.tensor([len(message)]).view(torch.uint8)
            row[_SIZE_BYTES : _SIZE_BYTES + len(message)] = message[: self._room]
            rows = [torch.empty_like(row) for _ in range(self._world_size)]
            dist.all_gather(rows, row, group=self._group)
            sizes = [int(x[:_SIZE_BYTES].view(torch.int64)) for x in rows]
            if max(sizes) <= self._room:
                return [x[_SIZE_BYTES : _SIZE_BYTES + size] for x, size in zip(rows, sizes, strict=True)]
            self._room = 2 * max(sizes)


def _weight(labels: Labels) -> float:
    return labels.num_labels if labels.weights_N is None else float(labels.weights_N.double().sum())


def _bytes(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(text), dtype=np.uint8))
