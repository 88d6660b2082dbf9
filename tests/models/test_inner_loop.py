"""Inner steps against closed forms, and gradients that are handed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gr.models.inner_loop import Scored, inner_sgd, with_gradient

CURVATURE, SIZE, START = 0.7, 0.3, 2.0


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_descent_on_a_parabola_is_a_power(steps: int, second_order: bool) -> None:
    """Of ``c x^2 / 2`` a step makes ``(1 - s c) x``; without the second order it has slope 1, and ``-c x`` in ``s``."""
    x, size = leaf(START), leaf(SIZE)
    found = inner_sgd(
        lambda values: CURVATURE * values["x"] ** 2 / 2, {"x": x}, {"x": size}, steps=steps, second_order=second_order
    )["x"]
    shrink = 1 - SIZE * CURVATURE
    assert float(found) == pytest.approx(START * shrink**steps)
    by_x, by_size = torch.autograd.grad(found, [x, size], allow_unused=True)
    assert float(by_x) == pytest.approx(shrink**steps if second_order else 1.0)
    if not steps:
        assert by_size is None
    elif second_order:
        assert float(by_size) == pytest.approx(-steps * CURVATURE * shrink ** (steps - 1) * START)
    else:
        assert float(by_size) == pytest.approx(-sum(CURVATURE * START * shrink**n for n in range(steps)))
    assert float(x.detach()) == START


def test_values_without_a_step_size_frozen_ones_and_unused_ones_stay() -> None:
    values = {name: leaf(1.0) for name in ("adapted", "without", "unused", "frozen")}
    values["frozen"].requires_grad_(False)
    found = inner_sgd(
        lambda now: now["adapted"] * now["without"] * now["frozen"],
        values,
        {"adapted": 0.5, "unused": 0.5, "frozen": 0.5},
        steps=2,
        second_order=False,
    )
    assert float(found["adapted"]) == 0.0
    assert all(found[name] is values[name] for name in ("without", "unused", "frozen"))
    alone = {"frozen": values["frozen"]}
    assert inner_sgd(lambda now: now["frozen"], alone, {"frozen": 1.0}, steps=1, second_order=True) == alone


def test_known_gradients_go_on_through_what_made_the_tensors() -> None:
    a, b = leaf(2.0), leaf(5.0)
    tensors = {"square": a**2, "b": b}
    value = with_gradient(torch.tensor(7.0), {"square": torch.tensor(3.0), "b": torch.tensor(-1.0)}, tensors)
    assert float(value.detach()) == 7.0
    (value / 4).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert float(a.grad) == pytest.approx(3.0 * 2 * 2.0 / 4)
    assert float(b.grad) == pytest.approx(-1.0 / 4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_and_its_heads_take_other_parameters_together(tied: bool) -> None:
    network, heads = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    if tied:
        heads.weight = network.weight

    def score(embedded: Any, batch: Any) -> Any:
        return {"click": heads(network(embedded["x"])) * batch}

    scored = Scored(network, heads, score)
    names = [name for name, _ in scored.named_parameters()]
    assert names == ["network.weight", "network.bias"] + ["heads.weight"] * (not tied) + ["heads.bias"]
    x = torch.randn(3, 2, dtype=torch.float64)
    given = {name: torch.randn_like(p) for name, p in scored.named_parameters()}
    before = {name: p.clone() for name, p in scored.named_parameters()}
    found = scored.with_parameters(given, {"x": x}, 2.0)["click"]
    hidden = x @ given["network.weight"].T + given["network.bias"]
    weight = given["network.weight" if tied else "heads.weight"]
    torch.testing.assert_close(found, 2 * (hidden @ weight.T + given["heads.bias"]))
    assert all(torch.equal(p, before[name]) for name, p in scored.named_parameters())
