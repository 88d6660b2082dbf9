"""Negative samples: the items that a label is contrasted with in training."""

from lightning_gr.negatives.uniform import UniformNegatives

__all__ = ["UniformNegatives"]
