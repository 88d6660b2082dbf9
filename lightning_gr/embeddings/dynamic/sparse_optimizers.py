"""Optimisers of embedding rows: one step on the rows that have a gradient, all others stay as they are.

Mathematics is in float32, whatever the precision of the rows.

Shape suffixes: N rows, D width, S width of the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.chunked_rows import ChunkedRows, run_native
from lightning_gr.embeddings.dynamic.row_storage import RowStorage
from lightning_gr.embeddings.dynamic.stochastic_rounding import CODES

SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "adam", "sgd", "momentum"]


@dataclass(frozen=True)
class SparseOptimizerConfig:
    """An optimiser of rows; g is a row's gradient, summed over all its occurrences in the step.

    Args:
        name: `rowwise_adagrad`: ``sum += mean(g²)``, ``row -= lr g / (√sum + eps)``, one number of state a row, as
            FBGEMM's exact one; `adagrad`: the same by element; `adam`: with bias correction by the row's own number of
            steps; `sgd`: ``row -= lr g``; `momentum`: ``buffer = momentum buffer + g``, ``row -= lr buffer``.
        lr: learning rate; None takes the strategy's.
        eps: of `rowwise_adagrad`, `adagrad` and `adam`.
        betas: of `adam`.
        momentum: of `momentum`.
        weight_decay: decoupled: ``row *= 1 - lr weight_decay`` in every step that updates the row.

    Raises:
        ValueError: an unknown optimiser, or a number that cannot work, by name.
    """

    name: SparseOptimizer = "rowwise_adagrad"
    lr: float | None = None
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(SparseOptimizer):
            raise ValueError(f"name={self.name!r}: expected one of {', '.join(get_args(SparseOptimizer))}")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a number of at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: expected two numbers from 0 to below 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: expected a number from 0 to below 1")

    def state_width(self, dim: int) -> int:
        """Float32 numbers of state that a row of `dim` values has; Adam's last is the row's number of steps."""
        return {"rowwise_adagrad": 1, "adagrad": dim, "adam": 2 * dim + 1, "sgd": 0, "momentum": dim}[self.name]


def update_rows(
    storage: RowStorage,
    rows_N: Tensor,
    grads_ND: Tensor,
    config: SparseOptimizerConfig,
    *,
    lr: float,
    step: int,
    seeds_N: Tensor | None = None,
) -> None:
    """One step of an optimiser.

    Args:
        storage: its state width is that of the optimiser.
        rows_N: int64, distinct; -1 is passed over, and may repeat.
        grads_ND: gradients.
        config: the optimiser; `lr` below takes the place of its own.
        lr: learning rate.
        step: for the draws of stochastic rounding.
        seeds_N: int64, one a row; with them 16-bit rows are rounded stochastically, else to the nearest.
    """
    assert grads_ND.shape == (len(rows_N), storage.dim), (grads_ND.shape, len(rows_N), storage.dim)
    assert storage.state_width == config.state_width(storage.dim), storage.state_width
    grads_ND = grads_ND.float()
    if _update_in_place(storage, rows_N, grads_ND, config, lr, step, seeds_N):
        return
    present_N = (rows_N >= 0).nonzero()[:, 0]
    rows_N, grads_ND = rows_N[present_N], grads_ND[present_N]
    values_ND, state_NS = storage.read(rows_N), storage.read_state(rows_N)
    values_ND *= 1 - lr * config.weight_decay
    values_ND -= _moves(grads_ND, state_NS, config, lr)
    storage.write(rows_N, values_ND, seeds_N=None if seeds_N is None else seeds_N[present_N], step=step)
    storage.write_state(rows_N, state_NS)


def _moves(grads_ND: Tensor, state_NS: Tensor, config: SparseOptimizerConfig, lr: float) -> Tensor:
    """What is taken from the rows; the state is changed in place."""
    D = grads_ND.shape[1]
    match config.name:
        case "rowwise_adagrad" | "adagrad":
            squares_ND = grads_ND.square()
            state_NS += squares_ND.mean(1, keepdim=True) if config.name == "rowwise_adagrad" else squares_ND
            moves_ND = lr * grads_ND / (state_NS.sqrt() + config.eps)
            # Without a gradient nothing moves, even where eps is 0.
            return torch.where(grads_ND == 0, 0.0, moves_ND)
        case "adam":
            (beta1, beta2), (m_ND, v_ND, steps_N1) = config.betas, state_NS.split([D, D, 1], dim=1)
            steps_N1 += 1
            m_ND.mul_(beta1).add_(grads_ND, alpha=1 - beta1)
            v_ND.mul_(beta2).addcmul_(grads_ND, grads_ND, value=1 - beta2)
            rate_N1 = (lr / (1 - beta1 ** steps_N1.double())).float()
            correction_N1 = (1 / (1 - beta2 ** steps_N1.double())).float()
            moves_ND = rate_N1 * m_ND / ((v_ND * correction_N1).sqrt() + config.eps)
            return torch.where(m_ND == 0, 0.0, moves_ND)
        case "momentum":
            state_NS.mul_(config.momentum).add_(grads_ND)
            return lr * state_NS
        case "sgd":
            return lr * grads_ND
    raise AssertionError(config.name)


def _update_in_place(
    storage: RowStorage,
    rows_N: Tensor,
    grads_ND: Tensor,
    config: SparseOptimizerConfig,
    lr: float,
    step: int,
    seeds_N: Tensor | None,
) -> bool:
    """The same where the rows lie, in one sweep; False where there is a cache, no host memory or no compiler."""
    state = storage.state
    if storage.device.type != "cpu" or not isinstance(state, ChunkedRows):
        return False
    rows_N, grads_ND = rows_N.contiguous(), grads_ND.contiguous()
    N, D = grads_ND.shape
    settings = (lr, config.eps, *config.betas, config.momentum, config.weight_decay)
    for values, own_N in storage.places(rows_N):
        assert isinstance(values, ChunkedRows)
        values.before_change(own_N)
        state.before_change(rows_N)
        done = run_native(
            "update",
            *(values.pointers, values.size, state.pointers, state.size, state.shift, own_N, rows_N, grads_ND),
            *(N, D, storage.state_width, CODES[values.dtype], get_args(SparseOptimizer).index(config.name)),
            *(float(x) for x in settings),
            *(None if seeds_N is None else seeds_N.contiguous(), step),
        )
        if not done:
            return False
    return True
