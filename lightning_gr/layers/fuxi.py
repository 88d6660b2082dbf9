"""FuXi blocks over jagged sequences: maps of queries, positions and times side by side, then two feed-forward stages.

FuXi-alpha is arXiv 2502.03036; without the query-key map a block is of FuXi-beta's (2508.10615) and FuXi-gamma's
(2512.12740) kind.

Shape suffixes: T tokens of all sequences together, D model width, E width of the projection, H heads, V value width,
P rows of the position table, C = channels x H x V, F width inside the feed-forward.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.layers.encoder_input import entered_tokens
from lightning_gr.layers.fuxi_time import FuXiTimeFunction, TimeFunctionName
from lightning_gr.layers.recompute import recomputed
from lightning_gr.ops.fuxi_bias import fuxi_bias, fuxi_bias_flops
from lightning_gr.ops.hstu_attention import attention_flops, hstu_attention
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

_INIT_STD = 0.02
_EPS = 1e-6


def fuxi_layer_flops(
    num_tokens: int,
    num_visible_pairs: int,
    *,
    dim: int,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    hidden_dim: int,
    query_key_map: bool,
) -> int:
    """Forward floating-point operations of one layer: products of tokens, and of each map with the values."""
    width = num_heads * v_dim
    channels = 2 + query_key_map
    projected = width * (channels + 1) + 2 * query_key_map * num_heads * qk_dim
    tokens = 2 * num_tokens * dim * (projected + channels * width + 3 * hidden_dim)
    pairs = fuxi_bias_flops(num_visible_pairs, num_heads=num_heads, v_dim=v_dim, num_maps=2)
    if query_key_map:
        pairs += attention_flops(num_visible_pairs, num_heads=num_heads, qk_dim=qk_dim, v_dim=v_dim)
    return tokens + pairs


def recency_map(max_length: int, num_heads: int) -> Tensor:
    """First values of a position map that looks at the last tokens: ``exp(-distance / 4^h)``, four reaches in turn.

    Returns:
        (2 * max_length - 1, num_heads).
    """
    distance_P1 = torch.arange(1 - max_length, max_length).abs()[:, None]
    return torch.exp(-distance_P1 / 4.0 ** (torch.arange(num_heads) % 4))


class FuXiLayer(nn.Module):
    """One block: adaptive multi-channel self-attention, then the multi-stage feed-forward network.

    ``U, V, Q, K = silu(W norm(x))``; channels ``scale * silu(Q K^T) V``, ``P V`` and ``F V`` of every head side by side
    are normed and gated by U; stage one is a linear map back to D with a residual, stage two RMS norm and SwiGLU with
    another (arXiv 2502.03036, section 3). All norms are RMS norms.

    Args:
        dim: model width.
        num_heads: heads.
        qk_dim: width of a head's queries and keys.
        v_dim: width of a head's values.
        hidden_dim: width inside the SwiGLU.
        max_length: longest sequence; sets the reach of the position map.
        dropout: on what each of the two stages takes.
        query_key_map: whether there is the channel of queries and keys.
        position_map: first values of the position map; see `FuXiEncoder`.
        bias_per_head: whether each head has a position map of its own.
        time_function: what the time map is.
        time_buckets: rows of the time function `buckets`.
        time_unit: seconds of one unit of the other time functions' gap.
        scale: factor of the query-key map.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        hidden_dim: int,
        max_length: int,
        dropout: float,
        query_key_map: bool,
        position_map: Literal["random", "recency"],
        bias_per_head: bool,
        time_function: TimeFunctionName,
        time_buckets: int,
        time_unit: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim, self.hidden_dim = num_heads, qk_dim, v_dim, hidden_dim
        self.dropout, self.query_key_map, self.scale = dropout, query_key_map, scale
        width, qk_width = num_heads * v_dim, num_heads * qk_dim * query_key_map
        self.channels_width = (2 + query_key_map) * width
        self.widths = [self.channels_width, width, qk_width, qk_width]
        self.input_norm = nn.RMSNorm(dim, eps=_EPS)
        self.uvqk = nn.Linear(dim, sum(self.widths), bias=False)
        self.attention_norm = nn.RMSNorm(self.channels_width, eps=_EPS)
        self.output = nn.Linear(self.channels_width, dim)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=_EPS)
        self.expand = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.contract = nn.Linear(hidden_dim, dim, bias=False)
        for linear in (self.uvqk, self.output, self.expand, self.contract):
            nn.init.normal_(linear.weight, std=_INIT_STD)
        nn.init.zeros_(self.output.bias)
        first_PH = torch.randn(2 * max_length - 1, num_heads if bias_per_head else 1) * _INIT_STD
        if position_map == "recency":
            recent_PH = recency_map(max_length, num_heads)
            first_PH += recent_PH if bias_per_head else recent_PH.mean(1, keepdim=True)
        self.position_table_PH = nn.Parameter(first_PH)
        self.time_function = FuXiTimeFunction(
            kind=time_function, num_heads=num_heads, num_buckets=time_buckets, unit=time_unit
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
    ) -> Tensor:
        """(T, D) to (T, D); see `FuXiEncoder.forward`."""
        projected_TE = F.silu(self.uvqk(self.input_norm(x_TD)))
        u_TC, v_TC, q_TC, k_TC = projected_TE.split(self.widths, dim=-1)
        channels_TC = self._channels(
            q_TC,
            k_TC,
            v_TC,
            layout=layout,
            mask=mask,
            q_times_T=times_T if request_times_T is None else request_times_T,
            k_times_T=times_T,
            positions_T=positions_T,
        )
        # By hand: a norm that autocast leaves alone takes its weight in the channels' dtype only so.
        norm_C = self.attention_norm.weight.to(channels_TC.dtype)
        normed_TC = F.rms_norm(channels_TC, (self.channels_width,), norm_C, _EPS)
        gated_TC = F.dropout(u_TC * normed_TC, self.dropout, self.training)
        first_TD = x_TD + self.output(gated_TC)
        normed_TD = F.dropout(self.feed_forward_norm(first_TD), self.dropout, self.training)
        gate_TF, value_TF = self.expand(normed_TD).chunk(2, dim=-1)
        out: Tensor = first_TD + self.contract(F.silu(gate_TF) * value_TF)
        return out

    def _channels(
        self,
        q_TC: Tensor,
        k_TC: Tensor,
        v_TC: Tensor,
        *,
        layout: JaggedLayout,
        mask: IntervalMask,
        q_times_T: Tensor | None,
        k_times_T: Tensor | None,
        positions_T: Tensor | None,
    ) -> Tensor:
        """Each map times the values, by position, by time and by queries, (T, C)."""
        v_THV = v_TC.unflatten(-1, (self.num_heads, self.v_dim)).contiguous()
        timed = k_times_T is not None
        by_position, by_time = fuxi_bias(
            v_THV,
            q_layout=layout,
            mask=mask,
            position_table_PH=self.position_table_PH.expand(-1, self.num_heads),
            time_function=self.time_function.function() if timed else None,
            q_times_T=q_times_T if timed else None,
            k_times_T=k_times_T,
            q_positions_T=positions_T,
            k_positions_T=positions_T,
        )
        assert by_position is not None
        if by_time is None:
            by_time = torch.zeros_like(by_position) + self.time_function.unused().to(by_position.dtype)
        channels = [by_position, by_time]
        if self.query_key_map:
            channels.append(
                hstu_attention(
                    q_TC.unflatten(-1, (self.num_heads, self.qk_dim)),
                    k_TC.unflatten(-1, (self.num_heads, self.qk_dim)),
                    v_THV,
                    q_layout=layout,
                    mask=mask,
                    scale=self.scale,
                    alpha=1.0,
                )
            )
        return torch.cat([x.flatten(1) for x in channels], dim=-1)


class FuXiEncoder(nn.Module):
    """A stack of FuXi blocks with learned input positions, in the place of `HSTUEncoder`.

    The defaults are FuXi-alpha's block with FuXi-gamma's time function, which is what TurboGR (arXiv 2605.13433)
    trains. ``query_key_map: false`` leaves the query-key channel out: tokens are mixed by where and when they are, not
    by what they are (FuXi-beta with ``power_law``, FuXi-gamma with ``exponential_power``).

    Args:
        dim: model width, equal to the item embedding's.
        num_layers: blocks.
        num_heads: heads a block.
        qk_dim: width of a head's queries and keys; None means ``dim / num_heads``.
        v_dim: width of a head's values; None means ``dim / num_heads``.
        hidden_dim: width inside a block's SwiGLU; None means `dim`.
        max_length: longest sequence in tokens.
        dropout: on the input and on what each linear stage of a block takes.
        input_position_embedding: whether the input has a learned embedding by position.
        query_key_map: whether blocks have the channel of queries and keys.
        position_map: first values of the position map: `random` and small, or `recency`, by which heads look at the
            last 1, 4, 16 and 64 tokens at first (all heads at the mean of these, where they share a map).
        bias_per_head: whether each head has a position map of its own; the authors' heads share one.
        time_function: the time map as a function of the gap: a table of logarithmic `buckets`, `power_law` or
            `exponential_power`; see `lightning_gr.layers.fuxi_time.FuXiTimeFunction`. Each head has its own.
        time_buckets: rows of the time function `buckets`; not used by the others.
        time_unit: seconds of one unit of the gap in the other functions; a day.
        scale: factor of the query-key map; None means ``1 / max_length``. Pinned, so that a user's outputs do not
            depend on batch mates.
        recompute: computes each layer's activations again in backward instead of keeping them; the results are the
            same.

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
        hidden_dim: int | None = None,
        max_length: int = 200,
        dropout: float = 0.2,
        input_position_embedding: bool = True,
        query_key_map: bool = True,
        position_map: Literal["random", "recency"] = "random",
        bias_per_head: bool = False,
        time_function: TimeFunctionName = "exponential_power",
        time_buckets: int = 128,
        time_unit: float = 86400.0,
        scale: float | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        sizes: dict[str, int | None] = {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}
        sizes |= {"qk_dim": qk_dim, "v_dim": v_dim, "hidden_dim": hidden_dim, "max_length": max_length}
        for name, size in (sizes | {"time_buckets": time_buckets}).items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        if not query_key_map and qk_dim is not None:
            raise ValueError(f"qk_dim={qk_dim}: without query_key_map there are no queries; leave it out")
        if ((query_key_map and qk_dim is None) or v_dim is None) and dim % num_heads:
            raise ValueError(f"dim={dim}: not divisible by num_heads={num_heads}; change one, or give qk_dim and v_dim")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: expected a probability in [0, 1)")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: expected a number above 0")
        if position_map not in ("random", "recency"):
            raise ValueError(f"position_map={position_map!r}: expected random or recency")
        self.dim, self.max_length, self.dropout, self.recompute = dim, max_length, dropout, recompute
        self.position_PD = nn.Parameter(torch.randn(max_length, dim) * _INIT_STD) if input_position_embedding else None
        self.layers = nn.ModuleList(
            FuXiLayer(
                dim=dim,
                num_heads=num_heads,
                qk_dim=qk_dim or dim // num_heads,
                v_dim=v_dim or dim // num_heads,
                hidden_dim=hidden_dim or dim,
                max_length=max_length,
                dropout=dropout,
                query_key_map=query_key_map,
                position_map=position_map,
                bias_per_head=bias_per_head,
                time_function=time_function,
                time_buckets=time_buckets,
                time_unit=time_unit,
                scale=1 / max_length if scale is None else scale,
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
        num_positions: int | None = None,
    ) -> Tensor:
        """Encodes the tokens of jagged sequences.

        Args:
            x_TD: token embeddings.
            layout: lengths of the sequences.
            mask: which tokens each token sees.
            times_T: int64 time of each token in seconds, for the time map; None makes its channel zeros.
            request_times_T: int64 time of the request that each token answers: in retrieval the next event's time,
                known when the request comes. None means `times_T`.
            positions_T: int64 position of each token, 0 ... `max_length` - 1, where it is not its place in its
                sequence.
            num_positions: positions that a sequence has at most, where `positions_T` gives several tokens the same one.
                None means the longest sequence's tokens.

        Returns:
            (T, D).

        Raises:
            ValueError: a sequence has more positions than `max_length`, or `x_TD` does not fit the layout and `dim`.
        """
        x_TD = entered_tokens(
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
        inputs: dict[str, Any] = {"layout": layout, "mask": mask, "times_T": times_T}
        inputs |= {"request_times_T": request_times_T, "positions_T": positions_T}
        for layer in self.layers:
            x_TD = recomputed(layer, x_TD, **inputs) if self.recompute else layer(x_TD, **inputs)
        return x_TD

    def flops(self, num_tokens: int, num_visible_pairs: int) -> int:
        """Forward floating-point operations for these many tokens and visible pairs."""
        layer = self.layers[0]
        assert isinstance(layer, FuXiLayer)
        return len(self.layers) * fuxi_layer_flops(
            num_tokens,
            num_visible_pairs,
            dim=self.dim,
            num_heads=layer.num_heads,
            qk_dim=layer.qk_dim,
            v_dim=layer.v_dim,
            hidden_dim=layer.hidden_dim,
            query_key_map=layer.query_key_map,
        )

    def recomputed_flops(self, num_tokens: int, num_visible_pairs: int) -> int:
        """What backward computes a second time: layers up to their last product, whose result it does not need."""
        layer = self.layers[0]
        assert isinstance(layer, FuXiLayer)
        last = len(self.layers) * 2 * num_tokens * layer.contract.weight.numel()
        return self.flops(num_tokens, num_visible_pairs) - last if self.recompute else 0
