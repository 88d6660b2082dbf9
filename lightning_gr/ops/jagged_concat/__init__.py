"""Jagged tensors joined sequence by sequence, and parted again.

Shape suffixes: B sequences, K parts, T tokens of all sequences together (of one part, where so said).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.jagged import JaggedLayout

__all__ = ["concat_bytes", "concat_layout", "jagged_concat", "jagged_split"]


def jagged_concat(xs: Sequence[Tensor], layouts: Sequence[JaggedLayout]) -> tuple[Tensor, JaggedLayout]:
    """Joins the parts of each sequence: contextual tokens, then history, then candidates, for example.

    Differentiable any number of times; any dtype. Places come from the host lengths: nothing is read back.

    Args:
        xs: parts, (tokens of the part, ...), of one dtype and device.
        layouts: their layouts, over the same sequences.

    Returns:
        (T, ...) and its layout.

    Raises:
        ValueError: no parts, or parts that do not fit together; the message names the part.
    """
    layout = concat_layout(layouts)
    if len(xs) != len(layouts):
        raise ValueError(f"xs: expected one tensor for each of {len(layouts)} layouts, got {len(xs)}")
    for k, (x, part) in enumerate(zip(xs, layouts, strict=True)):
        if x.dim() == 0 or x.shape != (part.num_tokens, *xs[0].shape[1:]):
            wanted = ", ".join(str(n) for n in (part.num_tokens, *xs[0].shape[1:]))
            raise ValueError(f"xs[{k}]: expected shape ({wanted}), got {tuple(x.shape)}")
        if x.dtype != xs[0].dtype:
            raise ValueError(f"xs[{k}]: expected the dtype of xs[0], {xs[0].dtype}, got {x.dtype}")
        if x.device != part.offsets_B1.device:
            raise ValueError(f"xs[{k}]: expected the device of its layout, {part.offsets_B1.device}, got {x.device}")
    if len(xs) == 1:
        return xs[0], layout
    return _Concat.apply(_places(layouts), *xs), layout


def jagged_split(x_T: Tensor, layouts: Sequence[JaggedLayout]) -> list[Tensor]:
    """The inverse of `jagged_concat`: the parts that were joined.

    Args:
        x_T: (T, ...), each sequence holding its parts one after another.
        layouts: the layout of each part.

    Returns:
        One tensor a part, (tokens of the part, ...).

    Raises:
        ValueError: no parts, or `x_T` does not have the tokens of all parts together.
    """
    layout = concat_layout(layouts)
    if x_T.shape[:1] != (layout.num_tokens,):
        raise ValueError(f"x_T: expected {layout.num_tokens} tokens, those of all parts, got shape {tuple(x_T.shape)}")
    if x_T.device != layout.offsets_B1.device:
        raise ValueError(f"x_T: expected the device of the layouts, {layout.offsets_B1.device}, got {x_T.device}")
    if len(layouts) == 1:
        return [x_T]
    return list(_Split.apply(_places(layouts), x_T))


def concat_layout(layouts: Sequence[JaggedLayout]) -> JaggedLayout:
    """The layout of the joined sequences.

    Args:
        layouts: of what is joined, of B sequences each, in order.

    Raises:
        ValueError: no layouts, or they differ in the number of sequences or in device.
    """
    if not layouts:
        raise ValueError("layouts: expected at least one, got none")
    first = layouts[0]
    for k, part in enumerate(layouts):
        if part.num_sequences != first.num_sequences:
            raise ValueError(
                f"layouts[{k}]: expected {first.num_sequences} sequences like layouts[0], got {part.num_sequences}"
            )
        if part.offsets_B1.device != first.offsets_B1.device:
            raise ValueError(
                f"layouts[{k}]: expected the device of layouts[0], {first.offsets_B1.device}, got "
                f"{part.offsets_B1.device}"
            )
    if len(layouts) == 1:
        return first
    return JaggedLayout.from_lengths(sum(part.lengths_B for part in layouts), first.offsets_B1.device)  # type: ignore[arg-type]


def concat_bytes(num_tokens: int, *, width: int, itemsize: int) -> int:
    """Bytes that a join, a split, or the gradient of either moves: each element is read once and written once."""
    return 2 * num_tokens * width * itemsize


def _places(layouts: Sequence[JaggedLayout]) -> list[Tensor]:
    """For each part, where its tokens stand in the joined tensor, int64 on the device."""
    lengths_BK = torch.stack([part.lengths_B for part in layouts], 1)
    starts_BK = (lengths_BK.flatten().cumsum(0) - lengths_BK.flatten()).view_as(lengths_BK)
    # One small copy to the device; the places of all tokens are made there.
    shifts_BK = (starts_BK - (lengths_BK.cumsum(0) - lengths_BK)).to(layouts[0].offsets_B1.device, non_blocking=True)
    return [
        torch.arange(part.num_tokens, device=shifts_BK.device) + shifts_BK[:, k][part.sequence_T]
        for k, part in enumerate(layouts)
    ]


class _Concat(torch.autograd.Function):
    """Writes each part to its places; the gradient is `_Split`, so it can be differentiated again."""

    @staticmethod
    @override
    def forward(ctx: Any, places: list[Tensor], *xs: Tensor) -> Tensor:
        ctx.places = places
        out = xs[0].new_empty(sum(len(x) for x in xs), *xs[0].shape[1:])
        for place, x in zip(places, xs, strict=True):
            out.index_copy_(0, place, x)
        return out

    @staticmethod
    @override
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return None, *_Split.apply(ctx.places, d_out)


class _Split(torch.autograd.Function):
    """Reads each part from its places; the gradient is `_Concat`."""

    @staticmethod
    @override
    def forward(ctx: Any, places: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        ctx.places = places
        return tuple(x.index_select(0, place) for place in places)

    @staticmethod
    @override
    def backward(ctx: Any, *d_parts: Tensor) -> Any:
        return None, _Concat.apply(ctx.places, *d_parts)
