"""ProductCounter: the operations of all matrix products that torch runs, without a change to any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override


class ProductCounter(TorchDispatchMode):
    """Counts while it is entered, by torch's own formulas, forward and backward.

    torch's ``FlopCounterMode`` takes operators such as ``silu_backward`` apart, which changes their last bits, and so
    the training that it watches.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out
