"""Positions of queries and keys that are not their places: the position bias against a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_gr.ops.hstu_attention import hstu_attention
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

LENGTHS, HEADS, DIM = [4, 0, 6, 1], 2, 3


def problem() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    q, k, v = (torch.randn(11, HEADS, DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    return {
        "q_THD": q,
        "k_THD": k,
        "v_THV": v,
        "q_layout": layout,
        "mask": IntervalMask.causal(layout),
        "scale": 0.5,
        "position_table_PH": torch.randn(5, HEADS, generator=generator, dtype=torch.float64, requires_grad=True),
    }


def test_the_bias_is_by_the_given_positions() -> None:
    p = problem()
    positions = torch.tensor([0, 1, 1, 5, 2, 2, 2, 3, 9, 4, 0])
    ours = hstu_attention(**p, q_positions_T=positions, k_positions_T=positions)
    wanted, start = [], 0
    for length in LENGTHS:
        for i in range(start, start + length):
            total = torch.zeros(HEADS, DIM, dtype=torch.float64)
            for j in range(start, i + 1):
                bucket = min(max(int(positions[j] - positions[i]), -2), 2) + 2
                logits = (p["q_THD"][i] * p["k_THD"][j]).sum(1) / DIM**0.5 + p["position_table_PH"][bucket]
                total = total + 0.5 * F.silu(logits)[:, None] * p["v_THV"][j]
            wanted.append(total)
        start += length
    torch.testing.assert_close(ours, torch.stack(wanted))
    weights = torch.randn_like(ours)
    (found,) = torch.autograd.grad((ours * weights).sum(), p["position_table_PH"])
    (truth,) = torch.autograd.grad((torch.stack(wanted) * weights).sum(), p["position_table_PH"])
    torch.testing.assert_close(found, truth)


def test_places_are_what_no_positions_mean() -> None:
    p = problem()
    places = p["q_layout"].position_T
    torch.testing.assert_close(hstu_attention(**p), hstu_attention(**p, q_positions_T=places, k_positions_T=places))


def test_what_does_not_fit_is_named() -> None:
    p, places = problem(), torch.arange(11)
    with pytest.raises(ValueError, match="k_positions_T=None: q_positions_T is given; give both"):
        hstu_attention(**p, q_positions_T=places)
    with pytest.raises(
        ValueError, match=r"q_positions_T: expected 11 int64 positions, got torch.int64 of shape \(10,\)"
    ):
        hstu_attention(**p, q_positions_T=places[:10], k_positions_T=places)
    with pytest.raises(ValueError, match="k_positions_T: expected 11 int64 positions, got torch.float32"):
        hstu_attention(**p, q_positions_T=places, k_positions_T=places.float())
