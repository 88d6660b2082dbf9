"""Policies of dynamic tables: what is refused by name, budgets in rows, and how many groups they are cut into."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.embeddings.dynamic import (
    Admission,
    DynamicTableConfig,
    DynamicTables,
    Eviction,
    SparseOptimizerConfig,
    TablePolicy,
)
from lightning_gr.embeddings.dynamic.policies import group_bits, row_budget


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (Admission, {"min_count": 0}, "min_count=0: expected a number of at least 1"),
        (Admission, {"forget_after_steps": 0}, "forget_after_steps=0"),
        (Admission, {"sketch_width": 15}, "sketch_width=15"),
        (Admission, {"counter": "bloom"}, "counter='bloom': expected one of exact, sketch"),
        (Eviction, {"policy": "fifo"}, "policy='fifo': expected one of lru, lfu, lfu_lru, decayed, score"),
        (Eviction, {"half_life_steps": 0}, "half_life_steps=0"),
        (Eviction, {"half_life_steps": math.nan}, "half_life_steps=nan"),
        (Eviction, {"slack": -0.1}, "slack=-0.1: expected a share"),
        (Eviction, {"slack": 1.0}, "slack=1.0"),
        (TablePolicy, {"max_rows": 0}, "max_rows=0"),
        (TablePolicy, {"max_rows": -5}, "max_rows=-5: expected a number of at least 1"),
        (TablePolicy, {"max_bytes": -1}, "max_bytes=-1"),
        (TablePolicy, {"ttl_steps": 0}, "ttl_steps=0"),
        (TablePolicy, {"ttl_seconds": -3}, "ttl_seconds=-3"),
        (TablePolicy, {"on_missing": "zero"}, "on_missing='zero': expected one of initial, default_row, bucket, error"),
        (TablePolicy, {"buckets_per_group": 0}, "buckets_per_group=0"),
        (SparseOptimizerConfig, {"name": "lion"}, "name='lion': expected one of"),
        (DynamicTables, {"virtual_shards": 3}, "virtual_shards=3: expected a power of two"),
        (DynamicTables, {"dedup": "twice"}, "dedup='twice': expected one of"),
        (DynamicTables, {"exchange_precision": "fp8"}, "exchange_precision='fp8': expected one of"),
    ],
)
def test_wrong_settings_are_refused_by_name(kind: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "a/b"}, "name='a/b'"),
        ({"embedding_dim": 0}, "table t: embedding_dim=0"),
        ({"feature_names": []}, "table t: feature_names is empty"),
        ({"precision": "fp8"}, "table t: precision='fp8'"),
        ({"placement": "host"}, "table t: placement=host needs cache_rows"),
        ({"hot_count": 0}, "table t: hot_count=0"),
        ({"init_fn": torch.nn.init.normal_}, "table t: init_fn must be a functools.partial"),
        ({"init_fn": functools.partial(torch.nn.init.zeros_)}, "table t: init_fn must be a functools.partial"),
    ],
)
def test_wrong_tables_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicTableConfig(**({"name": "t", "embedding_dim": 4, "feature_names": ["f"]} | wrong))


def test_the_lesser_of_two_budgets_counts() -> None:
    assert row_budget(TablePolicy(), bytes_per_row=10, name="t") is None
    assert row_budget(TablePolicy(max_rows=7, max_bytes=99), bytes_per_row=10, name="t") == 7
    assert row_budget(TablePolicy(max_rows=70, max_bytes=99), bytes_per_row=10, name="t") == 9
    with pytest.raises(ValueError, match="table t: max_bytes=9, but one row takes 10 bytes; raise it"):
        row_budget(TablePolicy(max_bytes=9), bytes_per_row=10, name="t")


@given(budget=st.integers(1, 1 << 40), shard_bits=st.integers(0, 20), least=st.integers(1, 5000))
def test_groups_are_as_many_as_have_enough_rows_each(budget: int, shard_bits: int, least: int) -> None:
    groups = 1 << group_bits(budget, 1 << shard_bits, least)
    assert groups <= 1 << shard_bits
    assert groups == 1 or budget // groups >= least
    assert groups == 1 << shard_bits or budget // (2 * groups) < least
    assert group_bits(None, 1 << shard_bits, least) == shard_bits
