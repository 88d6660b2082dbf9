"""What an encoder's first layer takes: tokens that are checked, with their input positions, and with dropout.

Shape suffixes: T tokens of all sequences together, D model width, P positions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.position_encoding import add_encodings


def entered_tokens(
    x_TD: Tensor,
    *,
    layout: JaggedLayout,
    dim: int,
    max_length: int,
    position_PD: Tensor | None,
    positions_T: Tensor | None,
    num_positions: int | None,
    dropout: float,
    training: bool,
) -> Tensor:
    """Tokens as the first layer takes them, (T, D).

    Args:
        x_TD: token embeddings.
        layout: lengths of the sequences.
        dim: D.
        max_length: most positions of a sequence.
        position_PD: learned embedding of each position; None for none.
        positions_T: position of each token; None means its place in its sequence.
        num_positions: positions that a sequence has at most; None means the longest sequence's tokens.
        dropout: probability that an element is 0.
        training: whether dropout applies.

    Raises:
        ValueError: a sequence has more positions than `max_length`, or `x_TD` does not fit the layout and `dim`.
    """
    if x_TD.shape != (layout.num_tokens, dim):
        raise ValueError(f"x_TD: expected ({layout.num_tokens} tokens, dim={dim}), got shape {tuple(x_TD.shape)}")
    longest = layout.max_length if num_positions is None else num_positions
    if longest > max_length:
        counted = "tokens" if num_positions is None else "positions, its candidates counted as one"
        raise ValueError(
            f"max_length={max_length}: a sequence has {longest} {counted}; raise the encoder's max_length or lower the "
            "data's"
        )
    if position_PD is not None:
        given_T = layout.position_T if positions_T is None else positions_T
        x_TD = add_encodings(x_TD, positions_T=given_T, position_table_PD=position_PD)
    return F.dropout(x_TD, dropout, training)
