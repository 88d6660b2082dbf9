"""Stochastic rounding to 16-bit floating point: right on average, by random bits that depend on the row alone.

Shape suffixes: N rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.counter_random import counter_bits
from lightning_gr.embeddings.dynamic.chunked_rows import run_native

# Mantissa bits without the leading one, and the exponent of the smallest normal number.
_FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the dtypes in row_storage.cpp."""


def round_stochastically(values_ND: Tensor, dtype: torch.dtype, seeds_N: Tensor, step: int) -> Tensor:
    """The upper neighbour with the probability that keeps the mean, else the lower one.

    The draw is a function of (seed of the row, step, column), so it does not depend on who rounds, or in which order.
    Numbers that the dtype has stay; beyond its largest finite number values are rounded to the nearest.

    Args:
        values_ND: float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        seeds_N: int64, one a row.
        step: another draw each step.

    Returns:
        (N, D) of the dtype.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in _FORMATS:
        raise ValueError(f"dtype={dtype}: expected torch.bfloat16 or torch.float16")
    assert values_ND.dtype == torch.float32
    assert seeds_N.shape == values_ND.shape[:1]
    N, D = values_ND.shape
    if values_ND.device.type == "cpu":
        out_ND = torch.empty(N, D, dtype=dtype)
        values_ND, seeds_N = values_ND.contiguous(), seeds_N.contiguous()
        if run_native("round_rows", values_ND, out_ND, N, D, CODES[dtype], seeds_N, step):
            return out_ND
    mantissa_bits, least_exponent = _FORMATS[dtype]
    columns_D = torch.arange(D, device=values_ND.device)
    uniform_ND = ((counter_bits(seeds_N[:, None], step, columns_D) >> 40) & 0xFFFFFF).double() * 2.0**-24
    magnitude_ND = values_ND.double().abs()
    exponent_ND = magnitude_ND.frexp().exponent - 1
    # 2 to that power, by its bits: a library's power need not be exact.
    spacing_exponent_ND = exponent_ND.clamp(min=least_exponent).to(torch.int64) - mantissa_bits
    spacing_ND = ((spacing_exponent_ND + 1023) << 52).view(torch.float64)
    steps_ND = magnitude_ND / spacing_ND
    lower_ND = steps_ND.floor()
    rounded_ND = (lower_ND + (uniform_ND < steps_ND - lower_ND)) * spacing_ND
    is_inside_ND = magnitude_ND <= torch.finfo(dtype).max
    return torch.where(is_inside_ND, rounded_ND.copysign(values_ND.double()).float(), values_ND).to(dtype)
