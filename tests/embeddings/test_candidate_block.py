"""Scores against candidates spread over processes = dense float64 formulas on one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gr.embeddings import CandidateBlock, candidate_block, corpus_share

DIM, NUM_IDS = 5, 23
QUERIES, CANDIDATES = {1: [11], 2: [7, 4], 3: [6, 0, 5]}, {1: [30], 2: [18, 12], 3: [13, 16, 1]}


def problem(repeats: bool) -> dict[str, Tensor]:
    """Queries and candidates of all processes together, float64."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, NUM_IDS, (30,), generator=generator) if repeats else torch.randperm(30, generator=generator)
    return {
        "queries": torch.randn(11, DIM, generator=generator, dtype=torch.float64),
        "candidates": torch.randn(30, DIM, generator=generator, dtype=torch.float64),
        "ids": ids,
        "weights": torch.rand(30, generator=generator, dtype=torch.float64) + 0.1,
        "targets": torch.randint(0, NUM_IDS, (11,), generator=generator),
        # Losses exclude one id a query: of several candidates, of none.
        "excluded": torch.tensor([4, 9, 999, 2, *ids[:7].tolist()]),
        # Some queries exclude several ids, one all of them, some none.
        "excluded_query": torch.tensor([0, 0, 3, 10, *[6] * 30]),
        "excluded_id": torch.tensor([4, 9, 999, 2, *range(30)]),
        "gradient": torch.randn(11, generator=generator, dtype=torch.float64),
    }


def dense_scores(p: dict[str, Tensor], excluding: bool) -> Tensor:
    """As ranking excludes."""
    scores = p["queries"] @ p["candidates"].T
    if excluding:
        for query, id_ in zip(p["excluded_query"].tolist(), p["excluded_id"].tolist(), strict=True):
            scores = torch.where((torch.arange(11) == query)[:, None] & (p["ids"] == id_), -torch.inf, scores)
    return scores


def my_part(p: dict[str, Tensor], world_size: int, rank: int) -> tuple[CandidateBlock, dict[str, Tensor]]:
    import torch.distributed as dist

    queries = slice(*np.cumsum([0, *QUERIES[world_size]])[rank : rank + 2].tolist())
    columns = slice(*np.cumsum([0, *CANDIDATES[world_size]])[rank : rank + 2].tolist())
    inside = (p["excluded_query"] >= queries.start) & (p["excluded_query"] < queries.stop)
    mine = {
        "queries": p["queries"][queries].clone().requires_grad_(),
        "candidates": p["candidates"][columns].clone().requires_grad_(),
        "weights": p["weights"][columns],
        "targets": p["targets"][queries],
        "gradient": p["gradient"][queries],
        "excluded": p["excluded"][queries],
        "excluded_query": p["excluded_query"][inside] - queries.start,
        "excluded_id": p["excluded_id"][inside],
    }
    group = dist.group.WORLD if world_size > 1 else None
    return CandidateBlock(mine["candidates"], p["ids"][columns], group), mine


def run(world_size: int, cells: int, excluding: bool, weighted: bool) -> dict[str, Any]:
    import torch.distributed as dist

    candidate_block._CELLS_AT_ONCE = cells
    rank = dist.get_rank() if world_size > 1 else 0
    found: dict[str, Any] = {}
    for reduction in ("log_sum_exp", "softplus_sum"):
        block, mine = my_part(problem(repeats=True), world_size, rank)
        settings = {
            "excluded_N": mine["excluded"] if excluding else None,
            "log_weights_C": mine["weights"].log() if weighted else None,
        }
        values = getattr(block, reduction)(mine["queries"], **settings)
        finite = torch.where(values == -torch.inf, 0.0, values)
        (finite * mine["gradient"]).sum().backward()
        found[reduction] = [
            np.asarray(x.detach()) for x in (values, mine["queries"].grad, mine["candidates"].grad) if x is not None
        ]
        found["multiplicity"] = [x.numpy() for x in block.multiplicity()]
    block, mine = my_part(problem(repeats=False), world_size, rank)
    pairs = (mine["excluded_query"], mine["excluded_id"]) if excluding else None
    found["ranks"] = block.ranks(mine["queries"], mine["targets"], excluded=pairs).numpy()
    found["top"] = [x.numpy() for x in block.top_k(mine["queries"], 4, excluded=pairs)]
    candidate_block._CELLS_AT_ONCE = 1 << 26
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("cells", "excluding", "weighted"), [(1 << 26, True, True), (40, True, True), (1 << 26, False, False)]
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_is_the_dense_formula(gloo: Any, world_size: int, cells: int, excluding: bool, weighted: bool) -> None:
    parts = gloo(world_size).run(run, world_size, cells, excluding, weighted)
    p = problem(repeats=True)
    for reduction in ("log_sum_exp", "softplus_sum"):
        queries, candidates = p["queries"].requires_grad_(), p["candidates"].requires_grad_()
        weights = p["weights"] if weighted else torch.ones(30, dtype=torch.float64)
        scores = queries @ candidates.T
        if excluding:
            scores = torch.where(p["excluded"][:, None] == p["ids"], -torch.inf, scores)
        if reduction == "log_sum_exp":
            sums = (scores.exp() * weights).sum(1)
            truth = sums.log()
            used = torch.where(sums > 0, sums.clamp(min=1e-300).log(), 0.0)
        else:
            truth = used = ((1 + scores.exp()).log() * weights).sum(1)
        gradients = torch.autograd.grad((used * p["gradient"]).sum(), [queries, candidates])
        for number, wanted in enumerate((truth.detach(), *gradients)):
            ours = np.concatenate([part[reduction][number] for part in parts])
            np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-10, atol=1e-12)
    counts = [p["ids"].tolist().count(i) for i in p["ids"].tolist()]
    assert np.concatenate([part["multiplicity"][0] for part in parts]).tolist() == counts
    assert {int(part["multiplicity"][1]) for part in parts} == {len(set(p["ids"].tolist()))}


@pytest.mark.dist
@pytest.mark.parametrize(("cells", "excluding"), [(1 << 26, True), (40, True), (1 << 26, False)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_best_are_those_of_a_sorted_list(gloo: Any, world_size: int, cells: int, excluding: bool) -> None:
    parts = gloo(world_size).run(run, world_size, cells, excluding, False)
    p = problem(repeats=False)
    scores, ids = dense_scores(p, excluding).numpy(), p["ids"].tolist()
    ranks, best, top = [], [], []
    for row, target in zip(scores, p["targets"].tolist(), strict=True):
        of_target = row[ids.index(target)]
        ranks.append(int((row >= of_target).sum()) + (of_target == -np.inf))  # behind all, if it is none of them
        order = [i for i in np.argsort(-row).tolist() if row[i] > -np.inf][:4]
        top.append(([ids[i] for i in order] + [-1] * 4)[:4])
        best.append(([float(row[i]) for i in order] + [-np.inf] * 4)[:4])
    assert np.concatenate([part["ranks"] for part in parts]).tolist() == ranks
    assert np.concatenate([part["top"][1] for part in parts]).tolist() == top
    np.testing.assert_allclose(np.concatenate([part["top"][0] for part in parts]), best, rtol=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("reduction", ["log_sum_exp", "softplus_sum"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_where_every_candidate_is_excluded_nothing_is_summed(gloo: Any, world_size: int, reduction: str) -> None:
    for values, of_query, of_candidates in gloo(world_size).run(exclude_all, world_size, reduction):
        assert values == [-np.inf if reduction == "log_sum_exp" else 0.0]
        assert not of_query.any()
        assert not of_candidates.any()


def exclude_all(world_size: int, reduction: str) -> Any:
    import torch.distributed as dist

    query, candidates = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    block = CandidateBlock(candidates, torch.full((3,), 7), dist.group.WORLD if world_size > 1 else None)
    values = getattr(block, reduction)(query, excluded_N=torch.tensor([7]))
    gradients = torch.autograd.grad(values.sum(), [query, candidates])
    return values.tolist(), *(x.numpy() for x in gradients)


def test_ties_nan_and_targets_that_are_no_candidates() -> None:
    candidates = torch.tensor([[1.0], [2.0], [2.0], [float("nan")], [0.5]])
    block = CandidateBlock(candidates, torch.tensor([4, 7, 5, 6, 1]))
    ranks = block.ranks(torch.ones(6, 1), torch.tensor([7, 5, 4, 6, 1, 99]))
    assert ranks.tolist() == [2, 2, 3, 6, 4, 6]
    scores, ids = block.top_k(torch.ones(1, 1), 6)
    assert ids.tolist() == [[5, 7, 4, 1, -1, -1]]
    assert scores[0, :4].tolist() == [2.0, 2.0, 1.0, 0.5]


def test_mixed_precision_is_summed_in_float32() -> None:
    queries, candidates = torch.randn(3, DIM).bfloat16().requires_grad_(), torch.randn(40, DIM).requires_grad_()
    found = CandidateBlock(candidates, torch.arange(40)).log_sum_exp(queries)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert queries.grad is not None
    assert queries.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, (queries.float() @ candidates.T).logsumexp(1))


def test_nan_reaches_the_loss() -> None:
    candidates = torch.randn(4, DIM)
    candidates[2] = torch.nan
    assert CandidateBlock(candidates, torch.arange(4)).log_sum_exp(torch.randn(1, DIM)).isnan().all()


def test_shares_of_a_corpus_are_those_of_row_wise_sharding() -> None:
    def shares(rows: Any, size: int) -> list[list[int]]:
        groups = [SimpleNamespace(size=lambda: size, rank=lambda r=r: r) for r in range(size)]
        tables: Any = [SimpleNamespace(_env=SimpleNamespace(process_group=group)) for group in groups]
        return [corpus_share(rows, table).tolist() for table in tables]

    assert shares(10, 1) == [list(range(10))]
    assert shares(10, 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert shares(torch.tensor([3, 8, 9, 40]), 2) == [[3, 8], [9, 40]]
    assert [len(part) for part in shares(5, 4)] == [1, 1, 1, 2]
    with pytest.raises(ValueError, match=r"corpus: 3 item\(s\) for 4 processes"):
        shares(3, 4)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"CandidateBlock: expected embeddings \(C, D\) and ids \(C,\)"):
        CandidateBlock(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("cells", [1 << 26, 64])
def test_of_equal_scores_the_lower_ids_are_best(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_block, "_CELLS_AT_ONCE", cells)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    candidates = torch.ones(1000, 4)
    candidates[ids == 700] = 2
    _, found = CandidateBlock(candidates, ids).top_k(torch.ones(2, 4), 5)
    assert found.tolist() == [[700, 0, 1, 2, 3]] * 2


def test_a_target_that_is_no_candidate_is_behind_all() -> None:
    block = CandidateBlock(torch.ones(3, 2), torch.arange(3))
    assert block.ranks(torch.ones(2, 2), torch.tensor([7, 1])).tolist() == [4, 3]
    assert CandidateBlock(torch.ones(0, 2), torch.arange(0)).ranks(torch.ones(1, 2), torch.tensor([7])).tolist() == [1]
