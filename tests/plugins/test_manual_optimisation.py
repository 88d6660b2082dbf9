"""Manual optimisation under the strategy: refused by name, where DDP's own message names nothing of the user's."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.plugins import SequenceBalancedStrategy


class ByHand(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("automatic", [False, True])
def test_a_backward_by_hand_is_refused_with_the_modules_name(automatic: bool) -> None:
    strategy, module = SequenceBalancedStrategy(), ByHand()
    module.automatic_optimization = automatic
    strategy.connect(module)
    if automatic:
        strategy.pre_backward(torch.zeros(()))
        return
    with pytest.raises(MisconfigurationException, match=r"ByHand\.automatic_optimization=False.*strategy ddp"):
        strategy.pre_backward(torch.zeros(()))
