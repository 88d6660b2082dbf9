"""Random numbers as a pure function of a counter, so that no value depends on who draws it, where or when.

First values of embedding rows and negative samples are drawn from (seed, name, row, column): any rank, device or
shard that asks for the same counter gets the same number. The mixing function is MurmurHash3's 64-bit finaliser
(Austin Appleby, public domain), applied once per key part.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The two's-complement int64 of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


_MULTIPLIER_1 = _signed(0xFF51AFD7ED558CCD)
_MULTIPLIER_2 = _signed(0xC4CEB9FE1A85EC53)
_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_LOW_31_BITS = (1 << 31) - 1


def mix64(x: Tensor) -> Tensor:
    """MurmurHash3's 64-bit finaliser, a bijection on int64 (arithmetic wraps)."""
    x = x ^ ((x >> 33) & _LOW_31_BITS)
    x = x * _MULTIPLIER_1
    x = x ^ ((x >> 33) & _LOW_31_BITS)
    x = x * _MULTIPLIER_2
    return x ^ ((x >> 33) & _LOW_31_BITS)


def counter_bits(*parts: int | Tensor) -> Tensor:
    """64 random bits (int64) for each element of the broadcast key parts.

    Args:
        *parts: integers or int64 tensors that broadcast together; their order matters.
    """
    device = next((p.device for p in parts if isinstance(p, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        value = part if isinstance(part, Tensor) else torch.tensor(_signed(part % (1 << 64)), device=device)
        state = mix64(state * 31 + _GOLDEN_GAMMA + mix64(value + _GOLDEN_GAMMA))
    return state


def counter_uniform(*parts: int | Tensor) -> Tensor:
    """Uniform float64 numbers in (0, 1) with 53 random bits; see `counter_bits`."""
    bits = (counter_bits(*parts) >> 11) & ((1 << 53) - 1)
    return (bits.to(torch.float64) + 0.5) * 2.0**-53


def counter_integers(high: int, *parts: int | Tensor) -> Tensor:
    """Uniform int64 numbers in [0, `high`); see `counter_bits`.

    Raises:
        ValueError: `high` is not in 1 ... 2**53.
    """
    if not 1 <= high <= 1 << 53:
        raise ValueError(f"high: expected a number in 1 ... 2**53, got {high}")
    return (counter_uniform(*parts) * high).to(torch.int64).clamp_(max=high - 1)


def name_key(name: str) -> int:
    """A stable 64-bit key of a name; the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
