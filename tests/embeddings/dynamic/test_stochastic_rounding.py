"""Stochastic rounding: only neighbours, right on average, the same whoever rounds, and special numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic import chunked_rows
from lightning_gr.embeddings.dynamic.stochastic_rounding import round_stochastically

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=["compiled", "pytorch"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pytorch":
        monkeypatch.setattr(chunked_rows, "load_native", lambda source: None)


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of the dtype at or beside each x, found among all 2^16 of them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()].unique()
    above = torch.searchsorted(every, x.double())
    below = torch.searchsorted(every, x.double(), right=True) - 1
    return every[below], every[above]


@TYPES
def test_the_mean_is_kept(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=random) * 2.0 ** torch.randint(-30, 15, (40,), generator=random)
    # Subnormal in fp16, in bf16, and exact ones.
    x = torch.cat([x, torch.tensor([3e-6, -1e-7, 2.0**-24 / 3, 1e-39, -3e-40, 0.0, 1.5, -65504.0])])
    draws = 20_000
    drawn = round_stochastically(x.expand(draws, len(x)), dtype, torch.arange(draws), step=5).double()
    low, high = neighbours(x, dtype)
    assert ((drawn == low) | (drawn == high)).all()
    width = (high - low).clamp(min=1e-300)
    share = torch.where(high > low, (x.double() - low) / width, 0)
    seen = torch.where(high > low, (drawn.mean(0) - low) / width, 0)
    assert (seen - share).abs().max() < 5 * 0.5 / draws**0.5


@TYPES
def test_numbers_of_the_type_stay(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    rounded = round_stochastically(every.float(), dtype, torch.arange(256), step=1)
    number = ~every.isnan()
    assert torch.equal(rounded.view(torch.int16)[number], every.view(torch.int16)[number])
    assert rounded[~number].isnan().all()


@TYPES
def test_beyond_the_range_it_is_the_nearest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gap = largest - float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    x = torch.tensor([largest + gap * share for share in (0.25, 0.49, 0.5, 0.9)] + [3.4e38, torch.inf])
    x = torch.cat([x, -x]).expand(200, 12)
    rounded = round_stochastically(x, dtype, torch.arange(200), step=1)
    assert torch.equal(rounded, x.to(dtype))


@TYPES
def test_the_draw_is_of_seed_step_and_column(dtype: torch.dtype) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(64) * -(2**57) + 3
    whole = round_stochastically(x, dtype, seeds, step=9)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_stochastically(x[order], dtype, seeds[order], step=9), whole[order])
    assert torch.equal(round_stochastically(x[:, :7], dtype, seeds, step=9), whole[:, :7])
    assert not torch.equal(round_stochastically(x, dtype, seeds, step=10), whole)
    assert not torch.equal(round_stochastically(x, dtype, seeds + 1, step=9), whole)
    same = round_stochastically(torch.full((64, 33), 1 + 2.0**-12), dtype, seeds, step=9)
    assert len(same.unique(dim=0)) > 1


@TYPES
def test_both_paths_draw_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(100, 17, generator=random) * 10.0 ** torch.randint(-42, 6, (100, 17), generator=random)
    seeds = torch.randint(-(2**63), 2**63 - 1, (100,), generator=random)
    one = round_stochastically(x, dtype, seeds, step=-2)
    monkeypatch.setattr(chunked_rows, "load_native", lambda source: None)
    assert torch.equal(one, round_stochastically(x, dtype, seeds, step=-2))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float64"):
        round_stochastically(torch.zeros(1, 1), torch.float64, torch.zeros(1, dtype=torch.int64), step=0)
    assert round_stochastically(torch.zeros(0, 3), torch.float16, torch.zeros(0, dtype=torch.int64), 0).shape == (0, 3)
