"""What reference files of Meta's HSTU hold, and how they are read and written.

A file has the weights under Meta's names (``weights/...``), jagged sequences with times, the logits of all items after
every token, and gradients of ``(logits * cotangents).sum()`` (``gradients/...``), all in float64.

Shape suffixes: B sequences, T tokens of all sequences together, I items, D width, N longest sequence with room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LENGTHS = (4, 3, 9, 12, 7)
LONGEST, ITEMS, DIM, HEADS, QK_DIM, V_DIM, LAYERS, BUCKETS = 14, 20, 8, 2, 3, 5, 2, 129


@dataclass(frozen=True)
class Reference:
    """The contents of a file.

    Args:
        weights: by Meta's names.
        gradients: by Meta's names; of which there are some.
        items_T: Meta's ids, 1 ... I.
        times_T: of the events, int64 seconds.
        logits_TI: cosine of the state after each token with items 1 ... I.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    items_T: Tensor
    times_T: Tensor
    logits_TI: Tensor

    @property
    def asked_T(self) -> Tensor:
        """Time of the next event; the last one's own."""
        rows = self.times_T.split(LENGTHS)
        return torch.cat([torch.cat([row[1:], row[-1:]]) for row in rows])


def sequences() -> tuple[Tensor, Tensor]:
    """Items and times; gaps from seconds to years, every item somewhere."""
    generator = torch.Generator().manual_seed(11)
    tokens = sum(LENGTHS)
    items_T = torch.cat([torch.randperm(ITEMS, generator=generator), torch.randperm(ITEMS, generator=generator)]) + 1
    gaps_T = (10 ** (1 + 6 * torch.rand(tokens, generator=generator, dtype=torch.float64))).long()
    return items_T[:tokens], torch.cat([1_500_000_000 + gaps.cumsum(0) for gaps in gaps_T.split(LENGTHS)])


def cotangents() -> Tensor:
    """What logits are multiplied with before they are summed up, (T, I)."""
    return torch.linspace(-1, 1, sum(LENGTHS) * ITEMS, dtype=torch.float64).sin().view(-1, ITEMS)


def random_weights() -> dict[str, Tensor]:
    """By Meta's names, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int, size: float = 0.5) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * size

    weights = {
        "_embedding_module._item_emb.weight": some(ITEMS + 1, DIM),
        "_input_features_preproc._pos_emb.weight": some(LONGEST, DIM),
        "_attn_mask": torch.ones(LONGEST, LONGEST, dtype=torch.bool).triu(1),
    }
    for i in range(LAYERS):
        layer = f"_hstu._attention_layers.{i}."
        weights |= {
            f"{layer}_uvqk": some(DIM, 2 * HEADS * (QK_DIM + V_DIM), size=1.0),
            f"{layer}_o.weight": some(DIM, HEADS * V_DIM, size=1.0),
            f"{layer}_o.bias": some(DIM),
            f"{layer}_rel_attn_bias._ts_w": some(BUCKETS),
            f"{layer}_rel_attn_bias._pos_w": some(2 * LONGEST - 1),
        }
    return weights


def write(path: str | Path, reference: Reference) -> None:
    """Writes a file."""
    tensors = {f"weights/{name}": value for name, value in reference.weights.items()}
    tensors |= {f"gradients/{name}": value for name, value in reference.gradients.items()}
    tensors |= {name: getattr(reference, name) for name in ("items_T", "times_T", "logits_TI")}
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, str(path))


def read(path: str | Path) -> Reference:
    """Reads a file."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    plain = (tensors[name] for name in ("items_T", "times_T", "logits_TI"))
    return Reference(below("weights/"), below("gradients/"), *plain)
