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
    def listwise_groups(
        cls,
        layout: JaggedLayout,
        num_groups_B: Tensor,
        group_sizes_G: Tensor,
        *,
        num_contextual_B: Tensor | None = None,
    ) -> IntervalMask:
        """The last tokens of a sequence are lists of candidates: each sees the history and all of its own list.

        NVIDIA's kernels call it ``target_group_size``: lists of one size, causal inside. Here lists have any size and
        are seen whole. Lists of one candidate each are `candidates`.

        Args:
            layout: lengths of the sequences, candidates included.
            num_groups_B: lists of each sequence, int64, on the host.
            group_sizes_G: candidates of each list, sequence by sequence, int64, on the host.
            num_contextual_B: contextual tokens of each sequence, as in `contextual_prefix`; None means none.

        Raises:
            ValueError: counts that do not fit the sequences or each other, by name.
        """
        for name, counts in (("num_groups_B", num_groups_B), ("group_sizes_G", group_sizes_G)):
            if counts.device.type != "cpu" or counts.dtype != torch.int64 or counts.dim() != 1 or (counts < 0).any():
                raise ValueError(
                    f"{name}: expected int64 counts of at least 0 on the CPU, one-dimensional, got {counts.dtype} of "
                    f"shape {tuple(counts.shape)} on {counts.device}"
                )
        if num_groups_B.shape != layout.lengths_B.shape or int(num_groups_B.sum()) != len(group_sizes_G):
            raise ValueError(
                f"num_groups_B: expected a count for each of {layout.num_sequences} sequence(s), {len(group_sizes_G)} "
                f"together as in group_sizes_G, got {len(num_groups_B)} that are {int(num_groups_B.sum())} together"
            )
        sequence_G = torch.repeat_interleave(num_groups_B)
        candidates_B = torch.zeros_like(layout.lengths_B).index_add(0, sequence_G, group_sizes_G)
        contextual_T, history_T = _parts(layout, num_contextual_B, candidates_B, "group_sizes_G of sequence ")
        a_T = torch.maximum(torch.minimum(layout.position_T + 1, history_T), contextual_T)
        # On the host, where the sizes are: a list begins where the lists before it in its sequence end.
        history_B, ends_G = layout.lengths_B - candidates_B, group_sizes_G.cumsum(0)
        last_G = (history_B - candidates_B.cumsum(0) + candidates_B)[sequence_G] + ends_G
        bounds_2G = torch.stack([last_G - group_sizes_G, last_G])
        bounds_2N = torch.repeat_interleave(bounds_2G, group_sizes_G, 1).to(a_T.device, non_blocking=True)
        candidate_T = layout.position_T >= history_T
        b_T = c_T = a_T
        if bounds_2N.shape[1]:
            # The n-th candidate of the batch takes the n-th column; the other tokens take any, and keep their a.
            place_T = (candidate_T.cumsum(0) - 1).clamp(min=0)
            b_T, c_T = torch.where(candidate_T, bounds_2N[:, place_T], a_T).unbind()
        return cls(a_T, b_T, c_T, torch.zeros_like(candidate_T))

    @classmethod
    def sliding_window(
        cls,
        layout: JaggedLayout,
        window: int,
        *,
        num_contextual_B: Tensor | None = None,
        num_candidates_B: Tensor | None = None,
    ) -> IntervalMask:
        """Row i sees the columns j with ``0 <= i - j < window``, and the contextual tokens from anywhere.

        A candidate sees itself and what the token right behind the history would see; its distance does not count the
        candidates before it, so it does not depend on them. Contextual tokens see each other fully.

        The same window has other numbers elsewhere. Meta's ``max_attn_len`` is the farthest distance, so `window` is
        ``max_attn_len + 1``; its contextual tokens are all one step before the history and drop out of the window of
        far rows, and they see the whole history, which ours never do. NVIDIA's ``window_size=(left, 0)`` is a farthest
        distance too, so `window` is ``left + 1``; ``left = -1`` is no window, and it takes neither contextual tokens
        nor candidates beside one.

        Args:
            layout: lengths of the sequences, candidates included.
            window: columns in the window, the row's own among them.
            num_contextual_B: contextual tokens at the start of each sequence, int64, on the host; None means none.
            num_candidates_B: candidates at the end of each sequence, int64, on the host; None means none.

        Raises:
            ValueError: a window below 1, or counts that do not fit the sequences, by name.
        """
        nobody_T = torch.zeros_like(layout.position_T, dtype=torch.bool)
        return cls._local(layout, window, 0, nobody_T, *_parts(layout, num_contextual_B, num_candidates_B))

    @classmethod
    def semi_local(
        cls,
        layout: JaggedLayout,
        window: int,
        *,
        num_full: int = 0,
        num_prefix: int = 0,
        num_contextual_B: Tensor | None = None,
        num_candidates_B: Tensor | None = None,
    ) -> IntervalMask:
        """A sliding window, which the first tokens reach past as columns, the last ones as rows, or both.

        Two things bear the name. In the paper of ULTRA-HSTU (arXiv 2602.16986) every row sees a local window and a
        global one, the oldest tokens: `num_prefix`. In Meta's code the rows beside the window are few and last: with
        ``min_full_attn_seq_len`` (``full_attn_size``) the last tokens of the history see all before them: `num_full`.
        Candidates see the whole history here, as they do there.

        Args:
            layout: lengths of the sequences, candidates included.
            window: columns in the window, the row's own among them; see `sliding_window`.
            num_full: the last tokens of the history that see all before them.
            num_prefix: the first tokens of the history, behind the contextual ones, that all later rows see.
            num_contextual_B: contextual tokens at the start of each sequence, int64, on the host; None means none.
            num_candidates_B: candidates at the end of each sequence, int64, on the host; None means none.

        Raises:
            ValueError: a window below 1, a negative number, or counts that do not fit the sequences, by name.
        """
        for name, value in (("num_full", num_full), ("num_prefix", num_prefix)):
            if value < 0:
                raise ValueError(f"{name}={value}: expected at least 0")
        contextual_T, history_T = _parts(layout, num_contextual_B, num_candidates_B)
        full_T = layout.position_T >= history_T - num_full
        return cls._local(layout, window, num_prefix, full_T, contextual_T, history_T)

    @classmethod
    def _local(
        cls,
        layout: JaggedLayout,
        window: int,
        num_prefix: int,
        full_T: Tensor,
        contextual_T: Tensor,
        history_T: Tensor,
    ) -> IntervalMask:
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1, the row's own column")
        # A contextual row ends where the contextual tokens do, a candidate where the history does.
        c_T = torch.maximum(torch.minimum(layout.position_T + 1, history_T), contextual_T)
        a_T = torch.minimum(contextual_T + num_prefix, c_T)
        start_T = torch.minimum(layout.position_T, history_T) - (window - 1)
        b_T = torch.where(full_T, a_T, torch.maximum(a_T, start_T))
        return cls(a_T, b_T, c_T, layout.position_T >= history_T)

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


def _parts(
    layout: JaggedLayout,
    num_contextual_B: Tensor | None,
    num_candidates_B: Tensor | None,
    name: str = "num_candidates_B",
) -> tuple[Tensor, Tensor]:
    """Where the contextual tokens and where the history of each token's sequence end, from checked host counts."""
    nothing_B = torch.zeros_like(layout.lengths_B)
    contextual_B = nothing_B if num_contextual_B is None else num_contextual_B
    candidates_B = nothing_B if num_candidates_B is None else num_candidates_B
    contextual_T = _per_token(layout, contextual_B, "num_contextual_B")
    candidates_T = _per_token(layout, candidates_B, name)
    if bool((contextual_B + candidates_B > layout.lengths_B).any()):
        i = int((contextual_B + candidates_B > layout.lengths_B).nonzero()[0])
        raise ValueError(
            f"num_contextual_B[{i}]={int(contextual_B[i])}: too many beside {int(candidates_B[i])} candidates; the "
            f"sequence has {int(layout.lengths_B[i])} tokens"
        )
    return contextual_T, layout.offsets_B1.diff()[layout.sequence_T] - candidates_T
