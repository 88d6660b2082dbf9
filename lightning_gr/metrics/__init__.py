"""Metrics of rankings and of clicks, and weighted means, all right when ranks saw different numbers of samples."""

from lightning_gr.metrics.classification import AUC, Calibration, GroupedAUC, NormalizedEntropy
from lightning_gr.metrics.ranking import NDCG, HitRate, MeanReciprocalRank, WeightedMean, ranks_of_targets

__all__ = [
    "AUC",
    "NDCG",
    "Calibration",
    "GroupedAUC",
    "HitRate",
    "MeanReciprocalRank",
    "NormalizedEntropy",
    "WeightedMean",
    "ranks_of_targets",
]
