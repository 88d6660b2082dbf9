"""Negative samples: the items that a label is contrasted with in training."""

from lightning_gr.negatives.hard import HardNegatives
from lightning_gr.negatives.in_batch import InBatchNegatives
from lightning_gr.negatives.mixed import MixedNegatives
from lightning_gr.negatives.offload import Offload
from lightning_gr.negatives.popularity import PopularityNegatives
from lightning_gr.negatives.sampler import NegativeSampler
from lightning_gr.negatives.uniform import UniformNegatives

__all__ = [
    "HardNegatives",
    "InBatchNegatives",
    "MixedNegatives",
    "NegativeSampler",
    "Offload",
    "PopularityNegatives",
    "UniformNegatives",
]
