"""RankingTokens: contextual, history and candidate tokens out of looked-up features.

MTGR (arXiv 2505.18654), section 3.2: each user scalar is a token; each event of the history and each candidate is a
token made by an MLP over its concatenated features. The paper has separate MLPs for static and real-time history; here
they share one, and candidates have their own.

Shape suffixes: B sequences, T tokens of all sequences together, X event tokens (T without the contextual ones), E width
of an embedding, D model width, W columns of numeric features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.batch import SequenceBatch, TokenKind
from lightning_gr.layers.multi_task import linear_flops
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.jagged_concat import jagged_concat, jagged_split
from lightning_gr.ranking_features import RankingFeatures


class RankingTokens(nn.Module):
    """Makes tokens of one width.

    Args:
        features: what batches hold.
        embedding_dim: width of the looked-up embeddings.
        dim: width of the tokens.
    """

    def __init__(self, *, features: RankingFeatures, embedding_dim: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        common = len(features.tokens) * embedding_dim + features.width

        def mlp(width: int) -> nn.Module:
            return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

        self.contextual = nn.ModuleDict({name: nn.Linear(embedding_dim, dim) for name in features.contextual})
        self.contextual_numbers = nn.Linear(features.contextual_width, dim) if features.contextual_width else None
        self.history = mlp(common + features.history_width)
        self.candidate = mlp(common + features.candidate_width)

    @override
    def forward(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """Tokens (T, D) in the batch's order.

        Args:
            embedded: by sparse feature, an embedding for each value of it in the batch.
            batch: the batch.
        """
        layouts = [
            JaggedLayout.from_lengths(batch.token_counts_B4[:, kind].contiguous(), batch.device) for kind in TokenKind
        ]
        parts = [[x] for x in jagged_split(batch.dense["numbers"], layouts)]
        for name, kinds in (("actions", (TokenKind.STATIC, TokenKind.REALTIME)), ("cross", (TokenKind.CANDIDATE,))):
            if name in batch.dense:
                of_kinds = jagged_split(batch.dense[name], layouts)
                for kind in kinds:
                    parts[kind].append(of_kinds[kind])
        event_XE = torch.cat([embedded[name] for name in self.features.tokens], 1)
        tokens = [event_XE.new_zeros(0, self.dim)]
        if self.features.num_contextual:
            tokens = [self._contextual(embedded, batch).flatten(0, 1)]
        for kind, of_kind in zip(list(TokenKind)[1:], jagged_split(event_XE, layouts[1:]), strict=True):
            layer = self.candidate if kind == TokenKind.CANDIDATE else self.history
            tokens.append(layer(torch.cat([of_kind, *(x.to(of_kind.dtype) for x in parts[kind])], 1)))
        # Autocast gives linear layers and sums dtypes of their own.
        joined_TD, _ = jagged_concat([x.to(tokens[-1].dtype) for x in tokens], layouts)
        return joined_TD

    def _contextual(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """(sequences that are not padding, contextual tokens, D)."""
        real_B = batch.token_counts_B4[:, TokenKind.CONTEXTUAL] > 0
        parts = []
        for name, layer in self.contextual.items():
            lengths_B = batch.features[name].lengths()
            pooled_BE = embedded[name].new_zeros(batch.num_sequences, embedded[name].shape[1])
            sequence = torch.repeat_interleave(lengths_B, output_size=embedded[name].shape[0])
            pooled_BE = pooled_BE.index_add(0, sequence, embedded[name]) / lengths_B.clamp(min=1)[:, None]
            parts.append(layer(pooled_BE))
        if self.contextual_numbers is not None:
            parts.append(self.contextual_numbers(batch.dense["contextual"].to(parts[0].dtype)))
        return torch.stack(parts, 1)[real_B.to(parts[0].device)]

    def flops(self, counts_4: Sequence[int]) -> int:
        """Forward floating-point operations of the tokens of each kind; of contextual ones, for whole sequences."""
        contextual, static, realtime, candidates = counts_4
        made = linear_flops(self.history, static + realtime) + linear_flops(self.candidate, candidates)
        if self.features.num_contextual:
            num_sequences = contextual // self.features.num_contextual
            made += linear_flops(self.contextual, num_sequences)
            if self.contextual_numbers is not None:
                made += linear_flops(self.contextual_numbers, num_sequences)
        return made


def token_places(batch: SequenceBatch, kind: TokenKind) -> Tensor:
    """Positions in the batch of the tokens of a kind, int64, on the host."""
    kinds = torch.arange(4).repeat(batch.num_sequences)
    return (torch.repeat_interleave(kinds, batch.token_counts_B4.flatten()) == kind).nonzero()[:, 0]


def candidate_places(batch: SequenceBatch) -> Tensor:
    """Positions in the batch of all candidates, int64 on the device."""
    return token_places(batch, TokenKind.CANDIDATE).to(batch.device, non_blocking=True)


def num_earlier(batch: SequenceBatch) -> Tensor:
    """For each token how many real-time tokens of its sequence have an earlier time, int64 (T,).

    Real-time tokens stand in the order of time. Equal times are not earlier.
    """
    assert batch.timestamps_T is not None
    times_T, layout = batch.timestamps_T, batch.layout
    realtime = token_places(batch, TokenKind.REALTIME).to(times_T.device, non_blocking=True)
    # Sequence and time in one number, so that one search serves all sequences; times fit into 41 bits.
    times_T = (times_T - times_T.min().clamp(max=0)).clamp(max=(1 << 41) - 1) if len(times_T) else times_T
    keys_T = (layout.sequence_T << 41) + times_T
    counts_B = batch.token_counts_B4[:, TokenKind.REALTIME].to(times_T.device, non_blocking=True)
    before_B = counts_B.cumsum(0) - counts_B
    found_T = torch.searchsorted(keys_T[realtime], keys_T) - before_B[layout.sequence_T]
    return found_T.clamp(min=0)


def moments(batch: SequenceBatch, num_earlier_T: Tensor) -> Tensor:
    """Positions by time, int64 (T,): a real-time token or candidate stands after all tokens of an earlier time.

    So a candidate's position does not depend on the candidates beside it, and it shares that of the event it became.
    """
    fixed_B = batch.token_counts_B4[:, : TokenKind.REALTIME].sum(1)
    fixed_T = fixed_B.to(num_earlier_T.device, non_blocking=True)[batch.layout.sequence_T]
    place_T = batch.layout.position_T
    return torch.where(place_T < fixed_T, place_T, fixed_T + num_earlier_T)
