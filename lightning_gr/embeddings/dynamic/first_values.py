"""First values of rows: a function of (seed, table, id, column) alone, as in static tables.

Shape suffixes: N keys, D width.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gr.counter_random import name_key
from lightning_gr.embeddings.static_tables import table_values
from lightning_gr.ops.native import load_native

_SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class _Config:
    name: str
    init_fn: functools.partial[Any]
    num_embeddings: int = 1


def first_values(init_fn: functools.partial[Any], seed: int, name: str, ids_N: Tensor, dim: int) -> Tensor:
    """Float32 (N, D); equal to those of a static table of this name whose rows are the ids.

    On a CPU they are drawn in C++. Logarithm and cosine may then differ from PyTorch's in the last bit of float64; rows
    in which that could show in float32, one in some thirty thousand, are drawn by PyTorch again.

    Args:
        init_fn: partial of ``torch.nn.init.normal_`` or ``uniform_``.
        seed: of the run.
        name: of the table.
        ids_N: int64 keys.
        dim: width.
    """
    library = load_native(_SOURCE) if ids_N.device.type == "cpu" else None
    if library is None:
        return _drawn_by_torch(init_fn, seed, name, ids_N, dim)
    ids_N, values_ND = ids_N.contiguous(), torch.empty(len(ids_N), dim)
    counters = (_pointer(ids_N), *(ctypes.c_int64(x) for x in (len(ids_N), dim)))
    keys = (ctypes.c_uint64(seed % (1 << 64)), ctypes.c_uint64(name_key(name)))
    settings = init_fn.keywords
    if init_fn.func is torch.nn.init.uniform_:
        low, high = settings.get("a", -1.0), settings.get("b", 1.0)
        library.uniform(*counters, *keys, *(ctypes.c_double(x) for x in (low, high - low)), _pointer(values_ND))
        return values_ND
    assert init_fn.func is torch.nn.init.normal_, init_fn
    moments = (ctypes.c_double(settings.get("mean", 0.0)), ctypes.c_double(settings.get("std", 1.0)))
    doubtful_N = torch.empty(len(ids_N), dtype=torch.bool)
    library.normal(*counters, *keys, *moments, _pointer(values_ND), _pointer(doubtful_N))
    if bool(doubtful_N.any()):
        values_ND[doubtful_N] = _drawn_by_torch(init_fn, seed, name, ids_N[doubtful_N], dim)
    return values_ND


def _drawn_by_torch(init_fn: functools.partial[Any], seed: int, name: str, ids_N: Tensor, dim: int) -> Tensor:
    columns = torch.arange(dim, device=ids_N.device)
    values = table_values(_Config(name, init_fn), seed=seed, rows=ids_N, columns=columns)
    return values.to(torch.float32)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
