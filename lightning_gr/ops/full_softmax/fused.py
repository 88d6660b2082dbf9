"""Softmax over items with its own backward pass, which computes logits again, or scales what forward took.

Shape suffixes: T tokens, C items, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import Backend, refuse_second_derivative
from lightning_gr.ops.full_softmax import cpu, triton_kernel
from lightning_gr.ops.full_softmax.logits import Logits


class Kernels(Protocol):
    """What a backend provides; inputs are contiguous, results float32, or float64 if the inputs are."""

    def forward(self, of: Logits, early: tuple[bool, bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The log-sum-exp of each token, and what `backward` wants kept.

        Args:
            of: the logits.
            early: for which of queries and items the gradient may be taken now, as that of the results' sum.
        """
        ...

    def backward(
        self,
        of: Logits,
        kept: tuple[Tensor | None, ...],
        targets_T: Tensor | None,
        total_T: Tensor,
        gradient_T: Tensor,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of queries and items, at least those wanted, from the log-sum-exp and the gradient of the loss."""
        ...


_KERNELS: dict[Backend, Kernels] = {"cpu": cpu, "triton": triton_kernel}


class FullSoftmax(torch.autograd.Function):
    """The log-sum-exp less the target's logit, if there is one; takes the fields of `Logits`.

    `early`: whether the gradient of the result will probably be equal for all tokens, so that forward may take it.
    """

    @staticmethod
    @override
    def forward(ctx: Any, backend: Backend, early: bool, targets_T: Tensor | None, *fields: Any) -> Tensor:
        inputs: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in fields]
        of = Logits(*inputs)
        targets_T = None if targets_T is None else targets_T.contiguous()
        wanted = ctx.needs_input_grad[3:5]
        total_T, kept = _KERNELS[backend].forward(of, (early and wanted[0], early and wanted[1]))
        tensors = (of.queries_TD, of.items_CD, of.log_weights_C, of.ids_C, of.excluded_T, targets_T, total_T)
        ctx.save_for_backward(*tensors, *kept)
        ctx.scale, ctx.backend = of.scale, backend
        if targets_T is None:
            return total_T
        targets_TD = of.items_CD[targets_T].to(total_T.dtype)
        return total_T - of.scale * (of.queries_TD * targets_TD).sum(1)

    @staticmethod
    @override
    def backward(ctx: Any, gradient_T: Tensor) -> Any:
        refuse_second_derivative("full_softmax", ctx.backend)
        queries_TD, items_CD, weights_C, ids_C, excluded_T, targets_T, total_T, *kept = ctx.saved_tensors
        # A token for which no item counts: exp(-inf - 0) = 0 instead of NaN.
        total_T = total_T.masked_fill(total_T == -torch.inf, 0.0)
        of = Logits(queries_TD, items_CD, ctx.scale, weights_C, ids_C, excluded_T)
        wanted = ctx.needs_input_grad[3:5]
        gradients = _KERNELS[ctx.backend].backward(of, tuple(kept), targets_T, total_T, gradient_T.contiguous(), wanted)
        inputs = (queries_TD, items_CD)
        found = [None if x is None else x.to(y.dtype) for x, y in zip(gradients, inputs, strict=True)]
        return None, None, None, *found, *(None,) * 4
