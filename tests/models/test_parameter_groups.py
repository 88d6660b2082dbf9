"""Parameter groups: who decays, whose rate differs, and updates equal to optimisers built by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.models import ParameterGroup, build_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.positions = nn.Parameter(torch.randn(5))
        self.last = nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(6, 2))
        self.table._in_backward_optimizers = []  # type: ignore[attr-defined]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.3)


def settings(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter, by name."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    found = [(names[p], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_biases_norms_and_vectors_do_not_decay() -> None:
    net = Net()
    optimizer = build_optimizer(net.named_parameters(), adamw)
    assert settings(net, optimizer) == {
        "first.weight": (0.1, 0.3),
        "last.weight": (0.1, 0.3),
        "first.bias": (0.1, 0.0),
        "last.bias": (0.1, 0.0),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "positions": (0.1, 0.0),
    }
    everything = settings(net, build_optimizer(net.named_parameters(), adamw, decay_all=True))
    assert set(everything.values()) == {(0.1, 0.3)}
    assert "table" not in everything


def test_named_groups() -> None:
    net = Net()
    groups = [ParameterGroup("last.bias", weight_decay=0.5), ParameterGroup("last.*", 2.0), ParameterGroup("f*", 0.5)]
    optimizer = build_optimizer(net.named_parameters(), adamw, groups)
    assert settings(net, optimizer) == {
        "first.weight": (0.05, 0.3),
        "first.bias": (0.05, 0.0),
        "last.weight": (0.2, 0.3),
        "last.bias": (0.1, 0.5),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "positions": (0.1, 0.0),
    }
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_first_group_has_the_whole_rate_even_if_nothing_else_has() -> None:
    net = Net()
    optimizer = build_optimizer(net.named_parameters(), adamw, [ParameterGroup("*", 0.1)])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["params"] == []
    assert [lr for lr, _ in settings(net, optimizer).values()] == pytest.approx([0.01] * 7)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005, 0.005])


def test_steps_equal_those_of_separate_optimisers() -> None:
    ours, truth = Net(), Net()
    optimizer = build_optimizer(ours.named_parameters(), adamw, [ParameterGroup("last.*", 3.0, weight_decay=0.0)])
    decays = torch.optim.AdamW([truth.first.weight], lr=0.1, weight_decay=0.3)
    exempt = [truth.first.bias, truth.norm.weight, truth.norm.bias, truth.positions]
    rest = torch.optim.AdamW(exempt, lr=0.1, weight_decay=0.0)
    fast = torch.optim.AdamW(truth.last.parameters(), lr=0.3, weight_decay=0.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(x, 2, 0.5) for x in (optimizer, decays, rest, fast)]
    for step in range(5):
        x = torch.full((2, 3), float(step + 1))
        for net, optimizers in ((ours, [optimizer]), (truth, [decays, rest, fast])):
            net.zero_grad()
            (net.last(net.norm(net.first(x))) ** 2).sum().backward()
            for each in optimizers:
                each.step()
        for scheduler in schedulers:
            scheduler.step()
    for (name, mine), (_, other) in zip(ours.named_parameters(), truth.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([ParameterGroup("encoder.*")], "pattern='encoder.*': matches no dense parameter; there are positions, first."),
        ([ParameterGroup("table")], "pattern='table': matches no dense parameter"),
        ([ParameterGroup("l*"), ParameterGroup("last.*")], "pattern='last.*': earlier patterns take all"),
    ],
)
def test_a_pattern_without_parameters_is_named(groups: list[ParameterGroup], said: str) -> None:
    with pytest.raises(MisconfigurationException) as error:
        build_optimizer(Net().named_parameters(), adamw, groups)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_settings_that_cannot_work() -> None:
    with pytest.raises(MisconfigurationException, match="pattern=''"):
        ParameterGroup("")
    with pytest.raises(MisconfigurationException, match="lr_factor=-1"):
        ParameterGroup("*", lr_factor=-1)
    with pytest.raises(MisconfigurationException, match="weight_decay=inf"):
        ParameterGroup("*", weight_decay=float("inf"))
    with pytest.raises(MisconfigurationException, match="Rprop has no weight_decay"):
        build_optimizer(Net().named_parameters(), torch.optim.Rprop, [ParameterGroup("*", weight_decay=0.1)])


class Holder:
    def __init__(self, *, optimizer: OptimizerCallable, groups: list[ParameterGroup] | None = None) -> None:
        self.optimizer, self.groups = optimizer, groups or []


def test_groups_and_optimiser_come_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "holder")
    text = """
holder:
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1, weight_decay: 0.3}}
  groups:
    - {pattern: "last.*", lr_factor: 0.5}
    - {pattern: positions, weight_decay: 0.2}
"""
    holder = parser.instantiate_classes(parser.parse_string(text)).holder
    net = Net()
    found = settings(net, build_optimizer(net.named_parameters(), holder.optimizer, holder.groups))
    assert found["last.weight"] == (0.05, 0.3)
    assert found["positions"] == (0.1, 0.2)
    assert found["first.weight"] == (0.1, 0.3)
