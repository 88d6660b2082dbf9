"""Deduplication of the ids of static tables on the CPU, where FBGEMM has no kernel for what TorchRec calls.

Shape suffixes: N ids, U distinct ids, F features, B samples, T tables.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.unique_keys import unique_keys

_OPERATOR = "fbgemm::jagged_unique_indices"


@cache
def register_static_dedup() -> torch.library.Library | None:
    """Gives TorchRec's deduplication a kernel for the CPU, once a process, unless FBGEMM has brought its own."""
    import fbgemm_gpu  # noqa: F401  # defines the operator

    if torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "CPU"):
        return None
    library = torch.library.Library("fbgemm", "IMPL")
    library.impl("jagged_unique_indices", jagged_unique_indices, "CPU")
    return library


def jagged_unique_indices(
    hash_size_cumsum: Tensor, hash_size_offsets: Tensor, offsets: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct ids of each table, in FBGEMM's form.

    Args:
        hash_size_cumsum: int64 (F + 1,); only its length is read.
        hash_size_offsets: int64 (F + 1,): where it grows from f to f + 1, a table of that many features begins at f.
        offsets: int64 (F B + 1,), where the ids of each feature and sample begin.
        indices: int64 (N,).

    Returns:
        ``(lengths, offsets, ids, inverse)``: the distinct ids of a table are shared out evenly over its features and
        samples, since a KeyedJaggedTensor has to say whose they are; inverse (N,) is int64.
    """
    size = (len(offsets) - 1) // (len(hash_size_cumsum) - 1)
    # Each table once, at its first feature.
    firsts = torch.unique(hash_size_offsets).tolist()
    begins = offsets[torch.tensor(firsts) * size].tolist()
    unique = unique_keys(indices, begins)
    counts = torch.tensor(unique.offsets_T1).diff().tolist()
    cells = (torch.tensor(firsts).diff() * size).tolist()
    lengths_FB = torch.cat([_shared_out(n, parts) for n, parts in zip(counts, cells, strict=True)])
    return lengths_FB, torch.nn.functional.pad(lengths_FB.cumsum(0), (1, 0)), unique.ids_U, unique.inverse_N


def _shared_out(total: int, parts: int) -> Tensor:
    """`total` as `parts` numbers that differ by at most 1."""
    return total // max(parts, 1) + (torch.arange(parts) < total % max(parts, 1)).to(torch.int64)
