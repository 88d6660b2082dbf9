"""GroupLayerNorm and HSTU blocks with it: plain layer norm where groups are equal, each token its group's otherwise.

Shape suffixes: T tokens, D width, G groups.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gr.layers import GroupLayerNorm, HSTUEncoder
from lightning_gr.models import build_optimizer
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

GROUPS, DIM = 4, 6
SIZES: dict[str, Any] = {"dim": DIM, "num_layers": 2, "num_heads": 2, "max_length": 12, "time_buckets": 9}


def disturb(module: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)


def draw(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(layout.num_tokens, DIM, generator=generator, dtype=torch.float64)
    groups_T = torch.randint(0, GROUPS, (layout.num_tokens,), generator=generator)
    times_T = torch.randint(0, 5000, (layout.num_tokens,), generator=generator)
    return x_TD, groups_T, {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times_T}


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_each_token_has_its_groups_factors_in_a_loop(lengths: list[int], seed: int) -> None:
    x_TD, groups_T, _ = draw(lengths, seed)
    norm = GroupLayerNorm(num_groups=GROUPS, dim=DIM).double()
    disturb(norm, seed)
    found_TD = norm(x_TD, groups_T)
    assert found_TD.shape == x_TD.shape
    for t, group in enumerate(groups_T.tolist()):
        x = x_TD[t]
        scaled = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5) ** 0.5
        torch.testing.assert_close(found_TD[t], scaled * norm.weight[group] + norm.bias[group], rtol=1e-10, atol=1e-11)


def encoders() -> tuple[HSTUEncoder, HSTUEncoder]:
    """A plain encoder, and one with groups whose affine parameters are all the plain one's."""
    torch.manual_seed(0)
    plain = HSTUEncoder(dropout=0.0, **SIZES).double()
    disturb(plain)
    grouped = HSTUEncoder(dropout=0.0, num_norm_groups=GROUPS, **SIZES).double()
    with torch.no_grad():
        for (name, theirs), ours in zip(plain.named_parameters(), grouped.parameters(), strict=True):
            ours.copy_(theirs.expand(GROUPS, -1) if "_norm." in name else theirs)
    return plain, grouped


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(lambda x: sum(x) > 0), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_with_equal_rows_it_is_plain_layer_norm_in_values_and_gradients(lengths: list[int], seed: int) -> None:
    plain, grouped = encoders()
    x_TD, groups_T, inputs = draw(lengths, seed)
    mine_TD, theirs_TD = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    ours, wanted = grouped(mine_TD, groups_T=groups_T, **inputs), plain(theirs_TD, **inputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    for out in (ours, wanted):
        (out * weights).sum().backward()
    torch.testing.assert_close(mine_TD.grad, theirs_TD.grad, rtol=1e-9, atol=1e-10)
    for (name, theirs), mine in zip(plain.named_parameters(), grouped.parameters(), strict=True):
        assert mine.grad is not None
        # A parameter that all groups share gets the sum of what each of them gets.
        gradient = mine.grad.sum(0) if "_norm." in name else mine.grad
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-9, atol=1e-10)


def test_a_groups_parameters_get_gradients_of_its_own_tokens_alone() -> None:
    _, grouped = encoders()
    x_TD, groups_T, inputs = draw([5, 0, 7], 3)
    groups_T = torch.where(groups_T == 2, 1, groups_T)
    out = grouped(x_TD, groups_T=groups_T, **inputs)
    (out**2).sum().backward()
    for layer in grouped.layers:
        for norm in (layer.input_norm, layer.attention_norm):
            reached = norm.weight.grad.abs().sum(1) > 0  # type: ignore[union-attr]
            assert reached.tolist() == [True, True, False, True]


def test_changing_one_groups_factors_changes_what_sees_its_tokens() -> None:
    """Under a causal mask: nothing before the first token of the group."""
    _, grouped = encoders()
    x_TD, _, inputs = draw([9], 5)
    groups_T = torch.tensor([0, 0, 1, 1, 0, 2, 0, 3, 3])
    before = grouped(x_TD, groups_T=groups_T, **inputs)
    with torch.no_grad():
        grouped.layers[0].input_norm.weight[2] += 1.0  # type: ignore[union-attr, index, operator]
    after = grouped(x_TD, groups_T=groups_T, **inputs)
    changed = (before - after).abs().amax(1) > 0
    assert changed.tolist() == [False] * 5 + [True] * 4


def test_one_group_is_torchs_layer_norm_and_needs_no_groups() -> None:
    plain = HSTUEncoder(**SIZES)
    assert all(isinstance(layer.input_norm, nn.LayerNorm) for layer in plain.layers)
    assert plain.state_dict()["layers.0.input_norm.weight"].shape == (DIM,)
    grouped = HSTUEncoder(num_norm_groups=GROUPS, **SIZES)
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    assert grouped.state_dict()["layers.0.attention_norm.weight"].shape == (GROUPS, DIM)


def test_affine_parameters_of_groups_are_not_decayed() -> None:
    grouped = HSTUEncoder(num_norm_groups=GROUPS, **SIZES)
    optimizer = build_optimizer(grouped.named_parameters(), lambda params: torch.optim.AdamW(params, weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in grouped.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and "_norm." not in name)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_and_recompute_go_with_groups(recompute: bool) -> None:
    """The same gradients to the bit as without recompute, at two steps of dropout."""
    x_TD, groups_T, inputs = draw([5, 0, 7], 3)
    found = []
    for again in (False, recompute):
        torch.manual_seed(0)
        encoder = HSTUEncoder(dropout=0.4, num_norm_groups=GROUPS, recompute=again, **SIZES)
        disturb(encoder)
        steps = []
        for _ in range(2):
            encoder.zero_grad()
            encoder(x_TD.float(), groups_T=groups_T, **inputs).square().sum().backward()
            steps.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
        assert not torch.equal(steps[0][-1], steps[1][-1])
        found.append(steps)
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) == len(theirs) > 10
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupLayerNorm(num_groups=0, dim=3), "num_groups=0: expected at least 1"),
        (lambda: GroupLayerNorm(num_groups=2, dim=0), "dim=0: expected at least 1"),
        (lambda: HSTUEncoder(num_norm_groups=0), "num_norm_groups=0: expected at least 1"),
        (
            lambda: GroupLayerNorm(num_groups=2, dim=3)(torch.zeros(1, 3), torch.tensor([2])),
            r"groups_T: expected 0 \.\.\. 1, got 2",
        ),
        (
            lambda: HSTUEncoder(num_norm_groups=2, **SIZES)(draw([3], 0)[0].float(), **draw([3], 0)[2]),
            "groups_T=None: there are 2 groups",
        ),
    ],
)
def test_what_cannot_work_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
