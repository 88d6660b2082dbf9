"""FuXi's position and time channels, maps times values over jagged sequences: checks and dispatch.

Shape suffixes: B sequences, T query tokens (or key tokens, where v or k), H heads, V value width, P rows of the
position table.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.fuxi_bias.cpu import fuxi_bias_cpu
from lightning_gr.ops.fuxi_bias.reference import fuxi_bias_reference
from lightning_gr.ops.fuxi_bias.time_function import TimeFunction
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

__all__ = ["TimeFunction", "fuxi_bias", "fuxi_bias_bytes", "fuxi_bias_flops"]


def fuxi_bias(
    v_THV: Tensor,
    *,
    q_layout: JaggedLayout,
    k_layout: JaggedLayout | None = None,
    mask: IntervalMask,
    position_table_PH: Tensor | None = None,
    time_function: TimeFunction | None = None,
    q_times_T: Tensor | None = None,
    k_times_T: Tensor | None = None,
    q_positions_T: Tensor | None = None,
    k_positions_T: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """The channels of FuXi's attention that do not look at queries: ``(mask * P) v`` and ``(mask * F) v``.

    In the adaptive multi-channel self-attention of FuXi-alpha (arXiv 2502.03036) they stand beside the query-key
    channel; in FuXi-beta (2508.10615) and FuXi-gamma (2512.12740) they are all there is. Per head,
    ``P[i, j] = position_table[clip(j - i, -n, n) + n]`` and ``F[i, j] = f(|t_i - t_j|)``.

    Args:
        v_THV: values of all sequences, float.
        q_layout: lengths and offsets of the query sequences, the rows of the maps.
        k_layout: those of the key sequences; None means the queries'.
        mask: which keys each query sees.
        position_table_PH: the position map's ``P = 2 n + 1`` rows; None leaves the channel out. A map that heads share
            is ``table_P1.expand(-1, H)``.
        time_function: the time map's ``f``, for each head; None leaves the channel out.
        q_times_T: int64 time of each query, in seconds, for the time map.
        k_times_T: int64 time of each key.
        q_positions_T: int64 position of each query; None, together with `k_positions_T`, means its place in its
            sequence.
        k_positions_T: int64 position of each key.
        backend: which implementation; `auto` takes that of an enclosing `use_backend`, else the device's.

    Returns:
        The position channel and the time channel, each (T, H, V) in the dtype of `v_THV`, or None where left out.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument and its value. Under
            ``LIGHTNING_GR_DEBUG=1`` also values on the device: offsets, intervals that leave their sequence, and a
            decay that is not in (0, 1].
    """
    k_layout = q_layout if k_layout is None else k_layout
    if v_THV.dim() != 3 or v_THV.shape[0] != k_layout.num_tokens or not v_THV.is_floating_point():
        raise ValueError(
            f"v_THV: expected floats ({k_layout.num_tokens} tokens, heads, width), got {v_THV.dtype} of shape "
            f"{tuple(v_THV.shape)}"
        )
    if k_layout.num_sequences != q_layout.num_sequences:
        raise ValueError(f"k_layout: expected {q_layout.num_sequences} sequences, got {k_layout.num_sequences}")
    if mask.a_T.shape[0] != q_layout.num_tokens:
        raise ValueError(f"mask: expected one row for each of {q_layout.num_tokens} queries, got {mask.a_T.shape[0]}")
    if position_table_PH is not None:
        rows, heads = position_table_PH.shape if position_table_PH.dim() == 2 else (0, 0)
        if rows % 2 == 0 or heads != v_THV.shape[1] or not position_table_PH.is_floating_point():
            raise ValueError(
                f"position_table_PH: expected floats (odd number of rows, {v_THV.shape[1]} heads), got "
                f"{position_table_PH.dtype} of shape {tuple(position_table_PH.shape)}"
            )
    if time_function is not None:
        if time_function.parameters_KH.shape[1] != v_THV.shape[1]:
            raise ValueError(
                f"time_function: expected {v_THV.shape[1]} heads, got {time_function.parameters_KH.shape[1]}"
            )
        for name, times in (("q_times_T", q_times_T), ("k_times_T", k_times_T)):
            if times is None:
                raise ValueError(f"{name}=None: time_function is given; give q_times_T and k_times_T")
    if (q_positions_T is None) != (k_positions_T is None):
        missing, given = ("q_positions_T", "k_positions_T")[:: 1 if q_positions_T is None else -1]
        raise ValueError(f"{missing}=None: {given} is given; give both, or neither for places in the sequence")
    for name, numbers, layout in (
        ("q_times_T", q_times_T, q_layout),
        ("k_times_T", k_times_T, k_layout),
        ("q_positions_T", q_positions_T, q_layout),
        ("k_positions_T", k_positions_T, k_layout),
    ):
        if numbers is not None and (numbers.shape != (layout.num_tokens,) or numbers.dtype != torch.int64):
            raise ValueError(
                f"{name}: expected {layout.num_tokens} int64 numbers, got {numbers.dtype} of shape "
                f"{tuple(numbers.shape)}"
            )
    for name, tensor in (
        ("q_layout", q_layout.offsets_B1),
        ("k_layout", k_layout.offsets_B1),
        ("mask", mask.a_T),
        ("position_table_PH", position_table_PH),
        ("time_function", None if time_function is None else time_function.parameters_KH),
        ("q_times_T", q_times_T),
        ("k_times_T", k_times_T),
        ("q_positions_T", q_positions_T),
        ("k_positions_T", k_positions_T),
    ):
        if tensor is not None and tensor.device != v_THV.device:
            raise ValueError(f"{name}: expected the device of v_THV, {v_THV.device}, got {tensor.device}")
    if os.environ.get("LIGHTNING_GR_DEBUG") == "1":
        q_layout.check_values("q_layout")
        k_layout.check_values("k_layout")
        mask.check_values(q_layout, k_layout)
        if time_function is not None and time_function.kind == "exponential_power":
            for h, gamma in enumerate(time_function.parameters_KH[2].tolist()):
                if not 0 < gamma <= 1:
                    raise ValueError(f"gamma_H[{h}]={gamma}: expected a decay in (0, 1]")
    implementation: Any = fuxi_bias_reference
    if (chosen := choose_backend(backend, v_THV.device)) == "cpu":
        implementation = fuxi_bias_cpu
    elif chosen == "triton":
        from lightning_gr.ops.fuxi_bias.triton_kernel import fuxi_bias_triton

        implementation = fuxi_bias_triton
    channels: tuple[Tensor | None, Tensor | None] = implementation(
        v_THV,
        q_layout=q_layout,
        k_layout=k_layout,
        mask=mask,
        position_table_PH=position_table_PH,
        time_function=time_function,
        q_times_T=q_times_T,
        k_times_T=k_times_T,
        q_positions_T=q_positions_T,
        k_positions_T=k_positions_T,
    )
    return channels


def fuxi_bias_flops(num_visible_pairs: int, *, num_heads: int, v_dim: int, num_maps: int = 2) -> int:
    """Forward floating-point operations of maps times values over visible pairs; padding is not work.

    What it takes to make a map is not counted, as an activation is not.

    Args:
        num_visible_pairs: (query, key) pairs that the mask shows; see `IntervalMask.num_visible_pairs`.
        num_heads: heads.
        v_dim: width of a head's values.
        num_maps: channels: 1 or 2.
    """
    return 2 * num_visible_pairs * num_heads * v_dim * num_maps


def fuxi_bias_bytes(
    num_queries: int, num_keys: int, *, num_heads: int, v_dim: int, itemsize: int, num_maps: int = 2
) -> int:
    """Bytes that the forward pass must move: values in, channels out, the mask, and the times of both sides."""
    return (num_keys + num_maps * num_queries) * num_heads * v_dim * itemsize + 33 * num_queries + 8 * num_keys
