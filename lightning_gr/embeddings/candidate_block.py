"""CandidateBlock: scores of queries against candidates that stay where they are, spread over processes.

Vocabulary parallelism as in Megatron-LM (arXiv 1909.08053, section 3): queries travel, candidates do not.
Memory is bounded, however many candidates there are.

Shape suffixes: N queries of this process, M queries of all processes, C candidates of this process, K best, D width,
P excluded pairs, X excluded cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.ops.full_softmax import full_softmax_flops, full_softmax_recomputed_flops, log_sum_exp

_CELLS_AT_ONCE = 1 << 26
"""Scores held at a time where they are ranked or summed by softplus."""

Pairs = tuple[Tensor, Tensor]
Reduction = Literal["log_sum_exp", "softplus_sum"]


def process_group_of(tables: nn.Module | None) -> dist.ProcessGroup | None:
    """The processes over which a collection's rows are spread; None where each process has them all.

    Args:
        tables: a collection, sharded or not; None means one process.
    """
    if isinstance(engine := getattr(tables, "engine", None), DynamicEngine):
        return engine.group
    group = getattr(getattr(tables, "_env", None), "process_group", None)
    return group if group is not None and group.size() > 1 else None


def all_processes_of(tables: nn.Module | None) -> dist.ProcessGroup | None:
    """The processes that train together, whichever group of them has the rows; None of one process.

    Args:
        tables: a collection, sharded or not; None means one process.
    """
    if isinstance(engine := getattr(tables, "engine", None), DynamicEngine):
        return engine.all_processes
    return process_group_of(tables)


def corpus_share(rows: Tensor | int, tables: nn.Module | None) -> Tensor:
    """The rows of a corpus that this process scores: all, or its share where the tables are sharded.

    Args:
        rows: int64 rows of the corpus, ascending, or how many there are. All rows are cut as row-wise sharding cuts
            them, so that looking up a share leaves no process. Of a dynamic table they are ids in any order.
        tables: the collection that holds them; if it is dynamic, in its only table.

    Raises:
        ValueError: there are more processes than rows.
    """
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    if isinstance(engine := getattr(tables, "engine", None), DynamicEngine):
        return rows[engine.owned(0, rows)]
    group = process_group_of(tables)
    if group is None:
        return rows
    size, rank = group.size(), group.rank()
    if len(rows) < size:
        raise ValueError(f"corpus: {len(rows)} item(s) for {size} processes; use at most one process an item")
    block = -(-len(rows) // size)
    if block * (size - 1) < len(rows):
        return rows[rank * block : (rank + 1) * block]
    # So few that blocks of one size would leave a process without any.
    return rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]


@dataclass(frozen=True)
class CandidateBlock:
    """Candidates of this process; those of a group's processes together are what its queries are scored against.

    Every process of the group calls the same methods in the same order, with any number of queries, none included.

    Args:
        embeddings_CD: the candidates.
        ids_C: int64 what each stands for; may repeat.
        group: the processes that hold the others; None means that there are no others.

    Raises:
        ValueError: the shapes do not fit together.
    """

    embeddings_CD: Tensor
    ids_C: Tensor
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.embeddings_CD.dim() != 2 or self.ids_C.shape != self.embeddings_CD.shape[:1]:
            raise ValueError(
                f"CandidateBlock: expected embeddings (C, D) and ids (C,), got {tuple(self.embeddings_CD.shape)} and "
                f"{tuple(self.ids_C.shape)}"
            )

    # ---- losses ------------------------------------------------------------------------------------------------

    def log_sum_exp(
        self, queries_ND: Tensor, *, excluded_N: Tensor | None = None, log_weights_C: Tensor | None = None
    ) -> Tensor:
        """``log(sum_c w_c exp(q . c))`` over the candidates of all processes; differentiable in both.

        Args:
            queries_ND: queries of this process.
            excluded_N: int64 id whose candidates do not count for a query.
            log_weights_C: logarithm of each candidate's weight; None means 0.

        Returns:
            float (N,); minus infinity where a query has no candidate.
        """
        return self._reduced("log_sum_exp", queries_ND, excluded_N, log_weights_C)

    def softplus_sum(
        self, queries_ND: Tensor, *, excluded_N: Tensor | None = None, log_weights_C: Tensor | None = None
    ) -> Tensor:
        """``sum_c w_c log(1 + exp(q . c))``, as `log_sum_exp`."""
        return self._reduced("softplus_sum", queries_ND, excluded_N, log_weights_C)

    def _reduced(
        self, reduction: Reduction, queries_ND: Tensor, excluded_N: Tensor | None, log_weights_C: Tensor | None
    ) -> Tensor:
        peers = _Peers.of(queries_ND, self.group)
        dtype = torch.promote_types(queries_ND.dtype, self.embeddings_CD.dtype)
        queries_MD, candidates_CD = queries_ND.to(dtype), self.embeddings_CD.to(dtype)
        if self.group is not None:
            queries_MD = _Gathered.apply(queries_MD, peers)
        excluded_M = None if excluded_N is None else peers.gathered(excluded_N)
        if reduction == "log_sum_exp":
            ids_C = None if excluded_M is None else self.ids_C
            part_M = log_sum_exp(
                queries_MD,
                candidates_CD,
                log_weights_C=log_weights_C,
                ids_C=ids_C,
                excluded_T=excluded_M,
                # As in a mean of losses; with other processes it is a share, and what excludes is joined to others.
                uniform_gradient=self.group is None and excluded_M is None,
            )
        else:
            rows_M = torch.arange(len(queries_MD), device=queries_MD.device)
            cells = None if excluded_M is None else self._cells_of(rows_M, excluded_M)
            part_M = _SoftplusSum.apply(queries_MD, candidates_CD, log_weights_C, cells)
        whole_N: Tensor = part_M if self.group is None else _Joined.apply(part_M, peers, reduction)
        return whole_N

    @staticmethod
    def recomputed_flops(
        reduction: Reduction,
        num_queries: int,
        num_candidates: int,
        dim: int,
        *,
        device: torch.device,
        alone: bool,
    ) -> int:
        """What backward of `log_sum_exp` or `softplus_sum` computes again, of scores by the queries' own share.

        `alone`: no other process has candidates, and nothing is excluded.
        """
        if reduction == "log_sum_exp":
            return full_softmax_recomputed_flops(
                num_queries, num_candidates, dim, device=device, uniform_gradient=alone
            )
        fits = num_queries * num_candidates <= _CELLS_AT_ONCE
        return 0 if fits else full_softmax_flops(num_queries, num_candidates, dim)

    def multiplicity(self) -> tuple[Tensor, Tensor]:
        """How often each id occurs among the candidates of all processes, and how many distinct ids there are.

        Returns:
            int64 (C,), and int64 0-D.
        """
        peers = _Peers.of(self.ids_C, self.group)
        _, inverse_M, counts = peers.gathered(self.ids_C).unique(return_inverse=True, return_counts=True)
        return peers.own(counts[inverse_M]), torch.tensor(len(counts), device=counts.device)

    def num_candidates(self) -> int:
        """How many candidates all processes have together."""
        return sum(_Peers.of(self.ids_C, self.group).sizes)

    # ---- ranking -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ranks(self, queries_ND: Tensor, targets_N: Tensor, *, excluded: Pairs | None = None) -> Tensor:
        """The rank of each query's target among the candidates, 1 being the best; ids must not repeat.

        Ties count against the model. A target whose score is NaN, or that is excluded or no candidate, is behind all.

        Args:
            queries_ND: queries of this process.
            targets_N: int64 id of each query's target.
            excluded: int64 ``(query_P, id_P)``: candidates with this id do not count for this query.

        Returns:
            int64 (N,).
        """
        peers = _Peers.of(queries_ND, self.group)
        cells = self._excluded_cells(excluded, peers)
        queries_MD, targets_M = peers.gathered(queries_ND.to(self.embeddings_CD.dtype)), peers.gathered(targets_N)
        row_X, column_X = self._cells_of(torch.arange(len(targets_M), device=targets_M.device), targets_M)
        chunks: Iterable[tuple[int, Tensor]] = _scores(queries_MD, self.embeddings_CD, cells, nan_last=True)
        if _fit_at_once(queries_MD, self.embeddings_CD):
            chunks = list(chunks)
        of_target_M = queries_MD.new_full(targets_M.shape, -torch.inf, dtype=_wide(queries_MD))
        for first, scores in chunks:
            here = (column_X >= first) & (column_X < first + scores.shape[1])
            of_target_M[row_X[here]] = scores[row_X[here], column_X[here] - first]
        of_target_M = _over_processes(of_target_M, self.group, dist.ReduceOp.MAX)
        if not isinstance(chunks, list):
            chunks = _scores(queries_MD, self.embeddings_CD, cells, nan_last=True)
        ahead_M = torch.zeros_like(targets_M)
        for _, scores in chunks:
            ahead_M += (scores >= of_target_M[:, None]).sum(1)
        # A target that cannot be found, of score minus infinity, has every candidate before it and is none itself.
        ahead_M = _over_processes(ahead_M, self.group, dist.ReduceOp.SUM) + (of_target_M == -torch.inf)
        return peers.own(ahead_M)

    @torch.no_grad()
    def top_k(self, queries_ND: Tensor, k: int, *, excluded: Pairs | None = None) -> tuple[Tensor, Tensor]:
        """The `k` best candidates of each query, best first; of equal scores the lower id.

        Where fewer than `k` are left, the rest has score minus infinity and id -1.

        Args:
            queries_ND: queries of this process.
            k: how many.
            excluded: as in `ranks`.

        Returns:
            ``(scores, ids)``: float32 and int64, both (N, K).
        """
        peers = _Peers.of(queries_ND, self.group)
        cells = self._excluded_cells(excluded, peers)
        queries_MD = peers.gathered(queries_ND.to(self.embeddings_CD.dtype))
        best = torch.full((len(queries_MD), k), -torch.inf, device=queries_MD.device)
        ids = torch.full((len(queries_MD), k), -1, dtype=torch.int64, device=queries_MD.device)
        for first, scores in _scores(queries_MD, self.embeddings_CD, cells, nan_last=True):
            found, columns = _top_k(scores, self.ids_C[first : first + scores.shape[1]], k)
            best, ids = _merged([best, found], [ids, self.ids_C[first + columns]], k)
        best, ids = _merged(_blocks(best, self.group), _blocks(ids, self.group), k)
        return peers.own(best), peers.own(ids.masked_fill(best == -torch.inf, -1))

    # ---- exclusion ---------------------------------------------------------------------------------------------

    def _excluded_cells(self, excluded: Pairs | None, peers: _Peers) -> Pairs | None:
        """Rows among the queries of all processes and columns of this one that do not count."""
        if excluded is None:
            return None
        query_P, id_P = excluded
        pairs = _Peers.of(query_P, self.group)
        return self._cells_of(pairs.gathered(query_P + peers.first), pairs.gathered(id_P))

    def _cells_of(self, rows_P: Tensor, ids_P: Tensor) -> Pairs:
        """Row and column of each candidate of this process that has the id which a row names."""
        ids, order = self.ids_C.sort()
        first_P, last_P = torch.searchsorted(ids, ids_P), torch.searchsorted(ids, ids_P, right=True)
        counts_P = last_P - first_P
        rows_X = torch.repeat_interleave(rows_P, counts_P)
        start_X = torch.repeat_interleave(first_P - (counts_P.cumsum(0) - counts_P), counts_P)
        return rows_X, order[start_X + torch.arange(len(rows_X), device=rows_X.device)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _columns_at_once(queries_MD: Tensor) -> int:
    return max(_CELLS_AT_ONCE // max(len(queries_MD), 1), 1)


def _fit_at_once(queries_MD: Tensor, candidates_CD: Tensor) -> bool:
    return len(candidates_CD) <= _columns_at_once(queries_MD)


def _scores(
    queries_MD: Tensor, candidates_CD: Tensor, cells: Pairs | None, *, nan_last: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """First column and float32 (or wider) scores of some candidates at a time; what does not count is -inf."""
    columns = _columns_at_once(queries_MD)
    for first in range(0, len(candidates_CD), columns):
        scores = queries_MD @ candidates_CD[first : first + columns].T
        scores = scores.to(_wide(scores))
        if cells is not None:
            rows_X, columns_X = cells
            if columns < len(candidates_CD):
                here = (columns_X >= first) & (columns_X < first + scores.shape[1])
                rows_X, columns_X = rows_X[here], columns_X[here] - first
            scores[rows_X, columns_X] = -torch.inf
        yield first, scores.masked_fill_(scores.isnan(), -torch.inf) if nan_last else scores


class _SoftplusSum(torch.autograd.Function):
    """A sum over the candidates of this process; kept scores, if they fit at once, save backward computing them."""

    @staticmethod
    @override
    def forward(
        ctx: Any, queries_MD: Tensor, candidates_CD: Tensor, log_weights_C: Tensor | None, cells: Pairs | None
    ) -> Tensor:
        total_M, kept = queries_MD.new_zeros(len(queries_MD), dtype=_wide(queries_MD)), None
        for first, scores in _scores(queries_MD, candidates_CD, cells):
            values = nn.functional.softplus(scores)
            if log_weights_C is not None:
                values = values * log_weights_C[first : first + scores.shape[1]].exp()
            total_M += values.sum(1)
            kept = scores
        if not _fit_at_once(queries_MD, candidates_CD):
            kept = None
        ctx.save_for_backward(queries_MD, candidates_CD, log_weights_C, kept, *(cells or ()))
        return total_M

    @staticmethod
    @override
    def backward(ctx: Any, grad_M: Tensor) -> Any:
        queries_MD, candidates_CD, log_weights_C, kept, *cells = ctx.saved_tensors
        grad_queries_MD, grad_candidates_CD = torch.zeros_like(queries_MD), torch.zeros_like(candidates_CD)
        chunks = _scores(queries_MD, candidates_CD, tuple(cells) or None) if kept is None else [(0, kept)]
        for first, scores in chunks:
            chunk = slice(first, first + scores.shape[1])
            slope = scores.sigmoid()
            if log_weights_C is not None:
                slope *= log_weights_C[chunk].exp()
            slope = slope.mul_(grad_M[:, None]).to(queries_MD.dtype)
            grad_candidates_CD[chunk] = slope.T @ queries_MD
            grad_queries_MD += slope @ candidates_CD[chunk]
        return grad_queries_MD, grad_candidates_CD, None, None


# ---- what the processes exchange -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Peers:
    """How many rows each process of a group has."""

    group: dist.ProcessGroup | None
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor, group: dist.ProcessGroup | None) -> _Peers:
        if group is None:
            return cls(None, (rows.shape[0],))
        counts = torch.zeros(group.size(), dtype=torch.int64, device=rows.device)
        counts[group.rank()] = rows.shape[0]
        dist.all_reduce(counts, group=group)
        return cls(group, tuple(counts.tolist()))

    @property
    def first(self) -> int:
        """Where this process's rows begin among those of all."""
        return 0 if self.group is None else sum(self.sizes[: self.group.rank()])

    def gathered(self, own: Tensor) -> Tensor:
        """Rows of all processes, one after the other."""
        if self.group is None:
            return own
        padded = own.new_zeros(max(self.sizes), *own.shape[1:])
        padded[: own.shape[0]] = own
        parts = _blocks(padded, self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def own(self, of_all: Tensor) -> Tensor:
        """This process's rows among those of all."""
        return of_all if self.group is None else of_all[self.first : self.first + self.sizes[self.group.rank()]]


class _Gathered(torch.autograd.Function):
    """Queries of all processes, whose gradients come from all of them."""

    @staticmethod
    @override
    def forward(ctx: Any, queries_ND: Tensor, peers: _Peers) -> Tensor:
        ctx.peers = peers
        return peers.gathered(queries_ND)

    @staticmethod
    @override
    def backward(ctx: Any, grad_MD: Tensor) -> Any:
        return ctx.peers.own(_over_processes(grad_MD.clone(), ctx.peers.group, dist.ReduceOp.SUM)), None


class _Joined(torch.autograd.Function):
    """The whole of this process's queries, from each process's part of the queries of all."""

    @staticmethod
    @override
    def forward(ctx: Any, part_M: Tensor, peers: _Peers, reduction: Reduction) -> Tensor:
        ctx.peers, ctx.reduction = peers, reduction
        parts = torch.stack(_blocks(part_M, peers.group))
        total_M = parts.logsumexp(0) if reduction == "log_sum_exp" else parts.sum(0)
        ctx.save_for_backward(part_M, total_M)
        return peers.own(total_M)

    @staticmethod
    @override
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        part_M, total_M = ctx.saved_tensors
        grad_M = ctx.peers.gathered(grad_N)
        if ctx.reduction == "log_sum_exp":
            # A query without any candidate has a sum of minus infinity, and no gradient.
            grad_M = grad_M * torch.where(part_M == -torch.inf, 0.0, (part_M - total_M).exp())
        return grad_M, None, None


def _blocks(own: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Tensors of one shape from all processes."""
    if group is None:
        return [own]
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts


def _over_processes(values: Tensor, group: dist.ProcessGroup | None, how: Any) -> Tensor:
    if group is not None:
        values = values.contiguous()
        dist.all_reduce(values, op=how, group=group)
    return values


def _top_k(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of some columns, of equal scores those of lower ids, in any order; and which columns they are."""
    k = min(k, scores.shape[1])
    found, columns = scores.topk(k, dim=1)
    if k == 0:
        return found, columns
    # More candidates reach the last score than there is room for, and `topk` takes any of them.
    tied = ((scores >= found[:, -1:]).sum(1) > k).nonzero()[:, 0]
    if len(tied):
        by_id = ids.argsort()
        sorted_scores, order = scores[tied][:, by_id].sort(dim=1, descending=True, stable=True)
        found[tied], columns[tied] = sorted_scores[:, :k], by_id[order[:, :k]]
    return found, columns


def _merged(scores: list[Tensor], ids: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best of several lists; of equal scores the lower id."""
    all_ids, by_id = torch.cat(ids, 1).sort(dim=1)
    all_scores = torch.cat([x.float() for x in scores], 1).gather(1, by_id)
    best, order = all_scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k], all_ids.gather(1, order)[:, :k]
