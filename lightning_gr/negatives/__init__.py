"""Samplers of negatives that do not depend on the number of ranks."""

from lightning_gr.negatives.uniform import UniformNegatives

__all__ = ["UniformNegatives"]
