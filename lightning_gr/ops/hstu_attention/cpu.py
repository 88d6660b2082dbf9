"""HSTU attention on a CPU without padding: compiled tiles in float32, blocks of rows in PyTorch otherwise.

Shape suffixes: T tokens, H heads, D query/key width, V value width, P positions, N time buckets, B sequences, R rows of
a block, C its columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.huge_pages import empty_in_huge_pages
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.native import load_native

_ROWS_AT_ONCE = 256


def hstu_attention_cpu(
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
    """As `hstu_attention_reference`; float16 and bfloat16 are computed in float32."""
    dtype = q_THD.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale_B = scale.to(wide) if isinstance(scale, Tensor) else torch.full((q_layout.num_sequences,), scale, dtype=wide)
    if q_times_T is None:
        time_table_NH = None
    inputs = (q_THD, k_THD, v_THV, scale_B, position_table_PH, time_table_NH)
    call = _Call(
        q_layout=q_layout,
        k_layout=k_layout,
        mask=mask,
        alpha=alpha,
        q_times_T=q_times_T,
        k_times_T=k_times_T,
        q_positions_T=q_positions_T,
        k_positions_T=k_positions_T,
        time_bucket_width=time_bucket_width,
        softmax=activation == "softmax",
        dropout=dropout,
        seed=int(torch.randint(0, 2**62, ())) if dropout else 0,
    )
    out: Tensor = _Attention.apply(call, *(None if x is None else x.to(wide) for x in inputs))
    return out.to(dtype)


@dataclass(frozen=True)
class _Call:
    """What a call is about besides the tensors that are differentiated."""

    q_layout: JaggedLayout
    k_layout: JaggedLayout
    mask: IntervalMask
    alpha: float
    q_times_T: Tensor | None
    k_times_T: Tensor | None
    q_positions_T: Tensor | None
    k_positions_T: Tensor | None
    time_bucket_width: float
    softmax: bool
    dropout: float
    seed: int


class _Attention(torch.autograd.Function):
    """Forward keeps the inputs and, for softmax, two numbers a row; backward computes the scores again."""

    @staticmethod
    @override
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> Tensor:
        native = load_native(Path(__file__).with_name("cpu.cpp")) if inputs[0].dtype == torch.float32 else None  # type: ignore[union-attr]
        compiled = _Compiled(native, call, inputs) if native is not None else None
        out = compiled.forward() if compiled is not None else _forward_by_blocks(call, inputs)
        ctx.call, ctx.compiled = call, compiled is not None
        kept = (compiled.lse_TH, out) if compiled is not None and call.softmax else (None, None)
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    @override
    def backward(ctx: Any, d_out: Tensor) -> Any:
        refuse_second_derivative("hstu_attention", "cpu")
        *inputs, lse_TH, out = ctx.saved_tensors
        if ctx.compiled:
            native = load_native(Path(__file__).with_name("cpu.cpp"))
            compiled = _Compiled(native, ctx.call, tuple(inputs))
            gradients = compiled.backward(d_out, lse_TH, out, ctx.needs_input_grad[1:])
        else:
            gradients = _backward_by_blocks(ctx.call, tuple(inputs), d_out, ctx.needs_input_grad[1:])
        return None, *gradients


# ---- compiled --------------------------------------------------------------------------------------------------------


class _Arguments(ctypes.Structure):
    """Mirrors `Arguments` in cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_heads", "qk_dim", "v_dim")),
        *((name, ctypes.c_void_p) for name in ("q_offsets", "k_offsets", "q", "k", "v")),
        *((f"{x}_{of}", ctypes.c_int64) for x in "qkv" for of in ("token", "head")),
        *((name, ctypes.c_void_p) for name in ("mask_a", "mask_b", "mask_c", "mask_self", "scale")),
        ("alpha", ctypes.c_double),
        ("position_table", ctypes.c_void_p),
        ("position_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_positions", "k_positions", "time_table")),
        ("time_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_times", "k_times", "time_thresholds")),
        ("time_bucket_width", ctypes.c_double),
        ("softmax", ctypes.c_int64),
        ("dropout", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("num_threads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "d_out", "d_q", "d_k", "d_v")),
        *((name, ctypes.c_void_p) for name in ("d_position_table", "d_time_table", "d_scale")),
    ]


class _Compiled:
    """One call of the compiled functions, with everything that its pointers point at."""

    def __init__(self, native: Any, call: _Call, inputs: tuple[Tensor | None, ...]) -> None:
        q_THD, k_THD, v_THV, scale_B, position_table_PH, time_table_NH = inputs
        assert q_THD is not None
        assert k_THD is not None
        assert v_THV is not None
        self._native, self._alive = native, []  # type: ignore[var-annotated]
        self.shape = (q_THD.shape[0], q_THD.shape[1], v_THV.shape[2])
        self.lse_TH: Tensor | None = None
        self._inputs = [None if x is None else x.detach() for x in inputs]
        self._arguments = arguments = _Arguments(
            num_sequences=call.q_layout.num_sequences,
            num_heads=q_THD.shape[1],
            qk_dim=q_THD.shape[2],
            v_dim=v_THV.shape[2],
            alpha=call.alpha,
            time_bucket_width=call.time_bucket_width,
            softmax=call.softmax,
            dropout=call.dropout,
            seed=call.seed,
            num_threads=torch.get_num_threads(),
        )
        for name, tensor in (("q", q_THD), ("k", k_THD), ("v", v_THV)):
            tensor = tensor.detach() if tensor.stride(2) == 1 else tensor.detach().contiguous()
            self._point(name, tensor)
            setattr(arguments, f"{name}_token", tensor.stride(0))
            setattr(arguments, f"{name}_head", tensor.stride(1))
        mask = call.mask
        for name, vector in (
            # From the host lengths, which were checked: the compiled code trusts them.
            ("q_offsets", call.q_layout.on_host().offsets_B1),
            ("k_offsets", call.k_layout.on_host().offsets_B1),
            ("mask_a", mask.a_T),
            ("mask_b", mask.b_T),
            ("mask_c", mask.c_T),
            ("mask_self", mask.self_T),
            ("scale", scale_B),
            ("q_positions", call.q_positions_T if position_table_PH is not None else None),
            ("k_positions", call.k_positions_T if position_table_PH is not None else None),
        ):
            if vector is not None:
                self._point(name, vector.detach().contiguous())
        if position_table_PH is not None:
            self._point("position_table", position_table_PH.detach().T.contiguous())
            arguments.position_rows = position_table_PH.shape[0]
        if time_table_NH is not None:
            assert call.q_times_T is not None
            assert call.k_times_T is not None
            self._point("time_table", time_table_NH.detach().T.contiguous())
            arguments.time_rows = time_table_NH.shape[0]
            self._point("q_times", call.q_times_T.contiguous())
            self._point("k_times", call.k_times_T.contiguous())
            self._point("time_thresholds", time_thresholds(time_table_NH.shape[0], call.time_bucket_width))

    def _point(self, name: str, tensor: Tensor) -> Tensor:
        self._alive.append(tensor)
        setattr(self._arguments, name, tensor.data_ptr())
        return tensor

    def forward(self) -> Tensor:
        out = self._point("out", empty_in_huge_pages(*self.shape, dtype=torch.float32))
        if self._arguments.softmax:
            self.lse_TH = self._point("lse", torch.empty(self.shape[:2]))
        self._native.hstu_attention_forward(ctypes.byref(self._arguments))
        return out

    def backward(
        self, d_out: Tensor, lse_TH: Tensor | None, out: Tensor | None, needed: tuple[bool, ...]
    ) -> list[Tensor | None]:
        q_THD, k_THD, v_THV, scale_B, position_table_PH, time_table_NH = self._inputs
        assert q_THD is not None
        assert k_THD is not None
        assert v_THV is not None
        assert scale_B is not None
        self._point("d_out", d_out.contiguous())
        for name, tensor in (("lse", lse_TH), ("out", out)):
            if tensor is not None:
                self._point(name, tensor)
        gradients: list[Tensor | None] = [
            self._point(name, empty_in_huge_pages(*x.shape, dtype=torch.float32))
            for name, x in (("d_q", q_THD), ("d_k", k_THD), ("d_v", v_THV))
        ]
        heads, threads = self.shape[1], self._arguments.num_threads
        d_scale_BH = self._point("d_scale", torch.zeros(len(scale_B), heads))
        tables: list[Tensor | None] = []
        for name, table, need in (
            ("d_position_table", position_table_PH, needed[4]),
            ("d_time_table", time_table_NH, needed[5]),
        ):
            tables.append(
                self._point(name, torch.zeros(threads, heads, table.shape[0])) if table is not None and need else None
            )
        self._native.hstu_attention_backward(ctypes.byref(self._arguments))
        # Cloned, since DDP wants the strides of the table, also where it has one head.
        table_gradients = [
            None if x is None else x.sum(0).T.clone(memory_format=torch.contiguous_format) for x in tables
        ]
        return [*gradients, d_scale_BH.sum(1), *table_gradients]


@lru_cache(maxsize=8)
def time_thresholds(num_buckets: int, width: float) -> Tensor:
    """The smallest whole gap of each time bucket, int64 (N,), by the reference's own float64 arithmetic."""
    bucket_N = torch.arange(num_buckets)
    low_N, high_N = torch.ones_like(bucket_N), torch.full_like(bucket_N, torch.iinfo(torch.int64).max)
    for _ in range(63):
        middle_N = low_N + (high_N - low_N) // 2
        reached_N = (torch.log(middle_N.to(torch.float64)) / width).floor() >= bucket_N
        high_N, low_N = torch.where(reached_N, middle_N, high_N), torch.where(reached_N, low_N, middle_N + 1)
    return high_N


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def _blocks(call: _Call) -> Iterator[tuple[slice, slice]]:
    """Query rows of one sequence, at most so many at a time, and the keys of the sequence."""
    q_starts, k_starts = call.q_layout.on_host().offsets_B1.tolist(), call.k_layout.on_host().offsets_B1.tolist()
    for b in range(call.q_layout.num_sequences):
        for first in range(q_starts[b], q_starts[b + 1], _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, q_starts[b + 1])
            # Columns after the last that a row sees are not work; in a causal mask that is nearly half.
            rows, mask = slice(first, last), call.mask
            seen = torch.maximum(mask.a_T[rows], torch.where(mask.b_T[rows] < mask.c_T[rows], mask.c_T[rows], 0))
            own = torch.arange(first, last) - q_starts[b]
            seen = torch.maximum(seen, torch.where(mask.self_T[rows], own + 1, 0))
            end = min(k_starts[b] + int(seen.max()), k_starts[b + 1])
            yield rows, slice(k_starts[b], end)


def _block(call: _Call, inputs: tuple[Tensor | None, ...], rows: slice, columns: slice, block: int) -> Tensor:
    """(R, H, V): the formula for some rows of one sequence."""
    q_RHD, k_CHD, v_CHV, scale_B, position_table_PH, time_table_NH = inputs
    assert q_RHD is not None
    assert k_CHD is not None
    assert v_CHV is not None
    assert scale_B is not None
    q_layout, mask = call.q_layout, call.mask
    own_R, key_C = q_layout.position_T[rows], torch.arange(columns.stop - columns.start)
    s_HRC = call.alpha * torch.einsum("rhd,chd->hrc", q_RHD, k_CHD)
    if position_table_PH is not None:
        reach = position_table_PH.shape[0] // 2
        q_at, k_at = own_R, key_C
        if call.q_positions_T is not None and call.k_positions_T is not None:
            q_at, k_at = call.q_positions_T[rows], call.k_positions_T[columns]
        at_RC = (k_at - q_at[:, None]).clamp(-reach, reach) + reach
        s_HRC = s_HRC + position_table_PH.T[:, at_RC]
    if time_table_NH is not None:
        assert call.q_times_T is not None
        assert call.k_times_T is not None
        gap_RC = (call.q_times_T[rows, None] - call.k_times_T[columns]).abs()
        thresholds_N = time_thresholds(time_table_NH.shape[0], call.time_bucket_width)
        s_HRC = s_HRC + time_table_NH.T[:, torch.searchsorted(thresholds_N[1:], gap_RC, right=True)]
    seen_RC = (key_C < mask.a_T[rows, None]) | ((key_C >= mask.b_T[rows, None]) & (key_C < mask.c_T[rows, None]))
    seen_RC = seen_RC | (mask.self_T[rows, None] & (key_C == own_R[:, None]))
    if call.softmax:
        hidden = torch.finfo(s_HRC.dtype).min
        w_HRC = torch.softmax(s_HRC.masked_fill(~seen_RC, hidden), -1) * seen_RC
    else:
        w_HRC = F.silu(s_HRC) * seen_RC * scale_B[q_layout.sequence_T[rows.start]]
    if call.dropout:
        generator = torch.Generator().manual_seed((call.seed + block) % 2**62)
        kept = torch.rand(w_HRC.shape, generator=generator) >= call.dropout
        w_HRC = w_HRC * kept / (1 - call.dropout)
    return torch.einsum("hrc,chv->rhv", w_HRC, v_CHV)


def _forward_by_blocks(call: _Call, inputs: tuple[Tensor | None, ...]) -> Tensor:
    q_THD, k_THD, v_THV, *rest = inputs
    assert q_THD is not None
    assert k_THD is not None
    assert v_THV is not None
    out = q_THD.new_empty(*q_THD.shape[:2], v_THV.shape[2])
    for block, (rows, columns) in enumerate(_blocks(call)):
        out[rows] = _block(call, (q_THD[rows], k_THD[columns], v_THV[columns], *rest), rows, columns, block)
    return out


def _backward_by_blocks(
    call: _Call, inputs: tuple[Tensor | None, ...], d_out: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    totals = [torch.zeros_like(x) if x is not None and need else None for x, need in zip(inputs, needed, strict=True)]
    for block, (rows, columns) in enumerate(_blocks(call)):
        places = (rows, columns, columns, ..., ..., ...)
        parts = [
            None if x is None else x[place].detach().requires_grad_(need)  # type: ignore[index]
            for x, place, need in zip(inputs, places, needed, strict=True)
        ]
        wanted = [i for i, (x, need) in enumerate(zip(parts, needed, strict=True)) if x is not None and need]
        with torch.enable_grad():
            out = _block(call, tuple(parts), rows, columns, block)
        found = torch.autograd.grad(out, [parts[i] for i in wanted], d_out[rows], allow_unused=True)  # type: ignore[arg-type]
        for i, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                totals[i][places[i]] += gradient  # type: ignore[index]
    return totals
