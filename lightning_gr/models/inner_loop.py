"""The inner loop of meta learning: steps of gradient descent on a task's support, on copies.

MAML (Finn et al., arXiv 1703.03400), equation 1, and its first-order form (section 5.2); step sizes that are learned as
in Meta-SGD (Li et al., arXiv 1707.09835), one for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

Values = Mapping[str, Tensor]


def inner_sgd(
    loss: Callable[[dict[str, Tensor]], Tensor],
    values: Values,
    step_sizes: Mapping[str, float | Tensor],
    *,
    steps: int,
    second_order: bool,
) -> dict[str, Tensor]:
    """Values after some steps of gradient descent; those that are given stay as they are.

    Args:
        loss: of the support, given values by name.
        values: by name, what the loss takes; those that require no gradient stay.
        step_sizes: by name, of the values that are adapted; the others are passed on.
        steps: how many.
        second_order: whether the result's gradient counts how the steps' own gradients depend on the values. Without
            it the steps are constants.

    Returns:
        By name, a value for each of `values`; differentiable with respect to them and to `step_sizes`.
    """
    adapted = dict(values)
    names = [name for name in step_sizes if values[name].requires_grad]
    for _ in range(steps if names else 0):
        gradients = torch.autograd.grad(
            loss(adapted), [adapted[name] for name in names], create_graph=second_order, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                adapted[name] = adapted[name] - step_sizes[name] * gradient
    return adapted


class _GivenGradient(torch.autograd.Function):
    """A number whose gradient was computed beforehand."""

    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    @override
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (factor,) = outputs
        return None, None, *(gradient * factor.to(gradient.dtype) for gradient in ctx.gradients)


def with_gradient(value: Tensor, gradients: Mapping[str, Tensor], tensors: Values) -> Tensor:
    """`value`, differentiable with respect to `tensors` with gradients that are known already.

    So the graph of one task can go before the next task's is made, and backward, with all that is exchanged in it,
    runs once.

    Args:
        value: a 0-D tensor.
        gradients: by name, of `value`; one for each of the tensors.
        tensors: by name.
    """
    names = list(tensors)
    result: Tensor = _GivenGradient.apply(value, tuple(gradients[name] for name in names), *tensors.values())
    return result


class Scored(nn.Module):
    """A network and its heads as one module, so that both can be given other parameters.

    Args:
        network: of the model; its parameters are named ``network.*``.
        heads: of the model; theirs are ``heads.*``.
        score: logits from embeddings and a batch, by these two.
    """

    def __init__(self, network: nn.Module, heads: nn.Module, score: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.network, self.heads, self._score = network, heads, score
        # Looking for parameters of two names takes a tenth of a step, so it is done where there are some.
        self._tied = sum(1 for _ in self.named_parameters(remove_duplicate=False)) > sum(1 for _ in self.parameters())

    def with_parameters(self, values: Values, embedded: Values, batch: Any) -> dict[str, Tensor]:
        """Logits with other parameters, by name; those without a value are the module's own."""
        logits: dict[str, Tensor] = torch.func.functional_call(
            self, dict(values), (embedded, batch), tie_weights=self._tied
        )
        return logits

    @override
    def forward(self, embedded: Values, batch: Any) -> dict[str, Tensor]:
        return self._score(embedded, batch)
