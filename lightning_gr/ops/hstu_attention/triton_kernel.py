"""HSTU attention on a GPU: tiles of queries forward and for dq, tiles of keys for dk and dv; nothing is padded.

A program takes a head of some rows (or columns) of a sequence and runs over the tiles that the mask shows it. What it
needs to know of the mask and the lengths is made once a mask, on the host without waiting and by the kernel `prepare`.

Gradients of the tables come from the kernel of dq. Where positions are places in the sequence, a tile is turned so that
its diagonals are columns and summed before it is added; positions of one's own are added pair by pair. Both keep what
lies beyond the table's ends in registers. Times have few buckets a tile, which are summed one after the other. The
additions are atomic, so the tables' gradients repeat up to rounding only; all others repeat bit for bit.

Shape suffixes: B sequences, T tokens, H heads, D query/key width, V value width, P positions, N time buckets, W units
of work, S tiles of bounds. In kernels M is the queries of a tile, N its keys.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import refuse_second_derivative
from lightning_gr.ops.hstu_attention.cpu import time_thresholds
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

# triton.language and what kernels share, globals since kernels look them up there
tl: Any
_place: Any
_load: Any
_store: Any
_vector: Any
_rows: Any
_hull: Any
_part: Any
_tile: Any
_keeps: Any
_next: Any

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_UNIT = 32 if _INTERPRETED else 128  # tokens of a unit of work: one program or, where blocks are smaller, several
_BOUND = 16 if _INTERPRETED else 64  # queries whose bounds are kept together
_NARROWEST = 1e-4  # below, float32 is too coarse to guess a time bucket to within one


def hstu_attention_triton(
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
    """As `hstu_attention_reference`, differentiable once; sums and tables are float32 whatever the inputs' dtype.

    Raises:
        ValueError: float64, heads wider than 256, or time buckets too narrow; the reference takes them.
    """
    if q_THD.dtype == torch.float64:
        raise ValueError(
            "q_THD: backend='triton' takes float32, float16 and bfloat16, got torch.float64; use 'reference'"
        )
    for name, tensor in (("q_THD", q_THD), ("v_THV", v_THV)):
        if tensor.shape[2] > 256:
            raise ValueError(
                f"{name}: backend='triton' takes heads up to 256 wide, got {tensor.shape[2]}; use 'reference'"
            )
    if time_table_NH is not None and time_bucket_width < _NARROWEST:
        raise ValueError(
            f"time_bucket_width: backend='triton' takes {_NARROWEST} or more, got {time_bucket_width}; use 'reference'"
        )
    if isinstance(scale, Tensor):
        scale_B = scale.to(torch.float32)
    else:
        scale_B = torch.full((q_layout.num_sequences,), scale, dtype=torch.float32, device=q_THD.device)
    position_HP = None if position_table_PH is None else position_table_PH.to(torch.float32).T.contiguous()
    time_HN = None if time_table_NH is None or q_times_T is None else time_table_NH.to(torch.float32).T.contiguous()
    call = _Call(
        q_layout=q_layout,
        k_layout=k_layout,
        plan=_plan(q_layout, k_layout, mask),
        alpha=alpha,
        q_times_T=q_times_T,
        k_times_T=k_times_T,
        q_positions_T=q_positions_T,
        k_positions_T=k_positions_T,
        time_bucket_width=time_bucket_width,
        softmax=activation == "softmax",
        dropout=dropout,
        seed=int(torch.randint(2**31 - 1, (), device="cpu")) if dropout else 0,
    )
    qkv = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THD, k_THD, v_THV))
    out: Tensor = _Attention.apply(call, *qkv, scale_B, position_HP, time_HN)
    return out


class _Plan(NamedTuple):
    """What the kernels need of a mask and the lengths."""

    q_work_W2: Tensor  # int32, (sequence, unit) heaviest first
    k_work_W2: Tensor
    rows_T4: Tensor  # int32, a, b and c of each query, cut off at its keys, and its own column or -1
    bounds_S5: Tensor  # int32, the columns that a tile of queries sees: [0, #0), [#1, #2) and [#3, #4)


_plans: WeakKeyDictionary[IntervalMask, tuple[JaggedLayout, JaggedLayout, _Plan]] = WeakKeyDictionary()


def _plan(q_layout: JaggedLayout, k_layout: JaggedLayout, mask: IntervalMask) -> _Plan:
    """The plan of a mask, which all layers of a model share."""
    q_known, k_known, plan = _plans.get(mask, (None, None, None))
    if plan is not None and q_known is q_layout and k_known is k_layout:
        return plan
    device = mask.a_T.device
    plan = _Plan(
        _work(q_layout, k_layout, device, of_keys=False),
        _work(k_layout, q_layout, device, of_keys=True),
        torch.empty(q_layout.num_tokens, 4, dtype=torch.int32, device=device),
        torch.empty(q_layout.num_tokens // _BOUND + q_layout.num_sequences + 1, 5, dtype=torch.int32, device=device),
    )
    if len(plan.q_work_W2):
        with torch.cuda.device_of(mask.a_T):
            _kernels()["prepare"][(len(plan.q_work_W2) * (_UNIT // _BOUND),)](
                *(x.contiguous() for x in (mask.a_T, mask.b_T, mask.c_T, mask.self_T)),
                plan.rows_T4,
                plan.bounds_S5,
                plan.q_work_W2,
                q_layout.offsets_B1,
                k_layout.offsets_B1,
                UNIT=_UNIT,
                BOUND=_BOUND,
            )
    _plans[mask] = (q_layout, k_layout, plan)
    return plan


def _work(layout: JaggedLayout, other: JaggedLayout, device: torch.device, *, of_keys: bool) -> Tensor:
    """(sequence, unit) of all units, int32; first those with most to do under a causal mask that ends with the keys."""
    units_B = (layout.lengths_B + _UNIT - 1) // _UNIT
    sequence_W = torch.repeat_interleave(units_B)
    unit_W = torch.arange(len(sequence_W)) - (units_B.cumsum(0) - units_B)[sequence_W]
    left_W = layout.lengths_B[sequence_W] - unit_W * _UNIT
    others_W = other.lengths_B[sequence_W]
    load_W = torch.minimum(left_W, others_W) if of_keys else others_W - left_W
    work_W2 = torch.stack([sequence_W, unit_W], 1)[load_W.argsort(descending=True)].to(torch.int32)
    return (work_W2.pin_memory() if device.type == "cuda" else work_W2).to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _thresholds(num_buckets: int, width: float, device: torch.device) -> Tensor:
    return time_thresholds(num_buckets, width).to(device, non_blocking=True)


@dataclass(frozen=True)
class _Call:
    """What a call is about besides the tensors that are differentiated."""

    q_layout: JaggedLayout
    k_layout: JaggedLayout
    plan: _Plan
    alpha: float
    q_times_T: Tensor | None
    k_times_T: Tensor | None
    q_positions_T: Tensor | None
    k_positions_T: Tensor | None
    time_bucket_width: float
    softmax: bool
    dropout: float
    seed: int

    def launch(self, name: str, inputs: tuple[Tensor | None, ...], **own: Any) -> None:
        """Runs a kernel on the inputs and what is its own."""
        q_THD, k_THD, v_THV, scale_B, position_HP, time_HN = inputs
        assert q_THD is not None
        assert k_THD is not None
        assert v_THV is not None
        of_keys = name == "keys_gradient"
        work_W2 = self.plan.k_work_W2 if of_keys else self.plan.q_work_W2
        (_, num_heads, qk_dim), v_dim = q_THD.shape, v_THV.shape[2]
        units = len(work_W2) * num_heads
        if units == 0:
            return
        block = "BLOCK_N" if of_keys else "BLOCK_M"
        nothing = q_THD.new_empty(0, dtype=torch.float32)
        longest = max(self.q_layout.max_length, self.k_layout.max_length)
        with torch.cuda.device_of(q_THD):
            _kernels()[name][lambda meta: (units * (_UNIT // meta[block]),)](
                Q=q_THD,
                K=k_THD,
                V=v_THV,
                q_token=q_THD.stride(0),
                q_head=q_THD.stride(1),
                k_token=k_THD.stride(0),
                k_head=k_THD.stride(1),
                v_token=v_THV.stride(0),
                v_head=v_THV.stride(1),
                WORK=work_W2,
                Q_OFFSETS=self.q_layout.offsets_B1,
                K_OFFSETS=self.k_layout.offsets_B1,
                ROWS=self.plan.rows_T4,
                SCALE=scale_B,
                alpha=self.alpha,
                POSITION=nothing if position_HP is None else position_HP,
                Q_POSITIONS=nothing if self.q_positions_T is None else self.q_positions_T.contiguous(),
                K_POSITIONS=nothing if self.k_positions_T is None else self.k_positions_T.contiguous(),
                num_positions=0 if position_HP is None else position_HP.shape[1],
                TIME=nothing if time_HN is None else time_HN,
                Q_TIMES=nothing if self.q_times_T is None else self.q_times_T.contiguous(),
                K_TIMES=nothing if self.k_times_T is None else self.k_times_T.contiguous(),
                THRESHOLDS=nothing
                if time_HN is None
                else _thresholds(time_HN.shape[1], self.time_bucket_width, q_THD.device),
                num_buckets=0 if time_HN is None else time_HN.shape[1],
                inverse_width=1 / self.time_bucket_width,
                dropout=self.dropout,
                seed=self.seed,
                H=num_heads,
                longest=1 << longest.bit_length(),
                D=qk_dim,
                WIDTH=v_dim,
                BLOCK_D=max(16, 1 << (qk_dim - 1).bit_length()),
                BLOCK_V=max(16, 1 << (v_dim - 1).bit_length()),
                SOFTMAX=self.softmax,
                POSITIONS=position_HP is not None,
                PLACES=self.q_positions_T is None,
                TIMES=time_HN is not None,
                DROPOUT=self.dropout > 0,
                UNIT=_UNIT,
                # Exact products hold a whole row in registers; of wide heads, three of tensor cores are as exact.
                PRECISION="ieee" if max(qk_dim, v_dim) <= 64 else "tf32x3",
                **{key: nothing if value is None else value for key, value in own.items()},
            )


class _Attention(torch.autograd.Function):
    """Forward keeps the inputs and, for softmax, the output and a number a row; backward computes the rest again."""

    @staticmethod
    @override
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> Tensor:
        q_THD, _, v_THV, *_ = inputs
        assert q_THD is not None
        assert v_THV is not None
        shape = q_THD.shape[:2]
        out_THV = q_THD.new_empty(*shape, v_THV.shape[2])
        lse_TH = q_THD.new_empty(shape, dtype=torch.float32) if call.softmax else None
        call.launch("forward", inputs, OUT=out_THV, LSE=lse_TH)
        ctx.call = call
        ctx.save_for_backward(*inputs, lse_TH, out_THV if call.softmax else None)
        return out_THV

    @staticmethod
    @override
    def backward(ctx: Any, d_out_THV: Tensor) -> Any:
        refuse_second_derivative("hstu_attention", "triton")
        call: _Call = ctx.call
        *kept, lse_TH, out_THV = ctx.saved_tensors
        inputs = tuple(kept)
        _, q_needed, k_needed, v_needed, scale_needed, position_needed, time_needed = ctx.needs_input_grad
        q_THD, k_THD, v_THV, scale_B, position_HP, time_HN = inputs
        d_out_THV = d_out_THV.contiguous()
        delta_TH = (d_out_THV.float() * out_THV).sum(2) if call.softmax else None
        common = {"D_OUT": d_out_THV, "LSE": lse_TH, "DELTA": delta_TH}
        d_q_THD = d_k_THD = d_v_THV = d_scale_B = d_position_HP = d_time_HN = None
        if q_needed or scale_needed or position_needed or time_needed:
            d_q_THD = q_THD.new_empty(q_THD.shape)
            d_position_HP = torch.zeros_like(position_HP) if position_needed else None
            d_time_HN = torch.zeros_like(time_HN) if time_needed else None
            scale_needed = scale_needed and not call.softmax
            d_scale_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32) if scale_needed else None
            call.launch(
                "queries_gradient",
                inputs,
                **common,
                D_Q=d_q_THD,
                D_SCALE=d_scale_TH,
                D_POSITION=d_position_HP,
                D_TIME=d_time_HN,
                SCALE_NEEDED=scale_needed,
                POSITION_NEEDED=position_needed,
                TIME_NEEDED=time_needed,
            )
            if d_scale_TH is not None:
                d_scale_B = _sum_over_sequences(d_scale_TH, call.q_layout)
        if k_needed or v_needed:
            d_k_THD, d_v_THV = k_THD.new_empty(k_THD.shape), v_THV.new_empty(v_THV.shape)
            call.launch(
                "keys_gradient", inputs, **common, D_K=d_k_THD, D_V=d_v_THV, BOUNDS=call.plan.bounds_S5, BOUND=_BOUND
            )
        return None, d_q_THD, d_k_THD, d_v_THV, d_scale_B, d_position_HP, d_time_HN


def _sum_over_sequences(x_TH: Tensor, layout: JaggedLayout) -> Tensor:
    if layout.num_sequences == 0:
        return x_TH.new_zeros(0)
    # Unsafe: its checks would wait for the device.
    return torch.segment_reduce(x_TH.sum(1), "sum", offsets=layout.offsets_B1, initial=0, unsafe=True)


@cache
def _kernels() -> dict[str, Any]:
    global tl, _place, _load, _store, _vector, _rows, _hull, _part, _tile, _keeps, _next
    import triton
    import triton.language as tl

    # ---- what kernels share ------------------------------------------------------------------------------------------

    @triton.jit  # type: ignore[untyped-decorator]
    def _place(WORK, Q_OFFSETS, K_OFFSETS, H, BLOCK: tl.constexpr, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
        """Head, sequence and first token of this program, and where the queries and keys of the sequence lie."""
        head = tl.program_id(0) % H
        part = tl.program_id(0) // H
        unit = part // (UNIT // BLOCK)
        b = tl.load(WORK + 2 * unit)
        first = tl.load(WORK + 2 * unit + 1) * UNIT + part % (UNIT // BLOCK) * BLOCK
        q_start = tl.load(Q_OFFSETS + b)
        q_length = (tl.load(Q_OFFSETS + b + 1) - q_start).to(tl.int32)
        k_start = tl.load(K_OFFSETS + b)
        k_length = (tl.load(K_OFFSETS + b + 1) - k_start).to(tl.int32)
        return head, b, first, q_start, q_length, k_start, k_length

    @triton.jit  # type: ignore[untyped-decorator]
    def _load(AT, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows of a matrix; zeros where they are not inside and beyond the width."""
        column = tl.arange(0, BLOCK_WIDTH)[None, :]
        mask = inside[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (column < WIDTH)
        return tl.load(AT + tl.arange(0, BLOCK)[:, None] * stride + column, mask=mask, other=0.0)

    @triton.jit  # type: ignore[untyped-decorator]
    def _store(AT, stride, values, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        column = tl.arange(0, BLOCK_WIDTH)[None, :]
        mask = inside[:, None] & (column < WIDTH)
        tl.store(AT + tl.arange(0, BLOCK)[:, None] * stride + column, values.to(AT.dtype.element_ty), mask=mask)

    @triton.jit  # type: ignore[untyped-decorator]
    def _vector(POINTER, start, index, inside, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
        """A number for each token of the tile; its place in the sequence where none is given."""
        return tl.load(POINTER + start + index, mask=inside, other=0) if GIVEN else index

    @triton.jit
    def _rows(ROWS, start, row, inside):  # type: ignore[no-untyped-def]
        """a, b, c and own column of the queries; those that are not inside see nothing."""
        AT = ROWS + 4 * (start + row)
        a = tl.load(AT, mask=inside, other=0)
        b = tl.load(AT + 1, mask=inside, other=0)
        c = tl.load(AT + 2, mask=inside, other=0)
        own = tl.load(AT + 3, mask=inside, other=-1)
        return a, b, c, own

    @triton.jit
    def _hull(a, b, c, own):  # type: ignore[no-untyped-def]
        """The columns that rows see together lie in [0, a), [b, c) and [own, own_end)."""
        hull_b = tl.min(tl.where(b < c, b, 2147483647))
        hull_c = tl.max(tl.where(b < c, c, 0))
        return tl.max(a), hull_b, hull_c, tl.min(tl.where(own >= 0, own, 2147483647)), tl.max(own) + 1

    @triton.jit
    def _part(part, a, b, c, own, own_end):  # type: ignore[no-untyped-def]
        """The first, second or third of the intervals of `_hull`, less what is in one before."""
        b = tl.maximum(a, b)
        own = tl.maximum(a, own)
        touch = (own < own_end) & (b < c) & (own < c) & (own_end > b)
        b = tl.where(touch, tl.minimum(b, own), b)
        c = tl.where(touch, tl.maximum(c, own_end), c)
        own_end = tl.where(touch, own, own_end)
        begin = tl.where(part == 0, 0, tl.where(part == 1, b, own))
        end = tl.where(part == 0, a, tl.where(part == 1, c, own_end))
        return begin, end

    @triton.jit  # type: ignore[untyped-decorator]
    def _tile(  # type: ignore[no-untyped-def]
        s,
        a,
        b,
        c,
        own,
        column,
        inside,
        q_position,
        k_position,
        q_time,
        k_time,
        POSITION,
        num_positions,
        TIME,
        num_buckets,
        THRESHOLDS,
        inverse_width,
        POSITIONS: tl.constexpr,
        TIMES: tl.constexpr,
    ):
        """Logits of a tile with their biases, which of them count, and the places in the tables."""
        hidden = tl.where(inside, column, 2147483647)
        seen = (hidden < a) | ((hidden >= b) & (hidden < c)) | (hidden == own)
        at_position = column
        if POSITIONS:
            reach = num_positions // 2
            distance = tl.minimum(tl.maximum(k_position - q_position, -reach), reach)
            at_position = (distance + reach).to(tl.int32)
            s += tl.load(POSITION + at_position)
        at_time = column
        if TIMES:
            gap = tl.maximum(tl.abs(q_time - k_time), 1)
            # The bucket or the next: the threshold, which is exact, says which of the two.
            guess = (tl.log(gap.to(tl.float32)) * inverse_width + 0.75).to(tl.int32)
            at_time = tl.minimum(guess, num_buckets - 1)
            at_time -= (gap < tl.load(THRESHOLDS + at_time)).to(tl.int32)
            s += tl.load(TIME + at_time)
        return s, seen, at_position, at_time

    @triton.jit
    def _keeps(seed, head, token, column, dropout):  # type: ignore[no-untyped-def]
        """Which weights dropout keeps: a function of the seed, the head, the query and the column alone."""
        column = column + 0 * token
        bits, _, _, _ = tl.philox(seed, column, token + 0 * column, head + 0 * column, 0 * column)
        return tl.uint_to_uniform_float(bits) >= dropout

    @triton.jit  # type: ignore[untyped-decorator]
    def _next(BOUNDS, tile, count, column, end, SEES: tl.constexpr):  # type: ignore[no-untyped-def]
        """The first tile of queries, from `tile` on, that sees columns of [column, end), or that does not."""
        found = count
        tile += 0 * count  # a tensor from the start, also where it comes as a number
        while (tile < count) & (found == count):
            tiles = tile + tl.arange(0, 64)
            AT = BOUNDS + 5 * tiles
            inside = tiles < count
            seen = tl.load(AT, mask=inside, other=0) > column
            seen |= (tl.load(AT + 1, mask=inside, other=0) < end) & (tl.load(AT + 2, mask=inside, other=0) > column)
            seen |= (tl.load(AT + 3, mask=inside, other=0) < end) & (tl.load(AT + 4, mask=inside, other=0) > column)
            found = tl.min(tl.where(inside & (seen == SEES), tiles, count))
            tile += 64
        return found

    # ---- kernels -----------------------------------------------------------------------------------------------------

    @triton.jit  # type: ignore[untyped-decorator]
    def prepare(  # type: ignore[no-untyped-def]
        MASK_A,
        MASK_B,
        MASK_C,
        MASK_SELF,
        ROWS,
        BOUNDS,
        WORK,
        Q_OFFSETS,
        K_OFFSETS,
        UNIT: tl.constexpr,
        BOUND: tl.constexpr,
    ):
        _, sequence, first, q_start, q_length, _, k_length = _place(WORK, Q_OFFSETS, K_OFFSETS, 1, BOUND, UNIT)
        row = first + tl.arange(0, BOUND)
        inside = row < q_length
        a = tl.minimum(tl.load(MASK_A + q_start + row, mask=inside, other=0), k_length).to(tl.int32)
        b = tl.minimum(tl.load(MASK_B + q_start + row, mask=inside, other=0), k_length).to(tl.int32)
        c = tl.minimum(tl.load(MASK_C + q_start + row, mask=inside, other=0), k_length).to(tl.int32)
        own = tl.where((tl.load(MASK_SELF + q_start + row, mask=inside, other=0) != 0) & (row < k_length), row, -1)
        AT = ROWS + 4 * (q_start + row)
        tl.store(AT, a, mask=inside)
        tl.store(AT + 1, b, mask=inside)
        tl.store(AT + 2, c, mask=inside)
        tl.store(AT + 3, own, mask=inside)
        a, b, c, own, own_end = _hull(a, b, c, own)
        AT = BOUNDS + 5 * (q_start // BOUND + sequence + first // BOUND)
        tl.store(AT, a)
        tl.store(AT + 1, b)
        tl.store(AT + 2, c)
        tl.store(AT + 3, own)
        tl.store(AT + 4, own_end)

    @triton.jit(do_not_specialize=["seed", "longest"])  # type: ignore[untyped-decorator]
    def forward(  # type: ignore[no-untyped-def]
        Q,
        K,
        V,
        q_token,
        q_head,
        k_token,
        k_head,
        v_token,
        v_head,
        WORK,
        Q_OFFSETS,
        K_OFFSETS,
        ROWS,
        SCALE,
        alpha,
        POSITION,
        Q_POSITIONS,
        K_POSITIONS,
        num_positions,
        TIME,
        Q_TIMES,
        K_TIMES,
        THRESHOLDS,
        num_buckets,
        inverse_width,
        dropout,
        seed,
        H,
        longest,
        OUT,
        LSE,
        D: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_V: tl.constexpr,
        SOFTMAX: tl.constexpr,
        POSITIONS: tl.constexpr,
        PLACES: tl.constexpr,
        TIMES: tl.constexpr,
        DROPOUT: tl.constexpr,
        UNIT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        head, sequence, first, q_start, q_length, k_start, k_length = _place(
            WORK, Q_OFFSETS, K_OFFSETS, H, BLOCK_M, UNIT
        )
        if first >= q_length:
            return
        row = first + tl.arange(0, BLOCK_M)
        q_inside = row < q_length
        a, b, c, own = _rows(ROWS, q_start, row, q_inside)
        hull_a, hull_b, hull_c, hull_own, hull_end = _hull(a, b, c, own)
        q_position = _vector(Q_POSITIONS, q_start, row, q_inside, POSITIONS and not PLACES)
        q_time = _vector(Q_TIMES, q_start, row, q_inside, TIMES)
        q = _load(Q + (q_start + first) * q_token + head * q_head, q_token, q_inside, D, BLOCK_M, BLOCK_D)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for part in range(3):
            begin, end = _part(part, hull_a, hull_b, hull_c, hull_own, hull_end)
            for column_0 in range(begin, end, BLOCK_N):
                column = column_0 + tl.arange(0, BLOCK_N)
                inside = column < end
                at = k_start + column_0
                k = _load(K + at * k_token + head * k_head, k_token, inside, D, BLOCK_N, BLOCK_D)
                v = _load(V + at * v_token + head * v_head, v_token, inside, WIDTH, BLOCK_N, BLOCK_V)
                k_position = _vector(K_POSITIONS, k_start, column, inside, POSITIONS and not PLACES)
                k_time = _vector(K_TIMES, k_start, column, inside, TIMES)
                s, seen, at_position, at_time = _tile(
                    tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha,
                    a[:, None],
                    b[:, None],
                    c[:, None],
                    own[:, None],
                    column[None, :],
                    inside[None, :],
                    q_position[:, None],
                    k_position[None, :],
                    q_time[:, None],
                    k_time[None, :],
                    POSITION + head * num_positions,
                    num_positions,
                    TIME + head * num_buckets,
                    num_buckets,
                    THRESHOLDS,
                    inverse_width,
                    POSITIONS,
                    TIMES,
                )
                if SOFTMAX:
                    s = tl.where(seen, s, float("-inf"))
                    higher = tl.maximum(highest, tl.max(s, 1))
                    # A row that has seen nothing yet keeps -inf, which must not be taken from -inf.
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                    w = tl.exp(s - shift[:, None])
                    fade = tl.exp(highest - shift)
                    total = total * fade + tl.sum(w, 1)
                    out *= fade[:, None]
                    highest = higher
                else:
                    w = tl.where(seen, s * tl.sigmoid(s), 0.0)
                if DROPOUT:
                    token = (q_start + row).to(tl.int32)
                    w = tl.where(_keeps(seed, head, token[:, None], column[None, :], dropout), w, 0.0)
                out = tl.dot(w.to(v.dtype), v, out, input_precision=PRECISION)
        if SOFTMAX:
            total = tl.where(total > 0, total, 1.0)  # blind rows: out is 0 already
            lse = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(total)
            tl.store(LSE + (q_start + row) * H + head, lse, mask=q_inside)
            out = out / total[:, None]
        else:
            out *= tl.load(SCALE + sequence)
        out *= 1 / (1 - dropout)
        AT = OUT + ((q_start + first) * H + head) * WIDTH
        _store(AT, H * WIDTH, out, q_inside, WIDTH, BLOCK_M, BLOCK_V)

    @triton.jit(do_not_specialize=["seed", "longest"])  # type: ignore[untyped-decorator]
    def queries_gradient(  # type: ignore[no-untyped-def]
        Q,
        K,
        V,
        q_token,
        q_head,
        k_token,
        k_head,
        v_token,
        v_head,
        WORK,
        Q_OFFSETS,
        K_OFFSETS,
        ROWS,
        SCALE,
        alpha,
        POSITION,
        Q_POSITIONS,
        K_POSITIONS,
        num_positions,
        TIME,
        Q_TIMES,
        K_TIMES,
        THRESHOLDS,
        num_buckets,
        inverse_width,
        dropout,
        seed,
        H,
        longest,
        D_OUT,
        LSE,
        DELTA,
        D_Q,
        D_SCALE,
        D_POSITION,
        D_TIME,
        D: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_V: tl.constexpr,
        SOFTMAX: tl.constexpr,
        POSITIONS: tl.constexpr,
        PLACES: tl.constexpr,
        TIMES: tl.constexpr,
        DROPOUT: tl.constexpr,
        SCALE_NEEDED: tl.constexpr,
        POSITION_NEEDED: tl.constexpr,
        TIME_NEEDED: tl.constexpr,
        UNIT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        head, sequence, first, q_start, q_length, k_start, k_length = _place(
            WORK, Q_OFFSETS, K_OFFSETS, H, BLOCK_M, UNIT
        )
        if first >= q_length:
            return
        row = first + tl.arange(0, BLOCK_M)
        q_inside = row < q_length
        a, b, c, own = _rows(ROWS, q_start, row, q_inside)
        hull_a, hull_b, hull_c, hull_own, hull_end = _hull(a, b, c, own)
        q_position = _vector(Q_POSITIONS, q_start, row, q_inside, POSITIONS and not PLACES)
        q_time = _vector(Q_TIMES, q_start, row, q_inside, TIMES)
        q = _load(Q + (q_start + first) * q_token + head * q_head, q_token, q_inside, D, BLOCK_M, BLOCK_D)
        d_out = _load(D_OUT + ((q_start + first) * H + head) * WIDTH, H * WIDTH, q_inside, WIDTH, BLOCK_M, BLOCK_V)
        inverse_keep = 1 / (1 - dropout)
        if SOFTMAX:
            lse = tl.load(LSE + (q_start + row) * H + head, mask=q_inside, other=0.0)
            delta = tl.load(DELTA + (q_start + row) * H + head, mask=q_inside, other=0.0)
            factor = 1.0
        else:
            factor = tl.load(SCALE + sequence) * inverse_keep
        reach = num_positions // 2
        d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        d_scale = tl.zeros([BLOCK_M], tl.float32)
        before = tl.zeros([BLOCK_N], tl.float32)  # what belongs to the first row of the position table, and to the last
        after = tl.zeros([BLOCK_N], tl.float32)
        for part in range(3):
            begin, end = _part(part, hull_a, hull_b, hull_c, hull_own, hull_end)
            for column_0 in range(begin, end, BLOCK_N):
                column = column_0 + tl.arange(0, BLOCK_N)
                inside = column < end
                at = k_start + column_0
                k = _load(K + at * k_token + head * k_head, k_token, inside, D, BLOCK_N, BLOCK_D)
                v = _load(V + at * v_token + head * v_head, v_token, inside, WIDTH, BLOCK_N, BLOCK_V)
                k_position = _vector(K_POSITIONS, k_start, column, inside, POSITIONS and not PLACES)
                k_time = _vector(K_TIMES, k_start, column, inside, TIMES)
                s, seen, at_position, at_time = _tile(
                    tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha,
                    a[:, None],
                    b[:, None],
                    c[:, None],
                    own[:, None],
                    column[None, :],
                    inside[None, :],
                    q_position[:, None],
                    k_position[None, :],
                    q_time[:, None],
                    k_time[None, :],
                    POSITION + head * num_positions,
                    num_positions,
                    TIME + head * num_buckets,
                    num_buckets,
                    THRESHOLDS,
                    inverse_width,
                    POSITIONS,
                    TIMES,
                )
                d_w = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
                if DROPOUT:
                    token = (q_start + row).to(tl.int32)
                    d_w = tl.where(_keeps(seed, head, token[:, None], column[None, :], dropout), d_w, 0.0)
                if SOFTMAX:
                    w = tl.exp(tl.where(seen, s, float("-inf")) - lse[:, None])
                    d_s = w * (d_w * inverse_keep - delta[:, None])
                else:
                    sigmoid = tl.sigmoid(s)
                    d_w = tl.where(seen, d_w, 0.0)
                    d_s = d_w * sigmoid * (1 + s * (1 - sigmoid))
                    if SCALE_NEEDED:
                        d_scale += tl.sum(d_w * s * sigmoid, 1)
                d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
                if POSITION_NEEDED:
                    TABLE = D_POSITION + head * num_positions
                    if PLACES:
                        # Each row is turned by its number: then a column holds the diagonals n - m = r - turn * N.
                        turned = tl.arange(0, BLOCK_M)[:, None] + tl.arange(0, BLOCK_N)[None, :]
                        skewed = tl.gather(d_s, turned % BLOCK_N, 1)
                        for turn in tl.static_range((BLOCK_M + 2 * BLOCK_N - 2) // BLOCK_N):
                            diagonal = tl.sum(tl.where(turned // BLOCK_N == turn, skewed, 0.0), 0) * factor
                            distance = column - first - turn * BLOCK_N
                            before += tl.where(distance <= -reach, diagonal, 0.0)
                            after += tl.where((distance >= reach) & (distance > -reach), diagonal, 0.0)
                            within = (distance > -reach) & (distance < reach)
                            tl.atomic_add(TABLE + distance + reach, diagonal, mask=within, sem="relaxed")
                    else:
                        is_first = at_position == 0
                        is_last = (at_position == num_positions - 1) & (at_position > 0)
                        before += tl.sum(tl.where(is_first, d_s, 0.0), 0) * factor
                        after += tl.sum(tl.where(is_last, d_s, 0.0), 0) * factor
                        within = seen & (at_position > 0) & (at_position < num_positions - 1)
                        tl.atomic_add(TABLE + at_position, d_s * factor, mask=within, sem="relaxed")
                if TIME_NEEDED:
                    lowest = tl.min(tl.where(seen, at_time, num_buckets))
                    for bucket in range(lowest, tl.max(tl.where(seen, at_time, -1)) + 1):
                        d_bucket = tl.sum(tl.where(at_time == bucket, d_s, 0.0)) * factor
                        tl.atomic_add(D_TIME + head * num_buckets + bucket, d_bucket, sem="relaxed")
        if POSITION_NEEDED:
            tl.atomic_add(D_POSITION + head * num_positions, tl.sum(before), sem="relaxed")
            tl.atomic_add(D_POSITION + (head + 1) * num_positions - 1, tl.sum(after), sem="relaxed")
        if SCALE_NEEDED:
            tl.store(D_SCALE + (q_start + row) * H + head, d_scale * inverse_keep, mask=q_inside)
        _store(D_Q + ((q_start + first) * H + head) * D, H * D, d_q * (alpha * factor), q_inside, D, BLOCK_M, BLOCK_D)

    @triton.jit(do_not_specialize=["seed", "longest"])  # type: ignore[untyped-decorator]
    def keys_gradient(  # type: ignore[no-untyped-def]
        Q,
        K,
        V,
        q_token,
        q_head,
        k_token,
        k_head,
        v_token,
        v_head,
        WORK,
        Q_OFFSETS,
        K_OFFSETS,
        ROWS,
        SCALE,
        alpha,
        POSITION,
        Q_POSITIONS,
        K_POSITIONS,
        num_positions,
        TIME,
        Q_TIMES,
        K_TIMES,
        THRESHOLDS,
        num_buckets,
        inverse_width,
        dropout,
        seed,
        H,
        longest,
        D_OUT,
        LSE,
        DELTA,
        BOUNDS,
        D_K,
        D_V,
        D: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_V: tl.constexpr,
        SOFTMAX: tl.constexpr,
        POSITIONS: tl.constexpr,
        PLACES: tl.constexpr,
        TIMES: tl.constexpr,
        DROPOUT: tl.constexpr,
        UNIT: tl.constexpr,
        BOUND: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """Tiles stand on their side here: keys are rows."""
        head, sequence, first, q_start, q_length, k_start, k_length = _place(
            WORK, Q_OFFSETS, K_OFFSETS, H, BLOCK_N, UNIT
        )
        if first >= k_length:
            return
        column = first + tl.arange(0, BLOCK_N)
        inside = column < k_length
        k_position = _vector(K_POSITIONS, k_start, column, inside, POSITIONS and not PLACES)
        k_time = _vector(K_TIMES, k_start, column, inside, TIMES)
        at = k_start + first
        k = _load(K + at * k_token + head * k_head, k_token, inside, D, BLOCK_N, BLOCK_D)
        v = _load(V + at * v_token + head * v_head, v_token, inside, WIDTH, BLOCK_N, BLOCK_V)
        inverse_keep = 1 / (1 - dropout)
        factor = 1.0 if SOFTMAX else tl.load(SCALE + sequence) * inverse_keep
        d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        BOUNDS += 5 * (q_start // BOUND + sequence)
        count = tl.cdiv(q_length, BOUND)
        last = tl.minimum(first + BLOCK_N, k_length)
        tile = _next(BOUNDS, 0, count, first, last, True)
        while tile < count:
            past = _next(BOUNDS, tile, count, first, last, False)
            end = tl.minimum(past * BOUND, q_length)
            for row_0 in range(tile * BOUND, end, BLOCK_M):
                row = row_0 + tl.arange(0, BLOCK_M)
                q_inside = row < end
                a, b, c, own = _rows(ROWS, q_start, row, q_inside)
                at = q_start + row_0
                q = _load(Q + at * q_token + head * q_head, q_token, q_inside, D, BLOCK_M, BLOCK_D)
                d_out = _load(D_OUT + (at * H + head) * WIDTH, H * WIDTH, q_inside, WIDTH, BLOCK_M, BLOCK_V)
                q_position = _vector(Q_POSITIONS, q_start, row, q_inside, POSITIONS and not PLACES)
                q_time = _vector(Q_TIMES, q_start, row, q_inside, TIMES)
                s, seen, at_position, at_time = _tile(
                    tl.dot(k, tl.trans(q), input_precision=PRECISION) * alpha,
                    a[None, :],
                    b[None, :],
                    c[None, :],
                    own[None, :],
                    column[:, None],
                    inside[:, None],
                    q_position[None, :],
                    k_position[:, None],
                    q_time[None, :],
                    k_time[:, None],
                    POSITION + head * num_positions,
                    num_positions,
                    TIME + head * num_buckets,
                    num_buckets,
                    THRESHOLDS,
                    inverse_width,
                    POSITIONS,
                    TIMES,
                )
                d_w = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                if SOFTMAX:
                    lse = tl.load(LSE + (q_start + row) * H + head, mask=q_inside, other=0.0)
                    delta = tl.load(DELTA + (q_start + row) * H + head, mask=q_inside, other=0.0)
                    w = tl.exp(tl.where(seen, s, float("-inf")) - lse[None, :])
                else:
                    sigmoid = tl.sigmoid(s)
                    w = tl.where(seen, s * sigmoid, 0.0)
                kept = w
                if DROPOUT:
                    token = (q_start + row).to(tl.int32)
                    keeps = _keeps(seed, head, token[None, :], column[:, None], dropout)
                    kept = tl.where(keeps, w, 0.0)
                    d_w = tl.where(keeps, d_w, 0.0)
                d_v = tl.dot(kept.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
                if SOFTMAX:
                    d_s = w * (d_w * inverse_keep - delta[None, :])
                else:
                    d_s = tl.where(seen, d_w * sigmoid * (1 + s * (1 - sigmoid)), 0.0)
                d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
            tile = _next(BOUNDS, past, count, first, last, True)
        at = (k_start + first) * H + head
        _store(D_K + at * D, H * D, d_k * (alpha * factor), inside, D, BLOCK_N, BLOCK_D)
        _store(
            D_V + at * WIDTH, H * WIDTH, d_v * (inverse_keep if SOFTMAX else factor), inside, WIDTH, BLOCK_N, BLOCK_V
        )

    def tuned(kernel: Any, outer: str, inner: str, reset: list[str]) -> Any:
        """The fastest of a few shapes, by the widths, the dtypes, the length and what there is to compute."""
        shapes = [(128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)]
        if _INTERPRETED:
            shapes = [(16, 16, 4, 1)]
        configs = [triton.Config({outer: x, inner: y}, num_warps=w, num_stages=s) for x, y, w, s in shapes]
        key = ["D", "WIDTH", "longest", "SOFTMAX", "POSITIONS", "PLACES", "TIMES", "DROPOUT"]
        return triton.autotune(configs, key, reset_to_zero=reset)(kernel)

    return {
        "prepare": prepare,
        "forward": tuned(forward, "BLOCK_M", "BLOCK_N", []),
        "queries_gradient": tuned(queries_gradient, "BLOCK_M", "BLOCK_N", ["D_POSITION", "D_TIME"]),
        "keys_gradient": tuned(keys_gradient, "BLOCK_N", "BLOCK_M", []),
    }
