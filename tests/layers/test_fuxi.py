"""FuXi blocks against the papers' equations in float64, one sequence and one query at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.layers import FuXiEncoder, FuXiLayer
from lightning_gr.layers.fuxi_time import FuXiTimeFunction
from lightning_gr.observability.product_counter import ProductCounter
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

DIM, HEADS, LONGEST, UNIT = 6, 2, 9, 3000.0


def make(lengths: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def make_encoder(**changes: Any) -> FuXiEncoder:
    """Far from its first values, so that every parameter matters."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"dim": DIM, "num_layers": 2, "num_heads": HEADS, "max_length": LONGEST, "time_unit": UNIT}
    encoder = FuXiEncoder(**(sizes | {"dropout": 0.0, "time_buckets": 5} | changes)).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return encoder


def inputs(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    times = torch.randint(0, 10_000, (total,), generator=generator)
    return torch.randn(total, DIM, generator=generator, dtype=torch.float64), times


def run(encoder: FuXiEncoder, x: Tensor, lengths: list[int], times: Tensor | None, **changes: Any) -> Tensor:
    layout = make(lengths)
    given_: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times} | changes
    return encoder(x, **given_)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def time_weight(time: FuXiTimeFunction, h: int, gap: int) -> Tensor:
    raw = time.parameters_KH[:, h]
    if time.kind == "buckets":
        return raw[min(int(math.log(max(1, gap)) / 0.301), len(raw) - 1)]
    if time.kind == "power_law":
        return raw[0] * (1 + gap / UNIT) ** (-torch.exp(raw[1]))
    gamma, beta = 1 / (1 + torch.exp(-raw[2])), torch.exp(raw[1])
    return raw[0] * (gamma ** ((gap / UNIT) ** beta) if gap else 1.0)


def layer_truth(layer: FuXiLayer, x: Tensor, times: list[int] | None, asked: list[int] | None) -> Tensor:
    """One causal block over one sequence."""
    n, qk, width, channels = len(x), layer.qk_dim, layer.v_dim, 2 + layer.query_key_map
    mixed = silu(rms(x, layer.input_norm.weight) @ layer.uvqk.weight.T)
    u, v, rest = mixed.split([channels * HEADS * width, HEADS * width, 2 * HEADS * qk * layer.query_key_map], dim=1)
    table = layer.position_table_PH
    out = []
    for i in range(n):
        by_position, by_time, by_query = [], [], []
        for h in range(HEADS):
            sums = [x.new_zeros(width), x.new_zeros(width), x.new_zeros(width)]
            for j in range(i + 1):
                value = v[j, h * width : (h + 1) * width]
                sums[0] = sums[0] + table[j - i + LONGEST - 1, h if table.shape[1] > 1 else 0] * value
                if times is not None and asked is not None:
                    sums[1] = sums[1] + time_weight(layer.time_function, h, abs(asked[i] - times[j])) * value
                if layer.query_key_map:
                    q, k = rest[i, h * qk : (h + 1) * qk], rest[j, (HEADS + h) * qk : (HEADS + h + 1) * qk]
                    sums[2] = sums[2] + layer.scale * silu((q * k).sum()) * value
            by_position.append(sums[0])
            by_time.append(sums[1])
            by_query.append(sums[2])
        row = [*by_position, *by_time, *(by_query if layer.query_key_map else [])]
        out.append(torch.cat(row))
    attended = torch.stack(out) if out else x.new_zeros(0, channels * HEADS * width)
    first = x + (u * rms(attended, layer.attention_norm.weight)) @ layer.output.weight.T + layer.output.bias
    hidden = rms(first, layer.feed_forward_norm.weight) @ layer.expand.weight.T
    gate, value = hidden[:, : layer.hidden_dim], hidden[:, layer.hidden_dim :]
    return first + (silu(gate) * value) @ layer.contract.weight.T


def encoder_truth(
    encoder: FuXiEncoder, x: Tensor, lengths: list[int], times: Tensor | None, asked: Tensor | None = None
) -> Tensor:
    asked = times if asked is None else asked
    out, start = [], 0
    for n in lengths:
        own = x[start : start + n]
        if encoder.position_PD is not None:
            own = own + encoder.position_PD[:n]
        when = None if times is None else times[start : start + n].tolist()
        requests = None if asked is None else asked[start : start + n].tolist()
        for layer in encoder.layers:
            assert isinstance(layer, FuXiLayer)
            own = layer_truth(layer, own, when, requests)
        out.append(own)
        start += n
    return torch.cat(out) if out else x


SETTINGS: list[dict[str, Any]] = [
    {},
    {"query_key_map": False},
    {"query_key_map": False, "time_function": "power_law", "v_dim": 2},
    {"time_function": "buckets", "bias_per_head": True},
    {"position_map": "recency", "bias_per_head": True, "input_position_embedding": False},
    {"position_map": "recency", "qk_dim": 2, "v_dim": 5, "hidden_dim": 4, "num_layers": 1},
    {"scale": 0.5},
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_outputs_and_gradients_are_the_equations(changes: dict[str, Any], backend: Any) -> None:
    encoder, lengths = make_encoder(**changes), [3, 0, 9, 1]
    x, times = inputs(lengths)
    x.requires_grad_()
    asked = times + 500
    weight = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    with use_backend(backend):
        ours = run(encoder, x, lengths, times, request_times_T=asked)
    truth = encoder_truth(encoder, x, lengths, times, asked)
    assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-11)
    leaves = [x, *encoder.parameters()]
    wanted = torch.autograd.grad((truth * weight).sum(), leaves)
    found = torch.autograd.grad((ours * weight).sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert float(b.abs().max()) > 0
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, LONGEST), max_size=5), st.booleans(), st.booleans())
def test_any_lengths(lengths: list[int], timed: bool, query_key_map: bool) -> None:
    encoder = make_encoder(num_layers=1, query_key_map=query_key_map)
    x, times = inputs(lengths)
    found = run(encoder, x, lengths, times if timed else None)
    assert torch.allclose(found, encoder_truth(encoder, x, lengths, times if timed else None), rtol=1e-9, atol=1e-11)


def test_single_precision_and_half_precision_are_near_the_equations() -> None:
    encoder, lengths = make_encoder(), [9, 0, 4]
    x, times = inputs(lengths)
    truth = encoder_truth(encoder, x, lengths, times).detach()
    encoder.float()
    with torch.no_grad():
        single = run(encoder, x.float(), lengths, times).double()
        with torch.autocast("cpu", torch.bfloat16):
            half = run(encoder, x.float(), lengths, times)
    assert half.dtype == torch.float32  # the residual stream stays single
    assert torch.allclose(single, truth, rtol=1e-4, atol=1e-4)
    assert 1e-4 < float((half.double() - truth).norm() / truth.norm()) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_a_gpu_has_the_equations_too(changes: dict[str, Any]) -> None:
    encoder, lengths = make_encoder(**changes), [3, 0, 9, 1]
    x, times = inputs(lengths)
    weight = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    truth = encoder_truth(encoder, x, lengths, times)
    wanted = torch.autograd.grad((truth * weight).sum(), list(encoder.parameters()))
    encoder.float().cuda()
    layout = JaggedLayout.from_lengths(torch.tensor(lengths), "cuda")
    mask, moved = IntervalMask.causal(layout), {"layout": layout, "times_T": times.cuda()}
    ours = encoder(x.float().cuda(), mask=mask, **moved)
    assert torch.allclose(ours.double().cpu(), truth, rtol=1e-3, atol=1e-3)
    found = torch.autograd.grad((ours * weight.cuda()).sum(), list(encoder.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double().cpu() - b).norm()) <= 1e-2 * float(b.norm())


def test_positions_can_be_given() -> None:
    encoder, lengths = make_encoder(), [5, 4]
    x, times = inputs(lengths)
    places = make(lengths).position_T
    assert torch.equal(run(encoder, x, lengths, times), run(encoder, x, lengths, times, positions_T=places))
    moved = run(encoder, x, lengths, times, positions_T=places + (places == 3))
    assert not torch.allclose(run(encoder, x, lengths, times), moved)
    long = [LONGEST + 3]
    x, times = inputs(long)
    capped = make(long).position_T.clamp(max=LONGEST - 1)
    assert run(encoder, x, long, times, positions_T=capped, num_positions=LONGEST).shape == x.shape
    with pytest.raises(ValueError, match="max_length=9: a sequence has 10 positions"):
        run(encoder, x, long, times, positions_T=capped, num_positions=LONGEST + 1)


def test_requests_default_to_the_tokens_own_times() -> None:
    encoder, lengths = make_encoder(), [5, 4]
    x, times = inputs(lengths)
    assert torch.equal(run(encoder, x, lengths, times), run(encoder, x, lengths, times, request_times_T=times))
    assert not torch.allclose(
        run(encoder, x, lengths, times), run(encoder, x, lengths, times, request_times_T=times + 9999)
    )


def test_without_times_every_parameter_still_has_a_gradient() -> None:
    """DistributedDataParallel waits for every one of them."""
    encoder, lengths = make_encoder(), [5, 4]
    x, _ = inputs(lengths)
    run(encoder, x, lengths, None).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    for layer in encoder.layers:
        assert isinstance(layer, FuXiLayer)
        assert float(layer.time_function.parameters_KH.grad.abs().max()) == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_a_rank_without_tokens_has_zero_gradients(lengths: list[int]) -> None:
    encoder = make_encoder()
    x, times = inputs(lengths)
    out = run(encoder, x, lengths, times)
    assert out.shape == (0, DIM)
    out.sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in encoder.parameters())


def test_a_user_is_encoded_alike_whoever_shares_the_batch() -> None:
    encoder = make_encoder()
    alone, times = inputs([4], seed=1)
    others, other_times = inputs([9, 2], seed=2)
    one = run(encoder, alone, [4], times)
    for order in ([others[:9], alone, others[9:]], [alone, others[:9], others[9:]]):
        lengths = [len(part) for part in order]
        stamps = [times if part is alone else other_times[:9] if len(part) == 9 else other_times[9:] for part in order]
        both = run(encoder, torch.cat(order), lengths, torch.cat(stamps))
        start = sum(lengths[: [part is alone for part in order].index(True)])
        assert torch.allclose(both[start : start + 4], one, rtol=1e-12, atol=1e-12)


def test_nothing_sees_what_comes_after_it() -> None:
    encoder = make_encoder()
    x, times = inputs([7])
    before = run(encoder, x, [7], times)
    for changed in range(7):
        moved, later = x.clone(), times.clone()
        moved[changed] += 1.0
        later[changed] += 5000
        after = run(encoder, moved, [7], later)
        assert torch.equal(before[:changed], after[:changed])
        assert not torch.allclose(before[changed], after[changed])


def test_dropout_is_of_training_alone_and_recompute_draws_the_same() -> None:
    encoder, lengths = make_encoder(dropout=0.5), [9, 4]
    x, times = inputs(lengths)
    assert not torch.equal(run(encoder, x, lengths, times), run(encoder, x, lengths, times))

    def gradients(recompute: bool) -> list[Tensor]:
        encoder.recompute = recompute
        torch.manual_seed(5)
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(encoder, leaf, lengths, times)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return [out.detach(), leaf.grad, *(p.grad.clone() for p in encoder.parameters())]  # type: ignore[union-attr, list-item]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))
    encoder.eval()
    assert torch.allclose(run(encoder, x, lengths, times), encoder_truth(encoder, x, lengths, times))


@pytest.mark.parametrize(
    "changes", [{}, {"query_key_map": False}, {"qk_dim": 2, "v_dim": 5, "hidden_dim": 7, "num_layers": 3}]
)
def test_flops_are_counted_as_torch_counts_dense_work(changes: dict[str, Any]) -> None:
    """One full-length sequence under a full mask is dense work, which the product counter sees whole."""
    x, times = inputs([LONGEST])
    layout = make([LONGEST])
    everything = IntervalMask.contextual_prefix(layout, torch.tensor([LONGEST]))
    counted = []
    for recompute in (False, True):
        encoder = make_encoder(recompute=recompute, **changes)
        with use_backend("reference"), ProductCounter() as counter:
            out = run(encoder, x.clone().requires_grad_(), [LONGEST], times, mask=everything)
            forward = counter.flops
            out.sum().backward()
        assert encoder.flops(LONGEST, LONGEST**2) == forward
        counted.append(counter.flops)
        again = encoder.recomputed_flops(LONGEST, LONGEST**2)
    assert counted[0] == 3 * forward
    assert counted[1] - counted[0] == again > 0
    assert encoder.flops(LONGEST, 0) + encoder.flops(0, LONGEST**2) == forward


def test_first_time_functions_decay_from_small_strengths_at_several_speeds() -> None:
    gaps = torch.tensor([0, 60, 3600, 86400, 30 * 86400])
    torch.manual_seed(0)
    by_gap = FuXiTimeFunction(kind="exponential_power", num_heads=8).function()(gaps).detach()
    assert bool((by_gap[:, :-1].abs() > by_gap[:, 1:].abs()).all())
    kept = by_gap[:, -1] / by_gap[:, 0]
    assert bool((kept.diff() > 0).all())
    assert float(kept[0]) < 1e-4 < 0.4 < float(kept[-1])
    assert 0.005 < float(by_gap[:, 0].std()) < 0.05
    by_gap = FuXiTimeFunction(kind="power_law", num_heads=2).function()(gaps)
    assert torch.allclose(by_gap[:, 3] / by_gap[:, 0], torch.full((2,), 0.5))


def test_time_functions_stay_finite_wherever_an_optimiser_takes_them() -> None:
    gaps = torch.tensor([0, 1, 86400, 10**9])
    for kind in ("power_law", "exponential_power"):
        time = FuXiTimeFunction(kind=kind, num_heads=2)  # type: ignore[arg-type]
        for far in (-1e4, 1e4):
            with torch.no_grad():
                time.parameters_KH.fill_(far)
            values = time.function()(gaps)
            (gradient,) = torch.autograd.grad(values.sum(), time.parameters_KH)
            assert bool(values.isfinite().all())
            assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1"),
        ({"hidden_dim": 0}, "hidden_dim=0: expected at least 1"),
        ({"num_heads": 4}, "dim=6: not divisible by num_heads=4"),
        ({"dropout": 1.0}, "dropout=1.0: expected a probability"),
        ({"time_buckets": 0}, "time_buckets=0: expected at least 1"),
        ({"time_unit": 0.0}, "time_unit=0.0: expected seconds above 0"),
        ({"time_function": "linear"}, "time_function='linear': expected one of buckets, power_law, exponential_power"),
        ({"position_map": "none"}, "position_map='none': expected random or recency"),
        ({"query_key_map": False, "qk_dim": 3}, "qk_dim=3: without query_key_map there are no queries"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(**changes)


def test_a_sequence_that_is_too_long_comes_with_the_remedy() -> None:
    encoder = make_encoder()
    x, times = inputs([10])
    with pytest.raises(ValueError, match=r"max_length=9: a sequence has 10 tokens; raise the encoder's max_length"):
        run(encoder, x, [10], times)
    with pytest.raises(ValueError, match=r"x_TD: expected \(10 tokens, dim=6\), got shape \(9, 6\)"):
        run(encoder, x[:9], [10], times)


def test_outputs_can_keep_their_weights() -> None:
    encoder, lengths = make_encoder(), [5, 3]
    x, times = inputs(lengths)
    other = make_encoder()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(run(other, x, lengths, times), run(encoder, x, lengths, times))
