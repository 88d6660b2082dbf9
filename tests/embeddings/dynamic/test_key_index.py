"""KeyIndex against a dictionary, on every backend; on a CPU the kernels are interpreted, in a process of its own."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from lightning_gr.embeddings.dynamic import key_slots
from lightning_gr.embeddings.dynamic.key_index import KeyIndex, key_hash, top_bits
from lightning_gr.embeddings.dynamic.key_slots import first_occurrences, probe_path, signed64

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_TOO = "dictionary or one_group or tombstones or without_memory or side_by_side"
SALTS = [0x9E3779B97F4A7C15, 12345, 0]
MASK = (1 << 64) - 1


@pytest.fixture(
    params=["triton"] if INTERPRETED else ["native", "torch", pytest.param("triton-cuda", marks=pytest.mark.gpu)],
    scope="module",
)
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    backend, _, device = request.param.partition("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return {"backend": backend, "device": device or "cpu"}


@pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs triton")
def test_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", INTERPRETED_TOO, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def hash_in_python(identity: int, salt: int) -> int:
    x = (identity ^ salt) & MASK
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & MASK
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ x >> 33


def int64(values: Any, device: str = "cpu") -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=device)


class Model:
    """A dictionary beside an index: both are told the same, and must say the same."""

    def __init__(self, where: dict[str, Any], salts: list[int] = SALTS, capacity: int = 8) -> None:
        self.salts, self.device = salts, where["device"]
        self.index = KeyIndex(salts=salts, capacity=capacity, **where)
        self.rows: dict[tuple[int, int], int] = {}
        self.next_row = 0

    def tensors(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return int64((k[0] for k in keys), self.device), int64((k[1] for k in keys), self.device)

    def find(self, keys: list[tuple[int, int]]) -> None:
        assert self.index.find(*self.tensors(keys)).tolist() == [self.rows.get(k, -1) for k in keys]

    def find_or_insert(self, keys: list[tuple[int, int]]) -> None:
        rows_N, positions_U = self.index.find_or_insert(*self.tensors(keys), self.next_row)
        expected, new = [], []
        for position, key in enumerate(keys):
            if key not in self.rows:
                self.rows[key] = self.next_row
                self.next_row += 1
                new.append(position)
            expected.append(self.rows[key])
        assert rows_N.tolist() == expected
        assert positions_U.tolist() == new

    def insert(self, keys: list[tuple[int, int]]) -> None:
        new = [k for k in dict.fromkeys(keys) if k not in self.rows]
        rows = [self.next_row + 3 * i for i in reversed(range(len(new)))]
        self.index.insert(*self.tensors(new), int64(rows, self.device))
        self.rows |= dict(zip(new, rows, strict=True))
        self.next_row += 3 * len(new)

    def delete(self, keys: list[tuple[int, int]]) -> None:
        keys = list(dict.fromkeys(keys))
        assert self.index.delete(*self.tensors(keys)).tolist() == [self.rows.pop(k, -1) for k in keys]

    def clear(self) -> None:
        self.index.clear()
        self.rows.clear()

    def check(self) -> None:
        assert len(self.index) == len(self.rows)
        assert self.index.load_factor <= 0.75
        assert as_dict(*self.index.entries()) == self.rows
        for bits in (0, 2):
            flags = (
                torch.rand(len(self.salts), 1 << bits, generator=torch.Generator().manual_seed(len(self.rows))) < 0.5
            )
            chosen = {
                (identity, table): row
                for (identity, table), row in self.rows.items()
                if flags[table, hash_in_python(identity, self.salts[table]) >> (64 - bits)]
            }
            assert as_dict(*self.index.entries_of(flags.to(self.device))) == chosen


def as_dict(ids_N: Tensor, tables_N: Tensor, rows_N: Tensor) -> dict[tuple[int, int], int]:
    assert ids_N.dtype == tables_N.dtype == rows_N.dtype == torch.int64
    keys = list(zip(ids_N.tolist(), tables_N.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, rows_N.tolist(), strict=True))


def colliding_ids(salt: int, count: int, num_groups: int) -> list[int]:
    """Ids whose search begins in one group, for indices of up to so many groups."""
    found: list[int] = []
    identity = 0
    while len(found) < count:
        found += [identity] if hash_in_python(identity, salt) % num_groups == 3 else []
        identity += 1
    return found


COLLIDING = colliding_ids(SALTS[0], 40, 64)
IDS = st.one_of(
    st.sampled_from([0, -1, -2, -3, 2**63 - 1, -(2**63), *COLLIDING]),
    st.integers(-60, 60),
    st.integers(-8, 8).map(lambda x: x * 4096),
    st.integers(-(2**63), 2**63 - 1),
)


def operations(num_tables: int) -> st.SearchStrategy[list[tuple[str, list[tuple[int, int]]]]]:
    keys = st.lists(st.tuples(IDS, st.integers(0, num_tables - 1)), max_size=40)
    names = st.sampled_from(["find", "find_or_insert", "find_or_insert", "insert", "delete", "delete"])
    return st.lists(st.tuples(names, keys), min_size=1, max_size=12)


@settings(
    max_examples=3 if INTERPRETED else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("num_tables", [1, 3])
def test_an_index_is_a_dictionary(where: dict[str, Any], num_tables: int, data: st.DataObject) -> None:
    model = Model(where, SALTS[:num_tables])
    for name, keys in data.draw(operations(num_tables)):
        getattr(model, name)(keys)
        model.check()
    model.find([(x, 0) for x in (0, -1, -(2**63), 17)])


def test_deletes_and_inserts_in_turn(where: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Model(where)
    for step in range(40):
        ids = torch.randint(-300, 300, (150,), generator=generator).tolist()
        tables = torch.randint(3, (150,), generator=generator).tolist()
        keys = list(zip(ids, tables, strict=True))
        model.find_or_insert(keys)
        model.find(keys)
        model.delete(keys[: 50 + 25 * (step % 4)])
        model.check()
    model.clear()
    model.find(keys)
    model.find_or_insert(keys)
    model.check()


def test_keys_that_all_begin_in_one_group(where: dict[str, Any]) -> None:
    model = Model(where, SALTS[:1], capacity=64)
    keys = [(x, 0) for x in COLLIDING]
    model.find_or_insert(keys)
    assert model.index.capacity == 64
    model.delete(keys[::2])
    assert model.index.num_tombstones > 0
    model.find(keys)
    model.find_or_insert(keys)
    model.check()


def test_tables_with_the_same_ids(where: dict[str, Any]) -> None:
    index = KeyIndex(salts=SALTS, **where)
    ids = torch.arange(-50, 50, device=where["device"])
    for table in range(3):
        rows_N, _ = index.find_or_insert(ids, table, 1000 * table)
        assert rows_N.tolist() == list(range(1000 * table, 1000 * table + 100))
    assert index.delete(ids, 1).tolist() == list(range(1000, 1100))
    assert index.find(ids, torch.ones_like(ids)).tolist() == [-1] * 100
    assert index.find(ids, torch.full_like(ids, 2, dtype=torch.int32)).tolist() == list(range(2000, 2100))


def test_equal_salts_do_not_mix_tables(where: dict[str, Any]) -> None:
    model = Model(where, [5, 5])
    model.find_or_insert([(x, table) for x in range(40) for table in (0, 1)])
    model.check()


@pytest.mark.parametrize("log", range(3, 13))
def test_a_path_visits_every_group_once(log: int) -> None:
    num_groups = (1 << log) // 8
    hashes_N = key_hash(torch.arange(-20, 20), SALTS[0])
    group_N, stride_N = probe_path(hashes_N, num_groups)
    for identity, group, stride in zip(range(-20, 20), group_N.tolist(), stride_N.tolist(), strict=True):
        hashed = hash_in_python(identity, SALTS[0])
        assert (group, stride) == (hashed % num_groups, hashed >> 32 | 1)
        assert sorted((group + t * stride) % num_groups for t in range(num_groups)) == list(range(num_groups))


@pytest.mark.parametrize("capacity", [8, 32, 1024])
def test_it_grows_when_three_quarters_are_full(where: dict[str, Any], capacity: int) -> None:
    index = KeyIndex(salts=[7], capacity=capacity, **where)
    most = capacity * 3 // 4
    ids = torch.arange(most + 1, device=where["device"])
    index.find_or_insert(ids[:most].repeat(2), 0, 0)
    assert (index.capacity, len(index)) == (capacity, most)
    index.find_or_insert(ids, 0, most)
    assert (index.capacity, len(index)) == (2 * capacity, most + 1)
    assert index.find(ids, 0).tolist() == ids.tolist()
    assert index.nbytes == 12 * index.capacity


def test_room_that_is_reserved_is_enough(where: dict[str, Any]) -> None:
    index = KeyIndex(salts=[7], capacity=1, **where)
    assert index.capacity == 8
    index.find_or_insert(torch.arange(5, device=where["device"]), 0, 0)
    index.reserve(1000)
    capacity = index.capacity
    index.find_or_insert(torch.arange(1000, device=where["device"]), 0, 5)
    assert capacity == index.capacity == 2048
    index.reserve(10)
    assert index.capacity == 2048
    assert index.find(torch.arange(1000, device=where["device"]), 0).tolist() == list(range(1000))


def test_tombstones_are_reused_and_cleared(where: dict[str, Any]) -> None:
    index = KeyIndex(salts=SALTS[:1], capacity=64, **where)
    ids = int64(COLLIDING, where["device"])
    index.insert(ids[:8], 0, torch.arange(8, device=ids.device))  # a full group, beyond which the others lie
    index.find_or_insert(ids[:20], 0, 8)
    index.delete(ids[:8], 0)
    assert index.num_tombstones == 8
    assert index.find(ids[:20], 0).tolist() == [-1] * 8 + [*range(8, 20)]
    index.find_or_insert(ids[:5], 0, 20)
    assert index.num_tombstones == 3
    left = [*range(20, 25)] + [-1] * 3 + [*range(8, 20)]
    assert index.find(ids[:20], 0).tolist() == left
    index.reserve(46)  # only tombstones are in the way
    assert (index.num_tombstones, index.capacity) == (0, 64)
    assert index.find(ids[:20], 0).tolist() == left


def test_turnover_does_not_let_it_grow_for_ever(where: dict[str, Any]) -> None:
    index = KeyIndex(salts=[7], **where)
    for step in range(60):
        ids = torch.arange(step * 100, step * 100 + 100, device=where["device"])
        index.find_or_insert(ids, 0, 0)
        index.delete(ids, 0)
    assert index.capacity <= 256
    assert len(index) == 0


def test_without_memory_nothing_has_changed(where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(where)
    model.find_or_insert([(x, 0) for x in range(6)])

    def no_memory(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of memory")

    keys = [(x, 1) for x in range(10)]
    with monkeypatch.context() as patch:
        patch.setattr(key_slots, "empty_in_huge_pages", no_memory)
        if model.device == "cuda":
            patch.setattr(torch, "empty", no_memory)
        for call in (
            lambda: model.index.reserve(7),
            lambda: model.index.find_or_insert(*model.tensors(keys), 6),
            lambda: model.index.insert(*model.tensors(keys), torch.arange(10)),
        ):
            with pytest.raises(MemoryError, match=r"(16|32) slots of a key index, (224|448) bytes"):
                call()
        model.check()
        model.find(keys)
    model.find_or_insert(keys)
    model.check()


def test_a_copy_is_an_index_of_its_own(where: dict[str, Any]) -> None:
    model = Model(where)
    model.find_or_insert([(x, 0) for x in range(6)])
    other = copy.deepcopy(model.index)
    other.clear()
    model.check()
    assert len(other) == 0


def test_of_no_keys(where: dict[str, Any]) -> None:
    index = KeyIndex(salts=[7], **where)
    nothing = int64([], where["device"])
    rows_N, positions_U = index.find_or_insert(nothing, 0, 0)
    assert rows_N.shape == positions_U.shape == index.find(nothing, nothing).shape == index.delete(nothing, 0).shape
    index.insert(nothing, 0, nothing)
    assert [len(x) for x in index.entries()] == [len(x) for x in index.entries_of(torch.ones(1, 4) > 0)] == [0, 0, 0]


def test_keys_that_do_not_lie_side_by_side(where: dict[str, Any]) -> None:
    index = KeyIndex(salts=SALTS, **where)
    pairs = torch.stack([torch.arange(40), torch.arange(40) % 3], 1).to(where["device"])
    index.insert(pairs[::2, 0], pairs[::2, 1], 5 * pairs[::2, 0])
    assert index.find(pairs[:, 0], pairs[:, 1]).tolist() == [5 * x if x % 2 == 0 else -1 for x in range(40)]


class TestBackendsAgree:
    @pytest.fixture(scope="class")
    @staticmethod
    def filled() -> KeyIndex:
        generator = torch.Generator().manual_seed(1)
        index = KeyIndex(salts=SALTS, backend="native")
        for step in range(6):  # more than what threads begin at
            ids = torch.randint(-20_000, 20_000, (9_000,), generator=generator)
            tables = torch.randint(3, (9_000,), generator=generator)
            index.find_or_insert(ids, tables, 100_000 * step)
            if step % 2:
                first_U, _ = first_occurrences(ids, tables)
                index.delete(ids[first_U][:5000], tables[first_U][:5000])
        return index

    def test_one_finds_what_the_other_has_put(self, filled: KeyIndex) -> None:
        ids, tables, rows = filled.entries()
        other = KeyIndex(salts=SALTS, backend="torch")
        other._slots = filled._slots
        assert torch.equal(other.find(ids, tables), rows)
        other = KeyIndex(salts=SALTS, backend="torch")
        other.insert(ids, tables, rows)
        filled_by_torch = KeyIndex(salts=SALTS, backend="native")
        filled_by_torch._slots = other._slots
        assert torch.equal(filled_by_torch.find(ids, tables), rows)
        flags = torch.rand(3, 64) < 0.3
        assert as_dict(*filled.entries_of(flags)) == as_dict(*other.entries_of(flags))

    def test_threads_change_nothing(self, filled: KeyIndex) -> None:
        ids, tables, rows = filled.entries()
        before = torch.get_num_threads()
        seen = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                index = KeyIndex(salts=SALTS, backend="native")
                index.insert(ids[:9000], tables[:9000], rows[:9000])
                index.reserve(50_000)
                found, _ = index.find_or_insert(ids, tables, 1 << 20)
                shards = index.entries_of(torch.arange(48).view(3, 16) % 3 == 0)
                seen.append([*index.entries(), found, *shards])
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(x, y) for other in seen[1:] for x, y in zip(seen[0], other, strict=True))


class TestArguments:
    @pytest.mark.parametrize(
        ("ids", "tables", "message"),
        [
            (torch.zeros(2, dtype=torch.int32), 0, r"ids: expected int64 ids of shape \(N,\) on cpu, got torch.int32"),
            (torch.zeros(2, 2, dtype=torch.int64), 0, "ids: expected int64"),
            (torch.zeros(2, dtype=torch.int64), 3, "tables: expected 0 ... 2, got 3"),
            (torch.zeros(2, dtype=torch.int64), torch.tensor([0, -1]), "tables: expected 0 ... 2, got -1"),
            (torch.zeros(2, dtype=torch.int64), torch.tensor([0]), "tables: expected one for each of 2 ids"),
        ],
    )
    def test_keys(self, ids: Tensor, tables: Tensor | int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            KeyIndex(salts=SALTS).find(ids, tables)

    def test_others(self) -> None:
        index = KeyIndex(salts=SALTS)
        with pytest.raises(ValueError, match="first_row: 2147483647 and 2 more rows"):
            index.find_or_insert(int64([1, 2]), 0, 2**31 - 1)
        with pytest.raises(ValueError, match="rows_M: expected a row for each of 2 ids"):
            index.insert(int64([1, 2]), 0, int64([1]))
        for shape in ((3, 3), (2, 4)):
            with pytest.raises(ValueError, match="shards_flagged: expected shape"):
                index.entries_of(torch.ones(shape) > 0)
        assert len(index) == 0
        with pytest.raises(ValueError, match="salts: expected one for each"):
            KeyIndex(salts=[])
        with pytest.raises(ValueError, match="backend: expected auto, native, torch or triton, got 'gpu'"):
            KeyIndex(salts=[1], backend="gpu")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="backend='triton': the index is on cpu"):
            KeyIndex(salts=[1], backend="triton")
        with pytest.raises(ValueError, match="backend='native': the index is on meta"):
            KeyIndex(salts=[1], backend="native", device="meta")


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1), st.integers(0, 63))
def test_hash_and_its_top_bits(identity: int, salt: int, bits: int) -> None:
    hashed = key_hash(int64([identity]), salt)
    expected = hash_in_python(identity, salt)
    assert hashed.tolist() == [signed64(expected)]
    assert torch.equal(key_hash(int64([identity]), int64([signed64(salt)])), hashed)
    assert top_bits(hashed, bits).tolist() == [expected >> (64 - bits)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), max_size=30))
def test_first_occurrences(keys: list[tuple[int, int]]) -> None:
    first_U, inverse_N = first_occurrences(int64(k[0] for k in keys), int64(k[1] for k in keys))
    distinct = list(dict.fromkeys(keys))
    assert first_U.tolist() == [keys.index(k) for k in distinct]
    assert inverse_N.tolist() == [distinct.index(k) for k in keys]
