"""Writes ``rectools.safetensors``: logits and gradients of RecTools' HSTU layers, under Meta's names.

    pip install "rectools[torch]==0.19.0" safetensors
    python -m tests.importers.make_rectools_reference rectools.safetensors

Their ``STULayer`` equals Meta's; it pads on the left, and its norms have weights, which are left at one. What is around
the layers (input scale and positions, cosine) is written out here.

Shape suffixes: B sequences, N padded length, T tokens, I items, D width.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from rectools.models.nn.transformers.hstu import STULayers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import tests.importers.reference_model as small


def padded(x_T: Tensor) -> Tensor:
    """(B, N, ...), with the tokens of each sequence at its right end."""
    rows = x_T.split(small.LENGTHS)
    return torch.stack([torch.cat([x_T.new_zeros(small.LONGEST - len(x), *x_T.shape[1:]), x]) for x in rows])


def named(layers: Any) -> dict[str, Any]:
    """Parameters of the layers by Meta's names."""
    found = {}
    for i, block in enumerate(layers.stu_blocks):
        layer = f"_hstu._attention_layers.{i}."
        found |= {f"{layer}_uvqk": block.uvqk_proj, f"{layer}_o.weight": block.output_mlp.weight}
        found |= {f"{layer}_o.bias": block.output_mlp.bias}
        found |= {f"{layer}_rel_attn_bias._ts_w": block.rel_attn.time_weights}
        found |= {f"{layer}_rel_attn_bias._pos_w": block.rel_attn.pos_weights}
    return found


def reference() -> small.Reference:
    """What their layers make of the small model."""
    weights = small.random_weights()
    layers = STULayers(
        n_blocks=small.LAYERS,
        n_factors=small.DIM,
        n_heads=small.HEADS,
        linear_hidden_dim=small.V_DIM,
        attention_dim=small.QK_DIM,
        session_max_len=small.LONGEST,
        relative_time_attention=True,
        relative_pos_attention=True,
        dropout_rate=0.2,
        epsilon=1e-6,
    ).eval()
    parameters = named(layers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape
            parameter.copy_(weights[name])
    items_T, times_T = small.sequences()
    names = ("_embedding_module._item_emb.weight", "_input_features_preproc._pos_emb.weight")
    table_ID, position_PD = (weights[name].clone().requires_grad_() for name in names)
    places_T = torch.cat([torch.arange(n) for n in small.LENGTHS])
    x_TD = table_ID[items_T] * small.DIM**0.5 + position_PD[places_T]
    last_B1 = torch.stack([row[-1:] for row in times_T.split(small.LENGTHS)])
    states_BND = layers(
        seqs=padded(x_TD) * 1,  # they multiply it in place
        timeline_mask=padded(torch.ones(len(items_T), 1)),
        attn_mask=torch.ones(small.LONGEST, small.LONGEST, dtype=torch.bool).triu(1),
        key_padding_mask=None,
        batch={
            "x": torch.zeros(len(small.LENGTHS), small.LONGEST),
            "unix_ts": torch.cat([padded(times_T), last_B1], 1),
        },
    )
    states_TD = torch.cat([row[small.LONGEST - n :] for row, n in zip(states_BND, small.LENGTHS, strict=True)])
    logits_TI = F.normalize(states_TD, dim=-1) @ F.normalize(table_ID[1:], dim=-1).T
    (logits_TI * small.cotangents()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    gradients |= dict(zip(names, (table_ID.grad, position_PD.grad), strict=True))
    return small.Reference(weights, gradients, items_T, times_T, logits_TI)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    small.write(sys.argv[1], reference())
