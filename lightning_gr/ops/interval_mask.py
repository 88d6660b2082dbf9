"""One attention mask for every paper: each query sees two column intervals of its own sequence and, if flagged, itself.

Shape suffixes: B sequences, T query tokens of all sequences together, Q longest query sequence, K longest key sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr.ops.jagged import JaggedLayout


@dataclass(frozen=True)
class IntervalMask:
    """Row i sees the key columns ``[0, a) + [b, c) + {own position, if self}`` of its own sequence.

    Columns count from the start of the row's own sequence. The intervals do not overlap: ``0 <= a <= b <= c``, which
    only `check_values` looks at, for it must read them back.

    Args:
        a_T: int64 end of the first interval of each query row.
        b_T: int64 start of the second.
        c_T: int64 end of the second; an empty one has ``b == c``.
        self_T: bool, whether the row also sees the column of its own position.
    """

    a_T: Tensor
    b_T: Tensor
    c_T: Tensor
    self_T: Tensor

    def __post_init__(self) -> None:
        shape = self.a_T.shape
        for name in ("a_T", "b_T", "c_T", "self_T"):
            tensor = getattr(self, name)
            if tensor.dim() != 1 or tensor.shape != shape:
                raise ValueError(
                    f"IntervalMask.{name}: expected one entry a query row, shape {tuple(shape)}, got "
                    f"{tuple(tensor.shape)}"
                )
            if tensor.device != self.a_T.device:
                raise ValueError(
                    f"IntervalMask.{name}: expected the device of a_T, {self.a_T.device}, got {tensor.device}"
                )
            wanted = torch.bool if name == "self_T" else torch.int64
            if tensor.dtype != wanted:
                raise ValueError(f"IntervalMask.{name}: expected {wanted}, got {tensor.dtype}")

    @classmethod
    def _prefix(cls, a_T: Tensor, self_T: Tensor | None = None) -> IntervalMask:
        nothing = a_T
        return cls(a_T, nothing, nothing, torch.zeros_like(a_T, dtype=torch.bool) if self_T is None else self_T)

    @classmethod
    def causal(cls, layout: JaggedLayout) -> IntervalMask:
        """Each token sees itself and what came before (HSTU, arXiv 2402.17152)."""
        return cls._prefix(layout.position_T + 1)

    @classmethod
    def contextual_prefix(cls, layout: JaggedLayout, num_contextual_B: Tensor) -> IntervalMask:
        """The first tokens of a sequence see each other fully and are seen by all; the rest is causal.

        Args:
            layout: lengths of the sequences.
            num_contextual_B: contextual tokens of each sequence, int64, on the host.

        Raises:
            ValueError: the counts are not one a sequence, or one is negative or above the sequence's length.
        """
        contextual_T = _per_token(layout, num_contextual_B, "num_contextual_B")
        return cls._prefix(torch.maximum(layout.position_T + 1, contextual_T))

    @classmethod
    def candidates(cls, layout: JaggedLayout, num_candidates_B: Tensor) -> IntervalMask:
        """The last tokens of a sequence are candidates: each sees the history and itself; the history is causal.

        Args:
            layout: lengths of the sequences, candidates included.
            num_candidates_B: candidates of each sequence, int64, on the host.

        Raises:
            ValueError: the counts are not one a sequence, or one is negative or above the sequence's length.
        """
        candidates_T = _per_token(layout, num_candidates_B, "num_candidates_B")
        history_T = layout.offsets_B1.diff()[layout.sequence_T] - candidates_T
        return cls._prefix(torch.minimum(layout.position_T + 1, history_T), layout.position_T >= history_T)

    @classmethod
    def dynamic(cls, layout: JaggedLayout, token_counts_B4: Tensor, num_earlier_T: Tensor) -> IntervalMask:
        """MTGR's dynamic mask (arXiv 2505.18654, section 3.4): what happened before, and nothing later.

        Contextual and static tokens see each other fully. Real-time tokens and candidates see those, the real-time
        tokens of an earlier time, and themselves; so candidates do not see each other. Real-time tokens stand in the
        order of time.

        Args:
            layout: lengths of the sequences.
            token_counts_B4: contextual, static, real-time and candidate tokens of each sequence, int64, on the host.
            num_earlier_T: int64, for real-time tokens and candidates how many real-time tokens of their sequence
                have an earlier time; not looked at for the others.

        Raises:
            ValueError: the counts do not add up to the layout's lengths, or the shape of `num_earlier_T` differs.
        """
        if token_counts_B4.shape != (layout.num_sequences, 4) or bool(
            (token_counts_B4.sum(1) != layout.lengths_B).any()
        ):
            raise ValueError(
                f"token_counts_B4: expected counts of 4 kinds that add up to the lengths of {layout.num_sequences} "
                f"sequence(s), got shape {tuple(token_counts_B4.shape)}"
            )
        if num_earlier_T.shape != (layout.num_tokens,):
            raise ValueError(
                f"num_earlier_T: expected one count for each of {layout.num_tokens} tokens, got shape "
                f"{tuple(num_earlier_T.shape)}"
            )
        fixed_T = _per_token(layout, token_counts_B4[:, :2].sum(1), "token_counts_B4")
        dynamic_T = layout.position_T >= fixed_T
        return cls._prefix(fixed_T + torch.where(dynamic_T, num_earlier_T, 0), dynamic_T)

    def visible(self, q_layout: JaggedLayout, k_layout: JaggedLayout) -> Tensor:
        """The mask in full, bool (B, Q, K); rows and columns beyond a sequence's length are False."""
        device = self.a_T.device
        columns_K = torch.arange(k_layout.max_length, device=device)
        seen_TK = (columns_K < self.a_T[:, None]) | ((columns_K >= self.b_T[:, None]) & (columns_K < self.c_T[:, None]))
        seen_TK = seen_TK | (self.self_T[:, None] & (columns_K == q_layout.position_T[:, None]))
        seen_TK = seen_TK & (columns_K < _num_keys(q_layout, k_layout)[:, None])
        dense = torch.zeros(
            q_layout.num_sequences, q_layout.max_length, k_layout.max_length, dtype=torch.bool, device=device
        )
        dense[q_layout.sequence_T, q_layout.position_T] = seen_TK
        return dense

    def num_visible_B(self, q_layout: JaggedLayout, k_layout: JaggedLayout) -> Tensor:
        """How many (query, key) pairs each sequence sees, int64 on the mask's device, without the dense mask."""
        keys_T = _num_keys(q_layout, k_layout)
        own_T = q_layout.position_T
        first_T = torch.minimum(self.a_T, keys_T)
        second_T = (torch.minimum(self.c_T, keys_T) - torch.minimum(self.b_T, keys_T)).clamp(min=0)
        in_interval_T = (own_T < self.a_T) | ((own_T >= self.b_T) & (own_T < self.c_T))
        alone_T = self.self_T & (own_T < keys_T) & ~in_interval_T
        counts_B = torch.zeros_like(q_layout.offsets_B1[1:])
        return counts_B.index_add(0, q_layout.sequence_T, first_T + second_T + alone_T)

    def num_visible_pairs(self, q_layout: JaggedLayout, k_layout: JaggedLayout) -> int:
        """How many (query, key) pairs all sequences see together.

        Reads back from the mask's device; make the mask from `JaggedLayout.on_host` to count on the host alone.
        """
        return int(self.num_visible_B(q_layout, k_layout).sum())

    def check_values(self, q_layout: JaggedLayout, k_layout: JaggedLayout) -> None:
        """Checks every row, which may live on a device; for debugging, since it reads them back.

        Raises:
            ValueError: a row's intervals overlap or leave its sequence of keys, or its own column does.
        """
        rows_T4 = torch.stack([self.a_T, self.b_T, self.c_T, self.self_T.to(torch.int64)], 1)
        own_T2 = torch.stack([q_layout.position_T, _num_keys(q_layout, k_layout)], 1)
        for i, ((a, b, c, sees_self), (own, num_keys)) in enumerate(
            zip(rows_T4.tolist(), own_T2.tolist(), strict=True)
        ):
            if not 0 <= a <= b <= c <= num_keys:
                raise ValueError(
                    f"mask: row {i} has the intervals [0, {a}) and [{b}, {c}); expected 0 <= a <= b <= c <= "
                    f"{num_keys}, the keys of its sequence"
                )
            if sees_self and own >= num_keys:
                raise ValueError(f"mask: row {i} sees its own column {own}; its sequence has {num_keys} keys")


def _num_keys(q_layout: JaggedLayout, k_layout: JaggedLayout) -> Tensor:
    """How many keys the sequence of each query has, int64 on the device."""
    return k_layout.offsets_B1.diff()[q_layout.sequence_T]


def _per_token(layout: JaggedLayout, counts_B: Tensor, name: str) -> Tensor:
    """Host counts of the sequences, checked, spread over their tokens on the device."""
    if counts_B.device.type != "cpu" or counts_B.dtype != torch.int64 or counts_B.shape != layout.lengths_B.shape:
        raise ValueError(
            f"{name}: expected one int64 count a sequence on the CPU, shape {tuple(layout.lengths_B.shape)}, got "
            f"{counts_B.dtype} of shape {tuple(counts_B.shape)} on {counts_B.device}"
        )
    for i, (count, length) in enumerate(zip(counts_B.tolist(), layout.lengths_B.tolist(), strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"{name}[{i}]={count}: expected 0 ... {length}, the length of the sequence")
    return counts_B.to(layout.offsets_B1.device, non_blocking=True)[layout.sequence_T]
