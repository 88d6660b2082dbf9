"""HSTU blocks over jagged sequences (Zhai et al., arXiv 2402.17152, section 3).

Shape suffixes: T tokens of all sequences together, D model width, E width of the projection, H heads, P rows of the
position table, N time buckets.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.layers.encoder_input import entered_tokens
from lightning_gr.layers.group_layer_norm import GroupLayerNorm, affine_rows
from lightning_gr.layers.recompute import recomputed
from lightning_gr.ops.group_layer_norm import group_layer_norm
from lightning_gr.ops.hstu_attention import attention_flops, hstu_attention
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.uvqk_projection import uvqk_projection

_INIT_STD = 0.02


def hstu_layer_flops(
    num_tokens: int, num_visible_pairs: int, *, dim: int, num_heads: int, qk_dim: int, v_dim: int
) -> int:
    """Forward floating-point operations of one layer: two projections and the attention over visible pairs."""
    projections = 2 * num_tokens * dim * num_heads * (2 * qk_dim + 2 * v_dim) + 2 * num_tokens * num_heads * v_dim * dim
    return projections + attention_flops(num_visible_pairs, num_heads=num_heads, qk_dim=qk_dim, v_dim=v_dim)


def recency_bias(max_length: int, num_heads: int) -> Tensor:
    """First values of a position table by which a head looks at the last tokens: ``3 exp(-distance / 4^h)``.

    The weights of pointwise attention do not compete, so from small random values every token of a long history weighs
    the same at first, and what the order of the last few tells is learned late (`docs/quality.md`, synthetic logs).
    Heads repeat the four reaches 1, 4, 16 and 64.

    Returns:
        (2 * max_length - 1, num_heads).
    """
    distance_P1 = torch.arange(1 - max_length, max_length).abs()[:, None]
    return 3.0 * torch.exp(-distance_P1 / 4.0 ** (torch.arange(num_heads) % 4))


class HSTULayer(nn.Module):
    """One block: ``x + W_o(dropout(U * norm(attention(Q, K, V))))`` with ``U, V, Q, K = silu(W norm(x))``.

    Args:
        dim: model width.
        num_heads: heads.
        qk_dim: width of a head's queries and keys.
        v_dim: width of a head's values and gate.
        max_length: longest sequence; sets the reach of the position bias.
        dropout: on the gated output.
        attention_dropout: on the attention weights.
        position_bias: first values of the bias by relative position, or False for none; see `HSTUEncoder`.
        time_buckets: buckets of the bias by time difference; 0 leaves it out.
        activation: of the attention.
        scale: factor of the attention weights.
        num_norm_groups: groups of tokens with affine parameters of their own in both norms; 1 is plain layer norm.
        bias_per_head: whether each head has bias tables of its own.
        affine: whether the norms have weights and biases, and the projection a bias.
        alpha: factor of the dot products; None means ``1 / sqrt(qk_dim)``.
        norm_eps: added to the variance in both norms.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        max_length: int,
        dropout: float,
        attention_dropout: float,
        position_bias: bool | Literal["recency"],
        time_buckets: int,
        activation: Literal["silu", "softmax"],
        scale: float,
        num_norm_groups: int = 1,
        bias_per_head: bool = True,
        affine: bool = True,
        alpha: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = num_heads, qk_dim, v_dim
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.activation: Literal["silu", "softmax"] = activation
        self.scale, self.alpha = scale, alpha
        self.input_norm = _norm(num_norm_groups, dim, affine=affine, eps=norm_eps)
        self.uvqk = nn.Linear(dim, num_heads * (2 * v_dim + 2 * qk_dim), bias=affine)
        self.attention_norm = _norm(num_norm_groups, num_heads * v_dim, affine=affine, eps=norm_eps)
        self.output = nn.Linear(num_heads * v_dim, dim)
        for linear in (self.uvqk, self.output):
            nn.init.normal_(linear.weight, std=_INIT_STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        tables = num_heads if bias_per_head else 1
        self.position_table_PH = (
            nn.Parameter(torch.randn(2 * max_length - 1, tables) * _INIT_STD) if position_bias else None
        )
        if self.position_table_PH is not None and position_bias == "recency":
            recency_PH = recency_bias(max_length, num_heads)
            self.position_table_PH.data += recency_PH if bias_per_head else recency_PH.mean(1, keepdim=True)
        self.time_table_NH = nn.Parameter(torch.randn(time_buckets, tables) * _INIT_STD) if time_buckets else None

    @override
    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: JaggedLayout,
        mask: IntervalMask,
        times_T: Tensor | None = None,
        request_times_T: Tensor | None = None,
        positions_T: Tensor | None = None,
        groups_T: Tensor | None = None,
    ) -> Tensor:
        """(T, D) to (T, D); see `HSTUEncoder.forward`."""
        v_width, qk_width = self.num_heads * self.v_dim, self.num_heads * self.qk_dim
        projected_TE = self.projected(x_TD, groups_T)
        u, v, q, k = projected_TE.split([v_width, v_width, qk_width, qk_width], dim=-1)
        attended = self.attended(
            q,
            k,
            v,
            q_layout=layout,
            mask=mask,
            q_times_T=times_T if request_times_T is None else request_times_T,
            k_times_T=times_T,
            q_positions_T=positions_T,
            k_positions_T=positions_T,
        )
        out: Tensor = x_TD + self.output(self.gated(attended, u, groups_T))
        return out

    def projected(
        self, x_TD: Tensor, groups_T: Tensor | None, part: Literal["u", "v", "q", "k"] | None = None
    ) -> Tensor:
        """``silu(W norm(x))``, (T, E): gates, values, queries and keys side by side, or one of them alone."""
        weight_ED: Tensor = self.uvqk.weight
        bias_E: Tensor | None = self.uvqk.bias
        bias_E = weight_ED.new_zeros(len(weight_ED)) if bias_E is None else bias_E
        if part is not None:
            v_width, qk_width = self.num_heads * self.v_dim, self.num_heads * self.qk_dim
            begin = {"u": 0, "v": v_width, "q": 2 * v_width, "k": 2 * v_width + qk_width}[part]
            rows = slice(begin, begin + (v_width if part in "uv" else qk_width))
            weight_ED, bias_E = weight_ED[rows], bias_E[rows]
        norm_weight_GD, norm_bias_GD = affine_rows(self.input_norm, x_TD)
        return uvqk_projection(
            x_TD,
            norm_weight_GD=norm_weight_GD,
            norm_bias_GD=norm_bias_GD,
            weight_ED=weight_ED,
            bias_E=bias_E,
            groups_T=groups_T,
            eps=self.input_norm.eps,
        )

    def attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_layout: JaggedLayout,
        k_layout: JaggedLayout | None = None,
        mask: IntervalMask,
        q_times_T: Tensor | None,
        k_times_T: Tensor | None,
        q_positions_T: Tensor | None,
        k_positions_T: Tensor | None,
    ) -> Tensor:
        """What queries (T, H * qk_dim) find among keys and values of as many heads; see `hstu_attention`."""
        attended_THV = hstu_attention(
            q.unflatten(-1, (self.num_heads, self.qk_dim)),
            k.unflatten(-1, (self.num_heads, self.qk_dim)),
            v.unflatten(-1, (self.num_heads, self.v_dim)),
            q_layout=q_layout,
            k_layout=k_layout,
            mask=mask,
            scale=self.scale,
            alpha=self.alpha,
            position_table_PH=_by_head(self.position_table_PH, self.num_heads),
            time_table_NH=_by_head(self.time_table_NH, self.num_heads) if k_times_T is not None else None,
            q_times_T=q_times_T if k_times_T is not None else None,
            k_times_T=k_times_T,
            q_positions_T=q_positions_T,
            k_positions_T=k_positions_T,
            activation=self.activation,
            dropout=self.attention_dropout,
            training=self.training,
        )
        if self.time_table_NH is not None and k_times_T is None:
            # Keeps the unused table in the graph: DDP waits for the gradient of every parameter.
            attended_THV = attended_THV + 0.0 * self.time_table_NH.sum()
        return attended_THV.flatten(1)

    def gated(self, attended: Tensor, u: Tensor, groups_T: Tensor | None) -> Tensor:
        """``dropout(u * norm(attended))``, (T, H * v_dim): what `output` takes."""
        weight_GD, bias_GD = affine_rows(self.attention_norm, attended)
        return group_layer_norm(
            attended,
            weight_GD=weight_GD,
            bias_GD=bias_GD,
            groups_T=groups_T,
            gate_TD=u,
            eps=self.attention_norm.eps,
            dropout=self.dropout,
            training=self.training,
        )


def _norm(num_groups: int, dim: int, *, affine: bool, eps: float) -> nn.LayerNorm | GroupLayerNorm:
    if num_groups == 1:
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)
    return GroupLayerNorm(num_groups=num_groups, dim=dim, eps=eps)


def _by_head(table: Tensor | None, num_heads: int) -> Tensor | None:
    """A bias table with a column for each head; those of a shared table are one."""
    return None if table is None else table.expand(-1, num_heads)


class HSTUEncoder(nn.Module):
    """A stack of HSTU blocks with learned input positions.

    Args:
        dim: model width, equal to the item embedding's.
        num_layers: blocks.
        num_heads: heads a block.
        qk_dim: width of a head's queries and keys; None means ``dim / num_heads``.
        v_dim: width of a head's values; None means ``dim / num_heads``.
        max_length: longest sequence in tokens.
        dropout: on the input and on each block's gated output.
        attention_dropout: on the attention weights.
        input_position_embedding: whether the input has a learned embedding by position.
        position_bias: whether attention has a bias by relative position. Its first values are small and random; or
            `recency`, by which heads look at the last 1, 4, 16 or 64 tokens at first.
        time_bias: whether attention has a bias by time difference, where the data has times.
        time_buckets: logarithmic buckets of the time bias.
        activation: `silu` is HSTU's, `softmax` SASRec's.
        scale: factor of the attention weights; None means ``1 / max_length``. Pinned, so that a user's outputs do not
            depend on batch mates.
        recompute: computes each layer's activations again in backward instead of keeping them; the results are the
            same.
        num_norm_groups: groups of tokens with affine parameters of their own in the norms of every layer (MTGR, arXiv
            2505.18654, eq. 5-6); 1 is plain layer norm.
        bias_per_head: whether each head has bias tables of its own; in Meta's code the heads of a layer share them.
            With `recency`, what they share begins at the mean of the four reaches.
        affine: whether the norms have weights and biases and the UVQK projection a bias; in Meta's code they have none.
        alpha: factor of the dot products; None means ``1 / sqrt(qk_dim)``. In Meta's code it is 1.
        norm_eps: added to the variance in the norms; 1e-6 in Meta's code.

    Raises:
        ValueError: a size that cannot work, by name.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        max_length: int = 200,
        dropout: float = 0.2,
        attention_dropout: float = 0.0,
        input_position_embedding: bool = True,
        position_bias: bool | Literal["recency"] = True,
        time_bias: bool = True,
        time_buckets: int = 128,
        activation: Literal["silu", "softmax"] = "silu",
        scale: float | None = None,
        recompute: bool = False,
        num_norm_groups: int = 1,
        bias_per_head: bool = True,
        affine: bool = True,
        alpha: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        sizes: dict[str, int | None] = {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}
        sizes |= {"qk_dim": qk_dim, "v_dim": v_dim, "max_length": max_length, "time_buckets": time_buckets}
        sizes |= {"num_norm_groups": num_norm_groups}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        if (qk_dim is None or v_dim is None) and dim % num_heads:
            raise ValueError(f"dim={dim}: not divisible by num_heads={num_heads}; change one, or give qk_dim and v_dim")
        if num_norm_groups > 1 and not affine:
            raise ValueError(
                f"affine=False: num_norm_groups={num_norm_groups} is about affine parameters; leave one of them out"
            )
        for name, factor in (("alpha", alpha), ("norm_eps", norm_eps)):
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"{name}={factor}: expected a number above 0")
        for name, rate in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name}={rate}: expected a probability in [0, 1)")
        self.dim, self.max_length, self.dropout, self.recompute = dim, max_length, dropout, recompute
        self.position_PD = nn.Parameter(torch.randn(max_length, dim) * _INIT_STD) if input_position_embedding else None
        self.layers = nn.ModuleList(
            HSTULayer(
                dim=dim,
                num_heads=num_heads,
                qk_dim=qk_dim or dim // num_heads,
                v_dim=v_dim or dim // num_heads,
                max_length=max_length,
                dropout=dropout,
                attention_dropout=attention_dropout,
                position_bias=position_bias,
                time_buckets=time_buckets if time_bias else 0,
                activation=activation,
                scale=1 / max_length if scale is None else scale,
                num_norm_groups=num_norm_groups,
                bias_per_head=bias_per_head,
                affine=affine,
                alpha=alpha,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )

    @override
    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: JaggedLayout,
        mask: IntervalMask,
        times_T: Tensor | None = None,
        request_times_T: Tensor | None = None,
        positions_T: Tensor | None = None,
        groups_T: Tensor | None = None,
        num_positions: int | None = None,
    ) -> Tensor:
        """Encodes the tokens of jagged sequences.

        Args:
            x_TD: token embeddings.
            layout: lengths of the sequences.
            mask: which tokens each token sees.
            times_T: int64 time of each token in seconds, for the time bias; None leaves it out.
            request_times_T: int64 time of the request that each token answers: in retrieval the next event's time,
                known when the request comes. None means `times_T`.
            positions_T: int64 position of each token, 0 ... `max_length` - 1, where it is not its place in its
                sequence: a candidate's is the moment it is shown at.
            groups_T: int64 norm group of each token, 0 ... `num_norm_groups` - 1; None where there is one group.
            num_positions: positions that a sequence has at most, where `positions_T` gives several tokens the same one:
                any number of candidates share theirs. None means the longest sequence's tokens.

        Returns:
            (T, D).

        Raises:
            ValueError: a sequence has more positions than `max_length`, or `x_TD` does not fit the layout and `dim`.
        """
        x_TD = self.entered(x_TD, layout=layout, positions_T=positions_T, num_positions=num_positions)
        inputs: dict[str, Any] = {"layout": layout, "mask": mask, "times_T": times_T}
        inputs |= {"request_times_T": request_times_T, "positions_T": positions_T, "groups_T": groups_T}
        for layer in self.layers:
            x_TD = recomputed(layer, x_TD, **inputs) if self.recompute else layer(x_TD, **inputs)
        return x_TD

    def entered(
        self, x_TD: Tensor, *, layout: JaggedLayout, positions_T: Tensor | None, num_positions: int | None = None
    ) -> Tensor:
        """Tokens as the first layer takes them: checked, with their input positions, and with dropout."""
        return entered_tokens(
            x_TD,
            layout=layout,
            dim=self.dim,
            max_length=self.max_length,
            position_PD=self.position_PD,
            positions_T=positions_T,
            num_positions=num_positions,
            dropout=self.dropout,
            training=self.training,
        )

    def flops(self, num_tokens: int, num_visible_pairs: int) -> int:
        """Forward floating-point operations for these many tokens and visible pairs."""
        layer = self.layers[0]
        assert isinstance(layer, HSTULayer)
        return len(self.layers) * hstu_layer_flops(
            num_tokens,
            num_visible_pairs,
            dim=self.dim,
            num_heads=layer.num_heads,
            qk_dim=layer.qk_dim,
            v_dim=layer.v_dim,
        )

    def recomputed_flops(self, num_tokens: int, num_visible_pairs: int) -> int:
        """What backward computes a second time: layers up to their last product, whose result it does not need."""
        layer = self.layers[0]
        assert isinstance(layer, HSTULayer)
        last = len(self.layers) * 2 * num_tokens * layer.output.weight.numel()
        return self.flops(num_tokens, num_visible_pairs) - last if self.recompute else 0
