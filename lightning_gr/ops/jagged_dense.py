"""Jagged to padded dense and back, for references and checks; fused operators never pad.

Shape suffixes: B sequences, L longest, T tokens of all sequences together.
"""

from __future__ import annotations

from torch import Tensor

from lightning_gr.ops.jagged import JaggedLayout


def jagged_to_dense(x_T: Tensor, layout: JaggedLayout) -> Tensor:
    """Pads (T, ...) to (B, L, ...) with zeros; differentiable, any dtype.

    Args:
        x_T: (T, ...), sequences one after another.
        layout: lengths of the B sequences, T tokens together.

    Raises:
        ValueError: `x_T` does not have the layout's tokens.
    """
    if x_T.shape[:1] != (layout.num_tokens,):
        raise ValueError(f"x_T: expected {layout.num_tokens} tokens, got shape {tuple(x_T.shape)}")
    dense = x_T.new_zeros(layout.num_sequences, layout.max_length, *x_T.shape[1:])
    return dense.index_put((layout.sequence_T, layout.position_T), x_T)


def dense_to_jagged(x_BL: Tensor, layout: JaggedLayout) -> Tensor:
    """Drops the padding of (B, L, ...): (T, ...); differentiable, any dtype.

    Args:
        x_BL: (B, L, ...), L the longest length of the layout.
        layout: lengths of the B sequences, T tokens together.

    Raises:
        ValueError: `x_BL` does not have the layout's sequences and longest length.
    """
    if x_BL.shape[:2] != (layout.num_sequences, layout.max_length):
        raise ValueError(
            f"x_BL: expected {layout.num_sequences} sequences of {layout.max_length} places, got shape "
            f"{tuple(x_BL.shape)}"
        )
    return x_BL[layout.sequence_T, layout.position_T]
