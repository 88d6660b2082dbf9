"""First values of rows: a function of (seed, table, id, column) alone, as in static tables.

Shape suffixes: N keys, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gr.embeddings.static_tables import table_values


@dataclass(frozen=True)
class _Config:
    name: str
    init_fn: functools.partial[Any]
    num_embeddings: int = 1


def first_values(init_fn: functools.partial[Any], seed: int, name: str, ids_N: Tensor, dim: int) -> Tensor:
    """Float32 (N, D); equal to those of a static table of this name whose rows are the ids.

    Args:
        init_fn: partial of ``torch.nn.init.normal_`` or ``uniform_``.
        seed: of the run.
        name: of the table.
        ids_N: int64 keys.
        dim: width.
    """
    columns = torch.arange(dim, device=ids_N.device)
    values = table_values(_Config(name, init_fn), seed=seed, rows=ids_N, columns=columns)  # type: ignore[arg-type]
    return values.to(torch.float32)
