"""WarmupSchedule against torch's own schedulers, step by step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from lightning_gr.models import WarmupSchedule

BASES = (0.4, 0.02)


def make_optimizer() -> Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in BASES])


def rates(make: Callable[[Optimizer], LRScheduler], steps: int) -> list[list[float]]:
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def after_warmup(warmup: int, rest: Callable[[Optimizer], LRScheduler]) -> Callable[[Optimizer], LRScheduler]:
    def make(optimizer: Optimizer) -> LRScheduler:
        first = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return SequentialLR(optimizer, [first, rest(optimizer)], milestones=[warmup])

    return make


@pytest.mark.parametrize("warmup", [1, 5])
def test_constant(warmup: int) -> None:
    truth = rates(after_warmup(warmup, lambda o: ConstantLR(o, factor=1.0)), 20)
    ours = rates(lambda o: WarmupSchedule(o, warmup_steps=warmup), 20)
    assert ours == [pytest.approx(x, rel=1e-9) for x in truth]


@pytest.mark.parametrize("warmup", [1, 5])
def test_cosine(warmup: int) -> None:
    # CosineAnnealingLR has one floor for all groups, so ours, a fraction, is compared where that is 0 or one group
    truth = rates(after_warmup(warmup, lambda o: CosineAnnealingLR(o, T_max=17 - warmup)), 18)
    ours = rates(lambda o: WarmupSchedule(o, warmup_steps=warmup, total_steps=17, shape="cosine"), 18)
    assert ours == [pytest.approx(x, rel=1e-9, abs=1e-12) for x in truth]
    floor = 0.1 * BASES[0]
    truth = rates(after_warmup(warmup, lambda o: CosineAnnealingLR(o, T_max=17 - warmup, eta_min=floor)), 18)
    ours = rates(lambda o: WarmupSchedule(o, warmup_steps=warmup, total_steps=17, shape="cosine", minimum=0.1), 18)
    assert [x[0] for x in ours] == pytest.approx([x[0] for x in truth], rel=1e-9)


@pytest.mark.parametrize("warmup", [1, 5])
def test_linear(warmup: int) -> None:
    def rest(optimizer: Optimizer) -> LRScheduler:
        return LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=17 - warmup)

    ours = rates(lambda o: WarmupSchedule(o, warmup_steps=warmup, total_steps=17, shape="linear", minimum=0.2), 25)
    assert ours == [pytest.approx(x, rel=1e-9) for x in rates(after_warmup(warmup, rest), 25)]
    assert ours[-1] == pytest.approx([0.2 * base for base in BASES])


def test_inverse_square_root() -> None:
    ours = rates(lambda o: WarmupSchedule(o, warmup_steps=4, shape="inverse_sqrt", minimum=0.3), 100)
    for step, found in enumerate(ours):
        factor = (step + 1) / 5 if step < 4 else max(0.3, math.sqrt(5 / (step + 1)))
        assert found == pytest.approx([base * factor for base in BASES], rel=1e-12)


def test_without_warmup_it_is_the_cosine_alone() -> None:
    truth = rates(lambda o: CosineAnnealingLR(o, T_max=9), 10)
    ours = rates(lambda o: WarmupSchedule(o, warmup_steps=0, total_steps=9, shape="cosine"), 10)
    assert ours == [pytest.approx(x, rel=1e-9, abs=1e-12) for x in truth]
    stays = rates(lambda o: WarmupSchedule(o, warmup_steps=0, total_steps=9, shape="cosine"), 15)
    assert all(x == pytest.approx([0.0, 0.0], abs=1e-12) for x in stays[9:])


def test_a_resumed_schedule_goes_on() -> None:
    def make(optimizer: Optimizer) -> WarmupSchedule:
        return WarmupSchedule(optimizer, warmup_steps=3, total_steps=12, shape="cosine")

    whole = rates(make, 12)
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make_optimizer()
    resumed = make(again)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    for expected in whole[5:]:
        assert [group["lr"] for group in again.param_groups] == pytest.approx(expected, rel=1e-12)
        again.step()
        resumed.step()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"shape": "step"}, "shape='step'"),
        ({"shape": "cosine"}, "total_steps=None"),
        ({"shape": "cosine", "total_steps": 2}, "total_steps=2: expected more than warmup_steps=2"),
        ({"total_steps": 9}, "total_steps=9: shape='constant' has no end"),
        ({"minimum": 0.1}, "minimum=0.1: shape='constant' never falls"),
        ({"shape": "inverse_sqrt", "minimum": 2.0}, "minimum=2.0"),
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException) as error:
        WarmupSchedule(make_optimizer(), **({"warmup_steps": 2} | wrong))
    assert str(error.value).startswith(said)


class Holder:
    def __init__(self, *, lr_scheduler: LRSchedulerCallable) -> None:
        self.lr_scheduler = lr_scheduler


def test_it_comes_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "holder")
    text = """
holder:
  lr_scheduler:
    class_path: lightning_gr.models.WarmupSchedule
    init_args: {warmup_steps: 3, total_steps: 9, shape: cosine}
"""
    holder = parser.instantiate_classes(parser.parse_string(text)).holder
    assert rates(holder.lr_scheduler, 9) == rates(
        lambda o: WarmupSchedule(o, warmup_steps=3, total_steps=9, shape="cosine"), 9
    )
