"""HSTU attention in dense PyTorch: the executable specification.

Shape suffixes: B sequences, H heads, Q and K longest query and key sequence, D query/key width, V value width,
T tokens, P positions, N time buckets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.jagged_dense import dense_to_jagged, jagged_to_dense


def position_buckets(q_positions_BQ: Tensor, k_positions_BK: Tensor, num_rows: int) -> Tensor:
    """Row of the position table for each (query, key): key minus query position, clipped, (B, Q, K) int64."""
    reach = (num_rows - 1) // 2
    distance = k_positions_BK[:, None, :] - q_positions_BQ[:, :, None]
    return distance.clamp(-reach, reach) + reach


def time_buckets(q_times_BQ: Tensor, k_times_BK: Tensor, num_buckets: int, width: float) -> Tensor:
    """Row of the time table: ``floor(ln(max(1, |query time - key time|)) / width)``, clipped, (B, Q, K) int64."""
    gap = (q_times_BQ[:, :, None] - k_times_BK[:, None, :]).abs().clamp(min=1)
    return (torch.log(gap.to(torch.float64)) / width).floor().to(torch.int64).clamp(max=num_buckets - 1)


def hstu_attention_reference(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    *,
    q_layout: JaggedLayout,
    k_layout: JaggedLayout,
    mask: IntervalMask,
    scale: float | Tensor,
    alpha: float,
    position_table_PH: Tensor | None,
    time_table_NH: Tensor | None,
    q_times_T: Tensor | None,
    k_times_T: Tensor | None,
    q_positions_T: Tensor | None,
    k_positions_T: Tensor | None,
    time_bucket_width: float,
    activation: Literal["silu", "softmax"],
    dropout: float,
) -> Tensor:
    """``scale * (act(alpha * q k^T + bias) * mask) v``, padded per batch; see `hstu_attention`."""
    q_BHQD = jagged_to_dense(q_THD, q_layout).transpose(1, 2)
    k_BHKD = jagged_to_dense(k_THD, k_layout).transpose(1, 2)
    v_BHKV = jagged_to_dense(v_THV, k_layout).transpose(1, 2)
    logits = alpha * (q_BHQD @ k_BHKD.transpose(-1, -2))
    if position_table_PH is not None:
        rows_BQK = position_buckets(
            _positions(q_positions_T, q_layout), _positions(k_positions_T, k_layout), position_table_PH.shape[0]
        )
        logits = logits + position_table_PH.to(logits.dtype).T[:, rows_BQK].transpose(0, 1)
    if time_table_NH is not None and q_times_T is not None and k_times_T is not None:
        rows_BQK = time_buckets(
            jagged_to_dense(q_times_T, q_layout),
            jagged_to_dense(k_times_T, k_layout),
            time_table_NH.shape[0],
            time_bucket_width,
        )
        logits = logits + time_table_NH.to(logits.dtype).T[:, rows_BQK].transpose(0, 1)
    visible_B1QK = mask.visible(q_layout, k_layout)[:, None]
    if activation == "silu":
        weights = F.silu(logits) * visible_B1QK
        if isinstance(scale, Tensor):
            scale = scale.to(weights.dtype)[:, None, None, None]
        weights = weights * scale
    else:
        # Not -inf: a row that sees nothing would hold NaN inside, which anomaly detection reports.
        hidden = torch.finfo(logits.dtype).min
        weights = torch.softmax(logits.masked_fill(~visible_B1QK, hidden), -1) * visible_B1QK
    weights = F.dropout(weights, dropout)
    return dense_to_jagged((weights @ v_BHKV).transpose(1, 2), q_layout)


def _positions(positions_T: Tensor | None, layout: JaggedLayout) -> Tensor:
    """Positions in dense form; without any, (1, L) places in the sequence, the same for all."""
    if positions_T is None:
        return torch.arange(layout.max_length, device=layout.offsets_B1.device)[None]
    return jagged_to_dense(positions_T, layout)
