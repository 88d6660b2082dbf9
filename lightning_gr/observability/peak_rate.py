"""PeakRate: how many operations a second a device can do at best, from a table or, where it has none, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops

_SIZE, _REPEATS = 1024, 5

# Dense rates, operations a second. Of these chips Lightning 2.6 has no figure or a wrong one: it takes L40 and L40S for
# an L4, and its figures of the H200 and of the H100 NVL are those with 2:4 sparsity.
_OURS: dict[str, tuple[dict[torch.dtype, float], str]] = {
    "b200": ({torch.bfloat16: 2250e12, torch.float32: 75e12}, "NVIDIA HGX B200 datasheet, 2024"),
    "gh200": ({torch.bfloat16: 989.4e12, torch.float32: 66.9e12}, "NVIDIA GH200 datasheet, 2023"),
    "h200 nvl": ({torch.bfloat16: 835.5e12, torch.float32: 60e12}, "NVIDIA H200 datasheet, 2024"),
    "h200": ({torch.bfloat16: 989.4e12, torch.float32: 66.9e12}, "NVIDIA H200 datasheet, 2024"),
    "h100 nvl": ({torch.bfloat16: 835.5e12, torch.float32: 60e12}, "NVIDIA H100 datasheet, 2024"),
    "h800": ({torch.bfloat16: 989.4e12, torch.float32: 66.9e12}, "as H100 SXM; NVIDIA, 2023"),
    "h20": ({torch.bfloat16: 148e12, torch.float32: 44e12}, "NVIDIA H20 specification, 2024"),
    "a800": ({torch.bfloat16: 312e12, torch.float32: 19.5e12}, "as A100; NVIDIA, 2022"),
    "l40s": ({torch.bfloat16: 362e12, torch.float32: 91.6e12}, "NVIDIA L40S datasheet, 2023"),
    "l40": ({torch.bfloat16: 181e12, torch.float32: 90.5e12}, "NVIDIA L40 datasheet, 2022"),
    "mi300x": ({torch.bfloat16: 1307.4e12, torch.float32: 163.4e12}, "AMD MI300X datasheet, 2023"),
}

_measured: dict[tuple[str, torch.dtype, int], float] = {}


@dataclass(frozen=True)
class PeakRate:
    """A rate and where it comes from.

    Args:
        flops: operations a second of one device.
        source: a table, a setting, or "measured".
    """

    flops: float
    source: str


def peak_rate(device: torch.device, dtype: torch.dtype) -> PeakRate:
    """The rate of matrix products in a dtype: our table, else Lightning's, else measured here, once a process.

    Args:
        device: any; of a CPU, the threads that torch uses now.
        dtype: of the factors; with TF32 allowed, float32 means it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        rates, source = next((found for chip, found in _OURS.items() if all(x in name for x in chip.split())), ({}, ""))
        is_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        wanted = torch.bfloat16 if dtype == torch.float16 else dtype
        if wanted in rates and not is_tf32:
            return PeakRate(rates[wanted], source)
        if not rates and (known := get_available_flops(device, dtype)):
            return PeakRate(float(known), "Lightning's table")
    return PeakRate(measured_rate(device, dtype), "measured")


def measured_rate(device: torch.device, dtype: torch.dtype, *, size: int = _SIZE, repeats: int = _REPEATS) -> float:
    """Operations a second of the best of some products of square matrices, after one that is not counted.

    Args:
        device: where.
        dtype: of the factors.
        size: rows and columns.
        repeats: how many products.
    """
    key = (str(device), dtype, torch.get_num_threads())
    if (size, repeats) == (_SIZE, _REPEATS) and key in _measured:
        return _measured[key]
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for repeat in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = best if repeat == 0 else min(best, time.perf_counter() - start)
    rate = 2 * size**3 / best
    if (size, repeats) == (_SIZE, _REPEATS):
        _measured[key] = rate
    return rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


def compute_dtype(precision: str) -> torch.dtype:
    """What matrix products are computed in, by a Trainer's ``precision``; float32 where it says something else."""
    return DTYPES.get(str(precision).partition("-")[0], torch.float32)
