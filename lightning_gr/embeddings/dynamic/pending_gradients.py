"""PendingGradients: the gradients of one physical table's rows between backward and the optimiser's step.

They are kept as (distinct rows, summed gradients), so that accumulated micro-batches equal one batch (MTGenRec,
arXiv 2505.12663, gradient accumulation).

Shape suffixes: U rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.gather_rows import sum_rows
from lightning_gr.embeddings.dynamic.unique_keys import unique_keys


class PendingGradients:
    """Gradients of rows, added up where a row has several.

    Args:
        dim: width of a row.
        device: of the gradients.
    """

    def __init__(self, *, dim: int, device: torch.device) -> None:
        self._dim, self._device = dim, device
        self._parts: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __bool__(self) -> bool:
        """Whether anything was added since the last `clear`."""
        return bool(self._parts)

    def add(self, rows_U: Tensor, grads_UD: Tensor, seeds_U: Tensor | None) -> None:
        """Adds gradients of one lookup.

        Args:
            rows_U: int64; -1 where there is no row, whose gradient is dropped.
            grads_UD: float32; taken over, so the caller must not change it.
            seeds_U: of stochastic rounding; None where rows are not rounded.
        """
        self._parts.append((rows_U, grads_UD, seeds_U))

    def clear(self) -> None:
        """Forgets all of them."""
        self._parts = []

    def merged(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Distinct rows, the sum of each one's gradients, and its seed."""
        if not self._parts:
            none = torch.zeros(0, dtype=torch.int64, device=self._device)
            return none, torch.zeros(0, self._dim, device=self._device), None
        rows, grads, seeds = self._parts[0]
        if len(self._parts) > 1:
            rows, grads = torch.cat([x[0] for x in self._parts]), torch.cat([x[1] for x in self._parts])
            seeds = None if seeds is None else torch.cat([x[2] for x in self._parts if x[2] is not None])
        if bool((rows < 0).any()):
            has = rows >= 0
            rows, grads, seeds = rows[has], grads[has], None if seeds is None else seeds[has]
        unique = unique_keys(rows, [0, len(rows)])
        if len(unique.ids_U) < len(rows):
            grads = sum_rows(grads, unique.inverse_N, len(unique.ids_U))
            if seeds is not None:
                # Keys that share a row have different ones, and come in an order that depends on the processes.
                least = torch.zeros_like(unique.ids_U)
                seeds = least.scatter_reduce_(0, unique.inverse_N, seeds, "amin", include_self=False)
            rows = unique.ids_U
        self._parts = [(rows, grads, seeds)]
        return rows, grads, seeds

    @property
    def rows(self) -> Tensor:
        """Rows that have gradients, which may repeat; -1 where there is none."""
        none = torch.zeros(0, dtype=torch.int64, device=self._device)
        return torch.cat([none, *(part[0] for part in self._parts)])

    def taken(self, rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `merged`, of these rows alone, which it then forgets."""
        rows, grads, seeds = self.merged()
        taken = torch.isin(rows, rows_N)
        if self._parts:
            self._parts = [(rows[~taken], grads[~taken], None if seeds is None else seeds[~taken])]
        return rows[taken], grads[taken], None if seeds is None else seeds[taken]

    def squared_norm(self) -> Tensor:
        """Sum of squares, float64."""
        return self.merged()[1].double().pow(2).sum()

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies all of them."""
        self._replace(self.merged()[1] * factor)

    def are_finite(self) -> bool:
        """Whether none is infinite or not a number."""
        return bool(self.merged()[1].isfinite().all())

    def _replace(self, grads_UD: Tensor) -> None:
        self._parts = [(rows, grads_UD, seeds) for rows, _, seeds in self._parts]
