"""Distinct keys and their owners against plain Python; C++ and PyTorch say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_gr.embeddings.dynamic import unique_keys as module
from lightning_gr.embeddings.dynamic.unique_keys import route, unique_keys

IDS = st.one_of(st.sampled_from([0, -1, -2, 2**63 - 1, -(2**63)]), st.integers(-4, 4), st.integers(-(2**63), 2**63 - 1))
MASK = (1 << 64) - 1


@pytest.fixture(params=["native", "torch"], scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(module, "_native", lambda: None)
        else:
            assert module._native() is not None
        yield request.param


def flat(tables: list[list[int]]) -> tuple[Tensor, list[int]]:
    offsets = [0]
    for table in tables:
        offsets.append(offsets[-1] + len(table))
    return torch.tensor([x for table in tables for x in table], dtype=torch.int64), offsets


@settings(max_examples=80, deadline=None)
@given(tables=st.lists(st.lists(IDS, max_size=40), min_size=1, max_size=4), weighs=st.booleans())
def test_distinct_keys_in_the_order_of_their_first_occurrence(
    backend: str, tables: list[list[int]], weighs: bool
) -> None:
    ids_N, offsets = flat(tables)
    weights = [(7 * i) % 5 for i in range(len(ids_N))] if weighs else [1] * len(ids_N)
    found = unique_keys(ids_N, offsets, torch.tensor(weights, dtype=torch.int64) if weighs else None)
    keys = [(number, x) for number, table in enumerate(tables) for x in table]
    distinct, counts = list(dict.fromkeys(keys)), Counter[tuple[int, int]]()
    for key, weight in zip(keys, weights, strict=True):
        counts[key] += weight
    assert found.ids_U.tolist() == [x for _, x in distinct]
    assert found.offsets_T1 == [sum(t < table for t, _ in distinct) for table in range(len(tables) + 1)]
    assert found.inverse_N.tolist() == [distinct.index(k) for k in keys]
    assert found.counts_U.tolist() == [counts[k] for k in distinct]
    assert {x.dtype for x in (found.ids_U, found.inverse_N, found.counts_U)} == {torch.int64}


def owner_in_python(identity: int, salt: int, bits: int, rotation: int, world_size: int) -> int:
    x = (identity ^ salt) & MASK
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & MASK
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    group = (x ^ x >> 33) >> (64 - bits)
    return (group * world_size // 2**bits + rotation) % world_size


@settings(max_examples=80, deadline=None)
@given(
    tables=st.lists(
        st.tuples(
            st.lists(IDS, max_size=30, unique=True), st.integers(0, 2**64 - 1), st.integers(0, 31), st.integers(-9, 9)
        ),
        min_size=1,
        max_size=4,
    ),
    world_size=st.integers(1, 9),
)
def test_a_route_sorts_keys_by_owner_and_table(
    backend: str, tables: list[tuple[list[int], int, int, int]], world_size: int
) -> None:
    ids_U, offsets = flat([table[0] for table in tables])
    salts, bits, rotations = ([table[i] for table in tables] for i in (1, 2, 3))
    found = route(ids_U, offsets, salts, bits, rotations, world_size)
    homes = [
        (owner_in_python(x, salt, bit, rotation, world_size), table)
        for table, (ids, salt, bit, rotation) in enumerate(tables)
        for x in ids
    ]
    assert found.order_U.tolist() == sorted(range(len(homes)), key=lambda i: homes[i])
    counts = Counter(homes)
    assert found.counts_WT.tolist() == [[counts[w, t] for t in range(len(tables))] for w in range(world_size)]


def test_many_ids_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randint(-(2**63), 2**63 - 1, (40_000,), generator=generator)
    # The first table is split into parts and has a frequent id, the second has few ids, the last many different ones.
    ids_N = torch.cat([distinct[torch.randint(30_000, (70_000,), generator=generator)], distinct[:100], distinct])
    ids_N[:70_000:3] = -1
    offsets = [0, 70_000, 70_100, 70_100, 110_100]
    weights_N = torch.randint(4, ids_N.shape, generator=generator)
    expected = module._unique_in_torch(ids_N, offsets, weights_N)
    # torch.unique is another truth, but for the order
    by_value, counts = torch.unique(ids_N[:70_000], return_counts=True)
    assert torch.equal(expected.ids_U[: expected.offsets_T1[1]].sort()[0], by_value)
    assert torch.equal(expected.ids_U[expected.inverse_N], ids_N)
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            found = unique_keys(ids_N, offsets, weights_N)
            assert found.offsets_T1 == expected.offsets_T1
            for name in ("ids_U", "inverse_N", "counts_U"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
            once = unique_keys(ids_N, offsets).counts_U
            assert torch.equal(once[: found.offsets_T1[1]].sort()[0], counts.sort()[0])
    finally:
        torch.set_num_threads(threads)


def test_ids_that_do_not_lie_side_by_side(backend: str) -> None:
    ids_N = torch.tensor([[5, 1], [6, 2], [5, 3]])[:, 0]
    assert unique_keys(ids_N, [0, 3]).counts_U.tolist() == [2, 1]
    assert route(ids_N, [0, 3], [0], [0], [0], 1).order_U.tolist() == [0, 1, 2]


def test_what_is_refused() -> None:
    ids_N = torch.arange(3)
    with pytest.raises(ValueError, match="ids: expected int64 ids"):
        unique_keys(ids_N.int(), [0, 3])
    for offsets in ([0], [0, 2], [1, 3], [0, 4, 3]):
        with pytest.raises(ValueError, match="offsets_T1: expected ascending numbers from 0 to 3"):
            unique_keys(ids_N, offsets)
    with pytest.raises(ValueError, match="weights_N: expected one for each of 3 ids"):
        unique_keys(ids_N, [0, 3], ids_N[:2])
    with pytest.raises(ValueError, match="salts: expected one for each of 1 tables, got 2"):
        route(ids_N, [0, 3], [1, 2], [0], [0], 1)
    with pytest.raises(ValueError, match=r"group_bits: expected 0 ... 31, got \[32\]"):
        route(ids_N, [0, 3], [1], [32], [0], 1)
    with pytest.raises(ValueError, match="world_size: expected 1 or more, got 0"):
        route(ids_N, [0, 3], [1], [1], [0], 0)
