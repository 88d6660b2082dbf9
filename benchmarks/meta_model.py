"""A meta step as textbooks have it, for bench_meta: lookups apart, task gradients gathered, the update on one process.

Shape suffixes: V values of all features together, U distinct keys, R rows of gradients, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_gr.batch import SequenceBatch
from lightning_gr.batch_samples import take
from lightning_gr.embeddings.dynamic.key_index import key_hash, top_bits
from lightning_gr.episode_batch import EpisodeBatch
from lightning_gr.models import MetaRankingModule


class TextbookModule(MetaRankingModule):
    """The step of `MetaRankingModule` in MAML's own order (Finn et al., arXiv 1703.03400, algorithm 1), spread naively.

    Rows are cut over the processes as ours are, and each computes the inner loops of its own tasks with the same code.
    What differs is what travels:

    - the rows of supports are looked up, and then those of queries, by exchanges of their own: a row in both travels
      twice. All tasks of a process share these two lookups
    - gradients are gathered on the first process, which adds them up, steps the dense optimiser, and sends the
      parameters to all and each row's gradient to the process that has the row

    Args:
        by_task: whether each task's gradient travels; otherwise a process adds up those of its tasks before.
        **settings: of `MetaRankingModule`; one inner step, and tables that are dynamic and of one width.
    """

    def __init__(self, *, by_task: bool, **settings: Any) -> None:
        super().__init__(**settings)
        assert self.inner_steps == 1
        self.automatic_optimization = False
        self.by_task = by_task
        self._found: dict[str, Tensor] | None = None

    @override
    def log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a step of ours logs once, this one would for each task."""

    @override
    def on_train_start(self) -> None:
        # Gradients travel below, not in DDP's backward.
        self.trainer.strategy.model._dmp_wrapped_module.require_backward_grad_sync = False  # type: ignore[union-attr]

    # ---- lookups -----------------------------------------------------------------------------------------------

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch with the features of all supports and of all queries, and each task's own episode."""
        sides = [(batch.shots_B > 0).nonzero()[:, 0], (batch.shots_B == 0).nonzero()[:, 0]]
        batch.sides = [take(batch, places).features for places in sides]
        batch.from_sides = _order(batch.features, sides)
        batch.tasks = []
        plain = SequenceBatch(**{x.name: getattr(batch, x.name) for x in fields(SequenceBatch) if x.init})
        for episode in batch.sample_ids_B.unique(sorted=True).tolist() if self.by_task else ():
            places = (batch.sample_ids_B == episode).nonzero()[:, 0]
            own = super().on_before_batch_transfer(take(plain, places), dataloader_idx)
            own.from_whole = _order(batch.features, [places])
            batch.tasks.append(own)
        return batch

    @override
    def embed(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Rows that were looked up."""
        assert self._found is not None
        return self._found

    @torch.no_grad()
    def _looked_up(self, batch: Any) -> dict[str, Tensor]:
        assert self.tables is not None
        sides = [{name: x.values() for name, x in self.tables(features).items()} for features in batch.sides]
        return {
            name: torch.cat([side[name] for side in sides]).index_select(0, batch.from_sides[name]).requires_grad_()
            for name in sides[0]
        }

    # ---- a step ------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        assert isinstance(batch, EpisodeBatch)
        rows = self._looked_up(batch)
        dense = [x for x in self.parameters() if x.requires_grad]
        losses, dense_gradients, keys, row_gradients = [], [], [], []
        for own in batch.tasks if self.by_task else [batch]:  # type: ignore[attr-defined]
            at = getattr(own, "from_whole", None)
            mine = rows if at is None else {name: x.detach()[at[name]].requires_grad_() for name, x in rows.items()}
            self._found = mine
            loss = super().training_step(own, batch_idx)
            gradients = torch.autograd.grad(loss, [*dense, *mine.values()])
            losses.append(loss.detach())
            dense_gradients.append(torch.cat([x.flatten() for x in gradients[: len(dense)]]))
            ids_V, tables_V = self._keys(own, list(mine))
            keys_U2, sums_UD = _summed(torch.stack([tables_V, ids_V], 1), torch.cat(gradients[len(dense) :]))
            keys.append(keys_U2)
            row_gradients.append(sums_UD)
        self._outer_step(dense, torch.stack(dense_gradients), torch.cat(keys), torch.cat(row_gradients))
        return torch.stack(losses).sum()

    @property
    def _engine(self) -> Any:
        assert self.tables is not None
        return self.tables.engine

    def _keys(self, batch: SequenceBatch, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and numbers of tables of all values, feature by feature."""
        table_of = {feature: t for t, feature, _ in self._engine.lookups}
        ids = [batch.features[name].values() for name in names]
        tables = [torch.full_like(x, table_of[name]) for name, x in zip(names, ids, strict=True)]
        return torch.cat(ids), torch.cat(tables)

    @torch.no_grad()
    def _outer_step(self, dense: list[Tensor], dense_TK: Tensor, keys_U2: Tensor, rows_UD: Tensor) -> None:
        """Gathers gradients on the first process, which updates and hands out."""
        world_size, first = dist.get_world_size(), dist.get_rank() == 0
        gathered = [torch.empty_like(dense_TK) for _ in range(world_size)] if first else None
        dist.gather(dense_TK, gathered)
        keys_R2, rows_RD = _to_first(keys_U2, rows_UD)
        flat = torch.empty_like(dense_TK[0])
        outgoing: list[tuple[Tensor, Tensor]] = [(keys_U2[:0], rows_UD[:0])] * world_size
        if gathered is not None:
            total = torch.cat(gathered).sum(0) / world_size
            for parameter, gradient in zip(dense, total.split([x.numel() for x in dense]), strict=True):
                parameter.grad = gradient.view_as(parameter)
            self.optimizers(use_pl_optimizer=False).step()  # type: ignore[union-attr]
            flat = torch.cat([x.flatten() for x in dense])
            keys_N2, sums_ND = _summed(keys_R2, rows_RD)
            owner_N = self._owners(keys_N2)
            outgoing = [(keys_N2[owner_N == r], sums_ND[owner_N == r]) for r in range(world_size)]
        dist.broadcast(flat, 0)
        for parameter, values in zip(dense, flat.split([x.numel() for x in dense]), strict=True):
            parameter.copy_(values.view_as(parameter))
        self._update_rows(*_from_first(outgoing))

    def _owners(self, keys_N2: Tensor) -> Tensor:
        """The process that holds each key's row."""
        owner_N = torch.zeros(len(keys_N2), dtype=torch.int64)
        placement = self._engine.placement
        for t, (salt, bits) in enumerate(zip(placement.salts, placement.group_bits, strict=True)):
            own = keys_N2[:, 0] == t
            owner_N[own] = placement.owners(t, top_bits(key_hash(keys_N2[own, 1], salt), bits))
        return owner_N

    def _update_rows(self, keys_N2: Tensor, sums_ND: Tensor) -> None:
        engine = self._engine
        (table,) = engine.tables
        keys_N2, order = _sorted(keys_N2)
        counts = torch.bincount(keys_N2[:, 0], minlength=len(engine.configs))
        offsets = [0, *counts.cumsum(0).tolist()]
        ones = torch.ones(len(keys_N2), dtype=torch.int64)
        plan = table.plan(
            keys_N2[:, 1].contiguous(), offsets, ones, step=engine.next_step, time=engine.time, training=False
        )
        engine._pending[0].add(plan.rows_N, sums_ND[order] / dist.get_world_size(), None)
        engine.step()


def _order(features: Any, sides: Sequence[Tensor]) -> dict[str, Tensor]:
    """By feature: if each side's sequences were looked up, one side after the other, where each value stands.

    With one side that leaves sequences out: which values are theirs.
    """
    lengths_FB = features.lengths().view(len(features.keys()), -1)
    found = {}
    for name, lengths_B in zip(features.keys(), lengths_FB, strict=True):
        number_V = torch.arange(int(lengths_B.sum())).split(lengths_B.tolist())
        values = torch.cat([number_V[b] for side in sides for b in side.tolist()])
        found[name] = values.argsort() if len(sides) > 1 else values
    return found


def _sorted(keys_N2: Tensor) -> tuple[Tensor, Tensor]:
    """Keys in the order of tables, and where each was."""
    order = keys_N2[:, 0].argsort(stable=True)
    return keys_N2[order], order


def _summed(keys_R2: Tensor, rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct keys and the sums of their rows."""
    size = int(keys_R2[:, 1].max()) + 1 if len(keys_R2) else 1
    codes_U, inverse_R = (keys_R2[:, 0] * size + keys_R2[:, 1]).unique(return_inverse=True)
    sums_UD = rows_RD.new_zeros(len(codes_U), rows_RD.shape[1]).index_add_(0, inverse_R, rows_RD)
    return torch.stack([codes_U // size, codes_U % size], 1), sums_UD


def _exchanged(pieces: Sequence[Tensor], counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    outgoing = torch.cat(list(pieces))
    incoming = outgoing.new_empty(sum(sizes), *outgoing.shape[1:])
    dist.all_to_all_single(incoming, outgoing, list(sizes), list(counts))
    return incoming


def _to_first(keys_U2: Tensor, rows_UD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and rows of all processes, on the first one."""
    world_size, first = dist.get_world_size(), dist.get_rank() == 0
    own = torch.tensor([len(keys_U2)])
    of_all = [torch.empty_like(own) for _ in range(world_size)]
    dist.gather(own, of_all if first else None)
    counts = [len(keys_U2)] + [0] * (world_size - 1)
    sizes = [int(x) for x in of_all] if first else [0] * world_size
    return _exchanged([keys_U2], counts, sizes), _exchanged([rows_UD], counts, sizes)


def _from_first(outgoing: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the first process sends to each."""
    world_size, first = dist.get_world_size(), dist.get_rank() == 0
    counts = [len(keys) for keys, _ in outgoing]
    own = torch.zeros(1, dtype=torch.int64)
    dist.scatter(own, [torch.tensor([n]) for n in counts] if first else None)
    sizes = [int(own)] + [0] * (world_size - 1)
    return _exchanged([x for x, _ in outgoing], counts, sizes), _exchanged([x for _, x in outgoing], counts, sizes)
