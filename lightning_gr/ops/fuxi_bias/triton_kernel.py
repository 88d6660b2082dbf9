"""FuXi's position and time channels on a GPU: both in one kernel forward, one kernel for all gradients.

Shape suffixes: B sequences, T tokens, H heads, V value width, P positions, K parameters of the time function. In
kernels i and j are the places of a tile's queries and keys in their sequence, d its columns of the values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.fuxi_bias.time_function import LARGEST_EXPONENT, TimeFunction
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

tl: Any  # triton.language and the helpers, globals since kernels look them up there
_seen: Any
_position_rows: Any
_time: Any
_add_to_table: Any
_BLOCK = 64
_COPIES = 16  # of a table's gradient, so that sequences rarely add to the same number at once


def fuxi_bias_triton(
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
    """As `fuxi_bias_reference`; maps in float32, products in the dtype of the values, summed in float32.

    Raises:
        ValueError: float64, which the kernels do not compute in.
    """
    if v_THV.dtype == torch.float64:
        raise ValueError(
            "fuxi_bias: backend='triton' takes float32, float16 and bfloat16, got torch.float64; use 'reference'"
        )
    kind, first_gaps, unit = "none", None, 1.0
    if time_function is not None:
        kind, unit = time_function.kind, time_function.unit
        first_gaps = time_function.first_gaps() if kind == "buckets" else None
    # A pointer that is never followed stands for what is not there.
    nothing = q_layout.offsets_B1
    numbers = (q_times_T, k_times_T, q_positions_T, k_positions_T, first_gaps)
    shared = (
        q_layout.offsets_B1,
        k_layout.offsets_B1,
        *(x.contiguous() for x in (mask.a_T, mask.b_T, mask.c_T, mask.self_T)),
        *(nothing if x is None else x.contiguous() for x in numbers),
        1.0 / unit,
        0.0 if time_function is None else 1.0 / time_function.bucket_width,
    )
    constants = {"KIND": kind, "PLACED": q_positions_T is not None}
    # Heads apart, so that neighbouring rows of a table are neighbours in memory.
    position_table_HP = None if position_table_PH is None else position_table_PH.T.float().contiguous()
    parameters_HK = None if time_function is None else time_function.parameters_KH.T.float().contiguous()
    out: tuple[Tensor | None, Tensor | None] = _FuxiBias.apply(
        (q_layout, k_layout, shared, constants), v_THV.contiguous(), position_table_HP, parameters_HK
    )
    return out


class _FuxiBias(torch.autograd.Function):
    """Keeps the inputs; backward makes the maps again."""

    @staticmethod
    @override
    def forward(
        ctx: Any, call: Any, v_THV: Tensor, position_table_HP: Tensor | None, parameters_HK: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.call = call
        ctx.save_for_backward(v_THV, position_table_HP, parameters_HK)
        q_layout = call[0]
        outs = [
            None if x is None else v_THV.new_empty(q_layout.num_tokens, *v_THV.shape[1:])
            for x in (position_table_HP, parameters_HK)
        ]
        _launch("forward", q_layout, call, (v_THV, position_table_HP, parameters_HK), outs)
        return outs[0], outs[1]

    @staticmethod
    @override
    def backward(ctx: Any, *d_outs: Tensor | None) -> Any:
        refuse_second_derivative("fuxi_bias", "triton")
        q_layout, k_layout, _, constants = ctx.call
        v_THV, position_table_HP, parameters_HK = ctx.saved_tensors
        tables = [position_table_HP, parameters_HK]
        needs = ctx.needs_input_grad[2:]
        adds = needs[0] or (needs[1] and constants["KIND"] == "buckets")
        if adds and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "fuxi_bias: backend='triton' adds up the gradient of a table in no fixed order, and deterministic "
                "algorithms are on; use backend='reference', or a formula as the time function and no position table"
            )
        d_outs = tuple(
            None if table is None else (torch.zeros_like(v_THV) if d is None else d.contiguous())
            for d, table in zip(d_outs, tables, strict=True)
        )
        d_v = torch.empty_like(v_THV)
        copies = max(1, min(_COPIES, q_layout.num_sequences))
        d_tables = [
            None if x is None or not need else x.new_zeros(copies, *x.shape)
            for x, need in zip(tables, needs, strict=True)
        ]
        if needs[1] and constants["KIND"] != "buckets":
            # A formula's few sums: a place for each program, added up afterwards, the same every time.
            programs = (-(-k_layout.max_length // _BLOCK), q_layout.num_sequences, *parameters_HK.shape)
            d_tables[1] = v_THV.new_zeros(programs, dtype=torch.float32)
        _launch("backward", k_layout, ctx.call, (v_THV, *tables), [*d_outs, d_v, *d_tables], copies=copies)
        sums = [None if x is None else x.flatten(0, -3).sum(0) for x in d_tables]
        return None, d_v, *sums


def _launch(
    name: str, tiled: JaggedLayout, call: Any, inputs: tuple[Tensor | None, ...], others: list[Any], **more: int
) -> None:
    q_layout, _, shared, constants = call
    v_THV, position_table_HP, parameters_HK = inputs
    assert v_THV is not None
    _, heads, width = v_THV.shape
    programs = (q_layout.num_sequences * heads, -(-tiled.max_length // _BLOCK))
    if 0 in (*programs, width):
        return
    flags = constants | {"POSITION": position_table_HP is not None}
    if name == "backward":
        flags |= {"D_POSITION": others[3] is not None, "D_TIME": others[4] is not None}
    arguments = (*inputs, *others)
    with torch.cuda.device_of(v_THV):
        _kernels()[name][programs](
            *(v_THV if x is None else x for x in arguments),
            *shared,
            *more.values(),
            heads,
            width,
            1 if position_table_HP is None else position_table_HP.shape[1],
            1 if parameters_HK is None else parameters_HK.shape[1],
            **flags,
            EXPONENT=LARGEST_EXPONENT,
            BLOCK=_BLOCK,
            BLOCK_V=max(16, 1 << (width - 1).bit_length()),
            num_warps=4 if width <= 64 else 8,
        )


@cache
def _kernels() -> dict[str, Any]:
    global tl, _seen, _position_rows, _time, _add_to_table
    import triton
    import triton.language as tl

    @triton.jit
    def _seen(i, j, q_first, num_q, num_k, A, B, C, SELF):  # type: ignore[no-untyped-def]
        """Whether each query of a tile sees each key."""
        inside = i < num_q
        a = tl.load(A + q_first + i, mask=inside, other=0).to(tl.int32)[:, None]
        b = tl.load(B + q_first + i, mask=inside, other=0).to(tl.int32)[:, None]
        c = tl.load(C + q_first + i, mask=inside, other=0).to(tl.int32)[:, None]
        own = tl.load(SELF + q_first + i, mask=inside, other=0).to(tl.int1)[:, None]
        key = j[None, :]
        seen = (key < a) | ((key >= b) & (key < c)) | (own & (key == i[:, None]))
        return seen & (key < num_k) & inside[:, None]

    @triton.jit  # type: ignore[untyped-decorator]
    def _position_rows(  # type: ignore[no-untyped-def]
        i, j, q_first, k_first, num_q, num_k, Q_AT, K_AT, P, PLACED: tl.constexpr
    ):
        """Which row of the position table each pair reads."""
        reach = P // 2
        if PLACED:
            q_at = tl.load(Q_AT + q_first + i, mask=i < num_q, other=0)
            k_at = tl.load(K_AT + k_first + j, mask=j < num_k, other=0)
            distance = k_at[None, :] - q_at[:, None]
        else:
            distance = j[None, :] - i[:, None]
        return (tl.minimum(tl.maximum(distance, -reach), reach) + reach).to(tl.int32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _time(  # type: ignore[no-untyped-def]
        i,
        j,
        q_first,
        k_first,
        num_q,
        num_k,
        Q_TIMES,
        K_TIMES,
        FIRST,
        PARAMETERS,
        per_unit,
        per_width,
        K,
        KIND: tl.constexpr,
        EXPONENT: tl.constexpr,
    ):
        """The time map of a tile, which bucket each pair reads, and the formula's slopes in its parameters."""
        q_time = tl.load(Q_TIMES + q_first + i, mask=i < num_q, other=0)
        k_time = tl.load(K_TIMES + k_first + j, mask=j < num_k, other=0)
        gap = tl.abs(q_time[:, None] - k_time[None, :])
        x = gap.to(tl.float32) * per_unit
        if KIND == "buckets":
            # At most one too low, for a logarithm is rounded by far less than a quarter of a bucket.
            guess = tl.log(tl.maximum(gap, 1).to(tl.float32)) * per_width - 0.25
            at = tl.minimum(tl.maximum(guess, 0.0).to(tl.int32), K - 1)
            above = tl.minimum(at + 1, K - 1)
            at = tl.where(gap >= tl.load(FIRST + above), above, at)
            value = tl.load(PARAMETERS + at)
            slope_0 = value
            slope_1 = value
            slope_2 = value
        elif KIND == "power_law":
            at = gap.to(tl.int32)
            a = tl.load(PARAMETERS)
            log = tl.log(1.0 + x)
            slope_0 = tl.exp(-tl.load(PARAMETERS + 1) * log)
            value = a * slope_0
            slope_1 = -value * log
            slope_2 = value
        else:
            at = gap.to(tl.int32)
            alpha = tl.load(PARAMETERS)
            gamma = tl.load(PARAMETERS + 2)
            log = tl.log(tl.where(gap == 0, 1.0, x))
            power = tl.where(gap == 0, 0.0, tl.exp(tl.minimum(tl.load(PARAMETERS + 1) * log, EXPONENT)))
            slope_0 = tl.exp(power * tl.log(gamma))
            value = alpha * slope_0
            slope_1 = value * tl.log(gamma) * power * log
            slope_2 = value * power / gamma
        return value, at, slope_0, slope_1, slope_2

    @triton.jit
    def _add_to_table(TABLE, at, values, seen):  # type: ignore[no-untyped-def]
        """TABLE[at] += values where seen; one addition where the whole tile reads one row, as beyond the reach."""
        lowest = tl.min(tl.where(seen, at, 2147483647))
        if lowest == tl.max(tl.where(seen, at, -1)):
            tl.atomic_add(TABLE + lowest, tl.sum(values), sem="relaxed")
        else:
            tl.atomic_add(TABLE + at, values, mask=seen, sem="relaxed")

    @triton.jit  # type: ignore[untyped-decorator]
    def forward(  # type: ignore[no-untyped-def]
        VALUES,
        TABLE,
        PARAMETERS,
        OUT_POSITION,
        OUT_TIME,
        Q_OFFSETS,
        K_OFFSETS,
        A,
        B,
        C,
        SELF,
        Q_TIMES,
        K_TIMES,
        Q_AT,
        K_AT,
        FIRST,
        per_unit,
        per_width,
        H,
        V,
        P,
        K,
        KIND: tl.constexpr,
        PLACED: tl.constexpr,
        POSITION: tl.constexpr,
        EXPONENT: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        """A tile of queries of a head of a sequence."""
        sequence = tl.program_id(0) // H
        h = tl.program_id(0) % H
        q_first = tl.load(Q_OFFSETS + sequence)
        num_q = (tl.load(Q_OFFSETS + sequence + 1) - q_first).to(tl.int32)
        k_first = tl.load(K_OFFSETS + sequence)
        num_k = (tl.load(K_OFFSETS + sequence + 1) - k_first).to(tl.int32)
        # The last rows first: under a causal mask they have the most to do.
        first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK
        if first < num_q:
            i = first + tl.arange(0, BLOCK)
            d = tl.arange(0, BLOCK_V)
            inside = i < num_q
            a = tl.load(A + q_first + i, mask=inside, other=0)
            b = tl.load(B + q_first + i, mask=inside, other=0)
            c = tl.load(C + q_first + i, mask=inside, other=0)
            own = tl.load(SELF + q_first + i, mask=inside, other=0).to(tl.int1)
            end = tl.maximum(
                tl.maximum(tl.max(a), tl.max(tl.where(b < c, c, 0))).to(tl.int32), tl.max(tl.where(own, i + 1, 0))
            )
            end = tl.minimum(end, num_k)
            position_sum = tl.zeros([BLOCK, BLOCK_V], tl.float32)
            time_sum = tl.zeros([BLOCK, BLOCK_V], tl.float32)
            for k_tile in range(0, end, BLOCK):
                j = k_tile + tl.arange(0, BLOCK)
                seen = _seen(i, j, q_first, num_q, num_k, A, B, C, SELF)
                if tl.max(seen.to(tl.int32)) > 0:
                    where = ((k_first + j)[:, None] * H + h) * V + d[None, :]
                    values = tl.load(VALUES + where, mask=(j < num_k)[:, None] & (d < V)[None, :], other=0.0)
                    if POSITION:
                        at = _position_rows(i, j, q_first, k_first, num_q, num_k, Q_AT, K_AT, P, PLACED)
                        tile = tl.where(seen, tl.load(TABLE + h * P + at), 0.0)
                        position_sum += tl.dot(tile.to(values.dtype), values, input_precision="ieee")
                    if KIND != "none":
                        tile, _, _, _, _ = _time(
                            i, j, q_first, k_first, num_q, num_k, Q_TIMES, K_TIMES, FIRST, PARAMETERS + h * K,
                            per_unit, per_width, K, KIND, EXPONENT,
                        )  # fmt: skip
                        tile = tl.where(seen, tile, 0.0)
                        time_sum += tl.dot(tile.to(values.dtype), values, input_precision="ieee")
            where = ((q_first + i)[:, None] * H + h) * V + d[None, :]
            kept = inside[:, None] & (d < V)[None, :]
            if POSITION:
                tl.store(OUT_POSITION + where, position_sum.to(OUT_POSITION.dtype.element_ty), mask=kept)
            if KIND != "none":
                tl.store(OUT_TIME + where, time_sum.to(OUT_TIME.dtype.element_ty), mask=kept)

    @triton.jit  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[no-untyped-def]
        VALUES,
        TABLE,
        PARAMETERS,
        D_OUT_POSITION,
        D_OUT_TIME,
        D_VALUES,
        D_TABLE,
        D_PARAMETERS,
        Q_OFFSETS,
        K_OFFSETS,
        A,
        B,
        C,
        SELF,
        Q_TIMES,
        K_TIMES,
        Q_AT,
        K_AT,
        FIRST,
        per_unit,
        per_width,
        copies,
        H,
        V,
        P,
        K,
        KIND: tl.constexpr,
        PLACED: tl.constexpr,
        POSITION: tl.constexpr,
        D_POSITION: tl.constexpr,
        D_TIME: tl.constexpr,
        EXPONENT: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        """A tile of keys of a head of a sequence: the gradient of its values, and its part of the tables'."""
        sequence = tl.program_id(0) // H
        h = tl.program_id(0) % H
        q_first = tl.load(Q_OFFSETS + sequence)
        num_q = (tl.load(Q_OFFSETS + sequence + 1) - q_first).to(tl.int32)
        k_first = tl.load(K_OFFSETS + sequence)
        num_k = (tl.load(K_OFFSETS + sequence + 1) - k_first).to(tl.int32)
        first = tl.program_id(1) * BLOCK
        if first < num_k:
            j = first + tl.arange(0, BLOCK)
            d = tl.arange(0, BLOCK_V)
            where_k = ((k_first + j)[:, None] * H + h) * V + d[None, :]
            kept_k = (j < num_k)[:, None] & (d < V)[None, :]
            values = tl.load(VALUES + where_k, mask=kept_k, other=0.0)
            d_values = tl.zeros([BLOCK, BLOCK_V], tl.float32)
            sum_0 = tl.zeros([BLOCK], tl.float32)
            sum_1 = tl.zeros([BLOCK], tl.float32)
            sum_2 = tl.zeros([BLOCK], tl.float32)
            copy = (sequence % copies).to(tl.int64) * H + h
            for q_tile in range(0, num_q, BLOCK):
                i = q_tile + tl.arange(0, BLOCK)
                seen = _seen(i, j, q_first, num_q, num_k, A, B, C, SELF)
                if tl.max(seen.to(tl.int32)) > 0:
                    where_q = ((q_first + i)[:, None] * H + h) * V + d[None, :]
                    kept_q = (i < num_q)[:, None] & (d < V)[None, :]
                    if POSITION:
                        d_out = tl.load(D_OUT_POSITION + where_q, mask=kept_q, other=0.0)
                        at = _position_rows(i, j, q_first, k_first, num_q, num_k, Q_AT, K_AT, P, PLACED)
                        tile = tl.where(seen, tl.load(TABLE + h * P + at), 0.0)
                        d_values += tl.dot(tl.trans(tile.to(d_out.dtype)), d_out, input_precision="ieee")
                        if D_POSITION:
                            d_tile = tl.dot(d_out, tl.trans(values), input_precision="ieee")
                            _add_to_table(D_TABLE + copy * P, at, tl.where(seen, d_tile, 0.0), seen)
                    if KIND != "none":
                        d_out = tl.load(D_OUT_TIME + where_q, mask=kept_q, other=0.0)
                        tile, at, slope_0, slope_1, slope_2 = _time(
                            i, j, q_first, k_first, num_q, num_k, Q_TIMES, K_TIMES, FIRST, PARAMETERS + h * K,
                            per_unit, per_width, K, KIND, EXPONENT,
                        )  # fmt: skip
                        tile = tl.where(seen, tile, 0.0)
                        d_values += tl.dot(tl.trans(tile.to(d_out.dtype)), d_out, input_precision="ieee")
                        if D_TIME:
                            d_tile = tl.where(seen, tl.dot(d_out, tl.trans(values), input_precision="ieee"), 0.0)
                            if KIND == "buckets":
                                _add_to_table(D_PARAMETERS + copy * K, at, d_tile, seen)
                            else:
                                sum_0 += tl.sum(d_tile * slope_0, 0)
                                sum_1 += tl.sum(d_tile * slope_1, 0)
                                if KIND == "exponential_power":
                                    sum_2 += tl.sum(d_tile * slope_2, 0)
            tl.store(D_VALUES + where_k, d_values.to(D_VALUES.dtype.element_ty), mask=kept_k)
            if D_TIME and KIND != "buckets":
                program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
                tl.store(D_PARAMETERS + program * K, tl.sum(sum_0))
                tl.store(D_PARAMETERS + program * K + 1, tl.sum(sum_1))
                if KIND == "exponential_power":
                    tl.store(D_PARAMETERS + program * K + 2, tl.sum(sum_2))

    return {"forward": forward, "backward": backward}
