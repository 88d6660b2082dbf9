"""MAML, first-order MAML, Meta-SGD and Reptile in plain loops over episodes and records, by `torch.func`; for tests.

It knows a model's layers, but nothing of how `MetaRankingModule` adapts them: rows are a dict by table and id, episodes
are taken one by one, and each loss is a loop over labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from lightning_gr.ops.backend import use_backend
from tests.models.episode_samples import DIVISOR, FEATURES, TABLE_OF, WEIGHTS, Episode, Record, collate, label_counts

Dense = dict[str, Tensor]
Rows = dict[tuple[str, int], Tensor]


def concat(xs: Sequence[Tensor], layouts: Sequence[Any]) -> tuple[Tensor, None]:
    """`jagged_concat` by slices; `torch.func` takes no autograd function of the older kind."""
    parts = [x.split(layout.lengths_B.tolist()) for x, layout in zip(xs, layouts, strict=True)]
    return torch.cat([part for of_sequence in zip(*parts, strict=True) for part in of_sequence]), None


def split(x_T: Tensor, layouts: Sequence[Any]) -> list[Tensor]:
    """`jagged_split` by slices."""
    lengths_BK = torch.stack([layout.lengths_B for layout in layouts], 1)
    parts = x_T.split(lengths_BK.flatten().tolist())
    return [torch.cat(parts[k :: len(layouts)]) for k in range(len(layouts))]


class Net(nn.Module):
    """Logits of a batch's candidates by task."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.network, self.heads = module.network, module.heads

    def forward(self, embedded: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        tokens = "lightning_gr.models.ranking_tokens"
        plain = patch.multiple(tokens, jagged_concat=concat, jagged_split=split)
        with use_backend("reference"), plain:
            found: dict[str, Tensor] = self.heads(self.network(embedded, batch))
        return found


def rows_of(episode: Episode, weights: dict[str, Tensor]) -> Rows:
    """The rows that an episode looks up."""
    return {
        (table, i): weights[table][i].detach()
        for feature, table in TABLE_OF.items()
        for part in (episode.support, episode.query)
        for i in episode.ids(feature, part)
    }


def label_losses(net: Net, dense: Dense, rows: Rows, episode: Episode, records: Sequence[Record]) -> Any:
    """By task, the cross entropies of its labels among some records."""
    embedded = {
        feature: torch.stack([rows[table, i] for i in episode.ids(feature, records)])
        if episode.ids(feature, records)
        else torch.zeros(0, FEATURES.dim_of(feature, 4), dtype=torch.float64)
        for feature, table in TABLE_OF.items()
    }
    logits = functional_call(net, dense, (embedded, collate([(episode, records)])))
    losses: dict[str, list[Tensor]] = {task: [] for task in FEATURES.tasks}
    for n, record in enumerate(records):
        for task, value in record.labels:
            x = logits[task][n]
            losses[task].append(torch.logaddexp(torch.zeros_like(x), x) - value * x)
    return losses


def mean_loss(net: Net, dense: Dense, rows: Rows, episode: Episode, parts: Sequence[Sequence[Record]]) -> Tensor:
    """The mean loss of each task over some records, weighted."""
    total = torch.zeros((), dtype=torch.float64)
    every: dict[str, list[Tensor]] = {task: [] for task in FEATURES.tasks}
    for part in parts:
        for task, losses in label_losses(net, dense, rows, episode, part).items():
            every[task] += losses
    for task, losses in every.items():
        if losses:
            total = total + WEIGHTS.get(task, 1.0) * torch.stack(losses).mean()
    return total


def query_loss(net: Net, dense: Dense, rows: Rows, episode: Episode, counts: dict[str, float]) -> Tensor:
    """An episode's part of the loss of the global batch."""
    total = torch.zeros((), dtype=torch.float64)
    for task, losses in label_losses(net, dense, rows, episode, episode.query).items():
        for loss in losses:
            total = total + WEIGHTS.get(task, 1.0) * loss * DIVISOR / counts[task]
    return total


def is_adapted(name: str, adapt: str | list[str]) -> bool:
    if isinstance(adapt, list):
        return any(fnmatchcase(name, pattern) for pattern in adapt)
    return adapt == "both" or (adapt == "embedding") == name.startswith("tables.")


def adapted(
    loss: Callable[[Dense, Rows], Tensor],
    dense: Dense,
    rows: Rows,
    *,
    steps: int,
    second_order: bool,
    sizes: dict[str, Tensor],
) -> tuple[Dense, Rows]:
    """Parameters and rows after inner steps; those without a step size stay."""
    for _ in range(steps):
        of_dense, of_rows = grad(loss, argnums=(0, 1))(dense, rows)
        if not second_order:
            of_dense = {name: x.detach() for name, x in of_dense.items()}
            of_rows = {key: x.detach() for key, x in of_rows.items()}
        dense = {name: x - sizes[name] * of_dense[name] if name in sizes else x for name, x in dense.items()}
        rows = {
            key: x - sizes[f"tables.{key[0]}"] * of_rows[key] if f"tables.{key[0]}" in sizes else x
            for key, x in rows.items()
        }
    return dense, rows


def step_sizes(net: Net, adapt: str | list[str], lr: float, lr_rows: float) -> dict[str, Tensor]:
    """By name, of what is adapted."""
    names = [*dict(net.named_parameters()), *(f"tables.{x}" for x in sorted(set(TABLE_OF.values())))]
    return {
        name: torch.tensor(lr_rows if name.startswith("tables.") else lr, dtype=torch.float64)
        for name in names
        if is_adapted(name, adapt)
    }


def meta_gradients(
    module: Any,
    weights: dict[str, Tensor],
    episodes: Sequence[Episode],
    *,
    steps: int,
    second_order: bool,
    sizes: dict[str, Tensor],
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient by name: of dense parameters, of tables, and of step sizes as ``sizes.<name>``."""
    net, counts = Net(module), label_counts(episodes)
    dense = {name: x.detach() for name, x in net.named_parameters()}
    found = {name: torch.zeros_like(x) for name, x in dense.items()}
    found |= {f"tables.{table}": torch.zeros_like(x) for table, x in weights.items()}
    found |= {f"sizes.{name}": torch.zeros_like(x) for name, x in sizes.items()}
    total = 0.0
    for episode in episodes:

        def outer(dense: Dense, rows: Rows, sizes: dict[str, Tensor], episode: Episode = episode) -> Tensor:
            own = adapted(
                lambda dense, rows: mean_loss(net, dense, rows, episode, [episode.support]),
                dense,
                rows,
                steps=steps,
                second_order=second_order,
                sizes=sizes,
            )
            return query_loss(net, *own, episode, counts)

        rows = rows_of(episode, weights)
        total += float(outer(dense, rows, sizes))
        of_dense, of_rows, of_sizes = grad(outer, argnums=(0, 1, 2))(dense, rows, sizes)
        for name, gradient in of_dense.items():
            found[name] += gradient
        for (table, i), gradient in of_rows.items():
            found[f"tables.{table}"][i] += gradient
        for name, gradient in of_sizes.items():
            found[f"sizes.{name}"] += gradient
    return total, found
