"""Layers of generative recommenders."""

from lightning_gr.layers.fuxi import FuXiEncoder, FuXiLayer
from lightning_gr.layers.group_layer_norm import GroupLayerNorm
from lightning_gr.layers.hstu import HSTUEncoder, HSTULayer
from lightning_gr.layers.multi_task import MultiTaskHeads
from lightning_gr.layers.sasrec import SASRecEncoder

__all__ = [
    "FuXiEncoder",
    "FuXiLayer",
    "GroupLayerNorm",
    "HSTUEncoder",
    "HSTULayer",
    "MultiTaskHeads",
    "SASRecEncoder",
]
