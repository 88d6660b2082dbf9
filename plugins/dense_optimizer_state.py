"""State of dense optimisers by parameter name, as checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.checkpoint.tensors import Shapes


class DenseOptimizerState:
    """The optimisers of a module's dense parameters; rows of sharded tables have optimisers of their own.

    Args:
        module: with sharded collections, or none.
        optimizers: as Lightning holds them.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer | LightningOptimizer]) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if not hasattr(parameter, "_in_backward_optimizers")
        }
        self._optimizers = [x._optimizer if isinstance(x, LightningOptimizer) else x for x in optimizers]

    def tensors_and_groups(self) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        """State tensors by optimiser and parameter name, and the groups with parameters as names."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        states: dict[str, Any] = {}
        groups: list[list[dict[str, Any]]] = []
        for index, optimizer in enumerate(self._optimizers):
            states[str(index)] = {names[p]: dict(state) for p, state in optimizer.state.items() if p in names}
            groups.append(
                [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
            )
        return states, groups

    def empty_tensors(self, storage: Storage, shapes: Shapes) -> dict[str, Any]:
        """Tensors of the saved shapes for every optimiser state of this model's dense parameters.

        Raises:
            ValueError: the checkpoint holds the state of a parameter that the model does not have.
        """
        states: dict[str, Any] = {}
        for key, (shape, dtype) in shapes.items():
            if not key.startswith("dense_optimizer."):
                continue
            index, _, rest = key.removeprefix("dense_optimizer.").partition(".")
            name, _, entry = rest.rpartition(".")
            if name not in self._parameters:
                raise ValueError(
                    f"checkpoint {storage}: holds optimiser state of {name}, which the model does not have; use the "
                    "configuration it was trained with"
                )
            device = self._parameters[name].device if shape else torch.device("cpu")
            states.setdefault(index, {}).setdefault(name, {})[entry] = torch.empty(shape, dtype=dtype, device=device)
        return states

    def load(
        self, states: Mapping[str, Mapping[str, Mapping[str, Tensor]]], groups: list[list[dict[str, Any]]]
    ) -> None:
        """Puts saved state and groups in place of the present ones."""
        for index, (optimizer, saved_groups) in enumerate(zip(self._optimizers, groups, strict=True)):
            optimizer.state.clear()
            for name, state in states.get(str(index), {}).items():
                optimizer.state[self._parameters[name]] = dict(state)
            for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
                group.update({key: value for key, value in saved.items() if key != "params"})
