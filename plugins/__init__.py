"""What is passed to a Lightning Trainer; importing this package registers the strategy ``sequence_balanced``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_gr.plugins.strategy import SequenceBalancedStrategy

if SequenceBalancedStrategy.strategy_name not in StrategyRegistry:
    SequenceBalancedStrategy.register_strategies(StrategyRegistry)

__all__ = ["SequenceBalancedStrategy"]
