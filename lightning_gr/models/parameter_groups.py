"""Groups of dense parameters with their own learning rate and weight decay, and the optimiser built on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate or a weight decay of their own.

    Args:
        pattern: shell pattern that the whole parameter name must match, ``*`` matching dots too, for example
            ``encoder.layers.0.*``.
        lr_factor: multiplies the optimiser's learning rate for these parameters.
        weight_decay: their weight decay, biases and 1-D parameters included; None keeps the optimiser's own, and none
            for biases and 1-D parameters.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
    """

    pattern: str
    lr_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            raise MisconfigurationException(f"pattern={self.pattern!r}: expected a pattern of parameter names, as '*'")
        if not 0 <= self.lr_factor < math.inf:
            raise MisconfigurationException(f"lr_factor={self.lr_factor}: expected a number of at least 0")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise MisconfigurationException(
                f"weight_decay={self.weight_decay}: expected a number of at least 0, or leave it out"
            )


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    factory: OptimizerCallable,
    groups: Sequence[ParameterGroup] = (),
    decay_all: bool = False,
) -> Optimizer:
    """The optimiser of the dense parameters, in groups; build its scheduler on what this returns.

    Biases and parameters of at most one dimension, so the affine parameters of norms too, get no weight decay. The
    first group has the optimiser's own learning rate: a strategy's sparse rate follows it. It is empty where `groups`
    change the rate of every parameter.

    Args:
        named_parameters: ``module.named_parameters()``; those that a strategy updates inside backward are left out.
        factory: makes the optimiser from a list of groups, as `OptimizerCallable` does.
        groups: parameters treated differently; the first pattern that matches a name counts.
        decay_all: whether biases and 1-D parameters get the optimiser's weight decay too.

    Raises:
        MisconfigurationException: a pattern that takes no parameter, or an optimiser without what a group sets.
    """
    dense = [(name, p) for name, p in named_parameters if not hasattr(p, "_in_backward_optimizers")]
    # (lr_factor, weight decay, None being the optimiser's own) -> parameters; the ordinary ones come first
    members: dict[tuple[float, float | None], list[Tensor]] = {(1.0, None): []}
    taken = [0] * len(groups)
    for name, parameter in dense:
        index = next((i for i, group in enumerate(groups) if fnmatchcase(name, group.pattern)), None)
        group = ParameterGroup("*") if index is None else groups[index]
        if index is not None:
            taken[index] += 1
        weight_decay = group.weight_decay
        if weight_decay is None and not decay_all and _is_exempt(name, parameter):
            weight_decay = 0.0
        members.setdefault((group.lr_factor, weight_decay), []).append(parameter)
    for group, count in zip(groups, taken, strict=True):
        if not count:
            _refuse(group, [name for name, _ in dense])
    kept = {key: parameters for key, parameters in members.items() if parameters}
    ordered = sorted(kept, key=lambda key: key[0] != 1.0)
    if not ordered or ordered[0][0] != 1.0:
        ordered.insert(0, (1.0, None))
    optimizer = factory([_group(members[key], key[1]) for key in ordered])
    _check_settings(optimizer, groups)
    for (lr_factor, _), options in zip(ordered, optimizer.param_groups, strict=True):
        if lr_factor != 1.0:
            options["lr"] = options["lr"] * lr_factor
    return optimizer


def optimizer_and_schedule(
    module: nn.Module,
    factory: OptimizerCallable,
    schedule: LRSchedulerCallable | None,
    groups: Sequence[ParameterGroup] = (),
) -> Any:
    """What ``configure_optimizers`` returns: the optimiser of `build_optimizer`, and a schedule stepped every step.

    Args:
        module: whose dense parameters are trained.
        factory: makes the optimiser.
        schedule: makes the schedule on it; None keeps the rate.
        groups: parameters treated differently.
    """
    optimizer = build_optimizer(module.named_parameters(), factory, groups=groups)
    if schedule is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


def _group(parameters: list[Tensor], weight_decay: float | None) -> dict[str, Any]:
    return {"params": parameters} | ({} if weight_decay is None else {"weight_decay": weight_decay})


def _is_exempt(name: str, parameter: Tensor) -> bool:
    # A norm by group has a row of affine parameters for each group.
    return parameter.ndim <= 1 or name.rpartition(".")[2] == "bias" or name.endswith("_norm.weight")


def _refuse(group: ParameterGroup, names: list[str]) -> None:
    hidden = [name for name in names if fnmatchcase(name, group.pattern)]
    if hidden:
        raise MisconfigurationException(
            f"pattern={group.pattern!r}: earlier patterns take all that it matches, as {hidden[0]}; move it up"
        )
    raise MisconfigurationException(
        f"pattern={group.pattern!r}: matches no dense parameter; there are {', '.join(names) or 'none'}"
    )


def _check_settings(optimizer: Optimizer, groups: Sequence[ParameterGroup]) -> None:
    kind = type(optimizer).__name__
    for group in groups:
        if group.weight_decay is not None and "weight_decay" not in optimizer.defaults:
            raise MisconfigurationException(
                f"pattern={group.pattern!r}: {kind} has no weight_decay; leave weight_decay={group.weight_decay} out"
            )
        if group.lr_factor != 1.0 and optimizer.defaults.get("lr") is None:
            raise MisconfigurationException(
                f"pattern={group.pattern!r}: {kind} has no lr to multiply; leave lr_factor={group.lr_factor} out"
            )
