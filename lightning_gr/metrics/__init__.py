"""Metrics as torchmetrics classes, right over uneven ranks."""

from lightning_gr.metrics.ranking import NDCG, HitRate, MeanReciprocalRank, WeightedMean, ranks_of_targets

__all__ = ["NDCG", "HitRate", "MeanReciprocalRank", "WeightedMean", "ranks_of_targets"]
