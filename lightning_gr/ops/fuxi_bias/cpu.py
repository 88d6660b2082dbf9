"""FuXi's position and time channels on a CPU without padding: maps of some rows at a time, never all of a sequence.

Maps and the sums that their gradients are made of are compiled, in float32; products are PyTorch's.

Shape suffixes: T tokens, H heads, V value width, P positions, K parameters of the time function, R rows of a block, C
its columns.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.fuxi_bias.time_function import LARGEST_EXPONENT, TimeFunction
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.native import load_native

_MAP_ELEMENTS = 1 << 18  # of one map of a block: what stays in a core's own cache


def fuxi_bias_cpu(
    v_THV: Tensor, *, position_table_PH: Tensor | None, time_function: TimeFunction | None, **others: Any
) -> tuple[Tensor | None, Tensor | None]:
    """As `fuxi_bias_reference`; float16 and bfloat16 are computed in float32."""
    wide = torch.float64 if v_THV.dtype == torch.float64 else torch.float32
    parameters_KH = None if time_function is None else time_function.parameters_KH
    inputs = (None if x is None else x.to(wide) for x in (v_THV, position_table_PH, parameters_KH))
    channels = _FuxiBias.apply(_Call(time_function=time_function, **others), *inputs)
    return tuple(None if x is None else x.to(v_THV.dtype) for x in channels)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Call:
    """What a call is about besides the tensors that are differentiated."""

    q_layout: JaggedLayout
    k_layout: JaggedLayout
    mask: IntervalMask
    time_function: TimeFunction | None
    q_times_T: Tensor | None
    k_times_T: Tensor | None
    q_positions_T: Tensor | None
    k_positions_T: Tensor | None


class _FuxiBias(torch.autograd.Function):
    """Keeps the inputs; backward makes the maps again."""

    @staticmethod
    @override
    def forward(
        ctx: Any, call: _Call, v_THV: Tensor, position_table_PH: Tensor | None, parameters_KH: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.call = call
        ctx.save_for_backward(v_THV, position_table_PH, parameters_KH)
        tables = [position_table_PH, parameters_KH]
        outs = [None if x is None else v_THV.new_empty(call.q_layout.num_tokens, *v_THV.shape[1:]) for x in tables]
        makes = _makes_maps(call, v_THV, tables, [False, False])
        for rows, columns in _blocks(call, v_THV.shape[1]):
            maps = makes.maps(rows, columns)
            v_HCV = v_THV[columns].transpose(0, 1)
            for out, map_HRC in zip(outs, maps, strict=True):
                if out is not None and map_HRC is not None:
                    out[rows] = torch.bmm(map_HRC, v_HCV).transpose(0, 1)
        return outs[0], outs[1]

    @staticmethod
    @override
    def backward(ctx: Any, *d_outs: Tensor | None) -> Any:
        refuse_second_derivative("fuxi_bias", "cpu")
        call: _Call = ctx.call
        v_THV, *tables = ctx.saved_tensors
        d_v = torch.zeros_like(v_THV) if ctx.needs_input_grad[1] else None
        needs = [need and d is not None for need, d in zip(ctx.needs_input_grad[2:], d_outs, strict=True)]
        makes = _makes_maps(call, v_THV, tables, needs)
        buffers = [_Buffer(v_THV.dtype), _Buffer(v_THV.dtype)]
        for rows, columns in _blocks(call, v_THV.shape[1]):
            maps = makes.maps(rows, columns)
            v_HVC = v_THV[columns].permute(1, 2, 0)
            d_maps: list[Tensor | None] = [None, None]
            for i, (map_HRC, d_out) in enumerate(zip(maps, d_outs, strict=True)):
                if map_HRC is None or d_out is None:
                    continue
                d_out_HRV = d_out[rows].transpose(0, 1)
                if d_v is not None:
                    d_v[columns] += torch.bmm(map_HRC.transpose(1, 2), d_out_HRV).transpose(0, 1)
                if needs[i]:
                    d_maps[i] = torch.bmm(d_out_HRV, v_HVC, out=buffers[i].take(*map_HRC.shape))
            if any(needs):
                makes.add_gradients(d_maps)
        return None, d_v, *makes.gradients()


def _blocks(call: _Call, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Some query rows of one sequence, and the keys of the sequence up to the last that one of them sees."""
    q_starts, k_starts = call.q_layout.on_host().offsets_B1.tolist(), call.k_layout.on_host().offsets_B1.tolist()
    mask = call.mask
    seen_T = torch.maximum(mask.a_T, torch.where(mask.b_T < mask.c_T, mask.c_T, 0))
    seen_T = torch.maximum(seen_T, torch.where(mask.self_T, call.q_layout.position_T + 1, 0))
    for b in range(call.q_layout.num_sequences):
        num_keys = k_starts[b + 1] - k_starts[b]
        at_once = max(16, min(256, _MAP_ELEMENTS // max(1, num_heads * num_keys)))
        for first in range(q_starts[b], q_starts[b + 1], at_once):
            rows = slice(first, min(first + at_once, q_starts[b + 1]))
            yield rows, slice(k_starts[b], k_starts[b] + min(num_keys, int(seen_T[rows].max())))


def _makes_maps(
    call: _Call, v_THV: Tensor, tables: list[Tensor | None], needs: list[bool]
) -> _CompiledMaps | _TorchMaps:
    native = load_native(Path(__file__).with_name("cpu.cpp")) if v_THV.dtype == torch.float32 else None
    return _TorchMaps(call, tables, needs) if native is None else _CompiledMaps(native, call, tables, needs)


class _Buffer:
    """Memory for one block after another: asking the system for new memory takes longer than filling it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype)

    def take(self, *shape: int) -> Tensor:
        """Some of it, whatever it holds."""
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(max(size, _MAP_ELEMENTS))
        return self._memory[:size].view(shape)


class _TorchMaps:
    """Maps of blocks and the sum of their tables' gradients, by PyTorch."""

    def __init__(self, call: _Call, tables: list[Tensor | None], needs: list[bool]) -> None:
        self._call = call
        self._tables = [
            None if x is None else x.detach().requires_grad_(need) for x, need in zip(tables, needs, strict=True)
        ]
        self._sums = [
            torch.zeros_like(x) if x is not None and need else None for x, need in zip(tables, needs, strict=True)
        ]
        self._maps: list[Tensor | None] = []

    def maps(self, rows: slice, columns: slice) -> list[Tensor | None]:
        """(H, R, C): the maps of some rows of one sequence, 0 where the mask hides."""
        with torch.enable_grad():
            self._maps = self._differentiable(rows, columns)
        return [None if x is None else x.detach() for x in self._maps]

    def add_gradients(self, d_maps: list[Tensor | None]) -> None:
        """Adds what gradients of the block's maps come to."""
        for total, table, map_HRC, d_map_HRC in zip(self._sums, self._tables, self._maps, d_maps, strict=True):
            if total is not None and table is not None and map_HRC is not None:
                total += torch.autograd.grad(map_HRC, table, d_map_HRC)[0]

    def gradients(self) -> list[Tensor | None]:
        """The sums, each as its table, or None where not asked for."""
        return self._sums

    def _differentiable(self, rows: slice, columns: slice) -> list[Tensor | None]:
        call, mask = self._call, self._call.mask
        own_R, key_C = call.q_layout.position_T[rows], torch.arange(columns.stop - columns.start)
        seen_RC = (key_C < mask.a_T[rows, None]) | ((key_C >= mask.b_T[rows, None]) & (key_C < mask.c_T[rows, None]))
        seen_RC = seen_RC | (mask.self_T[rows, None] & (key_C == own_R[:, None]))
        position_HRC = time_HRC = None
        position_table_PH, parameters_KH = self._tables
        if position_table_PH is not None:
            q_at, k_at = own_R, key_C
            if call.q_positions_T is not None and call.k_positions_T is not None:
                q_at, k_at = call.q_positions_T[rows], call.k_positions_T[columns]
            reach = position_table_PH.shape[0] // 2
            at_RC = (k_at - q_at[:, None]).clamp(-reach, reach) + reach
            position_HRC = torch.where(seen_RC, position_table_PH.T[:, at_RC], 0.0)
        if parameters_KH is not None:
            assert call.time_function is not None
            assert call.q_times_T is not None
            assert call.k_times_T is not None
            gap_RC = (call.q_times_T[rows, None] - call.k_times_T[columns]).abs()
            function = dataclasses.replace(call.time_function, parameters_KH=parameters_KH)
            time_HRC = torch.where(seen_RC, function(gap_RC), 0.0)
        return [position_HRC, time_HRC]


class _Block(ctypes.Structure):
    """Mirrors `Block` in cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "rows", "columns", "first_row", "threads")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "own", "table")),
        ("table_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_at", "k_at")),
        ("kind", ctypes.c_int64),
        ("parameters", ctypes.c_void_p),
        ("num_parameters", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_times", "k_times", "first_gaps")),
        *((name, ctypes.c_double) for name in ("unit", "bucket_width", "largest_exponent")),
        *((name, ctypes.c_void_p) for name in ("position_map", "time_map", "shared", "d_table", "d_parameters")),
    ]


class _CompiledMaps:
    """As `_TorchMaps`, compiled."""

    def __init__(self, native: Any, call: _Call, tables: list[Tensor | None], needs: list[bool]) -> None:
        self._native, function = native, call.time_function
        self._shared, self._buffers = _Buffer(torch.float32), [_Buffer(torch.float32), _Buffer(torch.float32)]
        self._row_T = call.q_layout.position_T
        # Heads apart, so that neighbouring rows of a table are neighbours in memory.
        self._tables = [None if x is None else x.detach().T.contiguous() for x in tables]
        self._sums = [
            torch.zeros_like(x) if x is not None and need else None for x, need in zip(self._tables, needs, strict=True)
        ]
        position_table_HP, parameters_HK = self._tables
        by_row = {
            "a": call.mask.a_T,
            "b": call.mask.b_T,
            "c": call.mask.c_T,
            "own": call.mask.self_T,
            "q_at": call.q_positions_T,
            "q_times": call.q_times_T,
        }
        by_column = {"k_at": call.k_positions_T, "k_times": call.k_times_T}
        self._by_row, self._by_column = (
            {name: x.contiguous() for name, x in given.items() if x is not None} for given in (by_row, by_column)
        )
        self._block = _Block(threads=torch.get_num_threads())
        for name, size, table in (
            ("table", "table_rows", position_table_HP),
            ("parameters", "num_parameters", parameters_HK),
        ):
            if table is not None:
                self._block.heads = table.shape[0]
                setattr(self._block, name, table.data_ptr())
                setattr(self._block, size, table.shape[1])
        if function is not None:
            self._block.kind = 1 + ("buckets", "power_law", "exponential_power").index(function.kind)
            self._block.unit, self._block.bucket_width = function.unit, function.bucket_width
            self._block.largest_exponent = LARGEST_EXPONENT
            if function.kind == "buckets":
                self._first_gaps = function.first_gaps()
                self._block.first_gaps = self._first_gaps.data_ptr()
        for name, total in zip(("d_table", "d_parameters"), self._sums, strict=True):
            setattr(self._block, name, None if total is None else total.data_ptr())

    def maps(self, rows: slice, columns: slice) -> list[Tensor | None]:
        block = self._block
        block.rows, block.columns = rows.stop - rows.start, columns.stop - columns.start
        block.first_row = int(self._row_T[rows.start])
        for part, given in ((rows, self._by_row), (columns, self._by_column)):
            for name, x in given.items():
                setattr(block, name, x[part].data_ptr())
        block.shared = self._shared.take(block.rows, block.columns).data_ptr()
        maps = [
            None if x is None else buffer.take(block.heads, block.rows, block.columns)
            for x, buffer in zip(self._tables, self._buffers, strict=True)
        ]
        self._point(maps)
        self._native.fuxi_maps(ctypes.byref(block))
        return maps

    def add_gradients(self, d_maps: list[Tensor | None]) -> None:
        self._point(d_maps)
        self._native.fuxi_map_gradients(ctypes.byref(self._block))

    def gradients(self) -> list[Tensor | None]:
        return [None if x is None else x.T for x in self._sums]

    def _point(self, maps: list[Tensor | None]) -> None:
        for name, x in zip(("position_map", "time_map"), maps, strict=True):
            setattr(self._block, name, None if x is None else x.data_ptr())
