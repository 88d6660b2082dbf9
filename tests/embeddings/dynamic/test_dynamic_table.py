"""DynamicTable against a simulator of dicts and lists: every policy, adversarial ids, a million operations, budgets."""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lightning_gr.counter_random import name_key
from lightning_gr.embeddings.dynamic import (
    Admission,
    DynamicTableConfig,
    Eviction,
    SparseOptimizerConfig,
    TablePolicy,
    chunked_rows,
    key_index,
    keyed_rows,
)
from lightning_gr.embeddings.dynamic.dynamic_table import DynamicTable, Lookup
from lightning_gr.embeddings.dynamic.first_values import first_values
from lightning_gr.embeddings.dynamic.table_statistics import TableStatistics

SEED, DIM, SHARDS = 7, 2, 8
NAMES = ["a", "b"]
EXTREMES = [0, -1, 2**63 - 1, -(2**63), 1, -2, 2**62, 2**31]
LOW_64 = (1 << 64) - 1


@functools.cache
def hash_of(id_: int, name: str) -> int:
    x = (id_ ^ name_key(name)) & LOW_64
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD & LOW_64
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53 & LOW_64
    return x ^ (x >> 33)


class FirstValues(dict[tuple[str, int], list[float]]):
    """First values by (table, id), drawn many at once."""

    def ask(self, name: str, ids: Iterable[int], dim: int) -> None:
        if new := [x for x in ids if (name, x) not in self]:
            init_fn = functools.partial(torch.nn.init.normal_, std=0.02)
            drawn = first_values(init_fn, SEED, name, torch.tensor(new), dim).tolist()
            self.update(((name, x), row) for x, row in zip(new, drawn, strict=True))


FIRST = FirstValues()


@dataclass
class Row:
    values: list[float]
    count: int = 0
    step: int = 0
    time: int = 0
    score: float = 0.0


@dataclass
class Simulated:
    """One table as its documentation has it; knows nothing of tensors, of merging, or of rows' places."""

    name: str
    policy: TablePolicy
    dim: int = DIM
    rows: dict[int, Row] = field(default_factory=dict)
    shared: dict[int, Row] = field(default_factory=dict)
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)
    occurred: Counter[int] = field(default_factory=Counter)
    statistics: TableStatistics = field(default_factory=TableStatistics)
    swept: int = -1

    def __post_init__(self) -> None:
        budget, bits = self.policy.max_rows, int(math.log2(SHARDS))
        if budget is not None:
            bits = max(0, min(bits, int(math.log2(max(budget // 64, 1)))))
        self.bits, groups = bits, 1 << bits
        shared = self.policy.buckets_per_group if self.policy.on_missing == "bucket" else 0
        self.budgets = budget and [budget // groups + (g < budget % groups) - shared for g in range(groups)]
        self.members: dict[int, set[int]] = defaultdict(set)

    def group(self, id_: int) -> int:
        return hash_of(id_, self.name) >> (64 - self.bits)

    def remove(self, id_: int) -> None:
        del self.rows[id_]
        self.members[self.group(id_)].discard(id_)

    def expired(self, row: Row, step: int, time: int) -> bool:
        p = self.policy
        by_step = p.ttl_steps is not None and step - row.step > p.ttl_steps
        by_time = p.ttl_seconds is not None and time - row.time > p.ttl_seconds
        return row.step < step and (by_step or by_time)

    def worth(self, id_: int, step: int) -> tuple[float, ...]:
        row, eviction = self.rows[id_], self.policy.eviction
        match eviction.policy:
            case "lru":
                return (row.step,)
            case "lfu":
                return (row.count,)
            case "lfu_lru":
                return (row.count, row.step)
            case "score":
                return (row.score,)
        return (math.log2(max(row.count, 1)) - (step - row.step) / eviction.half_life_steps,)

    def make_room(self, wanted: dict[int, int], hits: set[int], step: int, time: int) -> tuple[set[int], set[int]]:
        """(ids that get a row, ids that lose it)."""
        if self.budgets is None:
            return set(wanted), set()
        by_group: dict[int, list[int]] = defaultdict(list)
        for id_ in wanted:
            by_group[self.group(id_)].append(id_)
        kept: set[int] = set()
        gone: set[int] = set()
        for group, ids in by_group.items():
            budget, have, leave = self.budgets[group], self.members[group], list[int]()
            if len(have) + len(ids) > budget:
                number = len(have) + len(ids) - budget + int(budget * self.policy.eviction.slack)
                free = [x for x in have if self.rows[x].step < step and x not in hits]
                free.sort(key=lambda x: (not self.expired(self.rows[x], step, time), *self.worth(x, step), x))
                leave = free[:number]
            room = budget - len(have) + len(leave)
            kept.update(sorted(ids, key=lambda x: (-wanted[x], x))[:room])
            gone.update(leave)
        return kept, gone

    def insert(self, ids: Iterable[int]) -> None:
        FIRST.ask(self.name, ids, self.dim)
        for id_ in ids:
            self.rows[id_] = Row(FIRST[self.name, id_])
            self.members[self.group(id_)].add(id_)
            self.waiting.pop(id_, None)

    def change(self, counts: dict[int, int], step: int, time: int) -> bool:
        """What a training lookup would change; first what cannot fail. Whether every key that must has a row."""
        stats, p = self.statistics, self.policy
        dead = {x for x in counts if x in self.rows and self.expired(self.rows[x], step, time)}
        for id_ in dead:
            self.remove(id_)
        hits = {x for x in counts if x in self.rows}
        new = {x: n for x, n in counts.items() if x not in hits}
        admitted = {x: n for x, n in new.items() if self.waiting.get(x, (0, 0))[0] >= p.admission.min_count - 1}
        kept, gone = self.make_room(admitted, hits, step, time)
        stats.expired += len(dead)
        stats.looked_up += len(counts)
        stats.found += len(hits)
        stats.collided += sum(self.rows[x].step == step - 1 for x in hits)
        self.planned = kept, gone, new.keys() - kept, len(new) - len(admitted)
        return p.on_missing != "error" or len(kept) == len(new)

    def commit_change(self, counts: dict[int, int], step: int, time: int) -> None:
        stats, (kept, gone, without, rejected) = self.statistics, self.planned
        for id_ in gone:
            self.remove(id_)
        if self.policy.admission.min_count > 1:
            self.occurred.update({x: counts[x] for x in without})
        self.insert(kept)
        stats.evicted += len(gone)
        stats.inserted += len(kept)
        stats.rejected += rejected
        stats.failed += len(without) - rejected
        for id_ in counts:
            if id_ in self.rows:
                self.touch(self.rows[id_], counts[id_], step, time)

    def read(self, counts: dict[int, int], step: int, time: int, training: bool) -> dict[int, list[float]]:
        p, own, bucket_name = self.policy, self.rows, f"{self.name}#bucket"
        values = {x: own[x].values for x in counts if x in own and not self.expired(own[x], step, time)}
        missing = [x for x in counts if x not in values]
        self.statistics.missing += len(missing)
        if p.on_missing == "error" and missing:
            raise KeyError(self.name)
        if p.on_missing == "default_row":
            values.update((x, [p.default_value] * self.dim) for x in missing)
        elif p.on_missing == "initial":
            FIRST.ask(self.name, missing, self.dim)
            values.update((x, FIRST[self.name, x]) for x in missing)
        else:
            FIRST.ask(bucket_name, {self.bucket(x) for x in missing}, self.dim)
            for id_ in missing:
                row = self.shared.get(self.bucket(id_)) or Row(FIRST[bucket_name, self.bucket(id_)])
                if training:
                    self.shared[self.bucket(id_)] = row
                    self.touch(row, counts[id_], step, time)
                values[id_] = row.values
        return values

    @staticmethod
    def touch(row: Row, count: int, step: int, time: int) -> None:
        row.count, row.step, row.time = row.count + count, step, max(row.time, time)

    def bucket(self, id_: int) -> int:
        per_group = self.policy.buckets_per_group
        return self.group(id_) * per_group + (hash_of(id_, self.name) & 0x7FFFFFFF) % per_group

    def descend(self, id_: int, amount: float) -> None:
        """A step of SGD with rate 1 on what a training lookup has found, in float32."""
        row = self.rows.get(id_) or (self.shared[self.bucket(id_)] if self.policy.on_missing == "bucket" else None)
        if row is not None:
            row.values = [float(np.float32(x) - np.float32(amount)) for x in row.values]

    def sweep(self, step: int, time: int) -> None:
        """What the first lookup of every 64th step does at its end."""
        if step % 64 == 0 and step > self.swept:
            self.swept = step
            dead = [x for x, row in self.rows.items() if self.expired(row, step, time)]
            for id_ in dead:
                self.remove(id_)
            self.statistics.expired += len(dead)

    def commit(self, step: int) -> None:
        for id_, n in self.occurred.items():
            self.waiting[id_] = (self.waiting.get(id_, (0, 0))[0] + n, step)
        self.occurred.clear()
        forget = self.policy.admission.forget_after_steps
        if forget is not None and step % 64 == 0:
            self.waiting = {x: w for x, w in self.waiting.items() if w[1] >= step - forget}

    def delete(self, ids: Iterable[int]) -> int:
        present = {x for x in ids if x in self.rows}
        for id_ in present:
            self.remove(id_)
        for id_ in ids:
            self.waiting.pop(id_, None)
        return len(present)

    def upsert(self, values: dict[int, list[float]], step: int, time: int) -> int:
        dead = [x for x in values if x in self.rows and self.expired(self.rows[x], step, time)]
        for id_ in dead:
            self.remove(id_)
        self.statistics.expired += len(dead)
        hits = {x for x in values if x in self.rows}
        new = {x: 1 for x in values if x not in hits}
        kept, gone = self.make_room(new, hits, step, time)
        for id_ in gone:
            self.remove(id_)
        self.insert(kept)
        for id_ in hits | kept:
            self.waiting.pop(id_, None)
            self.rows[id_].values = values[id_]
            self.touch(self.rows[id_], 0, step, time)
        self.statistics.evicted += len(gone)
        self.statistics.inserted += len(kept)
        self.statistics.failed += len(new) - len(kept)
        return len(new) - len(kept)


def table_of(policies: Sequence[TablePolicy], *, dim: int = DIM, encode_ids: bool = False) -> DynamicTable:
    return DynamicTable(
        configs=[DynamicTableConfig(n, dim, [f"{n}_id"], policy=p) for n, p in zip(NAMES, policies, strict=False)],
        optimizer=SparseOptimizerConfig("sgd", lr=1.0),
        seed=SEED,
        virtual_shards=SHARDS,
        device=torch.device("cpu"),
        encode_ids=encode_ids,
    )


class Pair:
    """A table and its simulation, driven together and compared."""

    def __init__(self, policies: Sequence[TablePolicy], *, dim: int = DIM, encode_ids: bool = False) -> None:
        self.table = table_of(policies, dim=dim, encode_ids=encode_ids)
        self.simulated = [Simulated(name, policy, dim) for name, policy in zip(NAMES, policies, strict=False)]
        self.step = self.time = 0

    def lookup(
        self, ids: Sequence[list[int]], *, training: bool, distinct: bool, amount: float = 0.0, ahead: bool = False
    ) -> None:
        """Looks up in both; `ahead` plans and reads while the step is under way, and carries that out in the next."""
        counts = [Counter(x) for x in ids]
        keys = [list(c) for c in counts] if distinct else ids
        numbers = [list(c.values()) if distinct else [1] * len(x) for c, x in zip(counts, ids, strict=True)]
        flat = torch.tensor(sum(keys, []), dtype=torch.int64)
        offsets = np.cumsum([0, *map(len, keys)]).tolist()
        find: Any = functools.partial(self.table.lookup, flat, offsets)
        if ahead:
            find = functools.partial(self.finish, self.plan_ahead(flat, offsets, sum(numbers, []), distinct))
            self.commit()
        before = deepcopy(self.simulated)
        own = list(zip(self.simulated, counts, strict=True))
        expected: list[dict[int, list[float]]] = []
        allowed = [simulated.change(c, self.step, self.time) for simulated, c in own] if training else []
        refused = not all(allowed)
        if training and not refused:
            for simulated, c in own:
                simulated.commit_change(c, self.step, self.time)
        if not refused:
            try:
                expected += [simulated.read(c, self.step, self.time, training) for simulated, c in own]
            except KeyError:
                refused = True
        arguments: dict[str, Any] = {"step": self.step, "time": self.time, "training": training, "distinct": distinct}
        try:
            found = find(torch.tensor(sum(numbers, []), dtype=torch.int64), **arguments)
        except KeyError:
            assert refused
            self.simulated = before
            return
        assert not refused
        if training:
            for simulated in self.simulated:
                simulated.sweep(self.step, self.time)
        assert found.values_UD.tolist() == [e[x] for e, k in zip(expected, keys, strict=True) for x in k]
        if training and amount:
            rows = found.rows_U.unique()
            grads = torch.full((len(rows), self.table.dim), amount)
            self.table.update(rows, grads, lr=1.0, step=self.step)
            for simulated, c in own:
                for id_ in {x if x in simulated.rows else ("bucket", simulated.bucket(x)): x for x in c}.values():
                    simulated.descend(id_, amount)

    def plan_ahead(self, ids_N: Tensor, offsets: list[int], counts: list[int], distinct: bool) -> Any:
        try:
            plan = self.table.plan(
                ids_N,
                offsets,
                torch.tensor(counts, dtype=torch.int64),
                step=self.step + 1,
                time=self.time,
                training=True,
                distinct=distinct,
                ahead=True,
            )
        except KeyError as error:
            return error
        return plan, self.table.values(plan)

    def finish(self, planned: Any, *_: Any, **__: Any) -> Lookup:
        if isinstance(planned, KeyError):
            raise planned
        self.table.apply(planned[0])
        return Lookup(planned[0].rows_N, planned[1])

    def commit(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.table.commit_step(self.step)
            for simulated in self.simulated:
                simulated.commit(self.step)
            self.step += 1

    def compare(self) -> None:
        table = self.table
        for t, simulated in enumerate(self.simulated):
            compare_rows(table, t, simulated.rows)
            assert table.statistics[t] == simulated.statistics
            assert table.num_rows(t) == len(simulated.rows)
            if (state := table.counter_state(t)) is not None:
                columns = (state[0][name].tolist() for name in ("ids", "counts", "last_steps"))
                assert {x: (n, s) for x, n, s in zip(*columns, strict=True)} == simulated.waiting
            if simulated.policy.on_missing == "bucket":
                compare_rows(table, table.key_names.index(f"{simulated.name}#bucket"), simulated.shared)
            if (budget := simulated.policy.max_rows) is not None:
                assert len(simulated.rows) + len(simulated.shared) <= budget
        total = sum(len(x.rows) + len(x.shared) for x in self.simulated)
        assert total == len(table) == table.storage.num_rows


def compare_rows(table: DynamicTable, number: int, rows: dict[int, Row]) -> None:
    kept, _ = table.rows_of(number)
    m = kept.metadata
    scores = [0.0] * len(kept.ids_N) if m.scores is None else m.scores.tolist()
    columns = (kept.values_ND.tolist(), m.counts.tolist(), m.last_steps.tolist(), m.last_times.tolist(), scores)
    assert dict(zip(kept.ids_N.tolist(), zip(*columns, strict=True), strict=True)) == {
        id_: astuple(row) for id_, row in rows.items()
    }
    assert not kept.state_NS.numel()


def policies() -> st.SearchStrategy[TablePolicy]:
    def made(budget: int | None, on_missing: Any, per_group: int, **rest: Any) -> TablePolicy:
        return TablePolicy(
            max_rows=budget,
            rows_per_group=64,
            on_missing=on_missing,
            buckets_per_group=min(per_group, (budget or 9) - 1),
            default_value=0.5,
            **rest,
        )

    return st.builds(
        made,
        budget=st.sampled_from([None, 2, 5, 9, 130]),
        on_missing=st.sampled_from(["initial", "default_row", "bucket", "error"]),
        per_group=st.integers(1, 3),
        admission=st.builds(Admission, min_count=st.integers(1, 3), forget_after_steps=st.sampled_from([None, 3])),
        eviction=st.builds(
            Eviction,
            policy=st.sampled_from(["lru", "lfu", "lfu_lru", "decayed", "score"]),
            slack=st.sampled_from([0.0, 0.25, 0.5]),
            # Not rational in steps, so that only equal counts of equal age tie.
            half_life_steps=st.just(math.pi),
        ),
        ttl_steps=st.sampled_from([None, 1, 5]),
        ttl_seconds=st.sampled_from([None, 10]),
    )


ID_LISTS = st.lists(st.sampled_from([*EXTREMES, *range(-9, 10), 3**39, -(3**39)]), max_size=14)


class TableMachine(RuleBasedStateMachine):
    """Two merged tables, whose ids are often the same."""

    pair: Pair

    @initialize(first=policies(), second=policies())
    def start(self, first: TablePolicy, second: TablePolicy) -> None:
        self.pair = Pair([first, second])
        self.idle = True

    @rule(a=ID_LISTS, b=ID_LISTS, distinct=st.booleans(), amount=st.sampled_from([0.0, 0.125, 1.0]))
    def train(self, a: list[int], b: list[int], distinct: bool, amount: float) -> None:
        if not distinct:  # those statistics are of what arrives
            self.pair.lookup([list(set(a)), list(set(b))], training=True, distinct=False, amount=amount)
        else:
            self.pair.lookup([a, b], training=True, distinct=True, amount=amount)
        self.idle = False

    @rule(a=ID_LISTS, b=ID_LISTS, distinct=st.booleans(), amount=st.sampled_from([0.0, 1.0]))
    def train_ahead(self, a: list[int], b: list[int], distinct: bool, amount: float) -> None:
        ids = [a, b] if distinct else [list(set(a)), list(set(b))]
        self.pair.lookup(ids, training=True, distinct=distinct, amount=amount, ahead=True)
        self.idle = False

    @rule(a=ID_LISTS, b=ID_LISTS, distinct=st.booleans())
    def evaluate(self, a: list[int], b: list[int], distinct: bool) -> None:
        self.pair.lookup([list(set(a)), list(set(b))], training=False, distinct=distinct)

    @rule(start=st.integers(-(2**40), 2**40), number=st.integers(20, 150))
    def fill(self, start: int, number: int) -> None:
        ids = list(range(start, start + number))
        self.pair.lookup([ids, ids[::2]], training=True, distinct=True)
        self.idle = False

    @rule(steps=st.sampled_from([1, 1, 1, 2, 70]))
    def commit(self, steps: int) -> None:
        self.pair.commit(steps)
        self.idle = True

    @rule(seconds=st.integers(1, 12))
    def tick(self, seconds: int) -> None:
        self.pair.time += seconds

    @precondition(lambda self: self.idle)
    @rule(ids=ID_LISTS, t=st.integers(0, 1))
    def delete(self, ids: list[int], t: int) -> None:
        ids_N = torch.tensor(ids, dtype=torch.int64)
        assert self.pair.table.delete(ids_N, t) == self.pair.simulated[t].delete(ids)

    @precondition(lambda self: self.idle)
    @rule(ids=ID_LISTS, t=st.integers(0, 1))
    def upsert(self, ids: list[int], t: int) -> None:
        values = [[float(i), -float(i)] for i in range(len(ids))]
        refused = self.pair.table.upsert(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(values).view(-1, DIM),
            t,
            step=self.pair.step,
            time=self.pair.time,
        )
        wanted = dict(zip(ids, values, strict=True))  # of equal ids the last one counts
        assert refused == self.pair.simulated[t].upsert(wanted, self.pair.step, self.pair.time)

    @rule(ids=ID_LISTS, t=st.integers(0, 1))
    def set_scores(self, ids: list[int], t: int) -> None:
        simulated, scores = self.pair.simulated[t], [float(i % 5) for i in range(len(ids))]
        arguments = (torch.tensor(ids, dtype=torch.int64), torch.tensor(scores), t)
        if simulated.policy.eviction.policy != "score":
            with pytest.raises(ValueError, match="evicts by"):
                self.pair.table.set_scores(*arguments)
            return
        self.pair.table.set_scores(*arguments)
        for id_, score in zip(ids, scores, strict=True):
            if id_ in simulated.rows:
                simulated.rows[id_].score = score

    @invariant()
    def same(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare()


TestMachine = TableMachine.TestCase
TestMachine.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)


def drawn_policy(rng: np.random.Generator, eviction: Any) -> TablePolicy:
    budget = rng.choice([12, 20, 130])
    return TablePolicy(
        max_rows=int(budget),
        rows_per_group=64,
        admission=Admission(min_count=int(rng.integers(1, 4)), forget_after_steps=[None, 3][rng.integers(2)]),
        eviction=Eviction(eviction, slack=float(rng.choice([0, 0.25])), half_life_steps=math.pi),
        ttl_steps=[None, 2, 4][rng.integers(3)],
        ttl_seconds=[None, 20][rng.integers(2)],
        on_missing=rng.choice(["initial", "default_row", "bucket"]),
        buckets_per_group=int(rng.integers(1, 4)),
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("eviction", ["lru", "lfu", "lfu_lru", "decayed", "score"])
def test_long_lives_under_pressure(eviction: str, seed: int) -> None:
    """Few ids that come back, so that hits, ties, expiry, eviction and failure meet in most lookups."""
    rng = np.random.default_rng(seed)
    pair = Pair([drawn_policy(rng, eviction), drawn_policy(rng, rng.choice(["lru", "lfu_lru", "score"]))])
    pool = np.array(EXTREMES + list(range(-15, 25)))
    for _ in range(60):
        wide = pool if max(x.policy.max_rows or 0 for x in pair.simulated) < 130 else np.arange(-120, 120)
        ids = [rng.choice(wide, rng.integers(0, len(wide) // 3)).tolist() for _ in range(2)]
        pair.lookup(ids, training=True, distinct=True, amount=0.125)
        if rng.random() < 0.5:
            pair.lookup([ids[1], ids[0]], training=bool(rng.integers(2)), distinct=True)
        for t, simulated in enumerate(pair.simulated):
            if simulated.policy.eviction.policy == "score":
                scores = {x: float(rng.integers(4)) for x in set(ids[t])}
                pair.table.set_scores(torch.tensor([*scores], dtype=torch.int64), torch.tensor([*scores.values()]), t)
                for id_ in scores.keys() & simulated.rows.keys():
                    simulated.rows[id_].score = scores[id_]
        pair.compare()
        if rng.random() < 0.7:
            pair.commit(int(rng.choice([1, 1, 1, 2, 3])))
        pair.time += int(rng.integers(8))


@pytest.mark.parametrize("encode_ids", [False, True])
def test_a_million_operations(encode_ids: bool) -> None:
    """Half of them of frequent ids; every statistic and every row, count and clock in the end."""
    first = TablePolicy(max_rows=500, rows_per_group=64, eviction=Eviction("lfu_lru", slack=0.125), ttl_steps=8)
    second = TablePolicy(
        max_rows=2000, rows_per_group=64, eviction=Eviction("lru", slack=0.25),
        admission=Admission(min_count=2, forget_after_steps=40),
        on_missing="bucket", ttl_seconds=60,
    )  # fmt: skip
    pair, generator = Pair([first, second], encode_ids=encode_ids), np.random.default_rng(3)
    num_steps, size = (20, 2000) if encode_ids else (100, 5000)
    for step in range(num_steps):
        ids = [(generator.zipf(1.4, size) % 20_000 + (step // 20) * 3000).tolist() for _ in range(2)]
        pair.lookup(ids, training=True, distinct=True, amount=0.25)
        if step % 10 == 9:
            pair.commit()
            gone = generator.integers(0, 5000, 500).tolist()
            for t in range(2):
                assert pair.table.delete(torch.tensor(gone), t) == pair.simulated[t].delete(gone)
            pair.lookup([ids[1], ids[0]], training=False, distinct=True)
        pair.commit()
        pair.time += 7
        if step % 25 == 24:
            pair.compare()
    pair.compare()
    totals = [sum(x) for x in zip(*(astuple(x.statistics) for x in pair.simulated), strict=True)]
    assert encode_ids or min(totals) > 0, totals


def test_ten_million_ids_never_exceed_a_budget() -> None:
    """In rows and in bytes, beside a table without budget that keeps all it has."""
    by_rows = TablePolicy(max_rows=20_000, rows_per_group=64)
    table = table_of([by_rows, TablePolicy()], dim=4)
    kept_ids = torch.arange(-500, 500)
    table.lookup(kept_ids, [0, 0, 1000], torch.ones_like(kept_ids), step=0, time=0, training=True)
    most_bytes = 0
    for step in range(100):
        ids_U, inserted = torch.arange(100_000) * 0x9E3779B97F4A7C1 + step * 0x1F123BB5, table.statistics[0].inserted
        found = table.lookup(ids_U, [0, 100_000, 100_000], torch.ones_like(ids_U), step=step, time=0, training=True)
        table.commit_step(step)
        assert table.num_rows(0) <= 20_000
        assert table.num_rows(0) > 18_000
        assert int((found.rows_U >= 0).sum()) == table.statistics[0].inserted - inserted
        most_bytes = max(most_bytes, table.storage.nbytes + table.index.nbytes)
        assert len(table) == table.num_rows(0) + 1000 == table.storage.num_rows
    assert bool((table.find(kept_ids, 1) >= 0).all())
    assert table.statistics[0].inserted + table.statistics[0].failed == 10_000_000
    # Two chunks more than are in use, and slots for twice the keys.
    row_bytes = table.storage.row_bytes
    assert most_bytes <= (21_000 + 3 * 16384) * row_bytes + 2 * 38 * 21_000


@pytest.mark.parametrize("max_bytes", [10_000, 300_000])
def test_a_budget_in_bytes_holds_rows_and_keys(max_bytes: int) -> None:
    table = table_of([TablePolicy(max_bytes=max_bytes, rows_per_group=64, eviction=Eviction(slack=0.0))], dim=4)
    per_row = table.storage.row_bytes + 14 / 0.375  # a slot of 14 bytes, at the load of a doubled index
    for step in range(3):
        ids_U = torch.arange(10_000) * 0x9E3779B97F4A7C1 + step
        table.lookup(ids_U, [0, 10_000], torch.ones_like(ids_U), step=step, time=0, training=True)
        assert 0.9 * max_bytes / (per_row + 1) - 64 < len(table) <= max_bytes / per_row


def test_growth_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[list[Any]]:
        table, generator = (
            table_of([TablePolicy(), TablePolicy(max_rows=200, rows_per_group=64)]),
            torch.Generator().manual_seed(1),
        )
        for step in range(30):
            ids = torch.randint(-(2**62), 2**62, (60,), generator=generator)
            ids[:10] = torch.arange(10)
            found = table.lookup(ids, [0, 30, 60], torch.ones_like(ids), step=step, time=step, training=True)
            has = found.rows_U >= 0
            table.update(found.rows_U[has], found.values_UD[has] + 1, lr=0.5, step=step)
            table.commit_step(step)
        return [[x.tolist() for x in (rows.ids_N, rows.values_ND, *rows.metadata[:3])] for rows, _ in
                (table.rows_of(0), table.rows_of(1))]  # fmt: skip

    whole = trained()
    monkeypatch.setattr(keyed_rows, "RowStorage", functools.partial(keyed_rows.RowStorage, chunk_rows=4))
    monkeypatch.setattr(keyed_rows, "KeyIndex", functools.partial(keyed_rows.KeyIndex, capacity=8))
    assert trained() == whole


@pytest.mark.parametrize("on_missing", ["initial", "bucket"])
@pytest.mark.parametrize(("where", "num_before"), [("chunk", 0), ("chunk", 64), ("slots", 64)])
def test_without_memory_the_table_stays_as_it_was(
    where: str, num_before: int, on_missing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed_rows, "RowStorage", functools.partial(keyed_rows.RowStorage, chunk_rows=64))
    monkeypatch.setattr(keyed_rows, "KeyIndex", functools.partial(keyed_rows.KeyIndex, capacity=8))
    policy = TablePolicy(admission=Admission(min_count=2), on_missing=on_missing)
    pair = Pair([policy, TablePolicy(max_rows=4000, rows_per_group=64)])
    for _ in range(2 * num_before):
        pair.lookup([list(range(num_before)), list(range(-9, 0))], training=True, distinct=True)
        pair.commit()
    pair.compare()

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        if where == "chunk":
            patch.setattr(chunked_rows.ChunkedRows, "new_chunk", refuse)
        else:
            patch.setattr(key_index, "allocate_slots", refuse)
        arguments: dict[str, Any] = {"step": pair.step, "time": 0, "training": True}
        ids_U = torch.arange(-400, 600)
        # Keys that wait take shared rows at most.
        offsets = [0, 1000, 1000] if on_missing == "bucket" and not num_before else [0, 500, 1000]
        with pytest.raises(MemoryError, match="table a, b: no memory for"):
            pair.table.lookup(ids_U, offsets, torch.ones_like(ids_U), **arguments)
        with pytest.raises(MemoryError, match="table a, b: no memory for"):
            pair.table.upsert(ids_U, torch.zeros(1000, DIM), 1, step=pair.step, time=0)
    for simulated, statistics in zip(pair.simulated, pair.table.statistics, strict=True):
        for name in ("looked_up", "found", "collided"):  # of what was asked for
            setattr(simulated.statistics, name, getattr(statistics, name))
    pair.compare()
    for _ in range(2):
        pair.lookup([list(range(-400, 100)), list(range(100, 600))], training=True, distinct=True)
        pair.commit()
        pair.compare()


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="table a: a budget of 3 rows has no room beside its shared rows"):
        table_of([TablePolicy(max_rows=3, rows_per_group=64, on_missing="bucket", buckets_per_group=3)])
    with pytest.raises(ValueError, match="table a: max_bytes=9, but one row takes"):
        table_of([TablePolicy(max_bytes=9, rows_per_group=64)])


def test_bit_encoding_refuses_what_does_not_fit() -> None:
    table = table_of([TablePolicy(), TablePolicy()], encode_ids=True)
    largest = 2**61 - 1  # two bits of 63 number the tables
    table.lookup(torch.tensor([largest, 0]), [0, 1, 2], torch.ones(2), step=0, time=0, training=True)
    for id_ in (largest + 1, -1):
        with pytest.raises(ValueError, match="use id_encoding: pair"):
            table.lookup(torch.tensor([5, id_]), [0, 1, 2], torch.ones(2), step=0, time=0, training=True)
    assert len(table) == 2
    assert table.rows_of(0)[0].ids_N.tolist() == [largest]
