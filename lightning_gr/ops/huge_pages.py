"""Large tensors on the host in huge pages: the first touch of a fresh page of 4 KiB costs more than the work on it."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MIN_BYTES = 4 << 20


def empty_in_huge_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU; where Linux lends huge pages on request, a large tensor lies in them."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _MIN_BYTES and (madvise := _madvise()) is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # It is advice: where the kernel does not take it, the tensor is as any other.
        madvise(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
