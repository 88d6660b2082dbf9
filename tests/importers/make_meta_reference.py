"""Writes ``meta.safetensors``: weights, logits and gradients of Meta's own code, which is not in this repository.

    git clone https://github.com/facebookresearch/generative-recommenders
    PYTHONPATH=generative-recommenders python -m tests.importers.make_meta_reference meta.safetensors

needs fbgemm-gpu, on a CPU. The file in the tests was made from commit 2e81fab69a497fb5e24cd23569adf1e78070e4ec.

Shape suffixes: B sequences, N padded length, T tokens, I items, D width.
"""

from __future__ import annotations

import sys

import fbgemm_gpu  # noqa: F401  # registers the operators that Meta's code calls
import torch
from generative_recommenders.research.modeling.sequential import (
    embedding_modules,
    hstu,
    input_features_preprocessors,
    output_postprocessors,
)
from generative_recommenders.research.rails.similarities.dot_product_similarity_fn import DotProductSimilarity
from torch import Tensor

import tests.importers.reference_model as small


def padded(x_T: Tensor) -> Tensor:
    """(B, N), zeros behind each sequence."""
    rows = x_T.split(small.LENGTHS)
    return torch.stack([torch.nn.functional.pad(row, (0, small.LONGEST - len(row))) for row in rows])


def dense_to_jagged(x_BND: Tensor, offsets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What FBGEMM's operator of that name does, which has no float64."""
    lengths = offsets[0].diff().tolist()
    return torch.cat([row[:n] for row, n in zip(x_BND, lengths, strict=True)]), offsets


def jagged_to_padded_dense(
    values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0.0
) -> Tensor:
    """What FBGEMM's operator of that name does, which has no float64."""
    assert padding_value == 0.0
    rows = values.split(offsets[0].diff().tolist())
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, max_lengths[0] - len(row))) for row in rows])


def main(path: str) -> None:
    """Writes the file."""
    torch.ops.fbgemm.dense_to_jagged = dense_to_jagged
    torch.ops.fbgemm.jagged_to_padded_dense = jagged_to_padded_dense
    torch.set_default_dtype(torch.float64)  # also of the logarithm by which times are put into buckets
    room = 3
    model = hstu.HSTU(
        max_sequence_len=small.LONGEST - room,
        max_output_len=room,
        embedding_dim=small.DIM,
        num_blocks=small.LAYERS,
        num_heads=small.HEADS,
        linear_dim=small.V_DIM,
        attention_dim=small.QK_DIM,
        normalization="rel_bias",
        linear_config="uvqk",
        linear_activation="silu",
        linear_dropout_rate=0.2,
        attn_dropout_rate=0.0,
        embedding_module=embedding_modules.LocalEmbeddingModule(small.ITEMS, small.DIM),
        similarity_module=DotProductSimilarity(),
        input_features_preproc_module=input_features_preprocessors.LearnablePositionalEmbeddingInputFeaturesPreprocessor(
            small.LONGEST, small.DIM, 0.2
        ),
        output_postproc_module=output_postprocessors.L2NormEmbeddingPostprocessor(small.DIM, 1e-6),
        verbose=False,
    ).eval()
    model.load_state_dict(small.random_weights())
    items_T, times_T = small.sequences()
    ids_BN, times_BN = padded(items_T), padded(times_T)
    lengths_B = torch.tensor(small.LENGTHS)
    # Theirs writes the time of the answer behind the history.
    times_BN[torch.arange(len(lengths_B)), lengths_B] = times_BN[torch.arange(len(lengths_B)), lengths_B - 1]
    states_BND = model(
        past_lengths=lengths_B,
        past_ids=ids_BN,
        past_embeddings=model.get_item_embeddings(ids_BN),
        past_payloads={hstu.TIMESTAMPS_KEY: times_BN},
    )
    states_TD = torch.cat([row[:n] for row, n in zip(states_BND, small.LENGTHS, strict=True)])
    items_ID = model.get_item_embeddings(torch.arange(1, small.ITEMS + 1))
    items_ID = items_ID / items_ID.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    logits_TI, _ = model._ndp_module(states_TD, items_ID[None])
    (logits_TI * small.cotangents()).sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    small.write(path, small.Reference(model.state_dict(), gradients, items_T, times_T, logits_TI))


if __name__ == "__main__":
    main(sys.argv[1])
