"""The layout of a jagged tensor: lengths known on the host, offsets on the device.

Shape suffixes: B sequences, T tokens of all sequences together, L longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class JaggedLayout:
    """Where each sequence lies in a jagged tensor of ``T`` tokens.

    Lengths stay on the host, so that sizes, masks and FLOPs never read back from the device.

    Args:
        lengths_B: tokens of each sequence, int64, on the CPU.
        offsets_B1: ``B + 1`` starts and the total, int64, on the compute device.
    """

    lengths_B: Tensor
    offsets_B1: Tensor

    def __post_init__(self) -> None:
        if self.lengths_B.device.type != "cpu" or self.lengths_B.dtype != torch.int64 or self.lengths_B.dim() != 1:
            raise ValueError(
                "JaggedLayout.lengths_B: expected a 1-D int64 tensor on the CPU, got "
                f"{self.lengths_B.dim()}-D {self.lengths_B.dtype} on {self.lengths_B.device}"
            )
        if self.offsets_B1.shape != (self.lengths_B.numel() + 1,):
            raise ValueError(
                f"JaggedLayout.offsets_B1: expected {self.lengths_B.numel() + 1} offsets for "
                f"{self.lengths_B.numel()} lengths, got shape {tuple(self.offsets_B1.shape)}"
            )

    @classmethod
    def from_lengths(cls, lengths_B: Tensor, device: torch.device | str = "cpu") -> JaggedLayout:
        """Builds the layout from host lengths; the offsets are copied to `device` without waiting.

        Raises:
            ValueError: a length is negative, or the lengths are not a 1-D CPU tensor.
        """
        lengths_B = torch.as_tensor(lengths_B, dtype=torch.int64)
        if lengths_B.device.type != "cpu":
            raise ValueError(f"lengths_B: expected host lengths, got a tensor on {lengths_B.device}")
        if lengths_B.numel() and int(lengths_B.min()) < 0:
            raise ValueError(f"lengths_B: expected lengths >= 0, got {int(lengths_B.min())}")
        offsets_B1 = torch.zeros(lengths_B.numel() + 1, dtype=torch.int64)
        offsets_B1[1:] = lengths_B.flatten().cumsum(0)
        return cls(lengths_B, offsets_B1.to(device, non_blocking=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> JaggedLayout:
        """The same layout with its offsets on `device`."""
        return JaggedLayout(self.lengths_B, self.offsets_B1.to(device, non_blocking=non_blocking))

    def on_host(self) -> JaggedLayout:
        """The same layout with its offsets on the CPU, made from the host lengths: nothing is read back."""
        return JaggedLayout.from_lengths(self.lengths_B)

    def check_values(self, name: str = "layout") -> None:
        """Checks the offsets, which may live on a device; for debugging, since it reads them back.

        Args:
            name: what the message calls the layout.

        Raises:
            ValueError: the offsets are not the running sums of the lengths.
        """
        for i, (found, wanted) in enumerate(
            zip(self.offsets_B1.tolist(), self.on_host().offsets_B1.tolist(), strict=True)
        ):
            if found != wanted:
                raise ValueError(f"{name}.offsets_B1[{i}]={found}: expected {wanted}, the sum of the lengths before it")

    def pin_memory(self) -> JaggedLayout:
        """The same layout with its offsets in page-locked host memory."""
        return JaggedLayout(self.lengths_B, self.offsets_B1.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses the offsets."""
        self.offsets_B1.record_stream(stream)

    @cached_property
    def num_sequences(self) -> int:
        """``B``."""
        return self.lengths_B.numel()

    @cached_property
    def num_tokens(self) -> int:
        """``T``, the sum of the lengths."""
        return int(self.lengths_B.sum())

    @cached_property
    def max_length(self) -> int:
        """``L``, the longest sequence; 0 when there is none."""
        return int(self.lengths_B.max()) if self.lengths_B.numel() else 0

    @cached_property
    def sequence_T(self) -> Tensor:
        """The sequence each token belongs to, int64 on the compute device."""
        lengths_B = self.lengths_B.to(self.offsets_B1.device, non_blocking=True)
        return torch.repeat_interleave(lengths_B, output_size=self.num_tokens)

    @cached_property
    def position_T(self) -> Tensor:
        """Each token's place in its own sequence from 0, int64 on the compute device."""
        return torch.arange(self.num_tokens, device=self.offsets_B1.device) - self.offsets_B1[self.sequence_T]
