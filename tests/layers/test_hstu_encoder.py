"""HSTU blocks against the paper's equations in float64, one sequence at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.layers import HSTUEncoder
from lightning_gr.layers.hstu import HSTULayer
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

DIM, HEADS, LONGEST = 6, 2, 9


def make(lengths: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def make_encoder(**changes: Any) -> HSTUEncoder:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"dim": DIM, "num_layers": 2, "num_heads": HEADS, "max_length": LONGEST}
    encoder = HSTUEncoder(**(sizes | {"dropout": 0.0, "time_buckets": 5} | changes)).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return encoder


def inputs(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    times = torch.randint(0, 100_000, (total,), generator=generator)
    return torch.randn(total, DIM, generator=generator, dtype=torch.float64), times


def run(encoder: HSTUEncoder, x: Tensor, lengths: list[int], times: Tensor | None, **changes: Any) -> Tensor:
    layout = make(lengths)
    given_: dict[str, Any] = {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times} | changes
    return encoder(x, **given_)


def layer_truth(layer: HSTULayer, x: Tensor, times: list[int] | None, asked: list[int] | None) -> Tensor:
    """One causal block over one sequence, query by query: arXiv 2402.17152, equations 1 to 3."""
    n, qk, v_dim = x.shape[0], layer.qk_dim, layer.v_dim
    mixed = F.silu(
        F.layer_norm(x, (DIM,), layer.input_norm.weight, layer.input_norm.bias) @ layer.uvqk.weight.T + layer.uvqk.bias
    )
    u = mixed[:, : HEADS * v_dim]
    v = mixed[:, HEADS * v_dim : 2 * HEADS * v_dim]
    q = mixed[:, 2 * HEADS * v_dim : 2 * HEADS * v_dim + HEADS * qk]
    k = mixed[:, 2 * HEADS * v_dim + HEADS * qk :]
    out = []
    for i in range(n):
        heads = []
        for h in range(HEADS):
            logits = []
            for j in range(i + 1):
                logit = (q[i, h * qk : (h + 1) * qk] * k[j, h * qk : (h + 1) * qk]).sum() / math.sqrt(qk)
                if layer.position_table_PH is not None:
                    logit = logit + layer.position_table_PH[j - i + LONGEST - 1, h]
                if layer.time_table_NH is not None and times is not None:
                    assert asked is not None
                    bucket = int(math.log(max(1, abs(asked[i] - times[j]))) / 0.301)
                    logit = logit + layer.time_table_NH[min(bucket, layer.time_table_NH.shape[0] - 1), h]
                logits.append(logit)
            stacked = torch.stack(logits)
            weights = torch.softmax(stacked, 0) if layer.activation == "softmax" else F.silu(stacked) * layer.scale
            heads.append((weights[:, None] * v[: i + 1, h * v_dim : (h + 1) * v_dim]).sum(0))
        out.append(torch.cat(heads))
    attended = torch.stack(out) if out else x.new_zeros(0, HEADS * v_dim)
    normed = F.layer_norm(attended, (HEADS * v_dim,), layer.attention_norm.weight, layer.attention_norm.bias)
    return x + (u * normed) @ layer.output.weight.T + layer.output.bias


def encoder_truth(
    encoder: HSTUEncoder, x: Tensor, lengths: list[int], times: Tensor | None, asked: Tensor | None = None
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
            own = layer_truth(layer, own, when, requests)  # type: ignore[arg-type]
        out.append(own)
        start += n
    return torch.cat(out) if out else x


SETTINGS: list[dict[str, Any]] = [
    {},
    {"activation": "softmax"},
    {"time_bias": False},
    {"position_bias": False, "input_position_embedding": False},
    {"qk_dim": 2, "v_dim": 5, "num_layers": 1},
    {"scale": 0.5},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_outputs_and_gradients_are_the_equations(changes: dict[str, Any]) -> None:
    encoder, lengths = make_encoder(**changes), [3, 0, 9, 1]
    x, times = inputs(lengths)
    x.requires_grad_()
    asked = times + 500
    weight = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = run(encoder, x, lengths, times, request_times_T=asked)
    truth = encoder_truth(encoder, x, lengths, times, asked)
    assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-11)
    leaves = [x, *encoder.parameters()]
    wanted = torch.autograd.grad((truth * weight).sum(), leaves)
    found = torch.autograd.grad((ours * weight).sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, LONGEST), max_size=5), st.booleans())
def test_any_lengths(lengths: list[int], timed: bool) -> None:
    encoder = make_encoder(num_layers=1)
    x, times = inputs(lengths)
    found = run(encoder, x, lengths, times if timed else None)
    assert torch.allclose(found, encoder_truth(encoder, x, lengths, times if timed else None), rtol=1e-9, atol=1e-11)


def test_requests_default_to_the_tokens_own_times() -> None:
    encoder, lengths = make_encoder(), [5, 4]
    x, times = inputs(lengths)
    assert torch.equal(run(encoder, x, lengths, times), run(encoder, x, lengths, times, request_times_T=times))
    assert not torch.allclose(
        run(encoder, x, lengths, times), run(encoder, x, lengths, times, request_times_T=times + 99_999)
    )


def test_without_times_every_parameter_still_has_a_gradient() -> None:
    """DistributedDataParallel waits for every one of them."""
    encoder, lengths = make_encoder(), [5, 4]
    x, _ = inputs(lengths)
    run(encoder, x, lengths, None).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert all(float(layer.time_table_NH.grad.abs().max()) == 0 for layer in encoder.layers)  # type: ignore[union-attr, arg-type]


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
        moved = x.clone()
        moved[changed] += 1.0
        after = run(encoder, moved, [7], times)
        assert torch.equal(before[:changed], after[:changed])
        assert not torch.allclose(before[changed], after[changed])


def test_dropout_is_of_training_alone() -> None:
    encoder, lengths = make_encoder(dropout=0.5, attention_dropout=0.3), [9, 4]
    x, times = inputs(lengths)
    assert not torch.equal(run(encoder, x, lengths, times), run(encoder, x, lengths, times))
    encoder.eval()
    assert torch.equal(run(encoder, x, lengths, times), run(encoder, x, lengths, times))
    assert torch.allclose(run(encoder, x, lengths, times), encoder_truth(encoder, x, lengths, times))


@pytest.mark.parametrize("changes", [{}, {"qk_dim": 2, "v_dim": 5, "num_layers": 3}])
def test_flops_are_counted_as_torch_counts_dense_work(changes: dict[str, Any]) -> None:
    """One full-length sequence under a full mask is dense work, which torch's own counter sees whole."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make_encoder(time_bias=False, position_bias=False, **changes)
    x, _ = inputs([LONGEST])
    layout = make([LONGEST])
    everything = IntervalMask.contextual_prefix(layout, torch.tensor([LONGEST]))
    with FlopCounterMode(display=False) as counter:
        run(encoder, x, [LONGEST], None, mask=everything)
    assert encoder.flops(LONGEST, LONGEST * LONGEST) == counter.get_total_flops()


def test_flops_grow_with_visible_pairs_alone() -> None:
    encoder = make_encoder()
    per_pair = encoder.flops(10, 56) - encoder.flops(10, 55)
    assert per_pair == 2 * 2 * HEADS * (DIM // HEADS + DIM // HEADS)
    assert encoder.flops(11, 55) - encoder.flops(10, 55) == 2 * (2 * DIM * 4 * DIM + 2 * DIM * DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1"),
        ({"num_heads": 4}, "dim=6: not divisible by num_heads=4"),
        ({"dropout": 1.0}, "dropout=1.0: expected a probability"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1: expected a probability"),
        ({"time_buckets": 0}, "time_buckets=0: expected at least 1"),
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
