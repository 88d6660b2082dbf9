"""HSTU for next items trained by a plain PyTorch loop: what one would write without a library, for bench_end_to_end.

Histories are bucketed by length and padded, attention is dense, the logits of all items are one matrix, and the item
table is a dense parameter. The model and its loss are those of `lightning_gr` (`RetrievalModule` with `HSTUEncoder`,
full softmax, cosine similarity), and parameters of the encoder have the same names.

Shape suffixes: B sequences, L tokens of the longest sequence of a batch, N valid tokens, D width, H heads, P rows of
the position table, I items.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

TableOptimizer = Literal["adamw", "adagrad"]
Example = tuple[Tensor, Tensor]
"""Items of a history, and the item after each of them."""


class Layer(nn.Module):
    """A block of HSTU over padded sequences, with a bias by distance.

    Args:
        dim: width.
        num_heads: heads.
        max_length: longest sequence.
        dropout: on the gated output.
    """

    def __init__(self, *, dim: int, num_heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.max_length, self.dropout = num_heads, max_length, dropout
        self.input_norm, self.attention_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.uvqk, self.output = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)
        for linear in (self.uvqk, self.output):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        distance_P1 = torch.arange(1 - max_length, max_length).abs()[:, None]
        recency_PH = 3.0 * torch.exp(-distance_P1 / 4.0 ** (torch.arange(num_heads) % 4))
        self.position_table_PH = nn.Parameter(recency_PH + 0.02 * torch.randn_like(recency_PH))

    @override
    def forward(self, x_BLD: Tensor, visible_LL: Tensor, row_LL: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(self.input_norm(x_BLD))).chunk(4, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        bias_HLL = self.position_table_PH[row_LL].permute(2, 0, 1)
        weights_BHLL = F.silu(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias_HLL) * visible_LL / self.max_length
        attended_BLD = (weights_BHLL @ v).transpose(1, 2).flatten(2)
        gated_BLD = F.dropout(u * self.attention_norm(attended_BLD), self.dropout, self.training)
        out: Tensor = x_BLD + self.output(gated_BLD)
        return out


class Encoder(nn.Module):
    """Blocks behind learned input positions; padding stands behind a sequence, where causal attention never looks.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: heads.
        max_length: longest sequence.
        dropout: on the input and on each block's gated output.
    """

    def __init__(self, *, dim: int, num_layers: int, num_heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.position_PD = nn.Parameter(0.02 * torch.randn(max_length, dim))
        sizes = {"dim": dim, "num_heads": num_heads, "max_length": max_length}
        self.layers = nn.ModuleList(Layer(**sizes, dropout=dropout) for _ in range(num_layers))

    @override
    def forward(self, x_BLD: Tensor) -> Tensor:
        length, max_length = x_BLD.shape[1], len(self.position_PD)
        place_L = torch.arange(length)
        row_LL = place_L - place_L[:, None] + max_length - 1
        visible_LL = place_L <= place_L[:, None]
        x_BLD = F.dropout(x_BLD + self.position_PD[:length], self.dropout, self.training)
        for layer in self.layers:
            x_BLD = layer(x_BLD, visible_LL, row_LL)
        return x_BLD


class PlainHSTU(nn.Module):
    """HSTU over an item table that also scores.

    Args:
        num_items: rows of the table.
        dim: width.
        num_layers: blocks.
        num_heads: heads.
        max_length: longest sequence.
        dropout: see `Encoder`.
        temperature: divides the cosine.
    """

    def __init__(
        self,
        *,
        num_items: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        max_length: int,
        dropout: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.items = nn.Embedding(num_items, dim)
        nn.init.normal_(self.items.weight, std=0.02)
        self.encoder = Encoder(
            dim=dim, num_layers=num_layers, num_heads=num_heads, max_length=max_length, dropout=dropout
        )

    def logits(self, history_BL: Tensor, asked_BL: Tensor) -> Tensor:
        """Logits (N, I) of the tokens that are asked."""
        states_BLD = self.encoder(self.items(history_BL) * self.items.embedding_dim**0.5)
        queries_ND = F.normalize(states_BLD[asked_BL], dim=-1, eps=1e-6) / self.temperature
        items_ID = F.normalize(self.items.weight, dim=-1, eps=1e-6)
        return queries_ND @ items_ID.T

    @override
    def forward(self, history_BL: Tensor, target_BL: Tensor) -> Tensor:
        """The mean cross entropy; a target of -1 is padding."""
        asked_BL = target_BL >= 0
        return F.cross_entropy(self.logits(history_BL, asked_BL), target_BL[asked_BL])


# ---- data ------------------------------------------------------------------------------------------------------------


def read_sequences(path: str | Path) -> list[Tensor]:
    """Sequences of a file of ``user item item ...`` lines, items numbered from 0 in the order of their ids."""
    lines = [[int(x) for x in line.split()[1:]] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    _, rows = torch.tensor([item for line in lines for item in line]).unique(return_inverse=True)
    return list(rows.split([len(line) for line in lines]))


def examples(sequences: list[Tensor], max_length: int) -> tuple[list[Example], list[Example]]:
    """For training all but each user's last two items, of the latest `max_length`; for the test, the last one.

    A target of -1 is not asked.
    """
    train = [(x[:-3][-max_length:], x[1:-2][-max_length:]) for x in sequences if len(x) > 3]
    test = [(x[:-1][-max_length:], F.pad(x[-1:], (min(len(x) - 1, max_length) - 1, 0), value=-1)) for x in sequences]
    return train, [each for each, x in zip(test, sequences, strict=True) if len(x) > 2]


def padded_batches(of: list[Example], tokens: int, *, shuffled: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Histories and targets of like lengths, about `tokens` a batch, in random order."""
    noise = torch.rand(len(of)).tolist() if shuffled else range(len(of))
    order = [x for *_, x in sorted((len(of[x][0]), noise[x], x) for x in range(len(of)))]
    batches: list[list[int]] = [[]]
    used = 0
    for x in order:
        if used + len(of[x][0]) > tokens and batches[-1]:
            batches.append([])
            used = 0
        batches[-1].append(x)
        used += len(of[x][0])
    for place in torch.randperm(len(batches)).tolist() if shuffled else range(len(batches)):
        histories, targets = zip(*(of[x] for x in batches[place]), strict=True)
        yield (
            nn.utils.rnn.pad_sequence(list(histories), batch_first=True),
            nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=-1),
        )


# ---- training --------------------------------------------------------------------------------------------------------


def optimizers(model: PlainHSTU, table: TableOptimizer, *, lr: float, table_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW of all parameters, or of all but the table, which Adagrad then has."""
    if table == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)]
    return [
        torch.optim.AdamW(model.encoder.parameters(), lr=lr, weight_decay=0.0, fused=True),
        torch.optim.Adagrad(model.items.parameters(), lr=table_lr, fused=True),
    ]


def warm_ups(step_with: list[torch.optim.Optimizer], steps: int) -> list[LambdaLR]:
    """Schedules of rates that rise for so many steps, then stay."""
    return [LambdaLR(each, lambda step: min(1.0, (step + 1) / (steps + 1))) for each in step_with]


def train_epoch(
    model: PlainHSTU,
    of: list[Example],
    tokens: int,
    step_with: list[torch.optim.Optimizer],
    schedules: Sequence[LambdaLR] = (),
) -> tuple[float, float]:
    """Trains on all examples once; returns seconds and the mean loss of its steps."""
    began, losses = time.perf_counter(), []
    model.train()
    for history_BL, target_BL in padded_batches(of, tokens):
        for optimizer in step_with:
            optimizer.zero_grad(set_to_none=True)
        loss = model(history_BL, target_BL)
        loss.backward()
        for each in (*step_with, *schedules):
            each.step()
        losses.append(float(loss.detach()))
    return time.perf_counter() - began, sum(losses) / len(losses)


@torch.no_grad()
def recall(model: PlainHSTU, of: list[Example], *, k: int, tokens: int = 16_384) -> float:
    """Share of tests whose item is among the best `k` of all items; ties count against the model."""
    model.eval()
    hits = 0
    for history_BL, target_BL in padded_batches(of, tokens, shuffled=False):
        asked_BL = target_BL >= 0
        logits_BI = model.logits(history_BL, asked_BL)
        hits += int(((logits_BI >= logits_BI.gather(1, target_BL[asked_BL][:, None])).sum(1) <= k).sum())
    return hits / len(of)
