"""Episodes as plain Python, the batches that models are given of them, and a small model to learn them; for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from lightning_gr.batch import Labels, SequenceBatch
from lightning_gr.models import DLRM, MTGR, MetaRankingModule
from lightning_gr.ranking_features import RankingFeatures

FEATURES = RankingFeatures(
    contextual={"user_id": 9, "city": 6},
    contextual_width=0,
    tokens={"item_id": 12, "bought_with": 12, "tags": 5},
    width=1,
    history_width=2,
    candidate_width=0,
    tasks=("click", "buy"),
    tables={"bought_with": "item_id"},
    dims={"city": 3},
    pooling={"tags": "sum", "city": "mean"},
)
TABLE_OF = {name: FEATURES.tables.get(name, name) for name in FEATURES.sparse}
WEIGHTS = {"buy": 0.5}
DIVISOR = 2.0


@dataclass(frozen=True)
class Record:
    """An item that was shown, with a value of each kind of feature; a label may be missing."""

    item: int
    bought_with: int
    tags: tuple[int, ...]
    price: float
    time: int
    labels: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Episode:
    """Records of one user, past to recent."""

    user: int
    city: tuple[int, ...]
    history: tuple[Record, ...]
    support: tuple[Record, ...]
    query: tuple[Record, ...]

    def ids(self, feature: str, records: Sequence[Record]) -> list[int]:
        """Values of a feature in the sequence of some records."""
        if feature in FEATURES.contextual:
            return [self.user] if feature == "user_id" else list(self.city)
        events = (*self.history, *records)
        if feature == "tags":
            return [tag for x in events for tag in x.tags]
        return [x.item if feature == "item_id" else x.bought_with for x in events]


def draw_record(rng: np.random.Generator, time: int, items: Sequence[int] = range(12)) -> Record:
    """A record of one of some items; half of them have no label `buy`."""
    labels = [("click", float(rng.integers(2)))] + [("buy", float(rng.integers(2)))] * int(rng.integers(2))
    tags = tuple(int(x) for x in rng.integers(0, 5, int(rng.integers(0, 3))))
    return Record(int(rng.choice(items)), int(rng.integers(12)), tags, float(rng.normal()), time, tuple(labels))


def draw_episode(rng: np.random.Generator, *, history: int = 2, support: int = 3, query: int = 3) -> Episode:
    """Random records of a random user."""
    records = [draw_record(rng, time) for time in range(history + support + query)]
    city = tuple(int(x) for x in rng.integers(0, 6, int(rng.integers(1, 3))))
    cuts = records[:history], records[history : history + support], records[history + support :]
    past, own, asked = (tuple(x) for x in cuts)
    return Episode(int(rng.integers(9)), city, past, own, asked)


def draw_episodes(number: int, seed: int = 0, **sizes: int) -> list[Episode]:
    """Some random episodes."""
    rng = np.random.default_rng(seed)
    return [draw_episode(rng, **sizes) for _ in range(number)]


def collate(
    sequences: Sequence[tuple[Episode, Sequence[Record]]],
    *,
    samples: Sequence[int] = (),
    shots: Sequence[int] | None = None,
    denominators: dict[str, float] | None = None,
) -> SequenceBatch:
    """A batch of some records of some episodes, with the history of each."""
    from torchrec import KeyedJaggedTensor

    rows = [[episode.ids(name, own) for episode, own in sequences] for name in FEATURES.sparse]
    counts, times, numbers, actions, num_tags, places = [], [], [], [], [], []
    values: dict[str, list[float]] = {task: [] for task in FEATURES.tasks}
    tokens: dict[str, list[int]] = {task: [] for task in FEATURES.tasks}
    for episode, own in sequences:
        counts.append([2, 0, len(episode.history), len(own)])
        times += [0, 0]
        numbers += [[0.0]] * 2
        actions += [[0.0, 0.0]] * 2
        num_tags += [0, 0]
        for place, record in enumerate((*episode.history, *own)):
            if place >= len(episode.history):
                for task, value in record.labels:
                    values[task].append(value)
                    tokens[task].append(len(times))
            done = dict(record.labels) if place < len(episode.history) else {}
            times.append(record.time)
            numbers.append([record.price])
            actions.append([done.get("click", 0.0), done.get("buy", 0.0)])
            num_tags.append(len(record.tags))
        places.append(len(places))
    labels = {
        task: Labels(torch.tensor(values[task]), torch.tensor(tokens[task], dtype=torch.int64))
        for task in FEATURES.tasks
    }
    return SequenceBatch(
        features=KeyedJaggedTensor(
            keys=list(FEATURES.sparse),
            values=torch.tensor([x for of in rows for ids in of for x in ids], dtype=torch.int64),
            lengths=torch.tensor([len(ids) for of in rows for ids in of], dtype=torch.int64),
        ),
        token_counts_B4=torch.tensor(counts),
        sample_ids_B=torch.tensor(list(samples) or places),
        shots_B=None if shots is None else torch.tensor(shots),
        labels=labels,
        denominators=denominators or {task: float(max(len(x), 1)) for task, x in values.items()},
        gradient_divisor=DIVISOR,
        timestamps_T=torch.tensor(times),
        dense={
            "numbers": torch.tensor(numbers),
            "actions": torch.tensor(actions),
            "tags.count": torch.tensor(num_tags),
        },
    )


def label_counts(episodes: Sequence[Episode]) -> dict[str, float]:
    """By task, the labels of all queries."""
    found = [task for episode in episodes for record in episode.query for task, _ in record.labels]
    return {task: float(max(found.count(task), 1)) for task in FEATURES.tasks}


def training_batch(episodes: Sequence[Episode], shots: int = 3) -> SequenceBatch:
    """As `TaskDataModule` gives it: support and query of each episode, with its sample id."""
    return collate(
        [(x, part) for x in episodes for part in (x.support, x.query)],
        samples=[10 + i for i in range(len(episodes)) for _ in range(2)],
        shots=[shots, 0] * len(episodes),
        denominators=label_counts(episodes),
    )


def evaluation_batch(episodes: Sequence[Episode], shots: Sequence[int]) -> SequenceBatch:
    """Supports of the first records of each episode, so many as each of `shots` says, and its query."""
    return collate(
        [(x, part) for x in episodes for part in (*(x.support[:k] for k in shots), x.query)],
        samples=[10 + i for i in range(len(episodes)) for _ in range(len(shots) + 1)],
        shots=[*shots, 0] * len(episodes),
        denominators=label_counts(episodes),
    )


def make_network(kind: str, **changes: Any) -> Any:
    if kind == "mtgr":
        return MTGR(**({"dim": 4, "num_layers": 2, "num_heads": 2, "max_length": 32, "dropout": 0.0} | changes))
    return DLRM(**({"dim": 4, "hidden_dims": (6, 5), "pooling": kind, "dropout": 0.0} | changes))


class ExactTables(nn.Module):
    """Tables in float64; TorchRec's give float32, whatever they hold."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        own = {name.split(".")[-2]: x.detach().double() for name, x in tables.named_parameters()}
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding.from_pretrained(x, freeze=False) for name, x in own.items()}
        )

    @override
    def forward(self, features: Any) -> dict[str, Any]:
        found = {}
        for name, table in TABLE_OF.items():
            rows = self.embeddings[table](features[name].values())
            found[name] = SimpleNamespace(values=lambda rows=rows: rows)
        return found


def make_module(kind: str = "none", *, exact: bool = True, **changes: Any) -> MetaRankingModule:
    """A small model whose parameters all matter, which logs nowhere; in float64 if it is to be `exact`."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "network": make_network(kind),
        "features": FEATURES,
        "embedding_dim": 4,
        "embedding_std": 1.0,
        "task_weights": WEIGHTS,
        "num_experts": 2,
        "head_dim": 3,
        "shots": [0, 3],
        "inner_lr": 0.3,
        "inner_lr_rows": 0.7,
        "backend": "reference",
    }
    module = MetaRankingModule(**(settings | changes))
    module.setup("fit")
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("step_sizes"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    if exact:
        module.tables = ExactTables(module.tables)  # type: ignore[assignment, arg-type]
    return module.double() if exact else module


def train(module: MetaRankingModule, batch: SequenceBatch) -> float:
    """One training step without an update; the loss, and gradients in ``grad``."""
    module.zero_grad()
    loss: Any = module.training_step(module.on_before_batch_transfer(batch, 0), 0)
    loss.backward()
    return float(loss.detach())


def tables(module: MetaRankingModule) -> dict[str, torch.nn.Parameter]:
    """By table, its weights."""
    assert module.tables is not None
    return {name.split(".")[-2]: x for name, x in module.tables.named_parameters()}
