"""M-FALCON: candidates go through HSTU blocks in micro-batches, against keys and values of their history.

HSTU (arXiv 2402.17152, section 3.4) amortises the history over micro-batches of candidates. Here all of them pass one
block before the next begins, so that keys and values of one block are held at a time, and the history too is taken in
micro-batches: memory grows with tokens times width, and neither with the number of blocks nor with what a block makes
of each token on its way.

Shape suffixes: B sequences, T tokens of all sequences together, N candidates, R tokens of a micro-batch, K rows of keys
and values, D model width, E width of keys or values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr.layers.hstu import HSTUEncoder, HSTULayer
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout


@torch.no_grad()
def encode_candidates(
    encoder: HSTUEncoder,
    x_TD: Tensor,
    *,
    micro_batch: int,
    num_candidates_B: Tensor,
    layout: JaggedLayout,
    mask: IntervalMask,
    times_T: Tensor | None = None,
    request_times_T: Tensor | None = None,
    positions_T: Tensor | None = None,
    groups_T: Tensor | None = None,
    num_positions: int | None = None,
) -> Tensor:
    """The candidates' rows of `HSTUEncoder.forward`, for scoring: the same numbers, without gradients.

    What only other tokens of the history need is left out: its last block, and histories without candidates.

    Args:
        encoder: the encoder, in evaluation mode.
        x_TD: token embeddings; overwritten.
        micro_batch: most tokens that are taken through a block at once.
        num_candidates_B: candidates of each sequence, its last tokens, int64, on the host.
        layout: lengths of the sequences, candidates included.
        mask: which tokens each token sees: a prefix of the history and itself, as `IntervalMask.dynamic` has it. No
            token sees a candidate but itself.
        times_T: as in `HSTUEncoder.forward`, and so are the others.
        request_times_T: times of the requests.
        positions_T: positions.
        groups_T: groups of the norms.
        num_positions: positions of a sequence at most.

    Returns:
        (N, D).

    Raises:
        ValueError: `micro_batch` is below 1, or inputs do not fit; see `HSTUEncoder.forward`.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}: expected at least 1")
    x_TD = encoder.entered(x_TD, layout=layout, positions_T=positions_T, num_positions=num_positions)
    history, candidates, num_keys = _cut(layout, num_candidates_B, micro_batch)
    keys = _Keys(num_keys, times_T, layout.position_T if positions_T is None else positions_T)
    for rows in history:
        keys.place(rows)
    asked_T = times_T if request_times_T is None else request_times_T

    def pass_on(layer: HSTULayer, rows: _Rows) -> None:
        """Takes a micro-batch through the layer; keys and values that it sees are written."""
        groups_R = None if groups_T is None else groups_T[rows.at]
        # Nothing has a name here that is not needed any more.
        gated = layer.gated(
            layer.attended(
                layer.projected(x_TD[rows.at], groups_R, "q"),
                *keys.of(rows),
                q_layout=rows.q_layout,
                k_layout=rows.k_layout,
                mask=rows.mask(mask),
                q_times_T=None if asked_T is None else asked_T[rows.at],
                k_times_T=None if keys.times_K is None else keys.times_K[rows.seen],
                q_positions_T=keys.positions_T[rows.at],
                k_positions_T=keys.positions_K[rows.seen],
            ),
            layer.projected(x_TD[rows.at], groups_R, "u"),
            groups_R,
        )
        x_TD[rows.at] += layer.output(gated)

    for number, layer in enumerate(encoder.layers):
        assert isinstance(layer, HSTULayer)
        for rows in history:
            keys.write(layer, x_TD, groups_T, rows)
        for rows in candidates:
            keys.place(rows)
            keys.write(layer, x_TD, groups_T, rows)
            pass_on(layer, rows)
        # All keys and values of the layer are made, so the history may change under them.
        for rows in history if number + 1 < len(encoder.layers) else ():
            pass_on(layer, rows)
    keys.drop()
    return torch.cat([x_TD[rows.at] for rows in candidates] or [x_TD[:0]])


@dataclass(frozen=True)
class _Rows:
    """A micro-batch: consecutive tokens of the history, or consecutive candidates, of one or several sequences.

    Args:
        at: where they are among all tokens.
        keys: where their own keys and values are.
        columns_R: the same within the keys of their own sequence.
        seen: keys and values of the sequences that they belong to.
        q_layout: how many of each of these sequences they are.
        k_layout: how many keys each of these sequences has.
    """

    at: slice | Tensor
    keys: slice | Tensor
    columns_R: Tensor
    seen: slice
    q_layout: JaggedLayout
    k_layout: JaggedLayout

    def mask(self, whole: IntervalMask) -> IntervalMask:
        """Their rows of the mask; a token's own column is the second interval, for the operator knows no places."""
        a_R, b_R, c_R = whole.a_T[self.at], whole.b_T[self.at], whole.c_T[self.at]
        alone_R = whole.self_T[self.at] & (self.columns_R >= a_R)
        b_R = torch.where(alone_R, self.columns_R, b_R)
        c_R = torch.where(alone_R, self.columns_R + 1, c_R)
        return IntervalMask(a_R, b_R, c_R, torch.zeros_like(alone_R))


class _Keys:
    """Keys and values of one layer: of each sequence its history, then room for its candidates of one micro-batch.

    Args:
        num_keys: rows.
        times_T: time of each token; None means none.
        positions_T: position of each token.
    """

    def __init__(self, num_keys: int, times_T: Tensor | None, positions_T: Tensor) -> None:
        self.num_keys, self.times_T, self.positions_T = num_keys, times_T, positions_T
        self.times_K = None if times_T is None else times_T.new_zeros(num_keys)
        self.positions_K = positions_T.new_zeros(num_keys)
        self._k_KE: Tensor | None = None
        self._v_KE: Tensor | None = None

    def place(self, rows: _Rows) -> None:
        """Gives rows the times and positions of a micro-batch."""
        if self.times_K is not None and self.times_T is not None:
            self.times_K[rows.keys] = self.times_T[rows.at]
        self.positions_K[rows.keys] = self.positions_T[rows.at]

    def write(self, layer: HSTULayer, x_TD: Tensor, groups_T: Tensor | None, rows: _Rows) -> None:
        """Writes keys and values of a micro-batch."""
        groups_R = None if groups_T is None else groups_T[rows.at]
        k_RE = layer.projected(x_TD[rows.at], groups_R, "k")
        if self._k_KE is None:
            # Zeros, since rows that nobody sees are multiplied with 0.
            self._k_KE = k_RE.new_zeros(self.num_keys, k_RE.shape[1])
        self._k_KE[rows.keys] = k_RE
        v_RE = layer.projected(x_TD[rows.at], groups_R, "v")
        if self._v_KE is None:
            self._v_KE = v_RE.new_zeros(self.num_keys, v_RE.shape[1])
        self._v_KE[rows.keys] = v_RE

    def of(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Keys and values of the sequences that a micro-batch belongs to."""
        assert self._k_KE is not None
        assert self._v_KE is not None
        return self._k_KE[rows.seen], self._v_KE[rows.seen]

    def drop(self) -> None:
        """Frees keys and values."""
        self._k_KE = self._v_KE = None


def _cut(layout: JaggedLayout, num_candidates_B: Tensor, micro_batch: int) -> tuple[list[_Rows], list[_Rows], int]:
    """Micro-batches of the history and of the candidates, and the rows of keys; from numbers on the host."""
    device = layout.offsets_B1.device
    # Nobody asks a history without candidates.
    history_B = torch.where(num_candidates_B > 0, layout.lengths_B - num_candidates_B, 0)
    token_B = layout.lengths_B.cumsum(0) - layout.lengths_B
    first_B = num_candidates_B.cumsum(0) - num_candidates_B
    candidate_N = torch.arange(int(num_candidates_B.sum()))
    sequence_N = torch.repeat_interleave(num_candidates_B)
    # A candidate's place in the room: how many of its sequence stand before it in its micro-batch.
    room_N = candidate_N - torch.maximum(candidate_N // micro_batch * micro_batch, first_B[sequence_N])
    room_B = torch.zeros_like(history_B).scatter_reduce(0, sequence_N, room_N + 1, "amax")
    keys_B = history_B + room_B
    key_B = keys_B.cumsum(0) - keys_B
    sequence_H = torch.repeat_interleave(history_B)
    place_H = torch.arange(len(sequence_H)) - (history_B.cumsum(0) - history_B)[sequence_H]

    def micro_batches(sequence: Tensor, at: Tensor, columns: Tensor) -> list[_Rows]:
        found = []
        for first in range(0, len(sequence), micro_batch):
            own = slice(first, first + micro_batch)
            begin, end = int(sequence[own][0]), int(sequence[own][-1]) + 1
            found.append(
                _Rows(
                    at=_place(at[own], device),
                    keys=_place((key_B[sequence] + columns)[own], device),
                    columns_R=columns[own].to(device, non_blocking=True),
                    seen=slice(int(key_B[begin]), int(key_B[end - 1] + keys_B[end - 1])),
                    q_layout=JaggedLayout.from_lengths(
                        torch.bincount(sequence[own] - begin, minlength=end - begin), device
                    ),
                    k_layout=JaggedLayout.from_lengths(keys_B[begin:end], device),
                )
            )
        return found

    in_history_N = candidate_N - first_B[sequence_N] + (layout.lengths_B - num_candidates_B)[sequence_N]
    history = micro_batches(sequence_H, token_B[sequence_H] + place_H, place_H)
    candidates = micro_batches(sequence_N, token_B[sequence_N] + in_history_N, history_B[sequence_N] + room_N)
    return history, candidates, int(keys_B.sum())


def _place(at_R: Tensor, device: torch.device) -> slice | Tensor:
    """Rows as a slice where they stand side by side, which copies nothing."""
    first, last = int(at_R[0]), int(at_R[-1])
    return slice(first, last + 1) if last - first + 1 == len(at_R) else at_R.to(device, non_blocking=True)
