"""Table and id in one int64: MTGenRec's bit encoding (arXiv 2505.12663, equation 8), for ids known to fit.

Of m tables the i-th (1 ... m) has its number in the k = ceil(log2(m + 1)) bits below the sign, which is 0; an id has
the other 63 - k. Since k depends on m, a new table may change old keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def max_encodable(num_tables: int) -> int:
    """The largest id that fits beside the numbers of so many tables, 2**(63 - k) - 1.

    Raises:
        ValueError: there is no table, or no bit is left for ids.
    """
    return (1 << _id_bits(num_tables)) - 1


def encode_ids(ids: Tensor, table_index: int, num_tables: int) -> Tensor:
    """One int64 for each id and its table, never negative.

    Args:
        ids: int64 ids, 0 ... `max_encodable(num_tables)`.
        table_index: the table, 0 ... `num_tables` - 1; the paper's i is one more.
        num_tables: the paper's m.

    Raises:
        ValueError: an id does not fit, or there is no such table.
    """
    bits = _id_bits(num_tables)
    if ids.dtype != torch.int64:
        raise ValueError(f"ids: expected torch.int64, got {ids.dtype}; convert them")
    if not 0 <= table_index < num_tables:
        raise ValueError(f"table_index: expected 0 ... {num_tables - 1}, got {table_index}")
    outside = ids[(ids >> bits) != 0]
    if outside.numel():
        raise ValueError(
            f"ids: {int(outside[0])} of table {table_index} is not in [0, 2**{bits}), which is what {num_tables} "
            "table(s) leave; use id_encoding: pair"
        )
    return ids | ((table_index + 1) << bits)


def decode_ids(keys: Tensor, num_tables: int) -> tuple[Tensor, Tensor]:
    """Table (int64, from 0) and id of keys that `encode_ids` made with the same number of tables.

    Raises:
        ValueError: a key is none of these.
    """
    bits = _id_bits(num_tables)
    tables = (keys >> bits) - 1
    foreign = keys[(tables < 0) | (tables >= num_tables)]
    if foreign.numel():
        raise ValueError(f"keys: {int(foreign[0])} encodes none of {num_tables} table(s); was it made for as many?")
    return tables, keys & ((1 << bits) - 1)


def _id_bits(num_tables: int) -> int:
    if not 1 <= num_tables < 1 << 62:
        raise ValueError(f"num_tables: expected 1 or more, and a bit left for ids, got {num_tables}")
    return 63 - num_tables.bit_length()  # ceil(log2(m + 1)) is the number of bits of m
