"""Bit encoding against arithmetic on Python's integers: what fits comes back, what does not is refused."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_gr.embeddings.dynamic.id_encoding import decode_ids, encode_ids, max_encodable


def bits_of_ids(num_tables: int) -> int:
    return 63 - next(k for k in range(64) if 2**k >= num_tables + 1)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_tables=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 2**31 - 1, 2**61])))
def test_what_is_encoded_comes_back(data: st.DataObject, num_tables: int) -> None:
    limit = max_encodable(num_tables)
    assert limit == 2 ** bits_of_ids(num_tables) - 1
    some = st.one_of(st.sampled_from([0, 1, limit - 1, limit]), st.integers(0, limit))
    ids = data.draw(st.lists(some, max_size=20))
    table = data.draw(st.one_of(st.sampled_from([0, num_tables - 1]), st.integers(0, num_tables - 1)))
    keys = encode_ids(torch.tensor(ids, dtype=torch.int64), table, num_tables)
    assert keys.tolist() == [(table + 1) * 2 ** bits_of_ids(num_tables) + x for x in ids]
    assert all(0 <= key < 2**63 for key in keys.tolist())  # the sign is free
    tables, decoded = decode_ids(keys, num_tables)
    assert tables.tolist() == [table] * len(ids)
    assert decoded.tolist() == ids


@pytest.mark.parametrize("num_tables", [1, 2, 3, 4, 7, 8])
def test_no_two_keys_are_the_same(num_tables: int) -> None:
    limit = max_encodable(num_tables)
    assert limit == 2 ** (63 - math.ceil(math.log2(num_tables + 1))) - 1
    ids = torch.tensor([*range(50), *range(limit - 50, limit + 1)])
    keys = torch.cat([encode_ids(ids, table, num_tables) for table in range(num_tables)])
    assert len(keys.unique()) == num_tables * len(ids)


def test_an_id_that_does_not_fit_is_named() -> None:
    for culprit in (2**61, -1, -(2**63), 2**63 - 1):
        with pytest.raises(ValueError, match=rf"ids: {culprit} of table 1 .*\[0, 2\*\*61\).*use id_encoding: pair"):
            encode_ids(torch.tensor([5, culprit, -7]), 1, 3)
    assert encode_ids(torch.tensor([2**61 - 1]), 2, 3).tolist() == [2**63 - 1]


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match="table_index: expected 0 ... 2, got 3"):
        encode_ids(torch.tensor([1]), 3, 3)
    with pytest.raises(ValueError, match=r"ids: expected torch.int64, got torch.int32"):
        encode_ids(torch.tensor([1], dtype=torch.int32), 0, 3)
    for key in (7, -1, 5 << 60):
        with pytest.raises(ValueError, match=rf"keys: {key} encodes none of 4 table"):
            decode_ids(torch.tensor([1 << 60, key]), 4)
    for num_tables in (0, 1 << 62):
        with pytest.raises(ValueError, match="num_tables: expected 1 or more"):
            max_encodable(num_tables)
