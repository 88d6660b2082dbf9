"""RankingTokens: contextual, history and candidate tokens out of looked-up features.

MTGR (arXiv 2505.18654), section 3.2: each user scalar is a token; each event of the history and each candidate is a
token made by an MLP over its concatenated features. Candidates have an MLP of their own; static and real-time history
share one, or have one each as in the paper.

Shape suffixes: B sequences, T tokens of all sequences together, R tokens of one kind, V looked-up values of a feature,
E width of an embedding, D model width, W columns of numeric features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.batch import SequenceBatch, TokenKind
from lightning_gr.layers.dense_normalisation import DenseNormalisation
from lightning_gr.layers.multi_task import linear_flops
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.jagged_concat import jagged_concat, jagged_split
from lightning_gr.ranking_features import RankingFeatures

EVENT_KINDS = (TokenKind.STATIC, TokenKind.REALTIME, TokenKind.CANDIDATE)
HISTORY_KINDS = (TokenKind.STATIC, TokenKind.REALTIME)


class RankingTokens(nn.Module):
    """Makes tokens of one width.

    Args:
        features: what batches hold; statistics of dense features become buffers.
        embedding_dim: width of the looked-up embeddings, where features say none.
        dim: width of the tokens.
        separate_histories: whether static and real-time history have an MLP each.
    """

    def __init__(
        self, *, features: RankingFeatures, embedding_dim: int, dim: int, separate_histories: bool = False
    ) -> None:
        super().__init__()
        self.features, self.dim = features, dim

        def mlp(width: int) -> nn.Module:
            return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

        def widths(names: Mapping[str, int]) -> int:
            return sum(features.dim_of(name, embedding_dim) for name in names)

        common = widths(features.tokens) + features.width
        history = common + widths(features.history_tokens) + features.history_width
        self.contextual = nn.ModuleDict(
            {_module_name(name): nn.Linear(features.dim_of(name, embedding_dim), dim) for name in features.contextual}
        )
        self.contextual_numbers = nn.Linear(features.contextual_width, dim) if features.contextual_width else None
        self.history = mlp(history)
        self.candidate = mlp(common + widths(features.candidate_tokens) + features.candidate_width)
        self.realtime = mlp(history) if separate_histories else None
        self.normalisation = nn.ModuleDict(
            {
                name: DenseNormalisation(
                    means=[x.mean for x in columns], stds=[x.std for x in columns], logs=[x.log for x in columns]
                )
                for name, columns in features.normalisation.items()
            }
        )

    def layer(self, kind: TokenKind) -> nn.Module:
        """The MLP that makes tokens of a kind of event."""
        if kind == TokenKind.CANDIDATE:
            return self.candidate
        return self.realtime if kind == TokenKind.REALTIME and self.realtime is not None else self.history

    @override
    def forward(
        self, embedded: Mapping[str, Tensor], batch: SequenceBatch, *, rows_at_once: int | None = None
    ) -> Tensor:
        """Tokens (T, D) in the batch's order.

        Args:
            embedded: by sparse feature, an embedding for each value of it in the batch.
            batch: the batch.
            rows_at_once: most tokens of events that are made at a time; None makes all of a kind at once.
        """
        if rows_at_once is not None:
            return self._by_rows(embedded, batch, rows_at_once)
        layouts = _layouts(batch)
        columns = self._columns(embedded, batch, layouts)
        tokens = [self.layer(kind)(torch.cat(parts, 1)) for kind, parts in columns.items()]
        contextual = tokens[-1].new_zeros(0, self.dim)
        if self.features.num_contextual:
            contextual = self._contextual(embedded, batch).flatten(0, 1).to(tokens[-1].dtype)
        # Autocast gives linear layers and sums dtypes of their own.
        joined_TD, _ = jagged_concat([contextual, *tokens], layouts)
        return joined_TD

    def _by_rows(self, embedded: Mapping[str, Tensor], batch: SequenceBatch, rows_at_once: int) -> Tensor:
        """As `forward`; each token is written where it belongs as soon as it is made."""
        tokens_TD: Tensor | None = None
        for kind, columns in self._columns(embedded, batch, _layouts(batch)).items():
            places = token_places(batch, kind).to(batch.device, non_blocking=True)
            for at, *parts in zip(*(x.split(rows_at_once) for x in (places, *columns)), strict=True):
                made = self.layer(kind)(torch.cat(parts, 1))
                tokens_TD = made.new_empty(batch.num_tokens, self.dim) if tokens_TD is None else tokens_TD
                tokens_TD[at] = made
        assert tokens_TD is not None
        if self.features.num_contextual:
            places = token_places(batch, TokenKind.CONTEXTUAL).to(batch.device, non_blocking=True)
            tokens_TD[places] = self._contextual(embedded, batch).flatten(0, 1).to(tokens_TD.dtype)
        return tokens_TD

    def _columns(
        self, embedded: Mapping[str, Tensor], batch: SequenceBatch, layouts: Sequence[JaggedLayout]
    ) -> dict[TokenKind, list[Tensor]]:
        """By kind of event, the columns of its MLP's input, each (R, some)."""
        features = self.features
        columns: dict[TokenKind, list[Tensor]] = {kind: [] for kind in EVENT_KINDS}
        groups = ((features.tokens, EVENT_KINDS), (features.history_tokens, HISTORY_KINDS))
        for names, kinds in (*groups, (features.candidate_tokens, (TokenKind.CANDIDATE,))):
            whole = [embedded[name] for name in names if f"{name}.count" not in batch.dense]
            if whole:
                of_kinds = jagged_split(torch.cat(whole, 1), [layouts[kind] for kind in kinds])
                for kind, x_RE in zip(kinds, of_kinds, strict=True):
                    columns[kind].append(x_RE)
            for name in names:
                if f"{name}.count" in batch.dense:
                    pooled = _pooled(
                        embedded[name], batch.dense[f"{name}.count"].long(), mean=features.pooling[name] == "mean"
                    )
                    of_all = jagged_split(pooled, layouts)
                    for kind in kinds:
                        columns[kind].append(of_all[kind])
        dtype = columns[TokenKind.CANDIDATE][0].dtype
        for name, kinds in (
            ("numbers", EVENT_KINDS),
            ("actions", HISTORY_KINDS),
            ("cross", (TokenKind.CANDIDATE,)),
        ):
            if name in batch.dense:
                of_all = jagged_split(self._normalised(name, batch), layouts)
                for kind in kinds:
                    columns[kind].append(of_all[kind].to(dtype))
        return columns

    def _normalised(self, name: str, batch: SequenceBatch) -> Tensor:
        """Numeric columns of a batch, normalised where they are to be."""
        numbers = batch.dense[name]
        return self.normalisation[name](numbers) if name in self.normalisation else numbers

    def _contextual(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """(sequences that are not padding, contextual tokens, D)."""
        real_B = batch.token_counts_B4[:, TokenKind.CONTEXTUAL] > 0
        parts = []
        for name in self.features.contextual:
            layer = self.contextual[_module_name(name)]
            mean = self.features.pooling.get(name, "mean") == "mean"
            parts.append(layer(_pooled(embedded[name], batch.features[name].lengths(), mean=mean)))
        if self.contextual_numbers is not None:
            numbers = self._normalised("contextual", batch)
            parts.append(self.contextual_numbers(numbers.to(self.contextual_numbers.weight.dtype)))
        return torch.stack(parts, 1)[real_B.to(parts[0].device)]

    def flops(self, counts_4: Sequence[int]) -> int:
        """Forward floating-point operations of the tokens of each kind; of contextual ones, for whole sequences."""
        contextual = counts_4[TokenKind.CONTEXTUAL]
        made = sum(linear_flops(self.layer(kind), counts_4[kind]) for kind in EVENT_KINDS)
        if self.features.num_contextual:
            num_sequences = contextual // self.features.num_contextual
            made += linear_flops(self.contextual, num_sequences)
            if self.contextual_numbers is not None:
                made += linear_flops(self.contextual_numbers, num_sequences)
        return made


def _layouts(batch: SequenceBatch) -> list[JaggedLayout]:
    """Of the tokens of each kind."""
    return [JaggedLayout.from_lengths(batch.token_counts_B4[:, kind].contiguous(), batch.device) for kind in TokenKind]


def _pooled(values_VE: Tensor, counts: Tensor, *, mean: bool) -> Tensor:
    """The sum or mean (rows, E) of so many values a row; 0 for none."""
    of_row = torch.repeat_interleave(counts, output_size=values_VE.shape[0])
    pooled = values_VE.new_zeros(counts.shape[0], values_VE.shape[1]).index_add(0, of_row, values_VE)
    return pooled / counts.clamp(min=1)[:, None] if mean else pooled


def _module_name(feature: str) -> str:
    """A feature's name as a child of a `ModuleDict`, which takes no dots and no names of its own attributes."""
    name = feature.replace(".", ":")
    return f"{name}:" if hasattr(nn.ModuleDict(), name) else name


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
