"""Multi-task heads: a mixture of experts with a gate for each task (MMoE, Ma et al., KDD 2018).

Shape suffixes: N inputs, D width, E experts, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override


class MultiTaskHeads(nn.Module):
    """Experts shared by all tasks, mixed for each task by a gate of its own, and a tower with one logit.

    Args:
        dim: width of the inputs.
        tasks: names of the tasks.
        num_experts: experts; 0 gives each task a tower on the input itself.
        hidden_dim: width of experts and towers.
        dropout: inside the towers.
        top_k_experts: experts that a gate mixes for an input, those it weighs most, the others get 0; None mixes all.

    Raises:
        ValueError: a size that cannot work, by name.
    """

    def __init__(
        self,
        *,
        dim: int,
        tasks: Sequence[str],
        num_experts: int = 4,
        hidden_dim: int = 64,
        dropout: float = 0.0,
        top_k_experts: int | None = None,
    ) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks={list(tasks)}: expected at least one, none of them twice")
        if dim < 1 or hidden_dim < 1 or num_experts < 0:
            raise ValueError(
                f"dim={dim}, hidden_dim={hidden_dim}, num_experts={num_experts}: expected at least 1, 1 and 0"
            )
        if top_k_experts is not None and not 1 <= top_k_experts <= num_experts:
            raise ValueError(
                f"top_k_experts={top_k_experts}: expected 1 ... num_experts={num_experts}, or leave it out"
            )
        self.tasks, self.top_k_experts = tuple(tasks), top_k_experts
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU())
            for _ in range(num_experts)
        )
        width = hidden_dim if num_experts else dim
        self.gates = nn.ModuleList(nn.Linear(dim, num_experts) for _ in tasks) if num_experts else None
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden_dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, 1))
            for _ in tasks
        )

    @override
    def forward(self, x_ND: Tensor) -> dict[str, Tensor]:
        """Logit (N,) of each input by task."""
        if self.gates is None:
            return {task: tower(x_ND)[:, 0] for task, tower in zip(self.tasks, self.towers, strict=True)}
        experts_NEH = torch.stack([expert(x_ND) for expert in self.experts], 1)
        logits = {}
        for task, gate, tower in zip(self.tasks, self.gates, self.towers, strict=True):
            shares_NE = self._mixed(gate(x_ND)).softmax(1)
            logits[task] = tower((shares_NE[:, :, None] * experts_NEH).sum(1))[:, 0]
        return logits

    def _mixed(self, gates_NE: Tensor) -> Tensor:
        """Gates before their softmax, -inf where an expert is not mixed."""
        if self.top_k_experts is None:
            return gates_NE
        chosen_NK = gates_NE.topk(self.top_k_experts, 1).indices
        return torch.full_like(gates_NE, -torch.inf).scatter(1, chosen_NK, gates_NE.gather(1, chosen_NK))

    def flops(self, num_inputs: int) -> int:
        """Forward floating-point operations of the matrix products."""
        return linear_flops(self, num_inputs)


def linear_flops(module: nn.Module, num_inputs: int) -> int:
    """Forward floating-point operations of a module that gives every input to all its linear layers."""
    return 2 * num_inputs * sum(x.weight.numel() for x in module.modules() if isinstance(x, nn.Linear))
