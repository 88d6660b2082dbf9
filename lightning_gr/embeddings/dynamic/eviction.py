"""Which rows go: by their age, and by a budget of a table's groups.

Shape suffixes: N keys, G groups of keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.policies import Eviction, TablePolicy
from lightning_gr.embeddings.dynamic.row_storage import Metadata

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.keyed_rows import KeyedRows


def is_expired(policy: TablePolicy, metadata: Metadata, step: int, time: int) -> Tensor:
    """Which rows have lived too long since their last use, bool (N,)."""
    expired_N = torch.zeros_like(metadata.last_steps, dtype=torch.bool)
    if policy.ttl_steps is not None:
        expired_N |= metadata.last_steps < step - policy.ttl_steps
    if policy.ttl_seconds is not None:
        expired_N |= metadata.last_times < time - policy.ttl_seconds
    # What this step has looked up is in flight.
    return expired_N & (metadata.last_steps < step)


class RowBudget:
    """The budget of one table, shared out over its groups.

    Args:
        rows: the tables' rows.
        table: whose; it has a budget.

    Raises:
        ValueError: there is no room beside the shared rows.
    """

    def __init__(self, rows: KeyedRows, table: int) -> None:
        self._rows, self._table, self._policy = rows, table, rows.configs[table].policy
        budget, groups = rows.budgets[table], 1 << rows.group_bits[table]
        assert budget is not None
        share_G = torch.full((groups,), budget // groups) + (torch.arange(groups) < budget % groups)
        if table in rows.bucket_table:
            share_G -= self._policy.buckets_per_group
            if int(share_G.min()) < 1:
                raise ValueError(
                    f"table {rows.names[table]}: a budget of {budget} rows has no room beside its shared rows; raise "
                    "max_rows, or lower buckets_per_group"
                )
        self._share_G = share_G

    @property
    def num_rows(self) -> int:
        """Rows that fit on all processes together, shared ones left out."""
        return int(self._share_G.sum())

    def excess(self) -> Tensor:
        """How many rows too many each group has, int64 (G,) on the host."""
        return (self._rows.group_rows[self._table] - self._share_G).clamp(min=0)

    def make_room(
        self,
        ids_N: Tensor,
        counts_N: Tensor,
        hit_rows: Tensor,
        step: int,
        time: int,
        leaving: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Which new keys fit into the budget, and the ids of those that go for them; changes nothing.

        Args:
            ids_N: new keys.
            counts_N: how often each occurs; where not all fit, the most frequent do, of equal ones the least id.
            hit_rows: rows that this lookup uses.
            step: of the lookup.
            time: of the lookup.
            leaving: ids and rows that go before; distinct.

        Returns:
            ``(kept_N, gone_ids)``.
        """
        budget_G, have_G = self._share_G, self._rows.group_rows[self._table]
        if leaving is not None:
            left_G = torch.bincount(self._rows.groups(self._table, leaving[0]).cpu(), minlength=len(have_G))
            have_G, hit_rows = have_G - left_G, torch.cat([hit_rows, leaving[1]])
        groups_N = self._rows.groups(self._table, ids_N)
        need_G = torch.bincount(groups_N.cpu(), minlength=len(have_G))
        over_G = have_G + need_G > budget_G
        gone_ids = ids_N[:0]
        free_G = budget_G - have_G
        if bool(over_G.any()):
            slack_G = (budget_G * self._policy.eviction.slack).to(torch.int64)
            wanted_G = torch.where(over_G, have_G + need_G - budget_G + slack_G, 0)
            gone_ids = self.victims(over_G, wanted_G, hit_rows, step, time)
            free_G = free_G + torch.bincount(self._rows.groups(self._table, gone_ids).cpu(), minlength=len(have_G))
        if bool((need_G <= free_G).all()):
            return torch.ones_like(ids_N, dtype=torch.bool), gone_ids
        order = sorted_by(ids_N, -counts_N, groups_N)
        place_N = torch.empty_like(order)
        place_N[order] = _place_in_group(groups_N[order])
        return place_N < free_G.to(ids_N.device)[groups_N], gone_ids

    def victims(self, over_G: Tensor, wanted_G: Tensor, hit_rows: Tensor, step: int, time: int) -> Tensor:
        """Ids of the keys that each group over its budget loses: expired ones, then the least by its policy."""
        ids_N, rows_N = self._rows.entries(self._table, over_G)
        metadata = self._rows.storage.read_metadata(rows_N)
        free_N = (metadata.last_steps < step) & ~torch.isin(rows_N, hit_rows)
        ids_N, rows_N = ids_N[free_N], rows_N[free_N]
        metadata = self._rows.storage.read_metadata(rows_N)
        groups_N = self._rows.groups(self._table, ids_N)
        keys = _eviction_keys(self._policy.eviction, metadata, step)
        alive_N = ~is_expired(self._policy, metadata, step, time)
        order = sorted_by(ids_N, *keys, alive_N.to(torch.int64), groups_N)
        groups_N = groups_N[order]
        return ids_N[order][_place_in_group(groups_N) < wanted_G.to(ids_N.device)[groups_N]]


def _eviction_keys(eviction: Eviction, metadata: Metadata, step: int) -> list[Tensor]:
    """What rows are ordered by, the least going first; the last one counts most."""
    match eviction.policy:
        case "lru":
            return [metadata.last_steps]
        case "lfu":
            return [metadata.counts]
        case "lfu_lru":
            return [metadata.last_steps, metadata.counts]
        case "decayed":
            age_N = (step - metadata.last_steps).double()
            return [metadata.counts.double().clamp(min=1).log2() - age_N / eviction.half_life_steps]
        case "score":
            assert metadata.scores is not None
            return [metadata.scores]
    raise AssertionError(eviction.policy)


def sorted_by(*keys_N: Tensor) -> Tensor:
    """The order by the last key, where that is equal by the one before it, ..."""
    order = keys_N[0].argsort(stable=True)
    for key_N in keys_N[1:]:
        order = order[key_N[order].argsort(stable=True)]
    return order


def _place_in_group(groups_N: Tensor) -> Tensor:
    """How many before each belong to its group; groups stand together."""
    if not len(groups_N):
        return groups_N
    at_N = torch.arange(len(groups_N), device=groups_N.device)
    starts_N = torch.ones_like(groups_N, dtype=torch.bool)
    starts_N[1:] = groups_N[1:] != groups_N[:-1]
    return at_N - torch.where(starts_N, at_N, 0).cummax(0).values
