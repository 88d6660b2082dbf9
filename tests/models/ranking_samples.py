"""Ranking samples as plain Python, and the batches and embeddings that networks are given of them; for tests.

Shape suffixes: T tokens of all sequences together, E width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gr.batch import SequenceBatch
from lightning_gr.models import MTGR
from lightning_gr.ranking_features import RankingFeatures

FEATURES = RankingFeatures(
    contextual={"user_id": 9, "city": 4},
    contextual_width=0,
    tokens={"item_id": 40, "tag": 5},
    width=1,
    history_width=2,
    candidate_width=3,
    tasks=("click", "buy"),
)
EMBEDDING_DIM, LONGEST = 3, 48


@dataclass(frozen=True)
class Event:
    """An event of the history or a candidate; `numbers` are its own, of the history, and cross features."""

    item: int
    tag: int
    time: int
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """A user with static and real-time history, past to recent, and candidates in any order."""

    user: int
    city: int
    static: tuple[Event, ...] = ()
    realtime: tuple[Event, ...] = ()
    candidates: tuple[Event, ...] = field(default=())

    def events(self) -> list[Event]:
        """In the order of a batch's tokens."""
        return [*self.static, *self.realtime, *self.candidates]

    def of(self, candidates: list[Event], *, realtime: tuple[Event, ...] | None = None) -> Sample:
        """The same with other candidates."""
        return replace(
            self, candidates=tuple(candidates), realtime=self.realtime if realtime is None else tuple(realtime)
        )


def draw_sample(rng: np.random.Generator, static: int, realtime: int, candidates: int, last_time: int = 12) -> Sample:
    """Random events; times of real-time ones and candidates are often equal."""

    def events(times: Any) -> tuple[Event, ...]:
        drawn = [(int(rng.integers(40)), int(rng.integers(5)), int(t), tuple(rng.normal(size=6))) for t in times]
        return tuple(Event(*x) for x in drawn)

    return Sample(
        int(rng.integers(9)),
        int(rng.integers(4)),
        events(np.sort(rng.integers(-900, 0, static))),
        events(np.sort(rng.integers(0, last_time, realtime))),
        events(rng.integers(0, last_time, candidates)),
    )


def collate(samples: list[Sample]) -> SequenceBatch:
    """The batch of some samples, with two contextual tokens each."""
    from torchrec import KeyedJaggedTensor

    counts = torch.tensor([[2, len(x.static), len(x.realtime), len(x.candidates)] for x in samples])
    events = [event for x in samples for event in x.events()]
    ids = [x.user for x in samples] + [x.city for x in samples] + [e.item for e in events] + [e.tag for e in events]
    ones = torch.ones(len(samples), dtype=torch.int64)
    per_sample = counts[:, 1:].sum(1)
    rows: dict[str, list[list[float]]] = {"numbers": [], "actions": [], "cross": []}
    times = []
    for x in samples:
        times += [0, 0, *(e.time for e in x.events())]
        for name, begin, end, kinds in (
            ("numbers", 0, 1, (x.static, x.realtime, x.candidates)),
            ("actions", 1, 3, (x.static, x.realtime)),
            ("cross", 3, 6, (x.candidates,)),
        ):
            rows[name] += [[0.0] * (end - begin)] * 2
            for events_of_kind in (x.static, x.realtime, x.candidates):
                known = events_of_kind in kinds
                rows[name] += [list(e.numbers[begin:end]) if known else [0.0] * (end - begin) for e in events_of_kind]
    return SequenceBatch(
        features=KeyedJaggedTensor(
            keys=["user_id", "city", "item_id", "tag"],
            values=torch.tensor(ids, dtype=torch.int64),
            lengths=torch.cat([ones, ones, per_sample, per_sample]),
        ),
        token_counts_B4=counts,
        sample_ids_B=torch.arange(len(samples)),
        timestamps_T=torch.tensor(times, dtype=torch.int64),
        dense={
            name: torch.tensor(x).reshape(len(times), width).double()
            for (name, x), width in zip(rows.items(), (1, 2, 3), strict=True)
        },
    )


def embed(batch: SequenceBatch) -> dict[str, Tensor]:
    """An embedding for each value, float64, from tables that are always the same."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(rows, EMBEDDING_DIM, generator=generator, dtype=torch.float64)[batch.features[name].values()]
        for name, rows in FEATURES.sparse.items()
    }


def make_mtgr(**changes: Any) -> MTGR:
    """A small network in float64 whose parameters all matter, in evaluation mode."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"dim": 8, "num_layers": 3, "num_heads": 2, "max_length": LONGEST, "dropout": 0.0}
    network = MTGR(**(sizes | {"scale": 0.2} | changes))
    network.build(FEATURES, EMBEDDING_DIM)
    disturb(network)
    return network.double().eval()


def disturb(module: nn.Module) -> None:
    """First values hide mistakes: biases are 0 and norms the identity."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
