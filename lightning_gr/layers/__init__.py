"""Layers of generative recommenders."""

from lightning_gr.layers.hstu import HSTUEncoder, HSTULayer
from lightning_gr.layers.multi_task import MultiTaskHeads
from lightning_gr.layers.sasrec import SASRecEncoder

__all__ = ["HSTUEncoder", "HSTULayer", "MultiTaskHeads", "SASRecEncoder"]
