"""MTGR's network: HSTU blocks over contextual, history and candidate tokens (Meituan, arXiv 2505.18654, section 3).

Shape suffixes: T tokens of all sequences together, N candidates, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch, TokenKind
from lightning_gr.layers.hstu import HSTUEncoder
from lightning_gr.layers.micro_batches import encode_candidates
from lightning_gr.models.ranking_tokens import RankingTokens, candidate_places, moments, num_earlier
from lightning_gr.models.sequence_cost import half_candidates
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ranking_features import RankingFeatures

Mask = Literal["dynamic", "static", "causal"]


class MTGR(nn.Module):
    """Encodes candidates together with the user's context and history, under the dynamic mask.

    A candidate sees the context, what happened before it, and itself; so its logit does not depend on the candidates
    beside it. The paper names no bias of the attention; ours, by time difference and by position, can be left out.
    Positions are moments: a candidate stands after what happened before it. The norm behind the last block sees
    candidates alone, so it has no groups.

    Args:
        dim: model width.
        num_layers: HSTU blocks.
        num_heads: heads a block.
        max_length: most tokens of a sample, all its candidates counted as one; its inverse is the scale of the
            attention, unless `scale` says it.
        dropout: on the input and on each block's output.
        time_bias: whether attention has a bias by time difference.
        position_bias: whether attention has a bias by how many events lie between; or `recency`, by which heads look at
            the last 1, 4, 16 or 64 of them at first.
        scale: factor of the attention weights; None means ``1 / max_length``.
        recompute: computes each layer's activations again in backward instead of keeping them; the results are the
            same.
        group_norm: contextual, static, real-time and candidate tokens have affine parameters of their own in the norms
            of every block (group layer norm, eq. 5-6); False is plain layer norm, the paper's ablation.
        mask: `dynamic` is the paper's: what happened before. `static` shows real-time tokens and candidates the context
            and the static history alone, besides themselves. `causal` is the paper's ablation: while training, a token
            sees all that stand before it, so candidates see each other and later events; validation, test and predict
            keep to `dynamic`.
        separate_histories: static and real-time history have an MLP each, as in the paper; False shares one.

    Raises:
        ValueError: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        num_layers: int = 3,
        num_heads: int = 2,
        max_length: int = 512,
        dropout: float = 0.1,
        time_bias: bool = True,
        position_bias: bool | Literal["recency"] = True,
        scale: float | None = None,
        recompute: bool = False,
        group_norm: bool = True,
        mask: Mask = "dynamic",
        separate_histories: bool = True,
    ) -> None:
        super().__init__()
        if mask not in get_args(Mask):
            raise ValueError(f"mask={mask!r}: expected one of {', '.join(get_args(Mask))}")
        if mask == "causal":
            rank_zero_warn(
                "mask='causal': while training, candidates see other candidates and later events; validation, test and "
                "predict use the dynamic mask, so their scores are of another mask than the model is trained with"
            )
        self.dim, self.max_length, self.position_bias = dim, max_length, bool(position_bias)
        self.group_norm, self.mask, self.separate_histories = group_norm, mask, separate_histories
        self.encoder = HSTUEncoder(
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            max_length=max_length,
            dropout=dropout,
            input_position_embedding=False,
            position_bias=position_bias,
            time_bias=time_bias,
            scale=scale,
            recompute=recompute,
            num_norm_groups=len(TokenKind) if group_norm else 1,
        )
        self.norm = nn.LayerNorm(dim)
        self.tokens: RankingTokens | None = None

    def build(self, features: RankingFeatures, embedding_dim: int) -> None:
        """Makes the layers whose sizes the data decides."""
        self.tokens = RankingTokens(
            features=features, embedding_dim=embedding_dim, dim=self.dim, separate_histories=self.separate_histories
        )

    def attention_inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """What the encoder is told of a batch beside its tokens; `lightning-gr mask` shows it."""
        earlier_T = num_earlier(batch)
        if self.mask == "causal" and self.training:
            mask = IntervalMask.causal(batch.layout)
        else:
            seen_T = torch.zeros_like(earlier_T) if self.mask == "static" else earlier_T
            mask = IntervalMask.dynamic(batch.layout, batch.token_counts_B4, seen_T)
        return {
            "layout": batch.layout,
            "mask": mask,
            "times_T": batch.timestamps_T,
            "positions_T": moments(batch, earlier_T) if self.position_bias else None,
            "groups_T": batch.kind_T if self.group_norm else None,
            # Candidates stand at moments of the history or behind it, however many they are.
            "num_positions": int(batch.token_counts_B4[:, : TokenKind.CANDIDATE].sum(1).max()) + 1,
        }

    @override
    def forward(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """States of all candidates (N, D), in the batch's order."""
        assert self.tokens is not None
        states_TD = self.encoder(self.tokens(embedded, batch), **self.attention_inputs(batch))
        states_ND: Tensor = self.norm(states_TD[candidate_places(batch)])
        return states_ND

    @torch.no_grad()
    def in_micro_batches(self, embedded: Mapping[str, Tensor], batch: SequenceBatch, micro_batch: int) -> Tensor:
        """As `forward`, for scoring, at most so many tokens at once (M-FALCON, arXiv 2402.17152, section 3.4)."""
        assert self.tokens is not None
        states_ND: Tensor = self.norm(
            encode_candidates(
                self.encoder,
                self.tokens(embedded, batch, rows_at_once=micro_batch),
                micro_batch=micro_batch,
                num_candidates_B=batch.token_counts_B4[:, TokenKind.CANDIDATE],
                **self.attention_inputs(batch),
            )
        )
        return states_ND

    def visible_pairs(self, batch: SequenceBatch) -> Tensor:
        """Pairs of tokens of real samples that the mask shows, an int64 number on the batch's device."""
        mask = self.attention_inputs(batch)["mask"]
        real_B = (batch.sample_ids_B != PADDING_SAMPLE_ID).to(batch.device, non_blocking=True)
        pairs: Tensor = (mask.num_visible_B(batch.layout, batch.layout) * real_B).sum()
        return pairs

    def recomputed_flops(self, counts_4: Sequence[int], num_visible_pairs: int) -> int:
        """What backward computes a second time; arguments as of `flops`."""
        return self.encoder.recomputed_flops(sum(counts_4), num_visible_pairs)

    def flops(self, counts_4: Sequence[int], num_visible_pairs: int) -> int:
        """Forward floating-point operations.

        Args:
            counts_4: tokens of each kind.
            num_visible_pairs: pairs of tokens that the mask shows.
        """
        made = 0 if self.tokens is None else self.tokens.flops(counts_4)
        return made + self.encoder.flops(sum(counts_4), num_visible_pairs)

    def sequence_cost(self) -> SequenceCost:
        """Forward floating-point operations of a sample by its number of tokens, for balancing.

        Half of the tokens are taken as candidates and the mask as causal. A long static history sees itself whole and
        has up to twice the pairs; a sample without static history has half of them.
        """
        return half_candidates(self.flops, pairs_share=1 / 2)
