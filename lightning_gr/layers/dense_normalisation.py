"""DenseNormalisation: columns of numbers, normalised by statistics that a checkpoint carries.

Shape suffixes: R rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override


class DenseNormalisation(nn.Module):
    """Subtracts a mean and divides by a standard deviation, of some columns after a logarithm.

    The statistics are buffers: other data is normalised by those of the training data.

    Args:
        means: of each column.
        stds: of each column, above 0.
        logs: whether ``sign(x) log(1 + |x|)`` is taken of the column first.

    Raises:
        ValueError: numbers of columns differ, or a standard deviation is not above 0.
    """

    def __init__(self, *, means: Sequence[float], stds: Sequence[float], logs: Sequence[bool]) -> None:
        super().__init__()
        if not len(means) == len(stds) == len(logs):
            raise ValueError(f"means, stds, logs: expected as many of each, got {len(means)}, {len(stds)}, {len(logs)}")
        if wrong := [x for x in stds if not x > 0]:
            raise ValueError(f"stds: expected numbers above 0, got {wrong[0]}")
        self.mean_W: Tensor
        self.std_W: Tensor
        self.log_W: Tensor
        self.register_buffer("mean_W", torch.tensor(means, dtype=torch.get_default_dtype()))
        self.register_buffer("std_W", torch.tensor(stds, dtype=torch.get_default_dtype()))
        self.register_buffer("log_W", torch.tensor(logs, dtype=torch.bool))

    @override
    def forward(self, x_RW: Tensor) -> Tensor:
        """(R, W); a NaN becomes 0, which is the mean."""
        x_RW = x_RW.to(self.mean_W.dtype)
        x_RW = torch.where(self.log_W, x_RW.sign() * x_RW.abs().log1p(), x_RW)
        scaled_RW = (x_RW - self.mean_W) / self.std_W
        return scaled_RW.masked_fill(scaled_RW.isnan(), 0.0)
