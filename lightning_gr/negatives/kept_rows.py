"""Looked-up rows of candidates between their lookup and their gradient: on the device or in host memory, 32 or 16 bit.

Shape suffixes: N labels, K places a label, U distinct rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.negatives.host_memory import host_empty
from lightning_gr.negatives.offload import Offload
from lightning_gr.negatives.row_segments import RowSegments, copy_stream, wait_on_host
from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.sampled_softmax import check_places, kernels_of

_HALF = (torch.float16, torch.bfloat16)
_NUMBERS_AT_ONCE = 1 << 20
"""Of rows that are converted or normalised, or a 32nd of all if that is more: what it takes beside them stays small."""


def keep_rows(
    rows_UD: Tensor,
    *,
    offload: Offload | None = None,
    dtype: torch.dtype | None = None,
    normalise: bool = False,
) -> KeptRows:
    """Keeps rows for `KeptRows.logits`, so that nobody else need hold `rows_UD` until its gradient is made.

    Call it right after the lookup, before the rest of the model runs, and drop every reference to `rows_UD`. The
    gradient of the rows is then made after the backward pass of all that ran later, as autograd goes backward in the
    order of calls; until then no (U, D) tensor in float32 is on the device.

    Args:
        rows_UD: float rows of the distinct candidates.
        offload: keeps them in host memory and brings them in segments; None keeps them on the device.
        dtype: float16 or bfloat16 rounds the rows; products are summed in float32 and the gradient, in the dtype of
            `rows_UD`, never passes through 16 bit. None keeps theirs.
        normalise: the logits are those of rows of length 1, as of ``F.normalize(rows_UD, dim=-1, eps=1e-6)``.

    Raises:
        ValueError: `rows_UD` is not a float matrix, `dtype` is another one, or the host's memory is too small.
    """
    if rows_UD.dim() != 2 or not rows_UD.is_floating_point():
        raise ValueError(f"rows_UD: expected a float matrix, got {rows_UD.dtype} {tuple(rows_UD.shape)}")
    if dtype is not None and dtype != rows_UD.dtype and dtype not in _HALF:
        raise ValueError(f"dtype={dtype}: expected torch.float16, torch.bfloat16 or None for {rows_UD.dtype} as it is")
    kept = KeptRows(
        num_rows=rows_UD.shape[0],
        dim=rows_UD.shape[1],
        device=rows_UD.device,
        offload=offload,
        normalise=normalise,
    )
    kept.handle = _Keep.apply(rows_UD, kept, rows_UD.dtype if dtype is None else dtype)
    return kept


@dataclass
class KeptRows:
    """What `keep_rows` keeps.

    Args:
        num_rows: U.
        dim: D.
        device: where logits are computed.
        offload: how the rows come from host memory; None where they are on the device.
        normalise: whether logits are those of normalised rows.
    """

    num_rows: int
    dim: int
    device: torch.device
    offload: Offload | None
    normalise: bool
    handle: Tensor = field(init=False)  # a number whose gradient only says that gradients of logits are there
    _rows_UD: Tensor = field(init=False)
    _arrived: torch.cuda.Event | None = field(init=False, default=None)
    _waiting: _Waiting = field(init=False)

    def logits(self, queries_ND: Tensor, places_NK: Tensor, *, backend: Backend = "auto") -> Tensor:
        """``queries_ND[n] . rows[places_NK[n, k]]``, differentiable once.

        The segment changes no bit of it, nor of the gradients.

        Args:
            queries_ND: float, a query a label.
            places_NK: int64, which rows each query is multiplied with; may repeat.
            backend: which implementation; `auto` takes the fused one of the device.

        Returns:
            (N, K), float64 if queries or rows are, else float32.

        Raises:
            ValueError: shapes, dtypes or devices disagree, or a place is outside the rows; the latter is looked at as
                by `lightning_gr.ops.sampled_softmax.sampled_logits`.
        """
        if queries_ND.dim() != 2 or not queries_ND.is_floating_point() or queries_ND.shape[1] != self.dim:
            raise ValueError(
                f"queries_ND: expected a float matrix of width {self.dim} like the rows, got {queries_ND.dtype} "
                f"{tuple(queries_ND.shape)}"
            )
        if queries_ND.device != self.device:
            raise ValueError(f"queries_ND: expected the device of the rows, {self.device}, got {queries_ND.device}")
        if places_NK.dim() != 2:
            raise ValueError(f"places_NK: expected shape (N, K), got {tuple(places_NK.shape)}")
        check_places("places_NK", places_NK, queries_ND, self.num_rows)
        backend = choose_backend(backend, queries_ND.device)
        logits_NK: Tensor = _Logits.apply(queries_ND, self.handle, self._rows_UD, places_NK, self, backend)
        return logits_NK


class _Waiting:
    """Gradients of logits whose rows' gradient is not made yet, by backward pass."""

    def __init__(self) -> None:
        self._by_pass: dict[int, list[tuple[Tensor, Tensor, Tensor, Backend]]] = {}

    def add(self, weights_NK: Tensor, queries_ND: Tensor, places_NK: Tensor, backend: Backend) -> None:
        now = _backward_pass()
        # Another pass that left something asked for other gradients than those of the rows.
        self._by_pass = {now: [*self._by_pass.get(now, []), (weights_NK, queries_ND, places_NK, backend)]}

    def take(self) -> list[tuple[Tensor, Tensor, Tensor, Backend]]:
        try:
            return self._by_pass.pop(_backward_pass())
        except KeyError:
            raise RuntimeError(
                "KeptRows.logits: its backward pass was not part of the one that goes through the lookup, as under "
                "checkpoint(..., use_reentrant=True); call checkpoint with use_reentrant=False"
            ) from None


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()


class _Keep(torch.autograd.Function):
    """Puts rows where they wait; backward, makes the gradient of all their logits at once."""

    @staticmethod
    @override
    def forward(ctx: Any, rows_UD: Tensor, kept: KeptRows, dtype: torch.dtype) -> Tensor:
        ctx.num_rows, ctx.dtype, ctx.device = kept.num_rows, rows_UD.dtype, rows_UD.device
        kept._waiting = ctx.waiting = _Waiting()
        if kept.offload is None:
            kept._rows_UD = rows_UD.to(dtype).contiguous()
        else:
            pinned = kept.device.type == "cuda"
            kept.offload.refuse_without_memory(*rows_UD.shape, dtype=dtype, pinned=pinned)
            kept._rows_UD = host_empty(*rows_UD.shape, dtype=dtype, device=kept.device)
            stream = copy_stream(kept.device)
            looked_up = stream.mark()
            with stream.copying():
                stream.wait(looked_up)
                for some in _parts(rows_UD):
                    kept._rows_UD[some].copy_(rows_UD[some].to(dtype), non_blocking=True)
                kept._arrived = stream.mark()
            stream.keep_until_copied(rows_UD)
        ctx.normalise, ctx.arrived = kept.normalise, kept._arrived
        # Through save_for_backward, since what that holds goes with the backward pass.
        ctx.save_for_backward(*([kept._rows_UD] if kept.normalise else []))
        return torch.zeros((), device=rows_UD.device)

    @staticmethod
    @override
    def backward(ctx: Any, _: Tensor) -> Any:
        d_rows_UD = None
        for weights_NK, queries_ND, places_NK, backend in ctx.waiting.take():
            part_UD = kernels_of(backend).rows_gradient(weights_NK, queries_ND, places_NK, ctx.num_rows)
            d_rows_UD = part_UD if d_rows_UD is None else d_rows_UD.add_(part_UD)
        assert d_rows_UD is not None
        if ctx.normalise:
            (kept_UD,) = ctx.saved_tensors
            wait_on_host(ctx.arrived)
            for some in _parts(d_rows_UD):
                with torch.enable_grad():
                    rows = kept_UD[some].to(ctx.device, _wide(kept_UD)).requires_grad_()
                    d_rows_UD[some] = torch.autograd.grad(_length_1(rows), rows, d_rows_UD[some])[0]
        return d_rows_UD.to(ctx.dtype), None, None


class _Logits(torch.autograd.Function):
    """The dot products, and the gradient of the queries; the rows' is left to `_Keep`."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        queries_ND: Tensor,
        handle: Tensor,
        rows_UD: Tensor,
        places_NK: Tensor,
        kept: KeptRows,
        backend: Backend,
    ) -> Tensor:
        queries_ND, places_NK = queries_ND.contiguous(), places_NK.contiguous()
        ctx.backend, ctx.normalise, ctx.waiting = backend, kept.normalise, kept._waiting
        ctx.segments, ctx.arrived, local_NK = None, kept._arrived, None
        dots = kernels_of(backend).dots
        if kept.offload is None:
            logits_NK = dots(queries_ND, _normalised(rows_UD) if kept.normalise else rows_UD, places_NK)
        else:
            ctx.segments, local_NK = RowSegments.of(places_NK, kept.num_rows, kept.offload.segment)
            wide = torch.promote_types(_wide(rows_UD), queries_ND.dtype)
            logits_NK = torch.empty(places_NK.shape, dtype=wide, device=queries_ND.device)
            for labels, came in ctx.segments.fetch(rows_UD, kept._arrived, queries_ND.device):
                rows = _normalised(came) if kept.normalise else came
                logits_NK[labels] = dots(queries_ND[labels], rows, local_NK[labels].long())
        ctx.save_for_backward(queries_ND, rows_UD, places_NK, local_NK)
        return logits_NK

    @staticmethod
    @override
    def backward(ctx: Any, weights_NK: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "KeptRows.logits: rows that are kept are differentiable once; leave out negatives_offload and "
                "negatives_dtype, and take backend='reference', to differentiate the gradient"
            )
        queries_ND, rows_UD, places_NK, local_NK = ctx.saved_tensors
        weights_NK, d_queries_ND, d_handle = weights_NK.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            gradient = kernels_of(ctx.backend).queries_gradient
            if ctx.segments is None:
                rows = _normalised(rows_UD) if ctx.normalise else rows_UD
                d_queries_ND = gradient(weights_NK, rows, places_NK).to(queries_ND.dtype)
            else:
                d_queries_ND = torch.empty_like(queries_ND)
                for labels, came in ctx.segments.fetch(rows_UD, ctx.arrived, queries_ND.device):
                    rows = _normalised(came) if ctx.normalise else came
                    d_queries_ND[labels] = gradient(weights_NK[labels], rows, local_NK[labels].long()).to(
                        queries_ND.dtype
                    )
        if ctx.needs_input_grad[1]:
            ctx.waiting.add(weights_NK, queries_ND, places_NK, ctx.backend)
            d_handle = weights_NK.new_zeros((), dtype=torch.float32)
        return d_queries_ND, d_handle, None, None, None, None


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _parts(rows_UD: Tensor) -> Iterator[slice]:
    """Slices of rows, one after the other."""
    num_rows, dim = rows_UD.shape
    step = max(1, _NUMBERS_AT_ONCE // max(1, dim), num_rows // 32)
    return (slice(first, first + step) for first in range(0, num_rows, step))


def _length_1(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1, eps=1e-6)


def _normalised(rows_UD: Tensor) -> Tensor:
    out_UD = torch.empty(rows_UD.shape, dtype=_wide(rows_UD), device=rows_UD.device)
    for some in _parts(rows_UD):
        out_UD[some] = _length_1(rows_UD[some].to(out_UD.dtype))
    return out_UD
