"""Dot products of queries with the rows that they name, and their own backward pass: nothing of T x K x D exists.

Shape suffixes: T tokens, K rows that a token names, U rows of the table, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.ops.backend import Backend, refuse_second_derivative
from lightning_gr.ops.sampled_softmax import cpu, reference, triton_kernel


class Kernels(Protocol):
    """What a backend provides; inputs are contiguous, results float32, or float64 if an input is."""

    def dots(self, queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
        """``out[t, k] = queries[t] . rows[indices[t, k]]``."""
        ...

    def queries_gradient(self, weights_TK: Tensor, rows_UD: Tensor, indices_TK: Tensor) -> Tensor:
        """``out[t] = sum_k weights[t, k] rows[indices[t, k]]``."""
        ...

    def rows_gradient(self, weights_TK: Tensor, queries_TD: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
        """``out[u] = sum over (t, k) with indices[t, k] = u of weights[t, k] queries[t]``."""
        ...


_KERNELS: dict[Backend, Kernels] = {"cpu": cpu, "triton": triton_kernel, "reference": reference}


def kernels_of(backend: Backend) -> Kernels:
    """The products and sums of one backend, `reference`, `cpu` or `triton`, for operators that are made of them."""
    return _KERNELS[backend]


class GatheredDots(torch.autograd.Function):
    """The dot products, by the kernels of a backend."""

    @staticmethod
    @override
    def forward(ctx: Any, queries_TD: Tensor, rows_UD: Tensor, indices_TK: Tensor, backend: Backend) -> Tensor:
        queries_TD, rows_UD, indices_TK = queries_TD.contiguous(), rows_UD.contiguous(), indices_TK.contiguous()
        ctx.save_for_backward(queries_TD, rows_UD, indices_TK)
        ctx.backend = backend
        return _KERNELS[backend].dots(queries_TD, rows_UD, indices_TK)

    @staticmethod
    @override
    def backward(ctx: Any, weights_TK: Tensor) -> Any:
        refuse_second_derivative("sampled_softmax", ctx.backend)
        queries_TD, rows_UD, indices_TK = ctx.saved_tensors
        kernels, weights_TK = _KERNELS[ctx.backend], weights_TK.contiguous()
        d_queries = d_rows = None
        if ctx.needs_input_grad[0]:
            d_queries = kernels.queries_gradient(weights_TK, rows_UD, indices_TK).to(queries_TD.dtype)
        if ctx.needs_input_grad[1]:
            d_rows = kernels.rows_gradient(weights_TK, queries_TD, indices_TK, rows_UD.shape[0]).to(rows_UD.dtype)
        return d_queries, d_rows, None, None
