"""SASRec against torch's own attention on padded sequences, and what each token may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.layers import SASRecEncoder
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

LENGTHS = [5, 0, 1, 7]


def make(**changes: Any) -> SASRecEncoder:
    torch.manual_seed(1)
    encoder = SASRecEncoder(**({"dim": 8, "num_layers": 2, "num_heads": 2, "max_length": 9, "dropout": 0.0} | changes))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.double()


def padded(encoder: SASRecEncoder, x_LD: Tensor) -> Tensor:
    """One sequence through the paper's formulas, with torch's attention."""
    x = x_LD + encoder.position_PD[: len(x_LD)]
    for layer in encoder.layers:
        q, k, v = (
            linear(y).unflatten(-1, (layer.num_heads, -1)).transpose(0, 1)
            for linear, y in ((layer.query, layer.attention_norm(x)), (layer.key, x), (layer.value, x))
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + layer.output(attended)
        x = x + layer.contract(F.relu(layer.expand(layer.feed_forward_norm(x))))
    return encoder.norm(x)


def test_it_is_the_papers_transformer_with_every_gradient() -> None:
    encoder, layout = make(), JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    x = torch.randn(sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    ours = encoder(x, layout=layout, mask=IntervalMask.causal(layout))
    truth = torch.cat([padded(encoder, part) for part in x.split(LENGTHS)])
    torch.testing.assert_close(ours, truth)
    weights = torch.randn_like(ours)
    inputs = [x, *encoder.parameters()]
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((truth * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_dropout_is_of_training_alone() -> None:
    encoder, layout = make(dropout=0.5), JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    x, mask = torch.randn(sum(LENGTHS), 8, dtype=torch.float64), IntervalMask.causal(layout)
    assert not torch.equal(encoder(x, layout=layout, mask=mask), encoder(x, layout=layout, mask=mask))
    encoder.eval()
    assert torch.equal(encoder(x, layout=layout, mask=mask), encoder(x, layout=layout, mask=mask))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 9}, "dim=9: not divisible by num_heads=2"),
        ({"num_layers": 0}, "num_layers=0: expected at least 1"),
        ({"hidden_dim": -1}, "hidden_dim=-1"),
        ({"dropout": 1.0}, "dropout=1.0: expected a probability"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_sequence_that_is_too_long_is_refused() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([10]))
    with pytest.raises(ValueError, match="max_length=9: a sequence has 10 tokens"):
        make()(torch.zeros(10, 8, dtype=torch.float64), layout=layout, mask=IntervalMask.causal(layout))
    with pytest.raises(ValueError, match=r"x_TD: expected \(10 tokens, dim=8\), got shape \(10, 7\)"):
        make()(torch.zeros(10, 7, dtype=torch.float64), layout=layout, mask=IntervalMask.causal(layout))
