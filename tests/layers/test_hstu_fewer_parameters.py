"""HSTU with bias tables that heads share and without affine parameters, as Meta's code has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.layers import HSTUEncoder
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

DIM, HEADS, LONGEST, BUCKETS, LENGTHS = 6, 3, 9, 5, [3, 0, 9, 1]


def make(**changes: Any) -> HSTUEncoder:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"dim": DIM, "num_layers": 2, "num_heads": HEADS, "max_length": LONGEST}
    encoder = HSTUEncoder(**(sizes | {"dropout": 0.0, "time_buckets": BUCKETS} | changes)).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return encoder


def gradients(encoder: HSTUEncoder, backend: Any) -> tuple[Tensor, dict[str, Tensor]]:
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(sum(LENGTHS), DIM, generator=generator, dtype=torch.float64)
    times_T = torch.randint(0, 1000, (len(x_TD),), generator=generator)
    with use_backend(backend):
        out = encoder(x_TD, layout=layout, mask=IntervalMask.causal(layout), times_T=times_T)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in encoder.named_parameters()}
    return out.detach(), found  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_shared_table_is_one_that_all_heads_have(backend: Any) -> None:
    shared, own = make(bias_per_head=False), make()
    columns = {
        name: value.expand(-1, HEADS) if "_table_" in name else value for name, value in shared.state_dict().items()
    }
    own.load_state_dict(columns)
    (out, ours), (wanted, theirs) = gradients(shared, backend), gradients(own, backend)
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        by_head = theirs[name].sum(1, keepdim=True) if "_table_" in name else theirs[name]
        assert float(gradient.abs().max()) > 0
        assert torch.allclose(gradient, by_head, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_affine_parameters_norms_have_ones_and_zeros(backend: Any) -> None:
    plain, affine = make(affine=False), make()
    values = dict(plain.state_dict())
    for name, value in affine.state_dict().items():
        if name not in values:
            values[name] = torch.ones_like(value) if name.endswith("norm.weight") else torch.zeros_like(value)
    affine.load_state_dict(values)
    (out, ours), (wanted, theirs) = gradients(plain, backend), gradients(affine, backend)
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)
    assert theirs.keys() - ours.keys() == {
        f"layers.{i}.{name}"
        for i in range(2)
        for name in (
            "input_norm.weight",
            "input_norm.bias",
            "attention_norm.weight",
            "attention_norm.bias",
            "uvqk.bias",
        )
    }
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-9, atol=1e-11), name


def test_half_precision_has_neither_either() -> None:
    encoder = make(affine=False, bias_per_head=False).float()
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    x_TD = torch.randn(sum(LENGTHS), DIM)
    with torch.no_grad():
        single = encoder(x_TD, layout=layout, mask=IntervalMask.causal(layout))
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(x_TD, layout=layout, mask=IntervalMask.causal(layout))
    assert not torch.equal(half, single)
    assert float((half - single).norm() / single.norm()) < 0.05


def test_what_heads_share_begins_at_the_mean_of_their_reaches() -> None:
    torch.manual_seed(0)
    encoder = HSTUEncoder(dim=8, num_layers=1, num_heads=4, max_length=50, position_bias="recency", bias_per_head=False)
    (layer,) = encoder.layers
    table_P = layer.position_table_PH[:, 0].detach()  # type: ignore[union-attr, index]
    distance_P = (torch.arange(99) - 49).abs()
    wanted_P = sum(3 * torch.exp(-distance_P / reach) for reach in (1, 4, 16, 64)) / 4
    assert 0.01 < float((table_P - wanted_P).std()) < 0.03


def test_groups_of_norms_need_affine_parameters() -> None:
    with pytest.raises(ValueError, match="affine=False: num_norm_groups=2 is about affine parameters"):
        make(affine=False, num_norm_groups=2)
