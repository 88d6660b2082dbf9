"""SASRec: a causal Transformer over jagged sequences (Kang and McAuley, arXiv 1808.09781), a baseline beside HSTU.

Shape suffixes: T tokens of all sequences together, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.layers.encoder_input import entered_tokens
from lightning_gr.layers.recompute import recomputed
from lightning_gr.ops.hstu_attention import attention_flops, hstu_attention
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

_INIT_STD = 0.02


class SASRecLayer(nn.Module):
    """``h = x + attention(norm(x))`` and ``h + feed_forward(norm(h))``, as the paper's equations 2 to 5.

    Args:
        dim: model width.
        num_heads: heads, a divisor of `dim`.
        hidden_dim: width inside the feed-forward network.
        dropout: on attention weights and on both outputs.
    """

    def __init__(self, *, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.output = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand, self.contract = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        for linear in (self.query, self.key, self.value, self.output, self.expand, self.contract):
            nn.init.normal_(linear.weight, std=_INIT_STD)
            nn.init.zeros_(linear.bias)

    @override
    def forward(self, x_TD: Tensor, *, layout: JaggedLayout, mask: IntervalMask) -> Tensor:
        """(T, D) to (T, D)."""
        normed = self.attention_norm(x_TD)
        # The paper takes queries from the normalised input, keys and values from the input itself.
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1))
            for linear, x in ((self.query, normed), (self.key, x_TD), (self.value, x_TD))
        )
        attended = hstu_attention(
            q,
            k,
            v,
            q_layout=layout,
            mask=mask,
            scale=1.0,
            activation="softmax",
            dropout=self.dropout,
            training=self.training,
        )
        h_TD = x_TD + F.dropout(self.output(attended.flatten(1)), self.dropout, self.training)
        hidden = F.dropout(F.relu(self.expand(self.feed_forward_norm(h_TD))), self.dropout, self.training)
        out: Tensor = h_TD + F.dropout(self.contract(hidden), self.dropout, self.training)
        return out


class SASRecEncoder(nn.Module):
    """A stack of SASRec blocks with learned positions; times are not used.

    Args:
        dim: model width, equal to the item embedding's.
        num_layers: blocks.
        num_heads: heads a block, a divisor of `dim`.
        hidden_dim: width inside a block's feed-forward network; None means `dim`, the paper's.
        max_length: longest sequence in tokens.
        dropout: on the input, the attention weights and the blocks' outputs.
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
        num_heads: int = 1,
        hidden_dim: int | None = None,
        max_length: int = 200,
        dropout: float = 0.2,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        sizes: dict[str, int | None] = {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}
        for name, size in (sizes | {"hidden_dim": hidden_dim, "max_length": max_length}).items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        if dim % num_heads:
            raise ValueError(f"dim={dim}: not divisible by num_heads={num_heads}; change one")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: expected a probability in [0, 1)")
        self.dim, self.max_length, self.dropout, self.recompute = dim, max_length, dropout, recompute
        self.position_PD = nn.Parameter(torch.randn(max_length, dim) * _INIT_STD)
        self.layers = nn.ModuleList(
            SASRecLayer(dim=dim, num_heads=num_heads, hidden_dim=hidden_dim or dim, dropout=dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    @override
    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: JaggedLayout,
        mask: IntervalMask,
        times_T: Tensor | None = None,
        request_times_T: Tensor | None = None,
    ) -> Tensor:
        """Encodes the tokens of jagged sequences.

        Args:
            x_TD: token embeddings.
            layout: lengths of the sequences.
            mask: which tokens each token sees.
            times_T: not used.
            request_times_T: not used.

        Returns:
            (T, D).

        Raises:
            ValueError: a sequence is longer than `max_length`, or `x_TD` does not fit the layout and `dim`.
        """
        x_TD = entered_tokens(
            x_TD,
            layout=layout,
            dim=self.dim,
            max_length=self.max_length,
            position_PD=self.position_PD,
            positions_T=None,
            num_positions=None,
            dropout=self.dropout,
            training=self.training,
        )
        for layer in self.layers:
            inputs = {"layout": layout, "mask": mask}
            x_TD = recomputed(layer, x_TD, **inputs) if self.recompute else layer(x_TD, **inputs)
        normed: Tensor = self.norm(x_TD)
        return normed

    def flops(self, num_tokens: int, num_visible_pairs: int) -> int:
        """Forward floating-point operations for these many tokens and visible pairs."""
        layer = self.layers[0]
        assert isinstance(layer, SASRecLayer)
        projections = 2 * num_tokens * (4 * self.dim * self.dim + 2 * self.dim * layer.expand.out_features)
        width = self.dim // layer.num_heads
        attention = attention_flops(num_visible_pairs, num_heads=layer.num_heads, qk_dim=width, v_dim=width)
        return len(self.layers) * (projections + attention)

    def recomputed_flops(self, num_tokens: int, num_visible_pairs: int) -> int:
        """What backward computes a second time; without dropout behind it, not a layer's last product."""
        layer = self.layers[0]
        assert isinstance(layer, SASRecLayer)
        last = 0 if self.dropout else len(self.layers) * 2 * num_tokens * layer.contract.weight.numel()
        return self.flops(num_tokens, num_visible_pairs) - last if self.recompute else 0
