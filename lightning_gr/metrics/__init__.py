"""Ranking metrics and weighted means that stay right when ranks saw different numbers of samples."""

from lightning_gr.metrics.ranking import NDCG, HitRate, MeanReciprocalRank, WeightedMean, ranks_of_targets

__all__ = ["NDCG", "HitRate", "MeanReciprocalRank", "WeightedMean", "ranks_of_targets"]
