"""Layers of generative recommenders."""

from lightning_gr.layers.hstu import HSTUEncoder, HSTULayer

__all__ = ["HSTUEncoder", "HSTULayer"]
