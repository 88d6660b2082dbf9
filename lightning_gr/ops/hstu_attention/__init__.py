"""HSTU attention over jagged sequences: checks and dispatch.

Shape suffixes: B sequences, T query tokens (or key tokens, where k or v), H heads, D query/key width, V value width,
P rows of the position table, N time buckets.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.hstu_attention.cpu import hstu_attention_cpu
from lightning_gr.ops.hstu_attention.reference import hstu_attention_reference
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

__all__ = ["attention_bytes", "attention_flops", "hstu_attention"]


def hstu_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    *,
    q_layout: JaggedLayout,
    k_layout: JaggedLayout | None = None,
    mask: IntervalMask,
    scale: float | Tensor,
    alpha: float | None = None,
    position_table_PH: Tensor | None = None,
    time_table_NH: Tensor | None = None,
    q_times_T: Tensor | None = None,
    k_times_T: Tensor | None = None,
    q_positions_T: Tensor | None = None,
    k_positions_T: Tensor | None = None,
    time_bucket_width: float = 0.301,
    activation: Literal["silu", "softmax"] = "silu",
    dropout: float = 0.0,
    training: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Pointwise attention of HSTU (arXiv 2402.17152, section 3): ``scale * (silu(alpha q k^T + bias) * mask) v``.

    Args:
        q_THD: queries of all sequences, float, any width.
        k_THD: keys.
        v_THV: values.
        q_layout: lengths and offsets of the query sequences.
        k_layout: those of the key sequences; None means the queries'.
        mask: which keys each query sees.
        scale: factor of the weights, a number or one per sequence (B,). Pin it: a number taken from the batch would
            make a user's logits depend on batch mates.
        alpha: factor of the dot products; None means ``1 / sqrt(D)``.
        position_table_PH: bias by key position minus query position, clipped to the ``P = 2 n + 1`` rows.
        time_table_NH: bias by ``floor(ln(max(1, |query time - key time|)) / time_bucket_width)``, clipped to N - 1.
        q_times_T: int64 time of each query, in seconds; None, together with `k_times_T`, means no time bias.
        k_times_T: int64 time of each key.
        q_positions_T: int64 position of each query for the position bias; None means its place in its sequence.
        k_positions_T: int64 position of each key.
        time_bucket_width: width of a time bucket in natural-log seconds; 0.301 is Meta's.
        activation: `silu`, or `softmax` (SASRec), which ignores `scale`; a row that sees nothing gives 0.
        dropout: probability of dropping a weight while training.
        training: whether `dropout` is applied.
        backend: which implementation; `auto` takes that of an enclosing `use_backend`, else the device's.

    Returns:
        (T, H, V), the dtype of the inputs.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument and its value. Under
            ``LIGHTNING_GR_DEBUG=1`` also values on the device: offsets, and intervals that leave their sequence.
    """
    k_layout = q_layout if k_layout is None else k_layout
    _check(q_THD, k_THD, v_THV, q_layout, k_layout, mask, scale)
    for name, table in (("position_table_PH", position_table_PH), ("time_table_NH", time_table_NH)):
        if table is not None and (table.dim() != 2 or table.shape[1] != q_THD.shape[1] or table.shape[0] < 1):
            raise ValueError(f"{name}: expected (rows, {q_THD.shape[1]} heads), got shape {tuple(table.shape)}")
        if table is not None and not table.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {table.dtype}")
    if position_table_PH is not None and position_table_PH.shape[0] % 2 == 0:
        raise ValueError(f"position_table_PH: expected an odd number of rows, got {position_table_PH.shape[0]}")
    for name, times, layout in (("q_times_T", q_times_T, q_layout), ("k_times_T", k_times_T, k_layout)):
        if times is not None and times.shape != (layout.num_tokens,):
            raise ValueError(f"{name}: expected {layout.num_tokens} times, got shape {tuple(times.shape)}")
        if times is not None and times.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 seconds, got {times.dtype}")
    for name, positions, layout in (
        ("q_positions_T", q_positions_T, q_layout),
        ("k_positions_T", k_positions_T, k_layout),
    ):
        if positions is not None and (positions.shape != (layout.num_tokens,) or positions.dtype != torch.int64):
            raise ValueError(
                f"{name}: expected {layout.num_tokens} int64 positions, got {positions.dtype} of shape "
                f"{tuple(positions.shape)}"
            )
    for one, other, q_x, k_x in (
        ("q_times_T", "k_times_T", q_times_T, k_times_T),
        ("q_positions_T", "k_positions_T", q_positions_T, k_positions_T),
    ):
        if (q_x is None) != (k_x is None):
            missing, given = (one, other) if q_x is None else (other, one)
            what = "no time bias" if one == "q_times_T" else "places in the sequence"
            raise ValueError(f"{missing}=None: {given} is given; give both, or neither for {what}")
    _check_devices(
        q_THD.device,
        k_THD=k_THD,
        v_THV=v_THV,
        q_layout=q_layout.offsets_B1,
        k_layout=k_layout.offsets_B1,
        mask=mask.a_T,
        scale=scale if isinstance(scale, Tensor) else None,
        position_table_PH=position_table_PH,
        time_table_NH=time_table_NH,
        q_times_T=q_times_T,
        k_times_T=k_times_T,
        q_positions_T=q_positions_T,
        k_positions_T=k_positions_T,
    )
    if activation not in ("silu", "softmax"):
        raise ValueError(f"activation: expected 'silu' or 'softmax', got {activation!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if not time_bucket_width > 0:
        raise ValueError(f"time_bucket_width: expected a number above 0, got {time_bucket_width}")
    if os.environ.get("LIGHTNING_GR_DEBUG") == "1":
        q_layout.check_values("q_layout")
        k_layout.check_values("k_layout")
        mask.check_values(q_layout, k_layout)
    implementation: Any = hstu_attention_reference
    if (chosen := choose_backend(backend, q_THD.device)) == "cpu":
        implementation = hstu_attention_cpu
    elif chosen == "triton":
        from lightning_gr.ops.hstu_attention.triton_kernel import hstu_attention_triton

        implementation = hstu_attention_triton
    out: Tensor = implementation(
        q_THD,
        k_THD,
        v_THV,
        q_layout=q_layout,
        k_layout=k_layout,
        mask=mask,
        scale=scale,
        alpha=q_THD.shape[2] ** -0.5 if alpha is None else alpha,
        position_table_PH=position_table_PH,
        time_table_NH=time_table_NH,
        q_times_T=q_times_T,
        k_times_T=k_times_T,
        q_positions_T=q_positions_T,
        k_positions_T=k_positions_T,
        time_bucket_width=time_bucket_width,
        activation=activation,
        dropout=dropout if training else 0.0,
    )
    return out


def _check(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    q_layout: JaggedLayout,
    k_layout: JaggedLayout,
    mask: IntervalMask,
    scale: float | Tensor,
) -> None:
    for name, tensor, layout in (("q_THD", q_THD, q_layout), ("k_THD", k_THD, k_layout), ("v_THV", v_THV, k_layout)):
        if tensor.dim() != 3 or tensor.shape[0] != layout.num_tokens:
            raise ValueError(
                f"{name}: expected ({layout.num_tokens} tokens, heads, width), got shape {tuple(tensor.shape)}"
            )
        if tensor.shape[1] != q_THD.shape[1]:
            raise ValueError(f"{name}: expected {q_THD.shape[1]} heads like q_THD, got {tensor.shape[1]}")
        if tensor.dtype != q_THD.dtype or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected the floating dtype of q_THD, {q_THD.dtype}, got {tensor.dtype}")
    if k_THD.shape[2] != q_THD.shape[2]:
        raise ValueError(f"k_THD: expected width {q_THD.shape[2]} like q_THD, got {k_THD.shape[2]}")
    if k_layout.num_sequences != q_layout.num_sequences:
        raise ValueError(f"k_layout: expected {q_layout.num_sequences} sequences, got {k_layout.num_sequences}")
    if mask.a_T.shape[0] != q_layout.num_tokens:
        raise ValueError(f"mask: expected one row for each of {q_layout.num_tokens} queries, got {mask.a_T.shape[0]}")
    if isinstance(scale, Tensor) and scale.shape != (q_layout.num_sequences,):
        raise ValueError(f"scale: expected a number or {q_layout.num_sequences} numbers, got {tuple(scale.shape)}")


def _check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected the device of q_THD, {device}, got {tensor.device}")


def attention_flops(num_visible_pairs: int, *, num_heads: int, qk_dim: int, v_dim: int) -> int:
    """Forward floating-point operations of the two products over visible pairs; padding is not work.

    Args:
        num_visible_pairs: (query, key) pairs that the mask shows; see `IntervalMask.num_visible_pairs`.
        num_heads: heads.
        qk_dim: width of a head's queries and keys.
        v_dim: width of a head's values.
    """
    return 2 * num_visible_pairs * num_heads * (qk_dim + v_dim)


def attention_bytes(
    num_queries: int, num_keys: int, *, num_heads: int, qk_dim: int, v_dim: int, element_size: int = 4
) -> int:
    """Bytes that a fused forward reads and writes at least: queries, keys, values and the result, each once.

    Args:
        num_queries: query tokens of all sequences.
        num_keys: key tokens of all sequences.
        num_heads: heads.
        qk_dim: width of a head's queries and keys.
        v_dim: width of a head's values.
        element_size: bytes of a number.
    """
    return (num_queries + num_keys) * num_heads * (qk_dim + v_dim) * element_size
