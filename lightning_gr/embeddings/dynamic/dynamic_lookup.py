"""DynamicLookup: one forward of a dynamic collection, from its keys to its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.exchange import LookupExchange
from lightning_gr.embeddings.dynamic.lookup_plan import LookupPlan


class Jobs(Protocol):
    """Does one call after another, in the order in which they are handed in, perhaps in a thread of its own."""

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Hands in a call; once one has failed, all later ones fail with its error. On a GPU it gives an event."""
        ...

    def join(self) -> None:
        """Waits for all calls that were handed in; raises the error of one that failed."""
        ...


@dataclass(eq=False)
class DynamicLookup:
    """One forward of a collection.

    Args:
        features: what was looked up; `DynamicEngine.take` knows a prefetched lookup by it.
        training: whether it may change tables and gets gradients.
        exchange: the keys' travel.
        sizes: by feature in the engine's order, how many ids.
        plans: of each physical table; empty until keys have been found there.
        rows: of each physical table, what was received; the leaves of autograd.
        owned: of each physical table, rows at this process that the received keys stand for.
        seeds: of each physical table, what the random numbers of stochastic rounding are drawn from; None of fp32.
        gradients: of `rows`, until they are all on their way.
        late: of each physical table, which keys' rows are sent once the step before has updated them; None if none are.
        values: rows of a lookup whose late ones are still to be sent.
        jobs: what must be done before all rows are on their way.
        forgotten: whether rows that were sent ahead were given up.
        ready: leaves that have their gradient.
        sent: whether the gradients are on their way.
        keeps_order: whether it was prefetched on the engine's own group.
    """

    features: Any
    training: bool
    exchange: LookupExchange
    sizes: list[int]
    plans: list[LookupPlan] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    owned: list[Tensor] = field(default_factory=list)
    seeds: list[Tensor | None] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    late: list[Tensor] | None = None
    values: list[Tensor] = field(default_factory=list)
    jobs: list[Future[Any]] = field(default_factory=list)
    forgotten: bool = False
    ready: int = 0
    sent: bool = False
    keeps_order: bool = False

    def send(self, values: Sequence[Tensor], late: bool | None = None) -> None:
        """Starts sending rows to the group that asked for them: of each physical table (U, D); see `RowTravel`."""
        travel = self.exchange.travel
        own = [travel.own_places(p) for p in range(len(values))]
        travel.send_rows([x if at is None else x[at] for x, at in zip(values, own, strict=True)], late)

    def arrived(self) -> list[Tensor]:
        """Waits for the rows."""
        for job in self.jobs:
            if (event := job.result()) is not None:
                event.wait()  # of a GPU: the stream that computes waits for the one that looks up
        rows = self.exchange.travel.rows()
        for x in rows:
            if x.is_cuda:
                x.record_stream(torch.cuda.current_stream(x.device))
        return rows

    def forget(self) -> None:
        """Goes back to where keys have been received, unless the lookup was carried out."""
        if self.plans and not self.plans[0].applied:
            self.exchange.travel.recall()
            self.plans, self.values, self.late, self.jobs = [], [], None, []
            self.forgotten = True

    def record_stream(self, stream: Any) -> None:
        """Tells the allocator of a GPU that this stream uses what another one made."""
        self.exchange.record_stream(stream)
