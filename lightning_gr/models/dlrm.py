"""DLRM's network as a baseline: a candidate's features, the user's, and the history pooled, crossed by dot products.

Naumov et al., arXiv 1906.00091; pooling by target attention as in DIN (Zhou et al., arXiv 1706.06978), with a softmax.

Shape suffixes: T tokens of all sequences together, N candidates, K history tokens, F vectors a candidate, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch, TokenKind
from lightning_gr.layers.multi_task import linear_flops
from lightning_gr.models.ranking_tokens import RankingTokens, num_earlier, token_places
from lightning_gr.models.sequence_cost import half_candidates
from lightning_gr.ops.hstu_attention import attention_flops, hstu_attention
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ranking_features import RankingFeatures

Pooling = Literal["none", "sum", "target_attention"]


class DLRM(nn.Module):
    """Scores each candidate by itself: no layer lets one event of the history see another.

    Args:
        dim: width of the vectors that are crossed.
        hidden_dims: widths of the MLP over the crossed features; the last one is the state's.
        pooling: what becomes of the history that a candidate sees: nothing, its sum, or a sum weighted by attention of
            the candidate to it.
        num_heads: heads of the target attention.
        dropout: inside the MLP.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        hidden_dims: tuple[int, ...] = (256, 128),
        pooling: Pooling = "target_attention",
        num_heads: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(get_args(Pooling))}")
        if dim % num_heads:
            raise ValueError(f"dim={dim}: not divisible by num_heads={num_heads}; change one")
        if not hidden_dims:
            raise ValueError("hidden_dims: expected at least one width")
        self.dim, self.pooling, self.num_heads = hidden_dims[-1], pooling, num_heads
        self.width, self.hidden_dims, self.dropout = dim, hidden_dims, dropout
        self.tokens: RankingTokens | None = None

    @property
    def differentiable_twice(self) -> bool:
        """Whether no fused operator is part of it, so that second-order meta learning works with any backend."""
        return self.pooling != "target_attention"

    def build(self, features: RankingFeatures, embedding_dim: int) -> None:
        """Makes the layers whose sizes the data decides."""
        self.tokens = RankingTokens(features=features, embedding_dim=embedding_dim, dim=self.width)
        vectors = 1 + features.num_contextual + (self.pooling != "none")
        attends = self.pooling == "target_attention"
        self.query = nn.Linear(self.width, self.width) if attends else None
        self.key = nn.Linear(self.width, self.width) if attends else None
        self.value = nn.Linear(self.width, self.width) if attends else None
        layers: list[nn.Module] = []
        width = vectors * self.width + vectors * (vectors - 1) // 2
        for hidden in self.hidden_dims:
            layers += [nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(self.dropout)]
            width = hidden
        self.top = nn.Sequential(*layers)
        self.register_buffer("pairs", torch.triu_indices(vectors, vectors, 1), persistent=False)

    @override
    def forward(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """States of all candidates (N, D), in the batch's order."""
        assert self.tokens is not None
        tokens_TD = self.tokens(embedded, batch)
        counts_B4 = batch.token_counts_B4
        candidate = token_places(batch, TokenKind.CANDIDATE).to(tokens_TD.device, non_blocking=True)
        sequence_N = batch.layout.sequence_T[candidate]
        vectors = [tokens_TD[candidate]]
        for place in range(self.tokens.features.num_contextual):
            vectors.append(tokens_TD[batch.layout.offsets_B1[sequence_N] + place])
        if self.pooling != "none":
            history = (
                token_places(batch, TokenKind.STATIC),
                token_places(batch, TokenKind.REALTIME),
            )
            at_K = torch.cat(history).sort().values.to(tokens_TD.device, non_blocking=True)
            static_N = counts_B4[:, TokenKind.STATIC].to(tokens_TD.device, non_blocking=True)[sequence_N]
            seen_N = static_N + num_earlier(batch)[candidate]
            layout = JaggedLayout.from_lengths(
                counts_B4[:, TokenKind.STATIC] + counts_B4[:, TokenKind.REALTIME], tokens_TD.device
            )
            vectors.append(self._pooled(tokens_TD[candidate], tokens_TD[at_K], seen_N, sequence_N, layout, batch))
        vectors_NFD = torch.stack(vectors, 1)
        dots_NFF = vectors_NFD @ vectors_NFD.transpose(1, 2) * self.width**-0.5
        crossed = dots_NFF[:, self.pairs[0], self.pairs[1]]  # type: ignore[index]
        states_ND: Tensor = self.top(torch.cat([vectors_NFD.flatten(1), crossed], 1))
        return states_ND

    def _pooled(
        self,
        candidates_ND: Tensor,
        history_KD: Tensor,
        seen_N: Tensor,
        sequence_N: Tensor,
        layout: JaggedLayout,
        batch: SequenceBatch,
    ) -> Tensor:
        """What each candidate sees of its history, the first `seen_N` events, as one vector."""
        if self.query is None or self.key is None or self.value is None:
            # A sum over a prefix is a difference of running sums; float64 keeps what cancels.
            sums = torch.cat([history_KD.new_zeros(1, self.width).double(), history_KD.double().cumsum(0)])
            first_N = layout.offsets_B1[sequence_N]
            return ((sums[first_N + seen_N] - sums[first_N]) / (1 + seen_N[:, None]) ** 0.5).to(history_KD.dtype)
        nothing = torch.zeros_like(seen_N)
        heads = (self.num_heads, -1)
        pooled_NHV = hstu_attention(
            self.query(candidates_ND).unflatten(-1, heads),
            self.key(history_KD).unflatten(-1, heads),
            self.value(history_KD).unflatten(-1, heads),
            q_layout=JaggedLayout.from_lengths(batch.token_counts_B4[:, TokenKind.CANDIDATE], history_KD.device),
            k_layout=layout,
            mask=IntervalMask(seen_N, seen_N, seen_N, nothing.bool()),
            scale=1.0,
            activation="softmax",
        )
        return pooled_NHV.flatten(1)

    def visible_pairs(self, batch: SequenceBatch) -> Tensor:
        """Pairs of a real sample's candidate and an event before it, an int64 number on the batch's device."""
        counts_B4 = batch.token_counts_B4 * (batch.sample_ids_B != PADDING_SAMPLE_ID)[:, None]
        is_real = torch.repeat_interleave(counts_B4[:, TokenKind.CANDIDATE] > 0, batch.token_counts_B4[:, 3])
        candidate = token_places(batch, TokenKind.CANDIDATE)[is_real].to(batch.device, non_blocking=True)
        fixed = (counts_B4[:, TokenKind.STATIC] * counts_B4[:, TokenKind.CANDIDATE]).sum()
        return num_earlier(batch)[candidate].sum() + int(fixed)

    def flops(self, counts_4: Sequence[int], num_visible_pairs: int) -> int:
        """Forward floating-point operations.

        Args:
            counts_4: tokens of each kind.
            num_visible_pairs: pairs of a candidate and an event of its history.
        """
        assert self.tokens is not None
        _, static, realtime, candidates = counts_4
        vectors = 1 + self.tokens.features.num_contextual + (self.pooling != "none")
        total = self.tokens.flops(counts_4) + linear_flops(self.top, candidates)
        total += 2 * candidates * vectors**2 * self.width
        if self.query is not None and self.key is not None and self.value is not None:
            total += linear_flops(self.query, candidates)
            total += linear_flops(self.key, static + realtime) + linear_flops(self.value, static + realtime)
            head = self.width // self.num_heads
            total += attention_flops(num_visible_pairs, num_heads=self.num_heads, qk_dim=head, v_dim=head)
        return total

    def sequence_cost(self) -> SequenceCost:
        """Forward floating-point operations of a sample by its number of tokens, for balancing.

        Half of the tokens are taken as candidates, each of which sees the events before it.
        """
        return half_candidates(self.flops, pairs_share=1 / 8)
