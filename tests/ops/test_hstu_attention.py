"""HSTU attention against its formula, computed query by query and key by key in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.hstu_attention import attention_flops, hstu_attention
from lightning_gr.ops.hstu_attention.cpu import time_thresholds
from lightning_gr.ops.hstu_attention.reference import time_buckets
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

Rule = Callable[[int, int, int], bool]  # sequence, query position, key position
ACTIVATIONS = ["silu", "softmax"]
MASKS = ["causal", "contextual", "candidates", "arbitrary"]


def make(lengths: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None = None,
    time: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    q_lengths: list[int],
    k_lengths: list[int],
    sees: Rule,
    alpha: float,
    q_times: list[int] | None = None,
    k_times: list[int] | None = None,
    width: float = 0.301,
    activation: str = "silu",
) -> Tensor:
    """``scale * (act(alpha q k^T + bias) * mask) v`` one row and head at a time; hidden keys are not looked at."""
    rows, q_start, k_start = [], 0, 0
    for b, (num_queries, num_keys) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        factor = scale[b] if isinstance(scale, Tensor) else scale
        for i in range(num_queries):
            seen = [j for j in range(num_keys) if sees(b, i, j)]
            for h in range(q.shape[1]):
                row = v.new_zeros(v.shape[2]) + 0.0 * q.sum()
                logits = []
                for j in seen:
                    logit = alpha * (q[q_start + i, h] * k[k_start + j, h]).sum()
                    if position is not None:
                        reach = position.shape[0] // 2
                        logit = logit + position[max(-reach, min(reach, j - i)) + reach, h]
                    if time is not None and q_times is not None and k_times is not None:
                        gap = max(1, abs(q_times[q_start + i] - k_times[k_start + j]))
                        logit = logit + time[min(time.shape[0] - 1, math.floor(math.log(gap) / width)), h]
                    logits.append(logit)
                if activation == "silu":
                    weights = [factor * x / (1 + torch.exp(-x)) for x in logits]
                else:
                    highest = max((float(x.detach()) for x in logits), default=0.0)
                    powers = [torch.exp(x - highest) for x in logits]
                    weights = [power / torch.stack(powers).sum() for power in powers]
                for j, weight in zip(seen, weights, strict=True):
                    row = row + weight * v[k_start + j, h]
                rows.append(row)
        q_start, k_start = q_start + num_queries, k_start + num_keys
    return torch.stack(rows).view(-1, *v.shape[1:]) if rows else v.new_zeros(0, *v.shape[1:]) + 0.0 * q.sum()


def make_mask(kind: str, q_lengths: list[int], k_lengths: list[int], seed: int) -> tuple[IntervalMask, Rule]:
    """A mask and, apart from it, the rule by which a query sees a key."""
    layout = make(q_lengths)
    generator = torch.Generator().manual_seed(seed)
    some = [int(torch.randint(0, n + 1, (), generator=generator)) for n in q_lengths]
    if kind == "causal":
        return IntervalMask.causal(layout), lambda b, i, j: j <= i
    if kind == "contextual":
        mask = IntervalMask.contextual_prefix(layout, torch.tensor(some, dtype=torch.int64))
        return mask, lambda b, i, j: j <= i or j < some[b]
    if kind == "candidates":
        mask = IntervalMask.candidates(layout, torch.tensor(some, dtype=torch.int64))
        return mask, lambda b, i, j: i == j or (j < i and j < q_lengths[b] - some[b])
    table = {}
    for b, (num_queries, num_keys) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        for i in range(num_queries):
            a, begin, end = torch.randint(0, num_keys + 1, (3,), generator=generator).sort().values.tolist()
            table[b, i] = (a, begin, end, i < num_keys and bool(torch.rand((), generator=generator) < 0.5))
    columns = torch.tensor(list(table.values()), dtype=torch.int64).view(-1, 4).unbind(1)

    def sees(b: int, i: int, j: int) -> bool:
        a, begin, end, own = table[b, i]
        return j < a or begin <= j < end or (own and i == j)

    return IntervalMask(*columns[:3], columns[3].bool()), sees


@dataclass
class Case:
    """Inputs of one call, and the same for the truth."""

    tensors: list[Tensor]  # q, k, v, position table, time table, scale: all differentiable
    q_lengths: list[int]
    k_lengths: list[int]
    mask: IntervalMask
    sees: Rule
    q_times: Tensor
    k_times: Tensor
    activation: str
    alpha: float | None = None

    def ours(self, tensors: list[Tensor], **changes: Any) -> Tensor:
        q, k, v, position, time, scale = tensors
        arguments: dict[str, Any] = {
            "q_layout": make(self.q_lengths),
            "k_layout": make(self.k_lengths),
            "mask": self.mask,
            "scale": scale,
            "alpha": self.alpha,
            "position_table_PH": position,
            "time_table_NH": time,
            "q_times_T": self.q_times,
            "k_times_T": self.k_times,
            "activation": self.activation,
        }
        return hstu_attention(q, k, v, **(arguments | changes))

    def true(self, tensors: list[Tensor]) -> Tensor:
        width = tensors[0].shape[2]
        return truth(
            *tensors,
            q_lengths=self.q_lengths,
            k_lengths=self.k_lengths,
            sees=self.sees,
            alpha=1 / math.sqrt(width) if self.alpha is None else self.alpha,
            q_times=self.q_times.tolist(),
            k_times=self.k_times.tolist(),
            activation=self.activation,
        )


def make_case(
    kind: str,
    activation: str,
    q_lengths: list[int],
    k_lengths: list[int] | None = None,
    *,
    heads: int = 2,
    widths: tuple[int, int] = (3, 2),
    rows: tuple[int, int] = (5, 20),
    seed: int = 0,
) -> Case:
    keys = q_lengths if k_lengths is None else k_lengths
    mask, sees = make_mask(kind, q_lengths, keys, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    num_q, num_k = sum(q_lengths), sum(keys)
    shapes = [(num_q, heads, widths[0]), (num_k, heads, widths[0]), (num_k, heads, widths[1])]
    shapes += [(rows[0], heads), (rows[1], heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors.append(torch.rand(len(q_lengths), generator=generator, dtype=torch.float64) + 0.1)
    # Gaps of 0 and 1 second, in both directions, and beyond the last bucket, exp(20 * 0.301) = 411 s.
    q_times, k_times = (torch.randint(0, 900, (n,), generator=generator) // 3 * 3 for n in (num_q, num_k))
    if k_lengths is None:
        k_times = q_times + torch.arange(num_q) % 2
    return Case([x.requires_grad_() for x in tensors], q_lengths, keys, mask, sees, q_times, k_times, activation)


# How far an implementation may be from the truth on the same inputs, relative to the largest value, if above 1.
EXACT: list[tuple[str, torch.dtype, float]] = [
    ("reference", torch.float64, 1e-11),
    ("cpu", torch.float64, 1e-11),  # by blocks of rows in PyTorch
    ("cpu", torch.float32, 3e-6),  # compiled
]
ROUNDED: list[tuple[str, torch.dtype, float]] = [
    ("reference", torch.float32, 3e-6),
    ("cpu", torch.float16, 1e-3),
    ("cpu", torch.bfloat16, 8e-3),
]


def check(case: Case, implementations: list[tuple[str, torch.dtype, float]] = EXACT) -> list[Tensor]:
    """Outputs and every gradient of the implementations equal the truth's; returns the truth's gradients."""
    names = ("output", "q", "k", "v", "position", "time", "scale")
    settings: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(sum(case.q_lengths), *case.tensors[2].shape[1:], generator=generator, dtype=torch.float64)
    wanted: list[Tensor] = []
    for backend, dtype, tolerance in implementations:
        tensors = [x.detach().to(dtype).requires_grad_() for x in case.tensors]
        if implementations is ROUNDED or not wanted:
            inputs = tensors if implementations is ROUNDED else case.tensors
            doubles = [x.detach().double() for x in inputs]
            rounded = cotangent.to(dtype if implementations is ROUNDED else torch.float64).double()
            true = case.true([x.requires_grad_() for x in doubles])
            wanted = [true.detach(), *torch.autograd.grad(true, doubles, rounded, **settings)]
        ours = case.ours(tensors, backend=backend)
        assert ours.shape == wanted[0].shape
        assert ours.dtype == dtype
        found = [ours, *torch.autograd.grad(ours, tensors, cotangent.to(dtype), **settings)]
        for name, mine, truth_ in zip(names, found, wanted, strict=True):
            largest = float(truth_.abs().max()) if truth_.numel() else 0.0
            torch.testing.assert_close(
                mine.double(),
                truth_,
                rtol=0,
                atol=tolerance * max(largest, 1.0),
                msg=lambda text, name=name, by=(backend, dtype): f"{name} by {by}: {text}",
            )
    return wanted[1:]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", MASKS)
def test_every_dtype_is_within_its_rounding(kind: str, activation: str) -> None:
    check(make_case(kind, activation, [5, 0, 1, 7], widths=(8, 4)), ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "mtgr"])
def test_a_sequence_of_8192_tokens(kind: str) -> None:
    """Compiled against blocks in float64, which the other tests hold to the formula.

    The tables' gradients are sums of millions of terms; values and cotangents are positive, so that these do not cancel
    down to their rounding.
    """
    layout = make([8192])
    mask = IntervalMask.causal(layout)
    if kind == "mtgr":
        counts_B4 = torch.tensor([[4, 4000, 4000, 188]])
        earlier_T = torch.arange(8192) - 4004
        earlier_T[8004:] = torch.randint(0, 4001, (188,))
        mask = IntervalMask.dynamic(layout, counts_B4, earlier_T.clamp(min=0))
    qkv = [torch.randn(8192, 1, 16), torch.randn(8192, 1, 16), torch.rand(8192, 1, 16)]
    table, times = torch.randn(2 * 1000 + 1, 1), torch.arange(8192) * 60
    cotangent, found = torch.rand(8192, 1, 16), []
    for dtype in (torch.float32, torch.float64):
        tensors = [x.to(dtype).requires_grad_() for x in (*qkv, table, torch.linspace(-1, 1, 32)[:, None])]
        out = hstu_attention(
            *tensors[:3],
            q_layout=layout,
            mask=mask,
            scale=1 / 8192,
            position_table_PH=tensors[3],
            time_table_NH=tensors[4],
            q_times_T=times,
            k_times_T=times,
            backend="cpu",
        )
        found.append([out, *torch.autograd.grad(out, tensors, cotangent.to(dtype))])
    for mine, wanted in zip(*found, strict=True):
        assert float(((mine - wanted).abs().max() / wanted.abs().max()).detach()) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", MASKS)
def test_outputs_and_gradients_are_the_formulas(kind: str, activation: str) -> None:
    gradients = check(make_case(kind, activation, [5, 0, 1, 7]))
    used = gradients if activation == "silu" else gradients[:-1]  # softmax ignores the scale
    assert all(float(gradient.abs().sum()) > 0 for gradient in used)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keys_of_their_own(activation: str) -> None:
    check(make_case("arbitrary", activation, [3, 0, 2, 4], [5, 3, 0, 2]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1, 0]])
def test_nothing_and_next_to_nothing(lengths: list[int], activation: str) -> None:
    check(make_case("causal", activation, lengths))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=4),
    kind=st.sampled_from(MASKS),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths: list[int], kind: str, activation: str, seed: int) -> None:
    check(make_case(kind, activation, lengths, seed=seed))


def test_every_factor_is_the_callers() -> None:
    case = make_case("causal", "silu", [4, 3])
    case.alpha = 0.37
    check(case)
    q, k, v, position, time, _ = case.tensors
    common: dict[str, Any] = {"q_lengths": [4, 3], "k_lengths": [4, 3], "sees": case.sees, "alpha": 0.37}
    times: dict[str, Any] = {"q_times": case.q_times.tolist(), "k_times": case.k_times.tolist()}
    wanted = truth(q, k, v, None, time, 0.25, **common, **times, width=1.5)
    found = case.ours([q, k, v, None, time, 0.25], time_bucket_width=1.5)  # type: ignore[list-item]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    # No times, no time bias; no key layout, the queries'.
    wanted = truth(q, k, v, position, None, 0.25, **common)
    found = case.ours([q, k, v, position, time, 0.25], q_times_T=None, k_times_T=None, k_layout=None)  # type: ignore[list-item]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_both_orders(activation: str) -> None:
    case = make_case("causal", activation, [2, 0, 1], heads=1, widths=(2, 1), rows=(3, 2))
    inputs = case.tensors if activation == "silu" else case.tensors[:-1]
    scale = case.tensors[-1].detach()

    def call(*tensors: Tensor, backend: str = "reference") -> Tensor:
        return case.ours(list(tensors) if activation == "silu" else [*tensors, scale], backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(lambda *tensors: call(*tensors, backend="cpu"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_implementation_says_that_it_is_differentiable_once(dtype: torch.dtype) -> None:
    q = torch.randn(3, 1, 2, dtype=dtype, requires_grad=True)
    arguments: dict[str, Any] = {"q_layout": make([3]), "mask": IntervalMask.causal(make([3])), "scale": 0.5}
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        torch.autograd.grad(hstu_attention(q, q, q, **arguments).sum(), q, create_graph=True)
    with use_backend("reference"):
        out = hstu_attention(q, q, q, **arguments)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), q)
    assert float(second.abs().sum()) > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("positions", [False, True])
def test_long_sequences_in_compiled_tiles(activation: str, positions: bool) -> None:
    """Beyond one tile in every direction, against the reference, which the other tests hold to the formula."""
    torch.manual_seed(3)
    lengths = torch.tensor([301, 0, 64, 1, 530])
    layout = JaggedLayout.from_lengths(lengths)
    num_tokens, length_T = layout.num_tokens, lengths[layout.sequence_T]
    edges = (torch.rand(num_tokens, 3) * (length_T[:, None] + 1)).long().sort(1).values
    masks = [
        IntervalMask.causal(layout),
        IntervalMask(*(x.contiguous() for x in edges.unbind(1)), torch.rand(num_tokens) < 0.5),
    ]
    tensors = [torch.randn(num_tokens, 3, width) for width in (20, 20, 36)]
    tensors += [torch.randn(41, 3), torch.randn(30, 3), torch.rand(5)]
    times_T = torch.randint(0, 10**7, (num_tokens,))
    times_T[:301] += torch.arange(301) * 2**40  # a span beyond 32 bits
    places_T = torch.randint(0, 50, (num_tokens,)) if positions else None
    cotangent = torch.randn(num_tokens, 3, 36)
    for mask in masks:
        results = []
        for backend, dtype in (("cpu", torch.float32), ("cpu", torch.float32), ("reference", torch.float64)):
            # Slices of one projection, as the layer makes them.
            joined = torch.cat(tensors[:3], 2).to(dtype).requires_grad_()
            rest = [x.to(dtype).requires_grad_() for x in tensors[3:]]
            out = hstu_attention(
                *joined.split([20, 20, 36], 2),
                q_layout=layout,
                mask=mask,
                scale=rest[2],
                position_table_PH=rest[0],
                time_table_NH=rest[1],
                q_times_T=times_T,
                k_times_T=times_T,
                q_positions_T=places_T,
                k_positions_T=places_T,
                activation=activation,  # type: ignore[arg-type]
                backend=backend,  # type: ignore[arg-type]
            )
            inputs = [joined, *rest[: 3 if activation == "silu" else 2]]
            results.append([out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))])
        # A row of a table sums tens of thousands of pairs, which nearly cancel under softmax.
        tolerances = [5e-6, 5e-6, 1e-4, 1e-4, 1e-4]
        for once, again, wanted, tolerance in zip(*results, tolerances[: len(results[0])], strict=True):
            assert torch.equal(once, again)  # bit for bit
            assert float(((once - wanted).abs().max() / wanted.abs().max()).detach()) < tolerance


def test_thresholds_of_time_buckets_are_the_references() -> None:
    for width in (0.301, 0.05, 1.5):
        found = time_thresholds(40, width)
        for gap in (
            *range(1, 300),
            *(int(x) + d for x in found[found < 2**40] for d in (-1, 0, 1) if x > 1),
            2**50,
            2**61,
        ):
            bucket = int(time_buckets(torch.tensor([[gap]]), torch.tensor([[0]]), 40, width))
            assert int(torch.searchsorted(found[1:], gap, right=True)) == bucket, gap


def test_dropped_weights_are_the_same_in_the_backward_pass() -> None:
    for dtype in (torch.float32, torch.float64):
        size, layout = 70, make([70])
        everything = torch.full((size,), size)
        mask = IntervalMask(everything, everything, everything, torch.zeros(size, dtype=torch.bool))
        q, k = torch.randn(2, size, 1, 4, dtype=dtype)
        v = torch.eye(size, dtype=dtype)[:, None].requires_grad_()  # the output is the weights
        for activation in ("silu", "softmax"):
            arguments: dict[str, Any] = {"activation": activation, "dropout": 0.4, "training": True}
            weights = hstu_attention(q, k, v, q_layout=layout, mask=mask, scale=0.5, **arguments)
            cotangent = torch.randn(size, 1, size, dtype=dtype)
            (found,) = torch.autograd.grad(weights, v, cotangent)
            torch.testing.assert_close(found[:, 0], weights[:, 0].detach().T @ cotangent[:, 0], rtol=1e-4, atol=1e-5)
            assert 0.35 < float((weights == 0).float().mean()) < 0.45


def test_softmax_is_torchs_own() -> None:
    lengths = [6, 1, 3]
    case = make_case("causal", "softmax", lengths, widths=(4, 5))
    q, k, v, *_ = case.tensors
    found = case.ours([q, k, v, None, None, 1.0], q_times_T=None, k_times_T=None).split(lengths)  # type: ignore[list-item]
    for mine, *parts in zip(found, q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        wanted = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts), is_causal=True)
        torch.testing.assert_close(mine, wanted.transpose(0, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mates", [[2], [3, 0], [60]])
def test_a_sequence_does_not_notice_its_mates(activation: str, mates: list[int]) -> None:
    lengths = [5, *mates]
    case = make_case("causal", activation, lengths)
    tensors = [x.detach().float() for x in case.tensors]
    among = case.ours(tensors)[:5]
    alone = hstu_attention(
        *(x[:5] for x in tensors[:3]),
        q_layout=make([5]),
        mask=IntervalMask.causal(make([5])),
        scale=tensors[5][:1],
        position_table_PH=tensors[3],
        time_table_NH=tensors[4],
        q_times_T=case.q_times[:5],
        k_times_T=case.k_times[:5],
        activation=activation,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_hidden_key_changes_nothing(kind: str, activation: str) -> None:
    lengths = [5, 4]
    case = make_case(kind, activation, lengths, seed=3)
    before = case.ours(case.tensors)
    for hidden, b in ((1, 0), (4, 0), (5, 1), (8, 1)):
        q, k, v, *rest = (x.detach().clone() for x in case.tensors)
        k[hidden] += 1e4
        v[hidden] -= 1e4
        after = case.ours([q, k, v, *rest])
        key = hidden - sum(lengths[:b])
        sees = [other == b and case.sees(b, i, key) for other, n in enumerate(lengths) for i in range(n)]
        assert False in sees
        for row, (visible, x, y) in enumerate(zip(sees, before, after, strict=True)):
            assert torch.equal(x, y) != visible, f"row {row}, key {hidden}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_see_nothing_give_zeros_and_zero_gradients(activation: str, dtype: torch.dtype) -> None:
    case = make_case("causal", activation, [3, 2])
    zeros, nobody = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool)
    some = torch.tensor([0, 2, 0, 0, 0])  # the second row alone sees the first two keys
    with torch.autograd.set_detect_anomaly(True):
        for a_T in (zeros, some):
            tensors = [x.detach().to(dtype).requires_grad_() for x in case.tensors]
            out = case.ours(tensors, mask=IntervalMask(a_T, a_T, a_T, nobody))
            out.float().square().sum().backward()
            blind = a_T == 0
            assert bool((out[blind] == 0).all())
            q, *others = tensors[: 6 if activation == "silu" else 5]
            assert q.grad is not None
            assert bool((q.grad[blind] == 0).all())
            for tensor in (q, *others):
                assert tensor.grad is not None
                assert bool(tensor.grad.isfinite().all())
                assert bool((tensor.grad == 0).all()) == bool(blind.all())


@pytest.mark.parametrize("kind", MASKS)
def test_flops_count_the_multiplications_and_additions_over_visible_pairs(kind: str) -> None:
    lengths, heads, qk_dim, v_dim = [5, 0, 1, 8], 3, 4, 6
    mask, sees = make_mask(kind, lengths, lengths, seed=1)
    operations = 0
    for b, length in enumerate(lengths):
        for i in range(length):
            for j in range(length):
                for _ in range(heads if sees(b, i, j) else 0):
                    operations += 2 * qk_dim  # one product and one sum an element of q k
                    operations += 2 * v_dim  # and of weight times v
    pairs = mask.num_visible_pairs(make(lengths), make(lengths))
    assert attention_flops(pairs, num_heads=heads, qk_dim=qk_dim, v_dim=v_dim) == operations > 0


def weights_under_dropout(activation: str, rate: float, **settings: Any) -> Tensor:
    """Attention weights (Q, K), which a value of ones and zeros reveals; without dropout all in a row are equal."""
    size, layout = 64, make([64])
    everything = torch.full((size,), size)
    return hstu_attention(
        torch.ones(size, 1, 2),
        torch.ones(size, 1, 2),
        torch.eye(size)[:, None],
        q_layout=layout,
        mask=IntervalMask(everything, everything, everything, torch.zeros(size, dtype=torch.bool)),
        scale=0.5,
        activation=activation,  # type: ignore[arg-type]
        dropout=rate,
        **settings,
    )[:, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_drops_weights_in_training_alone_and_keeps_their_mean(activation: str) -> None:
    whole = weights_under_dropout(activation, 0.0)
    logit = 2 / math.sqrt(2)
    value = 0.5 * logit / (1 + math.exp(-logit)) if activation == "silu" else 1 / 64
    torch.testing.assert_close(whole, torch.full((64, 64), value))
    assert torch.equal(weights_under_dropout(activation, 0.3), whole)
    assert torch.equal(weights_under_dropout(activation, 0.3, training=False), whole)
    assert torch.equal(weights_under_dropout(activation, 0.0, training=True), whole)
    torch.manual_seed(1)
    thinned = weights_under_dropout(activation, 0.3, training=True)
    assert float((thinned == 0).float().mean()) == pytest.approx(0.3, abs=0.03)  # 4 deviations of 4096 draws
    torch.testing.assert_close(thinned[thinned != 0], whole[thinned != 0] / 0.7)
    assert float(thinned.mean() / whole.mean()) == pytest.approx(1.0, abs=0.045)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_as_near_the_truth_as_plain_operations(activation: str) -> None:
    lengths = [9, 4, 12]
    case = make_case("causal", activation, lengths, widths=(16, 8))
    q, k, v, position, _, scale = halves = [x.detach().bfloat16() for x in case.tensors]
    out = case.ours([*halves[:4], None, halves[5]], q_times_T=None, k_times_T=None)  # type: ignore[list-item]
    assert out.dtype == torch.bfloat16
    q_lengths: dict[str, Any] = {"q_lengths": lengths, "k_lengths": lengths}
    doubles = [q.double(), k.double(), v.double(), position.double(), None, scale.double()]
    wanted = truth(*doubles, **q_lengths, sees=case.sees, alpha=0.25, activation=activation)  # type: ignore[arg-type]
    plain = []
    for b, (qs, ks, vs) in enumerate(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)):
        distance = (torch.arange(len(qs)) - torch.arange(len(qs))[:, None]).clamp(-2, 2) + 2
        logits = 0.25 * torch.einsum("ihd,jhd->hij", qs, ks) + position[distance].permute(2, 0, 1)
        causal = torch.ones(len(qs), len(qs), dtype=torch.bool).tril()
        if activation == "silu":
            weights = F.silu(logits) * causal * scale[b]
        else:
            weights = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1)
        plain.append(torch.einsum("hij,jhv->ihv", weights, vs))
    error, error_of_plain = ((x.double() - wanted).abs().max() for x in (out, torch.cat(plain)))
    assert 0 < float(error) <= 2 * float(error_of_plain)


# ---- what cannot be meant ----------------------------------------------------------------------------------------


def call(**changes: Any) -> Tensor:
    """A valid call of 2 sequences, 5 queries, 4 keys, 2 heads, width 3 and 2, except for the changes."""
    arguments: dict[str, Any] = {
        "q_THD": torch.zeros(5, 2, 3),
        "k_THD": torch.zeros(4, 2, 3),
        "v_THV": torch.zeros(4, 2, 2),
        "q_layout": make([3, 2]),
        "k_layout": make([2, 2]),
        "mask": IntervalMask(*(torch.ones(5, dtype=torch.int64),) * 3, torch.zeros(5, dtype=torch.bool)),
        "scale": torch.ones(2),
        "position_table_PH": torch.zeros(3, 2),
        "time_table_NH": torch.zeros(4, 2),
        "q_times_T": torch.zeros(5, dtype=torch.int64),
        "k_times_T": torch.zeros(4, dtype=torch.int64),
    }
    return hstu_attention(**(arguments | changes))


def elsewhere(layout: JaggedLayout) -> JaggedLayout:
    return JaggedLayout(layout.lengths_B, layout.offsets_B1.to("meta"))


META_MASK = IntervalMask(
    *(torch.ones(5, dtype=torch.int64, device="meta"),) * 3, torch.zeros(5, dtype=torch.bool, device="meta")
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_THD": torch.zeros(5, 6)}, r"q_THD: expected \(5 tokens, heads, width\), got shape \(5, 6\)"),
        ({"q_THD": torch.zeros(4, 2, 3)}, r"q_THD: expected \(5 tokens, .* \(4, 2, 3\)"),
        ({"k_THD": torch.zeros(5, 2, 3)}, r"k_THD: expected \(4 tokens, .* \(5, 2, 3\)"),
        ({"v_THV": torch.zeros(3, 2, 2)}, r"v_THV: expected \(4 tokens, .* \(3, 2, 2\)"),
        ({"k_THD": torch.zeros(4, 1, 3)}, r"k_THD: expected 2 heads like q_THD, got 1"),
        ({"v_THV": torch.zeros(4, 3, 2)}, r"v_THV: expected 2 heads like q_THD, got 3"),
        ({"q_THD": torch.zeros(5, 2, 3, dtype=torch.int64)}, r"q_THD: expected the floating dtype .*got torch\.int64"),
        ({"k_THD": torch.zeros(4, 2, 3).double()}, r"k_THD: .*torch\.float32, got torch\.float64"),
        ({"v_THV": torch.zeros(4, 2, 2).bfloat16()}, r"v_THV: .*torch\.float32, got torch\.bfloat16"),
        ({"k_THD": torch.zeros(4, 2, 4)}, r"k_THD: expected width 3 like q_THD, got 4"),
        ({"k_layout": make([2, 1, 1])}, r"k_layout: expected 2 sequences, got 3"),
        ({"mask": IntervalMask.causal(make([4]))}, r"mask: expected one row for each of 5 queries, got 4"),
        ({"scale": torch.ones(3)}, r"scale: expected a number or 2 numbers, got \(3,\)"),
        ({"scale": torch.ones(())}, r"scale: expected a number or 2 numbers, got \(\)"),
        ({"position_table_PH": torch.zeros(3, 4)}, r"position_table_PH: expected \(rows, 2 heads\), got .*\(3, 4\)"),
        ({"position_table_PH": torch.zeros(0, 2)}, r"position_table_PH: expected \(rows, 2 heads\), got .*\(0, 2\)"),
        ({"position_table_PH": torch.zeros(4, 2)}, r"position_table_PH: expected an odd number of rows, got 4"),
        ({"position_table_PH": torch.zeros(3, 2).long()}, r"position_table_PH: expected a floating .*int64"),
        ({"time_table_NH": torch.zeros(2)}, r"time_table_NH: expected \(rows, 2 heads\), got shape \(2,\)"),
        ({"time_table_NH": torch.zeros(4, 2).int()}, r"time_table_NH: expected a floating dtype, got torch\.int32"),
        ({"q_times_T": torch.zeros(4).long()}, r"q_times_T: expected 5 times, got shape \(4,\)"),
        ({"k_times_T": torch.zeros(5).long()}, r"k_times_T: expected 4 times, got shape \(5,\)"),
        ({"q_times_T": torch.zeros(5)}, r"q_times_T: expected int64 seconds, got torch\.float32"),
        ({"k_times_T": torch.zeros(4).int()}, r"k_times_T: expected int64 seconds, got torch\.int32"),
        ({"q_times_T": None}, r"q_times_T=None: k_times_T is given"),
        ({"k_times_T": None}, r"k_times_T=None: q_times_T is given"),
        ({"k_THD": torch.zeros(4, 2, 3, device="meta")}, r"k_THD: expected the device of q_THD, cpu, got meta"),
        ({"v_THV": torch.zeros(4, 2, 2, device="meta")}, r"v_THV: expected the device .*got meta"),
        ({"q_layout": elsewhere(make([3, 2]))}, r"q_layout: expected the device .*got meta"),
        ({"k_layout": elsewhere(make([2, 2]))}, r"k_layout: expected the device .*got meta"),
        ({"mask": META_MASK}, r"mask: expected the device .*got meta"),
        ({"scale": torch.ones(2, device="meta")}, r"scale: expected the device .*got meta"),
        ({"position_table_PH": torch.zeros(3, 2, device="meta")}, r"position_table_PH: expected the device .*meta"),
        ({"time_table_NH": torch.zeros(4, 2, device="meta")}, r"time_table_NH: expected the device .*meta"),
        ({"q_times_T": torch.zeros(5, device="meta").long()}, r"q_times_T: expected the device .*meta"),
        ({"k_times_T": torch.zeros(4, device="meta").long()}, r"k_times_T: expected the device .*meta"),
        ({"activation": "relu"}, r"activation: expected 'silu' or 'softmax', got 'relu'"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"dropout: .*got -0\.1"),
        ({"backend": "cuda"}, r"backend: expected one of auto, reference, cpu, triton, got 'cuda'"),
        ({"time_bucket_width": 0.0}, r"time_bucket_width: expected a number above 0, got 0\.0"),
        ({"time_bucket_width": math.nan}, r"time_bucket_width: expected a number above 0, got nan"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    assert call().shape == (5, 2, 2)
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_layout": JaggedLayout(make([3, 2]).lengths_B, torch.tensor([0, 2, 5]))}, r"q_layout\.offsets_B1\[1\]=2: "),
        ({"k_layout": JaggedLayout(make([2, 2]).lengths_B, torch.tensor([0, 2, 3]))}, r"k_layout\.offsets_B1\[2\]=3: "),
        ({"mask": IntervalMask.causal(make([3, 2]))}, r"mask: row 2 .* <= 2, the keys of its sequence"),
    ],
)
def test_values_on_the_device_are_looked_at_in_debugging_alone(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIGHTNING_GR_DEBUG", raising=False)
    call(**changes)
    monkeypatch.setenv("LIGHTNING_GR_DEBUG", "1")
    assert call().shape == (5, 2, 2)
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)
