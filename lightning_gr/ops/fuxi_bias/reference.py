"""FuXi's position and time channels in dense PyTorch: the executable specification.

Shape suffixes: B sequences, H heads, Q and K longest query and key sequence, V value width, T tokens, P positions.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lightning_gr.ops.fuxi_bias.time_function import TimeFunction
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.jagged_dense import dense_to_jagged, jagged_to_dense


def fuxi_bias_reference(
    v_THV: Tensor,
    *,
    q_layout: JaggedLayout,
    k_layout: JaggedLayout,
    mask: IntervalMask,
    position_table_PH: Tensor | None,
    time_function: TimeFunction | None,
    q_times_T: Tensor | None,
    k_times_T: Tensor | None,
    q_positions_T: Tensor | None,
    k_positions_T: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(mask * map) v`` of both channels, padded per batch; see `fuxi_bias`."""
    v_BHKV = jagged_to_dense(v_THV, k_layout).transpose(1, 2)
    visible_B1QK = mask.visible(q_layout, k_layout)[:, None]

    def channel(map_HBQK: Tensor) -> Tensor:
        seen_BHQK = torch.where(visible_B1QK, map_HBQK.transpose(0, 1).to(v_THV.dtype), 0.0)
        return dense_to_jagged((seen_BHQK @ v_BHKV).transpose(1, 2), q_layout)

    by_position = by_time = None
    if position_table_PH is not None:
        reach = position_table_PH.shape[0] // 2
        q_at_T = q_layout.position_T if q_positions_T is None else q_positions_T
        k_at_T = k_layout.position_T if k_positions_T is None else k_positions_T
        distance_BQK = _differences(q_at_T, k_at_T, q_layout, k_layout)
        by_position = channel(position_table_PH.T[:, distance_BQK.clamp(-reach, reach) + reach])
    if time_function is not None:
        assert q_times_T is not None
        assert k_times_T is not None
        wide = dataclasses.replace(
            time_function, parameters_KH=time_function.parameters_KH.to(torch.promote_types(v_THV.dtype, torch.float32))
        )
        by_time = channel(wide(_differences(q_times_T, k_times_T, q_layout, k_layout).abs()))
    return by_position, by_time


def _differences(q_T: Tensor, k_T: Tensor, q_layout: JaggedLayout, k_layout: JaggedLayout) -> Tensor:
    """Key's number minus query's, (B, Q, K)."""
    return jagged_to_dense(k_T, k_layout)[:, None, :] - jagged_to_dense(q_T, q_layout)[:, :, None]
