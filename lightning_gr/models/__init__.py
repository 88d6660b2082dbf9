"""LightningModules of generative recommenders; none knows anything of distribution."""

from lightning_gr.models.retrieval import RetrievalModule

__all__ = ["RetrievalModule"]
