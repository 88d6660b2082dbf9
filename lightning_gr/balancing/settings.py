"""Settings of balancing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.partition import Method, check_method

Mode = Literal["auto", "planned", "local", "exchange"]


@dataclass
class Balancing:
    """How sequences are dealt out so that every rank has as much to compute.

    Args:
        mode: `planned` deals out global batches of a store, whose lengths are known, without a message; `local` cuts
            each rank's own stream by tokens (MTGenRec, arXiv 2505.12663); `exchange` deals out the ranks' batches anew
            and sends samples (TurboGR, arXiv 2605.13433); `auto` is planned where the loader has a plan, and leaves
            other loaders alone.
        partitioner: rule by which samples are dealt out: `lpt` the costliest first to the rank with least,
            `karmarkar_karp` by differences, `zigzag` with equal counts, `contiguous` as they come, not balanced.
        cost: `model` asks the module for the FLOPs of a sequence, `tokens` counts tokens; or the two coefficients.
        tokens_per_rank: most tokens that a rank computes at once, or None for no limit. Planned mode cuts a larger
            global batch into micro-steps and accumulates their gradients; the other modes cut batches by it.

    Raises:
        ValueError: a value is not one of these, by name.
    """

    mode: Mode = "auto"
    partitioner: Method = "lpt"
    cost: Literal["model", "tokens"] | SequenceCost = "model"
    tokens_per_rank: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}: expected one of {', '.join(get_args(Mode))}")
        check_method(self.partitioner, name="partitioner")
        if not isinstance(self.cost, SequenceCost) and self.cost not in ("model", "tokens"):
            raise ValueError(f"cost={self.cost!r}: expected model, tokens or a SequenceCost (linear and quadratic)")
        if self.tokens_per_rank is not None and self.tokens_per_rank < 1:
            raise ValueError(f"tokens_per_rank={self.tokens_per_rank}: expected at least 1, or null for no limit")
