"""HSTU blocks in NumPy under every mask, their sizes in numbers, and what request times may change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gr.layers.hstu import HSTUEncoder, HSTULayer, hstu_layer_flops
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

Array = np.ndarray[Any, Any]
Rule = Callable[[int, int, int], bool]  # length, query position, key position
DIM, HEADS, QK, V, LONGEST, BUCKETS = 5, 2, 3, 4, 8, 30
MASKS: dict[str, tuple[Callable[[JaggedLayout], IntervalMask], Rule]] = {
    "causal": (IntervalMask.causal, lambda n, i, j: j <= i),
    "contextual": (
        lambda layout: IntervalMask.contextual_prefix(layout, layout.lengths_B.clamp(max=2)),
        lambda n, i, j: j <= i or j < 2,
    ),
    "candidates": (
        lambda layout: IntervalMask.candidates(layout, layout.lengths_B.clamp(max=3)),
        lambda n, i, j: i == j or (j < i and j < n - 3),
    ),
}


def make(lengths: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def disturb(module: torch.nn.Module) -> None:
    """First values hide mistakes: biases are 0 and norms the identity."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)


def make_layer(**changes: Any) -> HSTULayer:
    sizes: dict[str, Any] = {"dim": DIM, "num_heads": HEADS, "qk_dim": QK, "v_dim": V, "max_length": LONGEST}
    others: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "position_bias": True, "time_buckets": BUCKETS}
    layer = HSTULayer(**({**sizes, **others, "activation": "silu", "scale": 0.3} | changes)).double()
    disturb(layer)
    return layer


def make_encoder(**changes: Any) -> HSTUEncoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 6, "max_length": LONGEST, "dropout": 0.0, "time_buckets": BUCKETS}
    encoder = HSTUEncoder(**(sizes | changes)).double()
    disturb(encoder)
    return encoder


def tokens(count: int, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, times, and request times some of which come before the keys' times."""
    generator = torch.Generator().manual_seed(7)
    times = torch.randint(0, 5000, (count,), generator=generator)
    asked = times + torch.randint(-100, 4000, (count,), generator=generator)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64), times, asked


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def block(layer: HSTULayer, x: Array, times: Array, asked: Array, sees: Rule) -> Array:
    """``x + W_o(U * norm(attention(Q, K, V)))`` of one sequence in float64."""
    w = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    mixed = norm(x, w["input_norm.weight"], w["input_norm.bias"]) @ w["uvqk.weight"].T + w["uvqk.bias"]
    cuts = np.cumsum([HEADS * V, HEADS * V, HEADS * QK])
    u, v, q, k = np.split(silu(mixed), cuts, axis=-1)
    n = len(x)
    attended = np.zeros((n, HEADS, V))
    for i in range(n):
        for h in range(HEADS):
            seen = [j for j in range(n) if sees(n, i, j)]
            logits = np.zeros(len(seen))
            for place, j in enumerate(seen):
                gap = max(1, abs(int(asked[i]) - int(times[j])))
                logits[place] = q[i, h * QK : (h + 1) * QK] @ k[j, h * QK : (h + 1) * QK] / math.sqrt(QK)
                logits[place] += w["position_table_PH"][j - i + LONGEST - 1, h]
                logits[place] += w["time_table_NH"][min(math.floor(math.log(gap) / 0.301), BUCKETS - 1), h]
            weights = layer.scale * silu(logits)
            if layer.activation == "softmax":
                weights = np.exp(logits) / np.exp(logits).sum()
            attended[i, h] = sum(weight * v[j, h * V : (h + 1) * V] for weight, j in zip(weights, seen, strict=True))
    gated = u * norm(attended.reshape(n, HEADS * V), w["attention_norm.weight"], w["attention_norm.bias"])
    return x + gated @ w["output.weight"].T + w["output.bias"]


@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("kind", MASKS)
def test_a_block_is_its_formula_under_every_mask(kind: str, activation: str) -> None:
    layer, lengths = make_layer(activation=activation), [5, 0, 1, 8]
    layout = make(lengths)
    x, times, asked = tokens(sum(lengths))
    make_mask, sees = MASKS[kind]
    found = layer(x, layout=layout, mask=make_mask(layout), times_T=times, request_times_T=asked).detach().numpy()
    start = 0
    for n in lengths:
        own = slice(start, start + n)
        wanted = block(layer, x.numpy()[own], times.numpy()[own], asked.numpy()[own], sees)
        np.testing.assert_allclose(found[own], wanted, rtol=1e-10, atol=1e-11)
        start += n


def test_the_default_scale_is_pinned_to_the_longest_that_may_come() -> None:
    assert [layer.scale for layer in make_encoder().layers] == [1 / LONGEST] * 2
    assert [layer.scale for layer in make_encoder(scale=2.0).layers] == [2.0] * 2
    x, times, _ = tokens(3, 6)
    layout = make([3])
    settings: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times}
    default, same, other = (
        make_encoder(**changes)(x, **settings) for changes in ({}, {"scale": 1 / LONGEST}, {"scale": 1 / 3})
    )
    assert torch.equal(default, same)
    assert not torch.allclose(default, other)


def test_a_candidate_does_not_notice_the_others() -> None:
    """Among many or the only one, its state is the same, where nothing depends on its position."""
    encoder = make_encoder(input_position_embedding=False, position_bias=False)
    x, _, _ = tokens(7, 6)
    both, single = make([7]), make([5])
    among = encoder(x, layout=both, mask=IntervalMask.candidates(both, torch.tensor([3])))
    for candidate in (4, 5, 6):
        alone = encoder(
            torch.cat([x[:4], x[candidate : candidate + 1]]),
            layout=single,
            mask=IntervalMask.candidates(single, torch.tensor([1])),
        )
        torch.testing.assert_close(alone[:4], among[:4], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone[4], among[candidate], rtol=0, atol=1e-12)


def test_a_request_time_moves_its_own_token_and_later_ones_alone() -> None:
    x, times, asked = tokens(7, 6)
    layout = make([7])
    for num_layers in (1, 2):
        encoder = make_encoder(num_layers=num_layers)
        settings: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times}
        before = encoder(x, **settings, request_times_T=asked)
        for changed in range(7):
            moved = asked.clone()
            moved[changed] += 20_000
            after = encoder(x, **settings, request_times_T=moved)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            # One block: no other token. Two: those after it attend to the token's new state.
            reached = range(changed, 7 if num_layers == 2 else changed + 1)
            assert same == [i not in reached for i in range(7)]


def test_the_time_of_a_later_token_changes_nothing_before_it() -> None:
    x, times, _ = tokens(7, 6)
    layout, encoder = make([7]), make_encoder()
    settings: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout)}
    before = encoder(x, **settings, times_T=times)
    moved = times.clone()
    moved[4] += 20_000
    after = encoder(x, **settings, times_T=moved)
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


def test_without_times_there_is_no_time_bias() -> None:
    x, times, asked = tokens(6, 6)
    layout, encoder = make([4, 2]), make_encoder()
    settings: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout)}
    without = encoder(x, **settings)
    assert torch.equal(encoder(x, **settings, request_times_T=asked), without)
    assert not torch.allclose(encoder(x, **settings, times_T=times), without)
    with torch.no_grad():
        for layer in encoder.layers:
            layer.time_table_NH.zero_()  # type: ignore[union-attr, operator]
    assert torch.allclose(encoder(x, **settings, times_T=times), without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_biases", [True, False])
def test_parameters_are_as_many_as_the_formula_has(with_biases: bool) -> None:
    encoder = HSTUEncoder(
        dim=10,
        num_layers=3,
        num_heads=2,
        qk_dim=4,
        v_dim=7,
        max_length=20,
        time_buckets=16,
        input_position_embedding=with_biases,
        position_bias=with_biases,
        time_bias=with_biases,
    )
    in_norm, uvqk, attention_norm, out = 2 * 10, (10 + 1) * 2 * (7 + 7 + 4 + 4), 2 * 14, (14 + 1) * 10
    a_block = in_norm + uvqk + attention_norm + out
    if with_biases:
        a_block += (2 * 20 - 1) * 2 + 16 * 2  # distances -19 ... 19, and the time buckets
    wanted = 3 * a_block + (20 * 10 if with_biases else 0)
    assert sum(p.numel() for p in encoder.parameters()) == wanted


def test_head_widths_default_to_a_share_of_the_model() -> None:
    (layer,) = HSTUEncoder(dim=12, num_heads=3, num_layers=1).layers
    assert (layer.qk_dim, layer.v_dim) == (4, 4)
    # Both widths given: the model's need not divide.
    (layer,) = HSTUEncoder(dim=10, num_heads=3, num_layers=1, qk_dim=2, v_dim=5).layers
    assert (layer.qk_dim, layer.v_dim) == (2, 5)


def test_flops_of_a_block_by_hand() -> None:
    # 10 tokens, 30 pairs, width 8, 2 heads of 3 and 5: U and V are 10 wide, Q and K 6.
    projections = 2 * 10 * 8 * (10 + 10 + 6 + 6) + 2 * 10 * 10 * 8
    attention = 30 * 2 * (2 * 3 + 2 * 5)
    assert hstu_layer_flops(10, 30, dim=8, num_heads=2, qk_dim=3, v_dim=5) == projections + attention == 7680
    encoder = HSTUEncoder(dim=8, num_layers=4, num_heads=2, qk_dim=3, v_dim=5)
    assert encoder.flops(10, 30) == 4 * 7680
    assert encoder.flops(0, 0) == 0


@pytest.mark.parametrize("num_layers", [1, 3])
def test_weights_travel_by_name(num_layers: int) -> None:
    one, other = (HSTUEncoder(dim=4, num_layers=num_layers, max_length=5) for _ in range(2))
    names = ["input_norm", "uvqk", "attention_norm", "output"]
    wanted = {f"layers.{i}.{name}.{kind}" for i in range(num_layers) for name in names for kind in ("weight", "bias")}
    wanted |= {f"layers.{i}.{table}" for i in range(num_layers) for table in ("position_table_PH", "time_table_NH")}
    assert set(one.state_dict()) == wanted | {"position_PD"}
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch for position_PD"):
        other.load_state_dict(HSTUEncoder(dim=4, num_layers=num_layers, max_length=6).state_dict())


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_mixed_precision_stays_near_and_reaches_every_parameter(activation: str) -> None:
    encoder = make_encoder(activation=activation).float()
    x, times, _ = tokens(9, 6)
    layout = make([5, 4])
    settings: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times}
    wanted = encoder(x.float(), **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(x.float(), **settings)
    found.sum().backward()
    error = float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())
    assert 0 < error < 0.02
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in encoder.parameters())


@pytest.mark.parametrize("name", ["dim", "num_layers", "num_heads", "qk_dim", "v_dim", "max_length", "time_buckets"])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_that_cannot_work_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value}: expected at least 1"):
        HSTUEncoder(**{name: value})


@pytest.mark.parametrize("given", ["qk_dim", "v_dim"])
def test_one_width_alone_does_not_excuse_the_other(given: str) -> None:
    with pytest.raises(
        ValueError, match=r"^dim=10: not divisible by num_heads=3; change one, or give qk_dim and v_dim"
    ):
        HSTUEncoder(dim=10, num_heads=3, **{given: 2})
